"""Where one forward ends and the next begins, as far as the calls of checkpointed layers tell."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class Forwards:
    """A forward begins with a layer that has been called in it already, with rows of another shape, or when the
    backward of the one before has come through or never will."""

    def __init__(self) -> None:
        self._seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._shape: tuple[int, ...] | None = None
        self._graph: weakref.ref[_Graph] | None = None  # of the forward under way
        self._is_done = True  # whether its backward has come to its first layer; there is none to wait for yet

    def enter(self, layer: nn.Module, shape: tuple[int, ...]) -> bool:
        """A layer is called with a row of that shape: whether a forward begins with it."""
        has_ended = self._graph is not None and not self.overlap
        if has_ended or layer in self._seen or shape != self._shape:
            return True
        self._seen.add(layer)
        return False

    def begin(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        """A forward begins with that layer."""
        self._seen.clear()
        self._seen.add(layer)
        self._shape, self._graph, self._is_done = shape, None, False

    @property
    def overlap(self) -> bool:
        """Whether the newest forward still waits for its backward, as is asked when the next one begins. A layer that
        is called several times in one forward looks the same, and so do layers with rows of their own."""
        return not self._is_done and self._graph is not None and self._graph() is not None

    @property
    def is_unfinished(self) -> bool:
        """Whether the backward of the newest forward has not come through, be it that it still may."""
        return not self._is_done

    def leave(self, outputs: Any) -> None:
        """The layer's outputs. The graph of the first ones of a forward tells whether it still waits."""
        if self._graph is not None:
            return
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                graph = _Graph(self)
                leaf.register_hook(graph.finish)
                self._graph = weakref.ref(graph)
                return

    def finish(self, graph: _Graph) -> None:
        """The backward of that graph has come to its first layer."""
        if self._graph is not None and self._graph() is graph:
            self._is_done = True


class _Graph:
    """Lives as long as a forward's graph."""

    def __init__(self, forwards: Forwards) -> None:
        self._forwards = forwards

    def finish(self, _: Tensor) -> None:
        self._forwards.finish(self)
