"""What the planner knows of a device: how much memory there is, how much is taken, and how long something took."""

from __future__ import annotations

from typing import Any, Protocol

import torch

# Of the usable memory, what "auto" leaves alone: the gaps between tensors, and libraries that allocate by themselves.
HEAD_ROOM = 0.06


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

    def mark(self) -> Any:
        """The time at which the device will have done all it has been given so far."""

    def milliseconds(self, begin: Any, end: Any) -> float:
        """The time between two marks; waits until the device has reached them."""


class CudaGauge:
    """See `Gauge`. The peak is torch's own, so that `torch.cuda.max_memory_allocated` starts anew with it.

    Args:
        budget: what tensors may take: bytes, a fraction of the device's memory, or ``"auto"``, which is all that is
            usable (free, or reserved by torch) less some head-room.
    """

    def __init__(self, device: torch.device, budget: int | float | str) -> None:
        self.device = device
        self.budget = budget

    def room(self) -> int:
        free, total = torch.cuda.mem_get_info(self.device)
        allowed = torch.cuda.get_per_process_memory_fraction(self.device) * total
        usable = min(free + torch.cuda.memory_reserved(self.device), allowed)
        if isinstance(self.budget, str):
            budget = (1 - HEAD_ROOM) * usable
        else:
            budget = min(usable, self.budget * total if isinstance(self.budget, float) else self.budget)
        return int(budget) - self.allocated()

    def allocated(self) -> int:
        return self._allocated_bytes("current")

    def peak(self) -> int:
        return self._allocated_bytes("peak")

    def restart_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def _allocated_bytes(self, which: str) -> int:
        # As `torch.cuda.memory_allocated`, without making a flat dictionary of a hundred other figures first.
        return int(torch.cuda.memory_stats_as_nested_dict(self.device)["allocated_bytes"]["all"][which])

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
