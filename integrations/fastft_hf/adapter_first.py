"""In a checkpointed layer, the adapter of the last linear layer runs before its base product.

A recompute ends once it has made all that the backward needs. A frozen base product is needed by nothing, but PEFT's
adapter comes after it, so with LoRA on a layer's last linear layer the largest product is always computed again (27 %
of the products of a Llama layer). The two are summands: in the other order, the sum is the same bit by bit.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastft_plugins.checkpointing.calls import layer_of
from fastft_plugins.checkpointing.measurement import is_compiled

_ACCUMULATES = 2**63  # the number of the nodes that add to a parameter's gradient, where a graph ends
_CLASSES = {("peft.tuners.lora.layer", "Linear"), ("peft.tuners.lora.bnb", "Linear4bit")}


class AdaptersFirst:
    """A checkpoint function for layers with LoRA. A copy or pickle, as part of a model, is one of what it calls."""

    def __init__(self, checkpoint_fn: Callable[..., Any]) -> None:
        self._checkpoint_fn = checkpoint_fn
        self._layers: weakref.WeakKeyDictionary[nn.Module, _Layer] = weakref.WeakKeyDictionary()

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        layer = layer_of(function)
        if layer is not None:
            if layer not in self._layers:
                self._layers[layer] = _Layer(layer)
            function = self._layers[layer].wrap(function)
        return self._checkpoint_fn(function, *args, **kwargs)

    def __reduce__(self) -> Any:
        return functools.partial, (self._checkpoint_fn,)


def has_adapters(module: nn.Module) -> bool:
    """Whether there may be something to reorder in it."""
    return any(map(_is_lora, module.modules())) and not is_compiled(module)


class _Layer:
    """For one layer: sees in its first forward which of its modules comes last, and reorders that one from then on.

    Only a module whose input is used by nothing else is reordered: three gradients would be added up in another order.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._modules = [weakref.ref(module) for module in _modules_with_weights(layer)]
        self._last: weakref.ref[nn.Module] | None = None
        self._is_known = not has_adapters(layer)

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, which calls the layer, for a checkpoint: its forward and its recompute have the same order."""
        if not self._is_known:
            return functools.partial(self._call_watched, function)
        last = None if self._last is None else self._last()
        return function if last is None else functools.partial(_call_reordered, function, last)

    def _call_watched(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._is_known:  # the recompute
            return function(*args, **kwargs)
        calls: list[tuple[nn.Module, Tensor]] = []  # holds on to the inputs, so that no two have the same address

        def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            calls.extend((module, each) for each in inputs[:1] if isinstance(each, Tensor))

        modules = [module for module in (reference() for reference in self._modules) if module is not None]
        handles = [module.register_forward_pre_hook(note) for module in modules]
        try:
            outputs = function(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        self._last = _last_of_its_own(calls, outputs)
        self._is_known = True
        return outputs


def _modules_with_weights(layer: nn.Module) -> Iterator[nn.Module]:
    """The innermost modules that have weights, where LoRA's wrappers count as one."""
    for child in layer.children():
        if _is_lora(child) or (not any(child.children()) and any(True for _ in child.parameters())):
            yield child
        else:
            yield from _modules_with_weights(child)


def _is_lora(module: nn.Module) -> bool:
    return (type(module).__module__, type(module).__name__) in _CLASSES


def _last_of_its_own(calls: list[tuple[nn.Module, Tensor]], outputs: Any) -> weakref.ref[nn.Module] | None:
    """The module called last, if it is LoRA's, was called once, and only its base and its adapter use its input."""
    if not calls:
        return None
    module, source = calls[-1]
    is_called_once = sum(each is module for each, _ in calls) == 1
    return weakref.ref(module) if _is_lora(module) and is_called_once and _uses(source, outputs) == 2 else None


def _uses(source: Tensor, outputs: Any) -> int:
    """How often ``source`` is used on the way to ``outputs``, by their graph; 0 if it has no history to tell."""
    if source.grad_fn is None:
        return 0
    # Nodes are numbered as they are made: those that use it come after it. The model before it is not walked through.
    first = source.grad_fn._sequence_nr()
    waiting = [leaf.grad_fn for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
    known, uses = set(waiting), 0
    while waiting:
        for node, _ in waiting.pop().next_functions:
            uses += node is source.grad_fn
            if node is not None and node not in known and first < node._sequence_nr() < _ACCUMULATES:
                known.add(node)
                waiting.append(node)
    return uses


def _call_reordered(function: Callable[..., Any], linear: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with _reordered(linear):
        return function(*args, **kwargs)


@contextmanager
def _reordered(linear: nn.Module) -> Iterator[None]:
    """For the time of one call: a graph that outlives the training run keeps its order."""
    if "forward" in vars(linear):  # somebody else's
        yield
        return
    vars(linear)["forward"] = functools.partial(_adapter_then_base, linear)
    try:
        yield
    finally:
        del vars(linear)["forward"]


def _adapter_then_base(linear: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """PEFT's forward with one plain adapter, the summands in the other order; in all other cases PEFT's own."""
    adapters = [name for name in linear.active_adapters if name in linear.lora_A]
    has_variant = any(name in getattr(linear, "lora_variant", ()) for name in adapters)
    if args or kwargs or len(adapters) != 1 or has_variant or linear.disable_adapters or linear.merged:
        return type(linear).forward(linear, x, *args, **kwargs)
    (name,) = adapters
    lora_a, lora_b = linear.lora_A[name], linear.lora_B[name]
    is_4bit = type(linear).__name__ == "Linear4bit"
    keeps_dtype = is_4bit and torch.is_autocast_enabled()
    given = x if keeps_dtype else linear._cast_input_dtype(x, lora_a.weight.dtype)
    delta = lora_b(lora_a(linear.lora_dropout[name](given))) * linear.scaling[name]
    base = linear.base_layer(x)
    if is_4bit:
        return base.clone() + (delta if keeps_dtype else delta.to(base.dtype))
    return (base + delta).to(base.dtype)
