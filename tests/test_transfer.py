"""Figures of the copies between GPU and host memory, from events that a test makes up."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from fastft_plugins.kernels.transfer import CudaTransfer, _Copy


@dataclass
class Event:
    """One of the GPU's, reached after so many milliseconds; None: not yet."""

    ms: float | None

    def query(self) -> bool:
        return self.ms is not None

    def elapsed_time(self, later: Event) -> float:
        return later.ms - self.ms


def copied(begin, end, reached):
    return _Copy(10, Event(begin), Event(end)), Event(reached)


def test_the_hidden_share_is_that_of_what_is_done():
    """What is still under way would have to be waited for."""
    transfer = object.__new__(CudaTransfer)  # without a GPU: whatever asks for one, synchronize for one, fails
    transfer._waited, transfer._told = 2, 0
    transfer._waits = deque([copied(20, None, 21), copied(20, 22, None)])
    assert transfer.hidden_share() is None
    transfer._waits.extend([copied(0, 2, 5), copied(2, 4, 3)])
    assert transfer.hidden_share() == 0.75


def test_the_hidden_share_is_told_once():
    """Until another copy has been waited for; of one that was not done, with the next question."""
    transfer = object.__new__(CudaTransfer)
    transfer._waited, transfer._told = 1, 0
    transfer._waits = deque([copied(0, 2, None)])
    assert transfer.hidden_share() is None
    transfer._waits[0] = copied(0, 2, 5)
    assert [transfer.hidden_share(), transfer.hidden_share()] == [1.0, None]
    transfer._waits.append(copied(2, 4, 3))
    transfer._waited += 1
    assert [transfer.hidden_share(), transfer.hidden_share()] == [0.75, None]
