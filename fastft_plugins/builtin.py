"""The plugin that brings this package's own features and kernels to the registry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastft_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from fastft_plugins.kernels.dispatch import Kernel
    from fastft_plugins.run import Feature


@hookimpl
def fastft_features() -> Sequence[Feature]:
    from fastft_plugins.packing.feature import PackingFeature

    return [PackingFeature()]


@hookimpl
def fastft_kernels(op: str) -> Sequence[Kernel]:
    if op != "attention":
        return []
    from fastft_plugins.kernels.attention import ATTENTION_KERNELS

    return ATTENTION_KERNELS
