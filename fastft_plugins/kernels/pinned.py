"""A pool of host buffers for copies: what one training step has allocated, the next ones use again.

Page-locking takes far longer than a copy, so a buffer is kept when it is given back. Rows of tokens differ in length
from step to step; sizes are therefore rounded up to a few, and a buffer serves every smaller size too.
"""

from __future__ import annotations

from collections import deque

from torch import Tensor

from fastft_plugins.kernels.transfer import Transfer

_STEPS = 8  # sizes between one power of two and the next: at most an eighth of a buffer is unused for rounding
_PAGE = 4096


class HostPool:
    """Buffers of one copy queue, at most ``budget`` bytes in all.

    Attributes:
        allocated: bytes it holds, in use or free.
        allocations: how many buffers it has had to allocate.
    """

    def __init__(self, transfer: Transfer, budget: int) -> None:
        self.budget = budget
        self.allocated = 0
        self.allocations = 0
        self._transfer = transfer
        self._free: list[Tensor] = []  # the one given back last at the end
        # Buffers come back from finalisers, which may run at any moment and in any thread: an append is all they do.
        self._returned: deque[Tensor] = deque()
        self._is_closed = False

    def take(self, nbytes: int) -> Tensor | None:
        """A buffer of at least ``nbytes``, uint8; None if the budget has no room for it."""
        self._collect()
        fitting = [buffer for buffer in self._free if buffer.numel() >= nbytes]
        if fitting:
            smallest = min(fitting, key=Tensor.numel)
            self._remove(smallest)
            return smallest
        size = rounded(nbytes)
        # All that are free are too small. As rows grow, one makes way for each larger one; more where there is no room.
        self._drop_oldest()
        while self.allocated + size > self.budget:
            if not self._drop_oldest():
                return None
        self.allocated += size
        self.allocations += 1
        return self._transfer.allocate(size)

    def give_back(self, buffer: Tensor) -> None:
        """For a later `take`. Copies that still use the buffer come before those of its next user in the queue."""
        self._returned.append(buffer)
        if self._is_closed:
            self.close()

    def close(self) -> None:
        """Free every buffer, those in use as soon as they come back."""
        self._is_closed = True
        self._collect()
        while self._drop_oldest():
            pass

    def _collect(self) -> None:
        while self._returned:
            self._free.append(self._returned.popleft())

    def _drop_oldest(self) -> bool:
        if not self._free:
            return False
        self.allocated -= self._free.pop(0).numel()
        return True

    def _remove(self, buffer: Tensor) -> None:
        self._free = [other for other in self._free if other is not buffer]


def rounded(nbytes: int) -> int:
    """The size of the buffer for ``nbytes``: whole pages, and one of few sizes."""
    step = max(_PAGE, (1 << (nbytes - 1).bit_length()) // (2 * _STEPS))
    return -(-nbytes // step) * step
