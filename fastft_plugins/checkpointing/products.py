"""Selective checkpointing: a layer's costly products are stored, and looked up when the layer runs again.

A matrix product of inner width K costs K operations for each byte of its bf16 output, all else in a layer a few. Torch
has the same idea in `create_selective_checkpoint_contexts`; here only products are looked at, those that the backward
never asks for are not stored, and a graph that is kept can run backward twice, as with torch's plain checkpoint.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# A narrower product is memory-bound: to compute it again takes hardly longer than to read it. LoRA's second one is.
MIN_WIDTH = 256

_aten = torch.ops.aten
_MATRIX_PRODUCTS = {_aten.mm.default: 0, _aten.addmm.default: 1, _aten.bmm.default: 0}  # where the first factor is
_ATTENTION = {
    getattr(_aten, name).default
    for name in (
        "_flash_attention_forward",
        "_efficient_attention_forward",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
}
_DROPOUT = {
    op: next(index for index, argument in enumerate(op._schema.arguments) if argument.name == "dropout_p")
    for op in _ATTENTION
}


def is_product(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation is worth its output's memory. Attention with dropout is not: it draws random numbers."""
    if op in _ATTENTION:
        index = _DROPOUT[op]
        return not (args[index] if index < len(args) else kwargs.get("dropout_p", 0.0))
    if op in _MATRIX_PRODUCTS:
        return bool(args[_MATRIX_PRODUCTS[op]].shape[-1] >= MIN_WIDTH)
    return bool(op is _aten._grouped_mm.default)


def storing_products(
    count: int | None = None,
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For the ``context_fn`` of torch's checkpoint: contexts for one call's forward, and for each time it runs again.

    Args:
        count: store only the first so many products; all by default.
    """
    stored: list[tuple[Any, Any, Any]] = []
    return _Storing(stored, count), _LookingUp(stored)


class _ProductMode(TorchDispatchMode):
    """Sees operations, but not those that compiled functions are made of: under other modes they would not compile."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


class CountProducts(_ProductMode):
    """Counts the products computed inside, and the bytes of their outputs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if is_product(func, args, kwargs or {}):
            self.count += 1
            self.nbytes += sum(leaf.nbytes for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))
        return outputs


class _Storing(_ProductMode):
    def __init__(self, stored: list[tuple[Any, Any, Any]], count: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stored, self._count = stored, count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if (self._count is None or len(self._stored) < self._count) and is_product(func, args, kwargs or {}):
            aliases = tree_map_only(Tensor, _alias, outputs)
            self._stored.append((func, aliases, _versions(aliases)))
        return outputs


class _LookingUp(_ProductMode):
    def __init__(self, stored: list[tuple[Any, Any, Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stored, self._next = stored, 0

    def __enter__(self) -> Any:
        self._next = 0  # a graph that is kept runs again from its first product
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._next < len(self._stored) and is_product(func, args, kwargs or {}):
            op, outputs, versions = self._stored[self._next]
            self._next += 1
            # What was changed in place since is computed again: its inputs are here.
            if op is func and versions == _versions(outputs):
                return tree_map_only(Tensor, _alias, outputs)
        return func(*args, **(kwargs or {}))


def _alias(tensor: Tensor) -> Tensor:
    """The same memory and version counter, without the history that autograd is about to give ``tensor``."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def _versions(outputs: Any) -> list[int]:
    return [leaf._version for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
