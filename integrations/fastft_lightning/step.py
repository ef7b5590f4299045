"""One training step: which packed rows belong to it, what the model is given, and whether its loss was the model's.

The user's ``training_step`` gets the padded batch. Where it calls the model with that batch's own tensors, labels
included, the model is given the packed row instead, and the logits come back in the padded shape. A loss that the model
computes from its labels is a sum over tokens, so packing cannot change it; any other loss might be changed, and a step
that returns one is computed again from the padded batch before anything has learned from it.

A batch that came without a row (a tuple, a nested one, one that a hook has changed, one made before the run) is packed
when the model is called with its tensors. That call shows which is which, so later ones are packed before their move.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastft_lightning import again
from fastft_lightning.batches import MODEL_INPUTS, Twin, at, make_twin, place_of, take_twins
from fastft_lightning.before import Before
from fastft_lightning.own_loss import ModelLosses
from fastft_lightning.traps import is_checkpointing
from fastft_plugins.errors import Declined
from fastft_plugins.packing import METADATA_KEY
from fastft_plugins.packing.collator import PACKED_KEYS
from fastft_plugins.packing.counting import count_unpacked
from fastft_plugins.packing.metadata import NotPacked
from fastft_plugins.run import Run

_PASSED_ON = ("num_items_in_batch", "return_dict")
_HARMLESS = (*MODEL_INPUTS, *PACKED_KEYS, *_PASSED_ON, "use_cache")  # use_cache: packed attention switches it off
_LEAK = "stock attention would mix the documents of a row here, since use_cache is on; packed attention does not"


class Step:
    """The state between the arrival of a batch and the end of its ``training_step``."""

    def __init__(self, run: Run, causal_lm: nn.Module, pack: Callable[[Any], Any]) -> None:
        self.run = run
        self.causal_lm: Any = causal_lm
        self._pack = pack
        self._arrived: Any = None  # the batch on its device
        self._places: list[dict[str, tuple[Any, ...]]] = []  # of the model's inputs, in batches that have no twin
        self.is_off = False
        self._twins: list[Twin] = []
        self._refusal: str | None = None  # why this step's own code kept a row that was there from the model
        self._has_packed = False
        self._inside = False
        self._was_packed = False
        self._losses = ModelLosses()
        self._is_leak_known = False
        self._signature = inspect.signature(causal_lm.forward)

    def move(self, batch: Any, to_device: Callable[[Any], Any], is_training: bool) -> Any:
        """Take the twins out of a batch and let them follow it to its device."""
        batch, found = take_twins(batch)
        same = {path: twin for path, twin in found.items() if twin.matches(at(batch, path))}
        is_served = is_training and not self.is_off
        others = self._pack_others(batch, same) if is_served else []
        moved = to_device(batch)
        self._twins = []
        if is_served:
            self._arrived = moved
            self._twins = [twin.follow(at(moved, path)) for path, twin in same.items()]
            self._twins += [twin.follow(_named(moved, places)) for places, twin in others]
        return moved

    def training_step(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the user's step by ``original``, the strategy's; again on the padded batch if its loss is another."""
        if self.is_off:
            return original(*args, **kwargs)
        return again.watched(self.run.model, self._watch, partial(original, *args, **kwargs))

    def _watch(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        trainer = self.run.target.trainer
        self._inside, self._was_packed, self._refusal, self._losses = True, False, None, ModelLosses()
        before, issued = Before(trainer), again.collectives()
        try:
            output = own(*args, **kwargs)
        finally:
            self._inside = False  # the twins stay: an optimizer may ask for the same step several times
            losses, self._losses = self._losses, ModelLosses()  # holds on to no graph
        self._has_packed |= self._was_packed
        if self._refusal is not None and not self._has_packed:
            self._switch_off(self._refusal)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        reason = losses.why_not(loss) if self._was_packed and isinstance(loss, Tensor) else None
        if reason is None:
            return output
        self._switch_off(reason)
        again.agree(trainer, has_collectives=again.collectives() != issued)
        before.restore()
        return own(*args, **kwargs)

    def give_row(self, causal_lm: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the model: replace the batch's tensors by the packed row."""
        if not self._inside or self.is_off or not torch.is_grad_enabled():
            return None
        given = self._named(args, kwargs)
        twin = next((twin for twin in self._twins if twin.inputs.get("input_ids") is given.get("input_ids")), None)
        if twin is None:
            twin = self._pack_at_call(given)
        reason = self._why_not(twin, given)
        if reason is not None:
            is_refusal = twin is None or twin.metadata is not None
            count_unpacked(self.run, reason, twin, complain=self._has_packed or not is_refusal)
            if is_refusal:
                self._refusal = reason
            return None
        assert twin is not None and twin.metadata is not None and isinstance(twin.row, dict)
        if twin.came_packed and len(twin.metadata.lengths) > 1 and not self._is_leak_known:
            self._is_leak_known = True
            if given.get("use_cache", self.causal_lm.config.use_cache) and not is_checkpointing(self.causal_lm):
                self.run.report.notes.append(_LEAK)
        return (), twin.row | {name: given[name] for name in _PASSED_ON if name in given}

    def take_output(self, causal_lm: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook of the model: remember the loss, and give the logits the shape of the padded batch."""
        if not self._inside:
            return None
        loss, metadata = getattr(output, "loss", None), kwargs.get(METADATA_KEY)
        if loss is not None:
            self._losses.add(loss)
        twin = next((twin for twin in self._twins if metadata is not None and twin.metadata is metadata), None)
        if twin is None:
            return None
        self._was_packed = True
        assert twin.index_T is not None
        output["logits"] = self._losses.padded(output.logits, twin.index_T, twin.inputs["input_ids"].shape)
        return output

    def _pack_others(self, batch: Any, same: Mapping[Any, Twin]) -> list[tuple[dict[str, tuple[Any, ...]], Twin]]:
        """Pack what earlier batches have shown to be the model's, in a batch still on the host."""
        known = [at(batch, (*path, "input_ids")) for path in same]
        others = []
        for places in self._places:
            inputs = _named(batch, places)
            if all(isinstance(value, Tensor) for value in inputs.values()) and not any(
                ids is inputs["input_ids"] for ids in known
            ):
                others.append((places, make_twin(inputs, self._pack)))
        return others

    def _pack_at_call(self, given: Mapping[str, Any]) -> Twin | None:
        """Pack tensors of the batch that it had no twin for; waits for the device, but only in a run's first step."""
        inputs = {name: given[name] for name in MODEL_INPUTS if isinstance(given.get(name), Tensor)}
        found = {name: place_of(tensor, self._arrived) for name, tensor in inputs.items()}
        places = {name: place for name, place in found.items() if place is not None}
        if len(places) < len(found) or not {"input_ids", "labels"} <= places.keys():
            return None
        twin = make_twin(inputs, self._pack).follow(inputs)
        self._twins.append(twin)
        if places not in self._places:
            self._places.append(places)
        return twin

    def _named(self, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        return {name: value for name, value in given.items() if value is not None}

    def _switch_off(self, reason: str) -> None:
        """Train stock from here on; raises `FastFTError` where packing must be on."""
        self.is_off = True
        self.run.switch_off("packing", Declined(reason))

    def _why_not(self, twin: Twin | None, given: Mapping[str, Any]) -> str | None:
        if twin is None and "labels" in given:
            return "training_step calls the model with other tensors than the batch's"
        if twin is not None and isinstance(twin.row, NotPacked):
            return twin.row.reason
        if twin is None or "labels" not in given:
            return "training_step passes no labels to the model: a loss of its own may not be a sum over tokens"
        changed = twin.changed_input(given)
        if changed is not None:
            return f"training_step does not pass the batch's {changed} on as it came"
        for name, value in given.items():
            if name not in _HARMLESS and value is not False:
                return f"training_step passes {name} to the model"
        if given.get("return_dict") is False or getattr(self.causal_lm.config, "output_hidden_states", False):
            return "the model returns a tuple or hidden states, which keep the shape of the row"
        return None


def _named(batch: Any, places: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    return {name: at(batch, place) for name, place in places.items()}
