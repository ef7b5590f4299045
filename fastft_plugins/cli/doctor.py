"""What fastft would do for a model on this machine: its real decision, about a model without weights.

The model is made on torch's meta device, where tensors have a shape and no memory, and given to `apply`. One packed
batch then goes through its forward. The kernel it meets there has been registered like a plugin's: it serves meta
tensors alone, and asks the dispatcher which kernel would serve the same call on this machine.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastft_plugins import apply
from fastft_plugins.cli.meta_model import build_on_meta, one_line
from fastft_plugins.config import FEATURES
from fastft_plugins.device import this_machine
from fastft_plugins.hookspecs import hookimpl
from fastft_plugins.kernels.attention import AttentionCall
from fastft_plugins.kernels.dispatch import Kernel, choose
from fastft_plugins.kernels.grouped_matmul_rejects import MatmulCall
from fastft_plugins.manager import get_plugin_manager
from fastft_plugins.run import Run, Target

_LENGTHS = (6, 3, 1)  # of the documents in the dry run's batch

# What a feature that is on can win, and the rule behind it.
_GAINS = {
    "packing": (
        "about 1 / (1 - p) times stock's speed, since the time of a step goes with its tokens and the share p of "
        "padding is left out: 1.33x at p = 25 %, 2x at 50 %. The p of your data is padding_share in a run's report"
    ),
    "checkpointing": (
        "at most the layers' second forward: about a quarter of a step in which all weights are trained, a third with "
        "LoRA; 1.15x to 1.40x of plain checkpointing at Llama-8B with LoRA in 30 to 140 GB, measured (docs/measured.md)"
    ),
    "moe": (
        "1.4x to 3.1x of stock's experts block on an H200, measured (docs/measured.md); of the whole step only the "
        "share that the block has in it"
    ),
    "bookkeeping": (
        "of the CPU's time, 3.4 ms a step in place of 15 ms at Llama-1B with LoRA, measured (docs/measured.md); the "
        "step gets shorter by it only where the GPU waits for the CPU"
    ),
}


def examine(source: str, config: Any) -> dict[str, Any]:
    """Return plain values, ready for JSON.

    Args:
        source: what the user named.
        config: the model's config, of transformers.

    Raises:
        FastFTConfigError: transformers cannot make a model of that config.
    """
    device = this_machine()
    model = build_on_meta(source, config, torch.bfloat16 if device.type == "cuda" else torch.float32)
    _switch_checkpointing_on(model)
    with _quiet():
        bookkeeping = _bookkeeping(model)
    with _quiet(), apply(model) as run:
        entries = {name: (entry.enabled, entry.reason) for name, entry in run.report.features.items()}
        entries["bookkeeping"] = bookkeeping
        dry_run = "not needed: packing is off, so the forward is stock's"
        kernels: dict[str, list[str]] = {}
        if entries["packing"][0]:
            dry_run, kernels["packing"] = _dry_run(run, device)
        if entries["moe"][0]:
            kernels["moe"] = _experts_kernels(model, device)
    return {
        "kind": "fastft doctor",
        "model": source,
        "class": type(model).__name__,
        "model_type": config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, no NVIDIA GPU",
        "features": {
            name: {
                "enabled": enabled,
                "reason": reason,
                "kernels": kernels.get(name, []),
                "expected_gain": _GAINS.get(name, "not known here") if enabled else "none while it is off",
            }
            for name, (enabled, reason) in entries.items()
        },
        "dry_run": dry_run,
        "notes": _notes(config),
    }


def _bookkeeping(model: Any) -> tuple[bool, str]:
    """The feature's decision in a run of transformers' Trainer, which is what most users have; no other run has it."""
    from transformers import Trainer

    trainer = Trainer.__new__(Trainer)  # its __init__ moves the model to a GPU, and on meta there is nothing to move
    others_off = dict.fromkeys((name for name in FEATURES if name != "bookkeeping"), "off")
    run = Run(Target(model, trainer, framework="transformers"), others_off).start()
    run.stop()
    entry = run.report.features["bookkeeping"]
    if not entry.enabled:
        return False, entry.reason
    where = "with transformers' Trainer and what is made from it"
    return True, f"{where}: {entry.reason}; off with Lightning and in a loop of your own"


def _notes(config: Any) -> list[str]:
    """What a real run could decide in another way."""
    notes = [
        "the loss, the collator and the adapters of your Trainer are not known here; a run looks at them too",
        "checkpointing is decided as if activation checkpointing were switched on",
    ]
    if getattr(config, "quantization_config", None) is not None:
        notes.append("quantization_config is left out: decided as if the weights were not quantised")
    return notes


def _switch_checkpointing_on(model: Any) -> None:
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):  # its new name, its old one
        if hasattr(model, name):
            with contextlib.suppress(ValueError):  # of a model that cannot
                getattr(model, name)()
            return


def _dry_run(run: Run, device: torch.device) -> tuple[str, list[str]]:
    """What came of one packed batch's forward, and the kernels that its attention would use on ``device``."""
    parts: list[Any] = list(run.model.modules())
    for module in parts:
        if hasattr(module, "has_gate"):  # which rows an expert gets is in the data, and on meta there is none
            module.forward = _as_wide
        if hasattr(module, "gradient_checkpointing"):  # nor is there anything to copy
            module.gradient_checkpointing = False
    manager, meta = get_plugin_manager(), _OnMeta()
    name = manager.register(meta, "fastft doctor")
    try:
        batch = run.collator(_padded)(_LENGTHS).to("meta")
        run.model(**batch)
    except Exception as error:
        return f"failed: {type(error).__name__}: {one_line(error)}", []
    finally:
        manager.unregister(name)
    shape = "x".join(map(str, batch["input_ids"].shape))
    kernels = [str(choose("attention", replace(call, device=device))) for call in meta.calls]
    return f"passed: a packed batch of shape {shape}, {len(_LENGTHS)} documents, went through the forward", _unique(
        kernels
    )


