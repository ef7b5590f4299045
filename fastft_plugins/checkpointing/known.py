"""Measured forwards, to plan others from: one for each way in which the layers are called and each kind of rows."""

from __future__ import annotations

import weakref
from collections.abc import Hashable

from torch import nn

from fastft_plugins.checkpointing.measurement import Measurement
from fastft_plugins.checkpointing.planner import Costs
from fastft_plugins.checkpointing.products import LayerProducts

# A row this many times longer than the one measured is measured itself; up to there, costs are taken to grow with it.
_LONGER = 1.25
_MOST = 8  # are remembered


class Known:
    """One measured forward.

    Args:
        signature: of the way in which its layers were called.
    """

    def __init__(self, signature: Hashable, measurement: Measurement, costs: Costs) -> None:
        self.signature, self.measurement = signature, measurement
        self.costs = costs  # with what has been learned since
        self.positions = measurement.positions
        self.products: weakref.WeakKeyDictionary[nn.Module, LayerProducts] = weakref.WeakKeyDictionary()
        self.excess = 0.0  # bytes that forwards planned from it have taken beyond what they were to take
        # What a link to host memory of that speed has time to copy.
        self.copied: tuple[float, tuple[frozenset[int], ...]] | None = None

    def covers(self, tokens: int, length: int) -> bool:
        """Whether a forward over ``tokens`` tokens in rows of ``length`` can be planned from it."""
        return tokens <= _LONGER * self.measurement.tokens and length <= _LONGER * self.measurement.length

    def checked(self) -> set[int]:
        """The positions of the layers whose products have been checked."""
        known = (self.positions.get(layer) for layer, products in self.products.items() if products.is_known)
        return {position for position in known if position is not None}


class KnownForwards:
    """The newest measured forwards, without those that a later one can stand for."""

    def __init__(self) -> None:
        self._known: list[Known] = []

    def add(self, new: Known) -> None:
        """Remember it, and forget those of no more tokens in no longer rows."""
        tokens, length = new.measurement.tokens, new.measurement.length
        for known in self._known:
            if known.signature == new.signature:
                new.products = known.products  # which of them come out the same does not depend on the rows
        others = (
            known
            for known in self._known
            if known.signature != new.signature
            or known.measurement.tokens > tokens
            or known.measurement.length > length
        )
        self._known = [*others, new][-_MOST:]

    def find(self, signature: Hashable, first: nn.Module, tokens: int, length: int) -> Known | None:
        """The one closest to a forward that begins with the layer ``first``; None if none covers it."""
        found = [
            known
            for known in self._known
            if known.signature == signature and first in known.positions and known.covers(tokens, length)
        ]
        return min(found, key=lambda known: known.measurement.tokens * known.measurement.length, default=None)

    def forget(self, known: Known) -> None:
        """Plan no more from it, and from others whose layers were called like that."""
        self._known = [other for other in self._known if other.signature != known.signature]

    def clear(self) -> None:
        """Plan from none of them any more."""
        self._known.clear()
