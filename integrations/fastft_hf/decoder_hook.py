"""The hook in front of a decoder: readies packed batches for attention, and refuses those that were changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastft_hf import stock_attention
from fastft_hf.families import Family
from fastft_plugins.errors import FastFTError
from fastft_plugins.hooks import RunHook
from fastft_plugins.kernels import segments
from fastft_plugins.packing import METADATA_KEY, PackedMetadata
from fastft_plugins.packing.collator import PACKED_KEYS
from fastft_plugins.packing.counting import count_of, count_packed, count_unpacked
from fastft_plugins.packing.metadata import NotPacked
from fastft_plugins.run import Run

_BARE = "no packed metadata came with it; in a loop of your own, give the loader run.collator(collator)"


class DecoderHook(RunHook):
    """The decoder's forward pre-hook: readies a packed batch for attention, and counts the batches that train."""

    def __init__(
        self, run: Run, family: Family, counts_bare: bool, checks: Sequence[Callable[[], str | None]] = ()
    ) -> None:
        super().__init__(run)
        self.family, self.counts_bare, self.checks = family, counts_bare, checks

    def __call__(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        metadata = kwargs.get(METADATA_KEY)
        is_training = decoder.training and torch.is_grad_enabled()
        if metadata is None:
            self._check_bare(args, kwargs)
            if is_training and self.counts_bare:
                count_unpacked(self.run, _BARE, None)
            count_of(self.run).may_have_trained |= torch.is_grad_enabled() and self.counts_bare
            return None
        kwargs = dict(kwargs)
        # The caller continues a sequence, and means what stock does. transformers 5.24 has a new name for it.
        if kwargs.get("past_key_values") is not None or kwargs.get("cache") is not None:
            metadata = NotPacked("past_key_values came with it")
        if isinstance(metadata, NotPacked):
            if is_training:
                count_unpacked(self.run, metadata.reason, metadata)
            for key in (METADATA_KEY, *PACKED_KEYS):
                kwargs.pop(key, None)
            return args, kwargs
        _check_unchanged(metadata, args, kwargs)
        _check_positions(metadata, self.family)
        self._check_code()
        _check_outputs(decoder, kwargs)
        if torch.is_grad_enabled():  # whatever the mode: models come from_pretrained in that of evaluation
            count_packed(self.run, metadata)
        device = _inputs(args, kwargs).device
        if metadata.cu_seqlens.device != device:  # loops that move tensors alone leave it behind
            kwargs[METADATA_KEY] = metadata = metadata.to(device, non_blocking=True)
        stock_attention.forget(metadata)
        kwargs["attention_mask"] = _make_mask(metadata)
        kwargs["use_cache"] = False
        return args, kwargs

    def _check_code(self) -> None:
        """Raise if somebody's code came since the run began; the padding with which stock could train is gone."""
        reason = next((reason for check in self.checks if (reason := check()) is not None), None)
        if reason is not None:
            raise FastFTError(
                f"since training began: {reason}. Packed rows are no longer safe: make that change before train() or "
                "apply() is called, or train with packing='off'"
            )

    def _check_bare(self, args: Any, kwargs: dict[str, Any]) -> None:
        """Raise for a row of this run's collator that lost its metadata: stock attention may mix its documents."""
        inputs = _inputs(args, kwargs)
        is_row = inputs is not None and inputs.shape[0] == 1 and kwargs.get("attention_mask") is None
        if self.run.has_given_collator and is_row and torch.is_grad_enabled():
            raise FastFTError(
                f"a row came without its '{METADATA_KEY}', which run.collator puts into every batch and without which "
                "documents mix: pass all of the batch on, model(**batch), and count labels[:, 1:] where you count them"
            )


def _check_unchanged(metadata: PackedMetadata, args: Any, kwargs: dict[str, Any]) -> None:
    """Raise for a row that is no longer the one the metadata was made for: as one sequence, its documents would mix."""
    reason = _why_stale(metadata, args, kwargs)
    if reason is not None:
        raise FastFTError(
            f"{reason}: this packed row is not what its metadata says, and its padding, with which stock could train "
            "it, is gone. Change batches inside the collator, before they are packed, or train with packing='off'"
        )


def _check_positions(metadata: PackedMetadata, family: Family) -> None:
    if metadata.moved_positions and not family.moves_positions:
        raise FastFTError(
            f"a document of this packed batch stood behind padding, and {family.reason}: "
            "use PaddingFreeCollator(collator, move_positions=False), which keeps such batches padded"
        )


def _check_outputs(decoder: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions") and decoder.config._attn_implementation == "eager":
        raise FastFTError("output_attentions=True: packed attention forms no weights; train with packing='off'")


def _make_mask(metadata: PackedMetadata) -> Tensor:
    """4-D, so masking returns it untouched; of size zero, so a stock attention function would fail on it."""
    mask = metadata.cu_seqlens[:0].view(1, 1, 0, 0)
    mask.fastft_metadata = metadata  # type: ignore[attr-defined]
    return mask


def _inputs(args: Any, kwargs: dict[str, Any]) -> Any:
    """The decoder's ``[B, T]`` input_ids or ``[B, T, hidden]`` inputs_embeds."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    return kwargs.get("inputs_embeds") if ids is None else ids


def _why_stale(metadata: PackedMetadata, args: Any, kwargs: dict[str, Any]) -> str | None:
    """The reason if the batch is no longer the one the metadata was made for. Never waits for a GPU."""
    inputs = _inputs(args, kwargs)
    if inputs is None or tuple(inputs.shape[:2]) != (1, metadata.total_tokens):
        return "the batch changed shape after the collator"
    if kwargs.get("attention_mask") is not None:
        return "the batch got an attention_mask after the collator"
    position_ids = kwargs.get("position_ids")
    if position_ids is None or position_ids.shape != (1, metadata.total_tokens):
        return "position_ids were removed or changed shape after the collator"
    if position_ids.device.type == "cpu":
        starts_T = position_ids[0].diff(prepend=position_ids[0, :1]) != 1
        if tuple(segments.lengths_of(starts_T)) != metadata.lengths:
            return "position_ids were changed after the collator"
    elif not position_ids.is_inference() and position_ids._version:  # a fresh copy on the device has version 0
        return "position_ids were changed in place after the collator"
    return None