def _padded(lengths: tuple[int, ...]) -> dict[str, Tensor]:
    mask = torch.tensor([[int(place < length) for place in range(max(lengths))] for length in lengths])
    return {"input_ids": mask, "attention_mask": mask, "labels": mask.masked_fill(mask == 0, -100)}


def _as_wide(hidden: Tensor, *routing: Any, **more: Any) -> Tensor:
    return torch.empty_like(hidden)


class _OnMeta:
    """A plugin with one kernel: attention for tensors without memory. It remembers the calls that it has served."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    @hookimpl
    def fastft_kernels(self, op: str) -> list[Kernel]:
        return [Kernel("shapes only", -1, self._rejects, _attention_shape)] if op == "attention" else []

    def _rejects(self, call: AttentionCall) -> str | None:
        if call.device.type != "meta":
            return "serves meta tensors"
        self.calls.append(call)
        return None


def _attention_shape(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, *more: Any) -> Tensor:
    return q_THD.new_empty((*q_THD.shape[:2], v_TGD.shape[2]))


def _experts_kernels(model: nn.Module, device: torch.device) -> list[str]:
    """What the dispatcher chooses for the products of each experts module's weights."""
    kernels = []
    for module in model.modules():
        for name in ("gate_up_proj", "up_proj", "down_proj") if hasattr(module, "has_gate") else ():
            weight = getattr(module, name, None)
            if isinstance(weight, Tensor) and weight.dim() == 3:
                inner, width = weight.shape[1:] if module.is_transposed else weight.shape[:0:-1]
                choice = choose("grouped_matmul", MatmulCall(device, weight.dtype, inner, width))
                kernels.append(f"{name}: {choice}")
    return _unique(kernels)


def _unique(texts: list[str]) -> list[str]:
    return list(dict.fromkeys(texts))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of what stays off: the reasons are the result."""
    logger = logging.getLogger("fastft")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
