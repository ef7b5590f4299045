"""Selective checkpointing: a layer's costly products are stored, and looked up when the layer runs again.

A matrix product of inner width K costs K operations for each byte of its bf16 output, all else in a layer a few. Torch
has the same idea in `create_selective_checkpoint_contexts`; here only products are looked at, those that the backward
never asks for are not stored, what is looked up has been checked first, and a graph that is kept can run backward
twice, as with torch's plain checkpoint.
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


class LayerProducts:
    """Which products of one layer are stored, and the contexts of its calls.

    The first time, products are stored but computed again as well, and only those that came out the same, bit by bit,
    are looked up from then on: a kernel may have written over one without torch's knowing. Products that the recompute
    does not come to are not stored any more.
    """

    def __init__(self) -> None:
        self._total: int | None = None  # of a forward; None before the first recompute has ended
        self._is_same: dict[int, Tensor] = {}  # found in the first recompute, not waited for
        self._trusted: set[int] | None = None

    def contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """For the ``context_fn`` of torch's checkpoint: of one call's forward, and of each time it runs again."""
        if self._trusted is None and self._total is not None:
            self._trusted = {index for index, is_same in self._is_same.items() if bool(is_same)}
        call = _Call(self, self._trusted)
        return _Storing(call), _LookingUp(call)

    def learn(self, total: int, is_same: dict[int, Tensor]) -> None:
        """A first recompute has ended."""
        if self._total is None:
            self._total, self._is_same = total, is_same

    def has(self, total: int) -> bool:
        """Whether a forward with so many products is like the one that was learned from."""
        return self._total == total


class _Call:
    """The products of one call of a layer."""

    def __init__(self, layer: LayerProducts, trusted: set[int] | None) -> None:
        self.layer, self.trusted = layer, trusted
        self.total = 0
        self.outputs: dict[int, tuple[Any, Any, list[int]]] = {}  # operation, aliases, versions, by index

    def forget(self, written: Tensor) -> None:
        """What shares memory with a tensor that is written to; versions do not tell, as not all views share them."""
        memory = written.untyped_storage().data_ptr()
        for index, (_, outputs, _) in list(self.outputs.items()):
            if any(leaf.untyped_storage().data_ptr() == memory for leaf in tree_leaves(outputs) if _is_there(leaf)):
                del self.outputs[index]


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
    def __init__(self, call: _Call) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._call = call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs, call = func(*args, **(kwargs or {})), self._call
        for written in _written(func, args, kwargs or {}):
            call.forget(written)
        if is_product(func, args, kwargs or {}):
            if call.trusted is None or call.total in call.trusted:
                aliases = tree_map_only(Tensor, _alias, outputs)
                call.outputs[call.total] = func, aliases, _versions(aliases)
            call.total += 1
        return outputs


class _LookingUp(_ProductMode):
    def __init__(self, call: _Call) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._call = call
        self._next = self._runs = 0
        self._is_same: dict[int, Tensor] = {}

    def __enter__(self) -> Any:
        self._next, self._runs = 0, self._runs + 1
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        if self._call.trusted is None:
            self._call.layer.learn(self._call.total, self._is_same)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_product(func, args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        index, call = self._next, self._call
        self._next += 1
        stored_by, outputs, versions = call.outputs.get(index, (None, None, []))
        # What was changed in place since is computed again: its inputs are here. So is all in the second backward of a
        # graph that was kept, as the first one may have written over what it was given.
        if stored_by is not func or versions != _versions(outputs) or self._runs > 1:
            return func(*args, **(kwargs or {}))
        if call.trusted is None:
            again = func(*args, **(kwargs or {}))
            self._is_same[index] = _is_same(again, outputs)
            return again
        if not call.layer.has(call.total):  # another path through the layer: the indices are not those learned
            return func(*args, **(kwargs or {}))
        return tree_map_only(Tensor, _alias, outputs)


def _is_same(one: Any, other: Any) -> Tensor:
    """Whether two results are equal bit by bit, on their device. Of attention's, the first one counts."""
    one, other = ((value if isinstance(value, Tensor) else value[0]).contiguous() for value in (one, other))
    if one.shape != other.shape or one.dtype != other.dtype:
        return torch.zeros((), dtype=torch.bool)
    is_same: Tensor = (one.view(torch.uint8) == other.view(torch.uint8)).all()
    return is_same


def _written(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes to."""
    schema = getattr(op, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    names = [each.name for each in schema.arguments if each.alias_info is not None and each.alias_info.is_write]
    return [leaf for leaf in tree_leaves([given.get(name) for name in names]) if _is_there(leaf)]


def _is_there(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided and leaf.numel() > 0


def _alias(tensor: Tensor) -> Tensor:
    """The same memory and version counter, without the history that autograd is about to give ``tensor``."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def _versions(outputs: Any) -> list[int]:
    return [leaf._version for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
