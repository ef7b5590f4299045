"""What a step changes outside its module, put back before it is run again: random numbers and what it has logged."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


class Before:
    """The state as a step begins. Kept for each one that may be run again, so it copies no tensor of a device."""

    def __init__(self, trainer: Any) -> None:
        self._generators: list[tuple[Any, Any]] = [
            (torch.set_rng_state, torch.get_rng_state()),
            (random.setstate, random.getstate()),
            (np.random.set_state, np.random.get_state()),
        ]
        accelerator: Any = getattr(torch, trainer.strategy.root_device.type, None)
        if hasattr(accelerator, "get_rng_state"):  # torch.cpu has none
            self._generators.append((accelerator.set_rng_state, accelerator.get_rng_state()))
        self._results = trainer._results
        # Lightning replaces the numbers in here and never changes one in place.
        self._logged = {key: (metric, dict(vars(metric))) for key, metric in self._results.items()}

    def restore(self) -> None:
        for set_state, state in self._generators:
            set_state(state)
        self._results.clear()
        for key, (metric, attributes) in self._logged.items():
            vars(metric).clear()
            vars(metric).update(attributes)
            self._results[key] = metric
