"""Where one forward ends and the next begins, as far as the calls of checkpointed layers tell."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

# After a forward that began before the backward of the one before, so many have to do without that.
_CLEAN = 16


class Forwards:
    """A forward begins with a layer that has been called in it already, or with rows of another shape."""

    def __init__(self) -> None:
        self._seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._shape: tuple[int, ...] | None = None
        self._backward: weakref.ref[_Backward] | None = None  # of the forward under way
        self._clean = _CLEAN

    @property
    def overlap(self) -> bool:
        """Whether forwards begin, or did so lately, before the backward of the one before. A layer that is called
        several times in one forward looks the same, and so do layers with rows of their own."""
        return self._clean < _CLEAN

    def enter(self, layer: nn.Module, shape: tuple[int, ...]) -> bool:
        """A layer is called with a row of that shape: whether a forward begins with it."""
        begins = layer in self._seen or shape != self._shape
        if begins:
            before = None if self._backward is None else self._backward()
            self._clean = 0 if before is not None and not before.is_done else self._clean + 1
            self._seen.clear()
            self._shape, self._backward = shape, None
        self._seen.add(layer)
        return begins

    def leave(self, outputs: Any) -> None:
        """The layer's outputs. The graph of the first ones of a forward tells whether it still waits."""
        if self._backward is not None:
            return
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                backward = _Backward()
                leaf.register_hook(backward.finish)
                self._backward = weakref.ref(backward)
                return


class _Backward:
    """Lives as long as a forward's graph, and learns when the backward has come to its first layer."""

    is_done = False

    def finish(self, _: Tensor) -> None:
        self.is_done = True
