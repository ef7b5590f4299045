"""The modes that see a layer's products: while they are counted, in a forward, and when the layer runs again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from fastft_plugins.checkpointing.products import Call

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


class _ProductMode(TorchDispatchMode):
    """Sees operations, but not those that compiled functions are made of: under other modes they would not compile."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


class CountProducts(_ProductMode):
    """Of each product computed inside, the bytes of its outputs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if is_product(func, args, kwargs or {}):
            self.sizes.append(sum(leaf.nbytes for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)))
        return outputs


class Storing(_ProductMode):
    """Over a layer's forward: gives its products to the call, and what is written to."""

    def __init__(self, call: Call) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._call = call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs, call = func(*args, **(kwargs or {})), self._call
        for written in _written(func, args, kwargs or {}):
            call.forget(written)
        if is_product(func, args, kwargs or {}):
            call.store(func, outputs)
        return outputs

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        self._call.end_forward()


class LookingUp(_ProductMode):
    """Over a layer's recompute: gives products of the forward in place of their computation."""

    def __init__(self, call: Call) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._call = call
        self._next = 0
        self._is_same: dict[int, Tensor] = {}

    def __enter__(self) -> Any:
        self._next = 0
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        if self._call.trusted is None:
            self._call.layer.learn(self._call.total, self._is_same)
        self._call.forget_all()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_product(func, args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        index, call = self._next, self._call
        self._next += 1
        # What was changed in place since is computed again: its inputs are here. So is all in the second backward of a
        # graph that was kept, as the first one has taken it, and may have written over it.
        if call.trusted is None:
            again, outputs = func(*args, **(kwargs or {})), call.look_up(index, func)
            if outputs is not None:
                self._is_same[index] = _is_same(again, outputs)
            return again
        outputs = call.look_up(index, func)
        return func(*args, **(kwargs or {})) if outputs is None else outputs


def _is_same(one: Any, other: Any) -> Tensor:
    """Whether two results are equal bit by bit, on their device. Of attention's, the first one counts."""
    one, other = ((value if isinstance(value, Tensor) else value[0]).contiguous() for value in (one, other))
    if one.shape != other.shape or one.dtype != other.dtype:
        return torch.zeros((), dtype=torch.bool, device=one.device)
    # Eight bytes at a time where that is possible, so that what is compared takes little memory.
    whole = torch.int64 if one.nbytes % 8 == 0 and one.data_ptr() % 8 == other.data_ptr() % 8 == 0 else torch.uint8
    one, other = (value.flatten().view(torch.uint8).view(whole) for value in (one, other))
    is_same: Tensor = (one == other).all()
    return is_same


def _written(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes to."""
    schema = getattr(op, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    names = [each.name for each in schema.arguments if each.alias_info is not None and each.alias_info.is_write]
    return [leaf for leaf in tree_leaves([given.get(name) for name in names]) if is_there(leaf)]


def is_there(leaf: Any) -> bool:
    """Whether something is a tensor with memory that can be shared."""
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided and leaf.numel() > 0
