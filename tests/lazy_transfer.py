"""A copy queue without a GPU that does everything as late as it may, and shows what was not waited for as NaN.

A copy runs when a compute stream waits for it, with those before it in the queue, and not earlier. Until then its
destination is NaN. It copies NaN if nobody kept its source, as that memory may have been used again; if nobody kept its
destination, it has written into memory of others. And it copies NaN if it was not told to wait for what was computed
just before: its source may not be finished, or somebody may still use its destination's memory.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class Copy:
    destination: weakref.ref[Tensor]
    source: weakref.ref[Tensor]
    is_ordered: bool


class HostMemory(bytearray):
    """What has been asked for is done before the memory is gone, as on a device."""

    def __del__(self) -> None:
        self.owner.drain()
        self.owner.live.remove(len(self))


class LazyTransfer:
    """See `fastft_plugins.kernels.transfer.Transfer`."""

    def __init__(self) -> None:
        self.stream = "main"
        self.corrupted: list[str] = []  # what would have damaged memory of others
        self.live: list[int] = []  # sizes of the host memory that is allocated
        self.copies = 0
        self.is_told = True  # whether no copy has been waited for since the hidden share was told
        self.bytes_a_millisecond: float | None = None
        self._queue: deque[Copy] = deque()
        self._computed = 0  # between two copies, there is always something new to wait for

    def compute_stream(self) -> str:
        return self.stream

    def mark(self, stream: str) -> tuple[str, int]:
        return stream, self._computed

    def copy(self, destination: Tensor, source: Tensor, after: Any) -> Copy:
        copy = Copy(weakref.ref(destination), weakref.ref(source), after == (self.stream, self._computed))
        destination.data.fill_(torch.nan)
        self._computed += 1
        self.copies += 1
        self._queue.append(copy)
        return copy

    def wait(self, stream: str, copy: Copy) -> None:
        self.is_told = False
        while copy in self._queue:
            self._run(self._queue.popleft())

    def keep_for(self, tensor: Tensor, stream: str) -> None:
        pass

    def allocate(self, nbytes: int) -> Tensor:
        self.live.append(nbytes)
        memory = HostMemory(nbytes)
        memory.owner = self
        return torch.frombuffer(memory, dtype=torch.uint8)

    def speed(self) -> float | None:
        return self.bytes_a_millisecond if self.copies else None

    def hidden_share(self) -> float | None:
        told, self.is_told = self.is_told, True
        return None if told else 1.0

    def metrics(self) -> dict[str, float]:
        return {"hidden_share": 1.0}

    def drain(self) -> None:
        """All that is queued happens now."""
        while self._queue:
            self._run(self._queue.popleft())

    def _run(self, copy: Copy) -> None:
        destination, source = copy.destination(), copy.source()
        if destination is None:
            self.corrupted.append("a copy into memory that was free")
        elif source is None or not copy.is_ordered:
            destination.data.fill_(torch.nan)
        else:
            destination.data.copy_(source)  # at some time that leaves no trace in the version, as on a device
