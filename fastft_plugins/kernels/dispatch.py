"""Chooses a kernel for a call and says why the better ones were not chosen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from fastft_plugins.errors import FastFTError
from fastft_plugins.manager import PluginManager, get_plugin_manager

logger = logging.getLogger("fastft")


@dataclass(frozen=True)
class Kernel:
    """One way to compute an operation.

    Attributes:
        name: shown in reports.
        rank: kernels with a lower rank are asked first; the plain-torch reference has the highest.
        rejects: given the operation's call (a hashable description of shapes, dtype and device), the reason why this
            kernel cannot serve it, or None.
        run: computes the operation.
    """

    name: str
    rank: int
    rejects: Callable[[Any], str | None]
    run: Callable[..., Any]


def not_on_nvidia(device: torch.device) -> str | None:
    """The reason why a kernel for NVIDIA's GPUs cannot serve tensors on ``device``, or None."""
    if device.type == "cuda" and torch.version.cuda is not None:
        return None
    return f"needs an NVIDIA GPU, the tensors are on {device.type}"


@dataclass(frozen=True)
class Choice:
    kernel: Kernel
    rejected: tuple[str, ...]  # "name: reason" of every better kernel

    def __str__(self) -> str:
        return self.kernel.name + (f" ({'; '.join(self.rejected)})" if self.rejected else "")


_choices: dict[tuple[str, Hashable, PluginManager, int], Choice] = {}


def choose(op: str, call: Hashable) -> Choice:
    """The best kernel for ``call``; remembered, so that a layer pays for one dictionary lookup."""
    manager = get_plugin_manager()
    key = (op, call, manager, manager.generation)
    choice = _choices.get(key)
    if choice is None:  # another thread may call `forget` at any moment
        choice = _choices[key] = _decide(op, call)
        logger.debug("fastft: %s runs on %s", op, choice)
    return choice


def choices(op: str) -> list[str]:
    """What was chosen for ``op`` since the last `forget`, in words."""
    return sorted({str(choice) for (name, *_), choice in _choices.items() if name == op})


def forget() -> None:
    """Decide again from here on; a run that starts calls this, so that its report names its own choices."""
    _choices.clear()


def _decide(op: str, call: Hashable) -> Choice:
    kernels: list[Kernel] = []
    for plugin, result in get_plugin_manager().call_each("fastft_kernels", op=op):
        if isinstance(result, Exception):
            logger.warning("fastft: plugin '%s' failed to offer kernels for %s: %s", plugin, op, result)
        else:
            kernels.extend(result)
    rejected: list[str] = []
    for kernel in sorted(kernels, key=lambda kernel: kernel.rank):
        try:
            reason = kernel.rejects(call)
        except Exception as error:
            reason = f"its own test failed: {type(error).__name__}: {error}"
        if reason is None:
            return Choice(kernel, tuple(rejected))
        rejected.append(f"not {kernel.name}: {reason}")
    raise FastFTError(f"no kernel can run {op} for {call}: {'; '.join(rejected)}")
