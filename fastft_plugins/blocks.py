"""`apply`: a run for as long as a ``with`` block lasts."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from torch import nn

from fastft_plugins.config import FastFTConfig
from fastft_plugins.errors import FastFTConfigError
from fastft_plugins.manager import get_plugin_manager
from fastft_plugins.run import Run, Target, joinable_run


def find_target(target: Any) -> Target:
    """Ask the adapters whose trainer ``target`` is; a plain `nn.Module` is its own target.

    Raises:
        FastFTConfigError: if nobody knows it.
    """
    for _, result in get_plugin_manager().call_each("fastft_matches", target=target):
        if isinstance(result, Target):
            return result
        if result is True:
            return Target(target.model, target, framework=type(target).__module__.split(".")[0])
    if isinstance(target, nn.Module):
        return Target(target)
    raise FastFTConfigError(
        f"target: {type(target).__module__}.{type(target).__name__} is not supported; allowed: a transformers, "
        "TRL or Lightning Trainer, an nn.Module, or a trainer that an installed plugin matches (see `fastft plugins`)"
    )


class apply:
    """``with apply(target, config) as run:`` trains faster inside the block and restores everything at its end.

    Args:
        target: a Hugging Face, TRL or Lightning `Trainer`, an `nn.Module` trained in a loop of your own, or whatever
            trainer an installed plugin matches.
        config: a `FastFTConfig` or a dict of its fields.

    A block inside another one on the same model joins the outer run. So does one inside a trainer's own run, but a run
    that another trainer has left behind is stopped.

    Raises:
        FastFTConfigError: for a bad config or target.
        FastFTError: if a feature set to "on" cannot be on.
    """

    def __init__(self, target: Any, config: FastFTConfig | Mapping[str, Any] | None = None) -> None:
        self._run = Run(find_target(target), config)
        self._joined: list[bool] = []  # one for each block that is open, innermost last

    def __enter__(self) -> Run:
        outer = joinable_run(self._run.model, self._run.target.trainer)
        if outer is None:
            run = self._run.start()
        else:
            run = outer
            run.join(self._run.config)
        self._joined.append(outer is not None)
        return run

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._joined.pop():
            self._run.stop(error)
