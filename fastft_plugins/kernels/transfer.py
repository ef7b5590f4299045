"""Copies between a device and host memory that run beside the computation, in a queue of their own.

A `Transfer` is one queue for a device and both directions: its copies run in the order in which they were asked for, so
a copy never has to wait for another one. What has to be said is how the queue and the computation wait for each other.

`upload` is for the few numbers that describe a batch. They have a queue of their own: in that of a `Transfer` they
would stand behind the activations of a whole step, and the next step would wait for both.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

_MEASURED = 1024  # waits of which the figures are kept
_RECENT = 128  # of these, the ones that the speed is from


class Transfer(Protocol):
    """The copy queue of one device. Streams, marks and copies mean nothing to the caller except to be handed back."""

    def compute_stream(self) -> Any:
        """The stream on which the calling thread computes; equal streams are the same one."""

    def mark(self, stream: Any) -> Any:
        """The end of what a compute stream has been given so far."""

    def copy(self, destination: Tensor, source: Tensor, after: Any) -> Any:
        """Queue a copy that begins once the mark ``after`` is reached. Both tensors have to live until it is done."""

    def wait(self, stream: Any, copy: Any) -> None:
        """What a compute stream is given from now on begins once ``copy`` is done. The host does not wait."""

    def keep_for(self, tensor: Tensor, stream: Any) -> None:
        """Its memory must not be used again before what ``stream`` has been given by its end is done."""

    def allocate(self, nbytes: int) -> Tensor:
        """Host memory for copies, uint8 ``[nbytes]``; its contents are undefined. It is freed after the last copy."""

    def speed(self) -> float | None:
        """Bytes that lately were copied in a millisecond, without waiting; None if no copy is known to be done."""

    def hidden_share(self) -> float | None:
        """Of the time of the last copies, the part in which the computation did not wait; see `speed`.

        None as well if no copy has been waited for since the last answer.
        """

    def metrics(self) -> dict[str, float]:
        """Figures of the copies so far, for a report."""


class _Copy(NamedTuple):
    nbytes: int
    begin: torch.cuda.Event
    end: torch.cuda.Event

    def milliseconds(self) -> float:
        elapsed: float = self.begin.elapsed_time(self.end)
        return elapsed


class CudaTransfer:
    """Copies on a CUDA stream of its own. Host memory is page-locked, without which copies would stop the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._queue = torch.cuda.Stream(device)
        self._waits: deque[tuple[_Copy, torch.cuda.Event]] = deque(maxlen=_MEASURED)
        self._waited = 0  # waits so far
        self._told = 0  # of these, those that there were when the hidden share was last told
        self._speed: tuple[float, int] | None = None  # as it was found last, and with which wait it is to be found anew
        self._pageable_bytes = 0

    def compute_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def mark(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event: torch.cuda.Event = stream.record_event()
        return event

    def copy(self, destination: Tensor, source: Tensor, after: torch.cuda.Event) -> _Copy:
        self._queue.wait_event(after)
        begin = self._queue.record_event(_timed())
        with torch.no_grad(), torch.cuda.stream(self._queue):
            destination.copy_(source, non_blocking=True)
        return _Copy(source.nbytes, begin, self._queue.record_event(_timed()))

    def wait(self, stream: torch.cuda.Stream, copy: _Copy) -> None:
        reached = stream.record_event(_timed())
        stream.wait_event(copy.end)
        self._waits.append((copy, reached))
        self._waited += 1

    def keep_for(self, tensor: Tensor, stream: torch.cuda.Stream) -> None:
        tensor.record_stream(stream)  # does nothing if the memory was allocated on this stream, as it is nearly always

    def allocate(self, nbytes: int) -> Tensor:
        # Whole pages of our own, as page-locking goes by pages; torch's pinned memory comes in powers of two.
        pages = _Pages(-1, nbytes)
        with contextlib.suppress(AttributeError, OSError):  # not on every system
            pages.madvise(mmap.MADV_HUGEPAGE)
        # Touched first by all of torch's threads: page-locking would bring the pages in one by one (2.6 GB/s).
        host = torch.frombuffer(pages, dtype=torch.uint8).zero_()
        if int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), nbytes, 0)) == 0:
            pages.locked_at, pages.queue = host.data_ptr(), self._queue
        else:
            self._pageable_bytes += nbytes
            _forget_cuda_error(self.device)
        return host

    def speed(self) -> float | None:
        # To ask for so many events takes a millisecond: it is done again only after as many further copies.
        if self._speed is None or self._waited >= self._speed[1]:
            recent = list(self._waits)[-_RECENT:]  # at once, as finalisers and other threads add to them
            done = [copy for copy, _ in recent if copy.end.query()]
            milliseconds = sum(copy.milliseconds() for copy in done)
            if milliseconds:
                self._speed = sum(copy.nbytes for copy in done) / milliseconds, self._waited + len(done)
        return None if self._speed is None else self._speed[0]

    def hidden_share(self) -> float | None:
        waited = self._waited
        if waited == self._told:
            return None
        recent = list(self._waits)[-_RECENT:]
        done = [(copy, reached) for copy, reached in recent if copy.end.query() and reached.query()]
        share = _hidden_share(done, sum(copy.milliseconds() for copy, _ in done))
        if share is not None:
            self._told = waited
        return share

    def metrics(self) -> dict[str, float]:
        """``hidden_share``: of the time of the copies, the part in which the computation did not wait for them."""
        torch.cuda.synchronize(self.device)
        waits = list(self._waits)
        copying = sum(copy.milliseconds() for copy, _ in waits)
        figures = {"pageable_bytes": float(self._pageable_bytes)} if self._pageable_bytes else {}
        share = _hidden_share(waits, copying)
        if share is not None:
            figures |= {"copy_ms": copying / len(waits), "hidden_share": share}
        return figures


