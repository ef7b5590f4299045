"""A method of one model, replaced for the time of a run."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn


class ModelMethod:
    """In the place of a method of one model. A copy or pickle, as part of a model, is the stock method of the copy."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.name = name
        self._model = weakref.ref(model)

    @property
    def model(self) -> nn.Module:
        model = self._model()
        assert model is not None  # whoever calls its method holds it
        return model

    def __reduce__(self) -> Any:
        return getattr, (self.model, self.name)  # of a copy that has no attributes yet: its class's method
