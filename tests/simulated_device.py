"""A device of any size without a GPU: counts the memory of all that torch makes, and runs out of it."""

from __future__ import annotations

import time
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class SimulatedDevice(TorchDispatchMode):
    """What is computed inside ``with device:`` takes its memory until the last tensor of it is gone.

    Host memory for copies, which is not torch's own, is none of it.

    It is its own `fastft_plugins.checkpointing.gauge.Gauge`, whose ``budget`` may be more than its ``capacity``.
    """

    def __init__(self, capacity: float = float("inf"), budget: float | None = None) -> None:
        super().__init__()
        self.capacity = capacity
        self.budget = capacity if budget is None else budget
        self.highest = 0  # ever
        self._taken = 0
        self._peak = 0
        self._failures = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self._allocate(leaf.untyped_storage())
        return outputs

    def _allocate(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not storage.resizable() or storage.device.type == "meta":
            return
        if self._taken + size > self.capacity:
            self._failures += 1
            raise torch.OutOfMemoryError(f"{size} bytes asked for, {self.capacity - self._taken} are free")
        self._known.add(key)
        self._taken += size
        self._peak = max(self._peak, self._taken)
        self.highest = max(self.highest, self._taken)
        weakref.finalize(storage, self._free, key, size).atexit = False

    def _free(self, key: int, size: int) -> None:
        self._known.remove(key)
        self._taken -= size

    def room(self) -> float:
        return self.budget - self._taken

    def allocated(self) -> int:
        return self._taken

    def peak(self) -> int:
        return self._peak

    def restart_peak(self) -> None:
        self._peak = self._taken

    def failures(self) -> int:
        return self._failures

    def mark(self) -> float:
        return time.perf_counter()

    def milliseconds(self, begin: float, end: float) -> float:
        return (end - begin) * 1e3
