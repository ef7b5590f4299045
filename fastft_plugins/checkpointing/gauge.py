"""What the planner knows of a device: how much memory there is, how much is taken, and how long something took."""

from __future__ import annotations

from typing import Any, Protocol

import torch

# Of the usable memory, what "auto" leaves alone: the gaps between tensors, and libraries that allocate by themselves.
HEAD_ROOM = 0.06
# And what it leaves alone at first, as the gaps are not known yet: a margin, in fractions of the usable memory.
_MARGIN, _STEP, _MOST = 0.06, 0.02, 0.08


class Gauge(Protocol):
    """The memory of one device in bytes, and its clock. Nothing waits for the device except `milliseconds`."""

    def room(self) -> int:
        """What is left of the budget, now."""

    def allocated(self) -> int:
        """What tensors take now."""

    def peak(self) -> int:
        """The most that tensors have taken at once since `restart_peak`."""

    def restart_peak(self) -> None:
        """Forget the peak so far."""

    def failures(self) -> int:
        """How often memory was asked for that was not there, so that an error was raised."""

    def mark(self) -> Any:
        """The time at which the device will have done all it has been given so far."""

    def milliseconds(self, begin: Any, end: Any) -> float:
        """The time between two marks; waits until the device has reached them."""


class CudaGauge:
    """See `Gauge`. The peak is torch's own, so that `torch.cuda.max_memory_allocated` starts anew with it.

    Each time room is asked for, the margin shrinks, until torch's allocator once had to give all of its free memory
    back to find some in one piece. That is slow, and comes before it fails; the margin grows by each time it happens.

    Args:
        budget: what tensors may take: bytes, a fraction of the device's memory, or ``"auto"``, which is all that is
            usable (free, or reserved by torch) less some head-room.
    """

    def __init__(self, device: torch.device, budget: int | float | str) -> None:
        self.device = device
        self.budget = budget
        self._margin = _MARGIN + _STEP
        self._retries: int | None = None  # of the allocator, when room was asked for last
        self._is_settled = False

    def room(self) -> int:
        if self._retries is None:  # memory that steps without a plan have left in pieces would count
            torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        allowed = torch.cuda.get_per_process_memory_fraction(self.device) * total
        stats = self._stats()
        usable = min(free + stats["reserved_bytes"]["all"]["current"], allowed)
        self._adjust_margin(stats["num_alloc_retries"])
        if isinstance(self.budget, str):
            budget = (1 - HEAD_ROOM - self._margin) * usable
        else:
            asked = self.budget * total if isinstance(self.budget, float) else self.budget
            budget = min((1 - self._margin) * usable, asked)
        return int(budget) - int(stats["allocated_bytes"]["all"]["current"])

    def _adjust_margin(self, retries: int) -> None:
        has_failed = self._retries is not None and retries > self._retries
        if has_failed:
            self._margin, self._is_settled = min(_MOST, self._margin + _STEP), True
        elif not self._is_settled:
            self._margin = max(0.0, self._margin - _STEP)
        self._retries = retries

    def allocated(self) -> int:
        return self._allocated_bytes("current")

    def peak(self) -> int:
        return self._allocated_bytes("peak")

    def restart_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def failures(self) -> int:
        return int(self._stats().get("num_ooms", 0))

    def _allocated_bytes(self, which: str) -> int:
        return int(self._stats()["allocated_bytes"]["all"][which])

    def _stats(self) -> dict[str, Any]:
        # As `torch.cuda.memory_stats`, without making a flat dictionary of a hundred other figures first.
        stats: dict[str, Any] = torch.cuda.memory_stats_as_nested_dict(self.device)
        return stats

    def mark(self) -> torch.cuda.Event:
        event: torch.cuda.Event = torch.cuda.current_stream(self.device).record_event(
            torch.cuda.Event(enable_timing=True)
        )
        return event

    def milliseconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        elapsed: float = begin.elapsed_time(end)
        return elapsed


def make_gauge(device: torch.device, budget: int | float | str) -> Gauge:
    """The gauge of a CUDA device; see `CudaGauge` for ``budget``."""
    return CudaGauge(device, budget)
