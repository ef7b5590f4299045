"""Logits of a packed row in the shape of the padded batch, made only if somebody looks at them.

Shape suffixes: B rows, S padded length, T real tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_OF_ITS_SHAPE = {
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.__len__,
}


class PaddedLogits(Tensor):
    """Stands for ``[B, S, V]`` logits, zero on padding; takes no memory until somebody looks at more than its shape."""

    _packed_TV: Tensor
    _index_T: Tensor
    _padded_BSV: Tensor | None
    _note_look: Callable[[], None]

    @classmethod
    def of(
        cls, packed_1TV: Tensor, index_T: Tensor, shape_BS: Sequence[int], note_look: Callable[[], None]
    ) -> PaddedLogits:
        """Gradients flow through it to the packed logits; ``note_look`` is called when somebody looks."""
        logits = packed_1TV.detach()[:1, :1, :1].expand(*shape_BS, packed_1TV.shape[-1]).as_subclass(cls)
        logits._packed_TV, logits._index_T, logits._padded_BSV = packed_1TV[0], index_T, None
        logits._note_look = note_look
        return logits

    def padded(self) -> Tensor:
        """The logits themselves."""
        self._note_look()
        with torch._C.DisableTorchFunctionSubclass():
            if self._padded_BSV is None:
                shape = self.shape
                flat = self._packed_TV.new_zeros(shape[0] * shape[1], shape[2])
                self._padded_BSV = flat.index_copy(0, self._index_T, self._packed_TV).view(shape)
            return self._padded_BSV

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OF_ITS_SHAPE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return func(*map(_real, args), **{name: _real(value) for name, value in (kwargs or {}).items()})


def _real(value: Any) -> Any:
    if isinstance(value, PaddedLogits):
        return value.padded()
    return type(value)(map(_real, value)) if type(value) in (list, tuple) else value
