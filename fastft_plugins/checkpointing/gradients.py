"""How much memory the gradients of a model are still going to take."""

from __future__ import annotations

import weakref

from torch import nn


class GradientsToCome:
    """Bytes of gradients that the next backward makes, as there are none yet to add to.

    To walk through a model takes milliseconds, so its parameters are listed in `look_again` and asked one by one in
    `nbytes`. One that is put in later is missed until the list is made anew: plans take its gradient to be no memory.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._model = None if model is None else weakref.ref(model)
        self._parameters: list[weakref.ref[nn.Parameter]] = []

    def look_again(self) -> None:
        """List the parameters that the model has now."""
        model = None if self._model is None else self._model()
        self._parameters = [] if model is None else [weakref.ref(parameter) for parameter in model.parameters()]

    def nbytes(self) -> int:
        """Of the listed parameters."""
        return self.look()[0]

    def look(self) -> tuple[int, tuple[int, int]]:
        """`nbytes`, and number and bytes of all listed parameters that are trained."""
        to_come = count = trained = 0
        for reference in self._parameters:
            parameter = reference()
            if parameter is not None and parameter.requires_grad:
                size = parameter.nbytes
                count, trained = count + 1, trained + size
                if parameter.grad is None:
                    to_come += size
        return to_come, (count, trained)
