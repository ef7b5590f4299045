"""The seam of activation checkpointing: each checkpointed layer of transformers keeps the function that it calls."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from fastft_hf.adapter_first import AdaptersFirst, has_adapters
from fastft_hf.checkpoint_functions import FUNCTION, REENTRANT, CheckpointFunction, is_checkpointed, is_flex, why_not
from fastft_hf.checkpoint_switch import follow_switch
from fastft_hf.targets import is_data_parallel
from fastft_plugins.errors import Declined, NothingToWin
from fastft_plugins.ledger import Ledger
from fastft_plugins.report import FeatureReport
from fastft_plugins.run import Run

# Newer transformers says "activation" where older ones say "gradient".
_NAMES = ("activation_checkpointing", "gradient_checkpointing")

_OFF = "activation checkpointing is not switched on"
_LATER = "checkpoint function of the layers, when training switches checkpointing on"
_SPLIT = (
    "the model is split over processes (FSDP, ZeRO-3, tensor, context or sequence parallelism), and ranks that run "
    "other layers again would wait for each other"
)


def inject_reloader(run: Run, checkpoint_fn: Callable[..., Any]) -> str | None:
    """Make checkpointed layers call ``checkpoint_fn``; None if the model is not transformers' own."""
    if not any(isinstance(module, PreTrainedModel) for module in run.model.modules()):
        return None
    args = getattr(run.target.trainer, "args", None)
    is_later = any(getattr(args, name, False) for name in _NAMES) and not run.target.in_training
    if not is_later and not any(map(is_checkpointed, run.model.modules())):
        raise NothingToWin(_OFF)
    if is_data_parallel(run):
        raise Declined("DataParallel copies the layers to every GPU at each step; launch one process per GPU")
    if getattr(args, "activation_offloading", False):
        raise Declined("activation_offloading=True: TRL's own offloading copies all that is saved")
    if _is_split(run):
        raise Declined(_SPLIT)
    seam = _Seam(run, checkpoint_fn)
    change = _LATER if is_later else seam.inject(run)
    seam.said = change
    follow_switch(run.model, run.ledger, seam.take_back, seam.inject_again)
    run.ledger.record("the checkpoint functions of the layers", seam.close)
    return change


class _Seam:
    """Gives the layers of a run's model our functions, anew whenever checkpointing is switched on.

    That is in the middle of training, or when it starts, in a block around a Trainer. What was learned stays.
    """

    def __init__(self, run: Run, checkpoint_fn: Callable[..., Any]) -> None:
        self.said = ""  # the newest words of ours among the changes in the report
        self._run = weakref.ref(run)
        self._notes = run.ledger.notes
        self._checkpoint_fn = checkpoint_fn
        self._ledger = Ledger()
        self._made: list[tuple[CheckpointFunction, Callable[..., Any]]] = []
        self._change: str | None = None  # by the newest injection
        self._reason: str | None = None  # of the feature to be on, while it is switched off

    def inject(self, run: Run) -> str:
        """Raises `Declined` if no layer can call ours."""
        modules = [module for module in run.model.modules() if is_checkpointed(module)]
        if not modules:
            raise NothingToWin(_OFF)
        kept: Counter[str] = Counter()
        has_lora, stores_products = has_adapters(run.model), not any(map(is_flex, run.model.modules()))
        try:
            for module in modules:
                reason = why_not(getattr(module, FUNCTION))
                if reason is not None:
                    kept[reason] += 1
                    continue
                function = CheckpointFunction(self._checkpoint_fn, getattr(module, FUNCTION), stores_products)
                self._ledger.setattr(module, FUNCTION, self._known(function, has_lora))
        except BaseException:
            self._ledger.close()
            raise
        if kept.total() == len(modules):  # the user's own choice of reentrant checkpointing is no shortcoming
            raise (NothingToWin if set(kept) == {REENTRANT} else Declined)("; ".join(kept))
        changes = [f"checkpoint function in {len(modules) - kept.total()} modules"]
        changes += ["LoRA's last adapter of a layer runs before its base product"] if has_lora else []
        changes += [f"{count} modules keep theirs: {reason}" for reason, count in kept.items()]
        self._change = "; ".join(changes)
        return self._change

    def take_back(self) -> None:
        """Before somebody switches: what is replaced then is a stock function, which is worth no note."""
        self._ledger.close()
        self._ledger = Ledger()

    def inject_again(self) -> None:
        """Somebody has switched checkpointing on, or off."""
        run = self._run()
        if run is None or not run.active:
            return
        entry, change = run.report.features["checkpointing"], self._change
        if not any(getattr(module, "gradient_checkpointing", False) for module in run.model.modules()):
            if change is not None:
                self._say(entry, f"{change}, until checkpointing was switched off during training")
            return
        try:
            self._say(entry, self.inject(run))
        except Declined as declined:
            if change is not None:  # what was done until now stays true
                self._say(entry, f"{change}, until checkpointing was switched on anew, and stayed stock: {declined}")
                run.fall_short("checkpointing", declined)
            else:
                self._reason = self._reason or entry.reason
                run.switch_off("checkpointing", declined)
        else:
            if self._reason is not None:
                entry.enabled, entry.reason, self._reason = True, self._reason, None

    def close(self) -> None:
        """The layers get their stock functions back."""
        self._ledger.close()
        self._notes.extend(self._ledger.notes)

    def _known(self, function: CheckpointFunction, has_lora: bool) -> Callable[..., Any]:
        """What does the same as ``function``, one object for all layers and all of the run."""
        for like, made in self._made:
            if like == function and isinstance(made, AdaptersFirst) == has_lora:
                return made
        self._made.append((function, AdaptersFirst(function) if has_lora else function))
        return self._made[-1][1]

    def _say(self, entry: FeatureReport, words: str) -> None:
        entry.changes[:] = [words if change == self.said else change for change in entry.changes]
        self.said = words


def _is_split(run: Run) -> bool:
    """Whether the trainer splits the layers over processes; a run may start before it has done so."""
    state = getattr(getattr(run.target.trainer, "accelerator", None), "state", None)
    plugins = (getattr(state, name, None) for name in ("fsdp_plugin", "parallelism_config"))
    shards = getattr(getattr(state, "deepspeed_plugin", None), "zero_stage", 0) == 3
    return shards or any(plugin is not None for plugin in plugins) or (getattr(run.model, "tp_size", None) or 1) > 1
