"""Calls of checkpointed layers: whose they are, what they leave behind besides values, and two ways to make them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

# Keywords that are torch's checkpoint's own and not the layer's. The first ones say nothing to a layer that is kept
# whole; with the others the user has a plan of their own.
_OF_A_RECOMPUTE = {"preserve_rng_state", "determinism_check", "early_stop"}
OF_USERS = {"context_fn", "debug"}


def layer_of(function: Callable[..., Any]) -> nn.Module | None:
    """The layer that is called: ``function`` itself, the owner of a method, or what a partial calls or passes first."""
    if isinstance(function, nn.Module):
        return function
    if isinstance(function, functools.partial):
        found = (layer_of(candidate) for candidate in (function.func, *function.args[:1]))
        return next((layer for layer in found if layer is not None), None)
    owner = getattr(function, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def trains(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of the layer has a backward. The input tells nearly always; to walk through a layer is slow."""
    if any(isinstance(each, Tensor) and each.requires_grad for each in args):
        return True
    given = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    return any(each.requires_grad for each in itertools.chain(given, layer.parameters()))


def leaves_traces(layer: nn.Module | None) -> bool:
    """Whether a call may do more than return a value, so that one that has failed half-way cannot be made again.

    Hooks may note what they see, as those of transformers do with the router logits that the loss is made from; a
    batch norm that trains notes means. To walk through a layer is slow.
    """
    return layer is None or any(
        module._forward_hooks
        or module._forward_pre_hooks
        or (module.training and getattr(module, "running_mean", None) is not None)
        for module in layer.modules()
    )


def checkpoint_layer(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a layer with torch's checkpointing."""
    return checkpoint(function, *args, use_reentrant=False, **kwargs)


def keep_layer(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a layer without checkpointing."""
    return function(*args, **{name: value for name, value in kwargs.items() if name not in _OF_A_RECOMPUTE})
