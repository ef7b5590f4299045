"""Whether the loss that ``training_step`` returns is the model's own, which packing cannot change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastft_lightning.padded import PaddedLogits

_MORE = "training_step returns a loss that is not the model's alone, but made from more"
_LOOKED = "training_step looks at the logits and returns a loss that is not the model's alone, so it may depend on both"


class ModelLosses:
    """What the model gave to one ``training_step``."""

    def __init__(self) -> None:
        self._nodes: set[Any] = set()  # of autograd, one for each loss that the model made from its labels
        self._looked_at_logits = False

    def add(self, loss: Tensor) -> None:
        if loss.grad_fn is not None:
            self._nodes.add(loss.grad_fn)

    def padded(self, logits_1TV: Tensor, index_T: Tensor, shape_BS: Sequence[int]) -> PaddedLogits:
        """The logits of a packed row for the step's own code, and a note of it if that looks at them."""
        return PaddedLogits.of(logits_1TV, index_T, shape_BS, self._note_look)

    def why_not(self, loss: Tensor) -> str | None:
        """The reason if ``loss`` may be another number on a packed row than on a padded batch.

        Logits on padding are zero where stock's are not. What is made from them without a gradient, a weight of the
        loss or a decision, leaves no trace in its graph.
        """
        if loss.grad_fn in self._nodes:
            return None
        if not self._are_all_of(loss):
            return _MORE
        return _LOOKED if self._looked_at_logits else None

    def _note_look(self) -> None:
        self._looked_at_logits = True

    def _are_all_of(self, loss: Tensor) -> bool:
        """Whether no parameter is reached from ``loss`` except through the model's losses."""
        pending, seen = [loss.grad_fn], set(self._nodes)
        while pending:
            node = pending.pop()
            if node is None or node in seen:
                continue
            if not node.next_functions:
                return False
            seen.add(node)
            pending.extend(following for following, _ in node.next_functions)
        return True
