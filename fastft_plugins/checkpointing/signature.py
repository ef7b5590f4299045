"""How a layer is called, as far as what it holds depends on that and a glance shows it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn


def signature_of(layer: nn.Module, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Hashable:
    """Of a call of ``layer`` by ``function``: autocast, the input's type, and which arguments are tensors.

    Not their sizes, as these grow with the rows. A mask that is there in some batches only takes another attention.
    """
    if isinstance(function, functools.partial):
        args, kwargs = (*args, *function.args), function.keywords | kwargs
    device_type = args[0].device.type
    is_autocast = torch.is_autocast_enabled(device_type)
    return (
        args[0].dtype,
        torch.get_autocast_dtype(device_type) if is_autocast else None,
        layer.training,
        tuple(each.dim() if isinstance(each, Tensor) else None for each in args),
        frozenset((name, each.dim()) for name, each in kwargs.items() if isinstance(each, Tensor)),
    )
