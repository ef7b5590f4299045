"""The state of the random numbers, to run something again with the same ones."""

from __future__ import annotations

import torch


class RandomState:
    """Of the host's generator and that of ``device``, as it is now.

    It is taken before every layer that may run out of memory: torch's `get_device_states`, which looks through all
    arguments for devices, takes several times as long. A GPU's generator is a seed and an offset, both on the host.
    """

    def __init__(self, device: torch.device) -> None:
        generators = [torch.default_generator]
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            generators.append(torch.cuda.default_generators[index])
        self._states = [(generator, generator.get_state()) for generator in generators]

    def restore(self) -> None:
        """Go on from there."""
        for generator, state in self._states:
            generator.set_state(state)