def _hidden_share(waits: Sequence[tuple[_Copy, torch.cuda.Event]], copying: float) -> float | None:
    """The share of ``copying`` milliseconds in which no stream waited, of copies and waits that are done."""
    if not copying:
        return None
    waiting: float = sum(max(0.0, reached.elapsed_time(copy.end)) for copy, reached in waits)
    return max(0.0, 1 - waiting / copying)


class _Pages(mmap.mmap):
    """Memory that is unlocked before it is unmapped, however it is let go of.

    Pages that were still registered would make copies to whatever is mapped there next fail.
    """

    locked_at = 0
    queue: torch.cuda.Stream | None = None

    def __del__(self) -> None:
        if self.queue is not None:
            self.queue.synchronize()
            torch.cuda.cudart().cudaHostUnregister(self.locked_at)


def upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on ``device``. On the way to a GPU the host waits for nothing, and neither do the copies.

    They run beside what the calling thread's stream has been given so far, the step before, and are there for what it
    is given from now on. Whoever uses them on another stream has to wait for this one first.

    Args:
        tensors: any dtypes and shapes. Those in pageable memory are staged in page-locked memory first, which torch
            keeps for the next time; those that a `DataLoader` has pinned are copied from where they are.

    Returns:
        New tensors in the order of the given ones; a tensor that is on ``device`` already is returned itself.
    """
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    stream = torch.cuda.current_stream(device)
    queue = _upload_queue(stream.device)
    on_device = []
    for tensor in tensors:
        if tensor.device.type != "cpu":
            on_device.append(tensor.to(device))
            continue
        with torch.cuda.stream(queue):  # so that the new memory is the queue's, and no kernel still uses it
            on_device.append(tensor.pin_memory().to(device, non_blocking=True))
        on_device[-1].record_stream(stream)
    stream.wait_stream(queue)
    return on_device


@functools.cache
def _upload_queue(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def why_no_transfer(device: torch.device) -> str | None:
    """Why there is nothing to copy to or from ``device``, in words for a report; None if there is."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "no NVIDIA GPU: the activations are in host memory already" if device.type == "cpu" else "no NVIDIA GPU"
    if torch.cuda.get_device_properties(device).is_integrated:
        return "the GPU shares the host's memory, so there is no other memory to copy to"
    return None


def make_transfer(device: torch.device) -> Transfer:
    """A copy queue for ``device``, for which `why_no_transfer` gives no reason."""
    return CudaTransfer(device)


def _timed() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _forget_cuda_error(device: torch.device) -> None:
    """CUDA remembers the failed call, and torch would report it as that of the next kernel: let one fail here."""
    try:
        torch.zeros(1, device=device)
    except RuntimeError:
        pass
