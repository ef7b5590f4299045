"""One checkpointed input on its way: from the device to host memory in the forward, and back in the backward.

A handle belongs to one checkpointed call of one graph and dies with it, so graphs may be nested, interleaved, kept or
dropped in any order. The chain of calls says only what to fetch ahead: where it guesses wrong, a reload is late.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastft_plugins.kernels.pinned import HostPool
from fastft_plugins.kernels.transfer import Transfer


class Lane:
    """The checkpointed inputs of one device: its copy queue, its host buffers, and which input comes before which."""

    def __init__(self, transfer: Transfer, budget: int) -> None:
        self.transfer = transfer
        self.pool = HostPool(transfer, budget)
        self.bytes_out = 0
        self.bytes_in = 0
        # Backward runs in threads of autograd's own, and finalisers in any.
        self.lock = threading.RLock()
        self._newest: weakref.ref[Handle] | None = None
        self._ahead: weakref.ref[Handle] | None = None

    def offload(self, source: Tensor) -> Handle | None:
        """Start to copy ``source`` out; None if there is no host memory for it.

        The input of the layer before, whose copy has had that layer's forward to finish in, leaves the device now.
        """
        with self.lock:
            previous = _alive(self._newest)
            if previous is not None:
                previous.leave_device()
            buffer = self.pool.take(source.nbytes)
            if buffer is None:
                self._newest = None
                return None
            handle = Handle(self, source, buffer, previous)
            self._newest = weakref.ref(handle)
            return handle

    def fetch_ahead(self, handle: Handle, current: Handle) -> None:
        """Start to copy ``handle`` in while ``current`` is used. One waits at a time: it takes the place of another."""
        other = _alive(self._ahead)
        if other is not None and other not in (handle, current):
            other.leave_device()
        handle.start_reload()
        self._ahead = weakref.ref(handle)


class Handle:
    """The input of one checkpointed call, wherever it is at the moment."""

    def __init__(self, lane: Lane, source: Tensor, buffer: Tensor, previous: Handle | None) -> None:
        self._lane = lane
        self._buffer = buffer
        self._host = buffer[: source.nbytes].view(source.dtype).as_strided(source.size(), source.stride())
        self._device = source.device
        self._requires_grad = source.requires_grad
        self._previous = None if previous is None else weakref.ref(previous)
        self._was_changed = False
        # What is on the device, the stream that uses it, and its copy under way to or from the host.
        self._on_device: Tensor | None = None
        self._stream = lane.transfer.compute_stream()
        lane.transfer.keep_for(source, self._stream)
        on_device = source.detach()
        self._copy = lane.transfer.copy(self._host, on_device, after=lane.transfer.mark(self._stream))
        self._on_device, self._version = on_device, on_device._version
        lane.bytes_out += source.nbytes

    def get(self) -> Tensor:
        """The input as it was in the forward, a leaf, for a recompute on the current stream.

        Raises:
            RuntimeError: it was changed in place before it had been copied.
        """
        transfer = self._lane.transfer
        # Selective checkpointing watches every operation of a recompute, and these are none of the layer's.
        with self._lane.lock, _disable_current_modes():
            stream = transfer.compute_stream()
            if self._stream != stream:
                self.leave_device()
            self.start_reload()
            previous = _alive(self._previous)
            if previous is not None:
                # Before this layer's recompute is queued, so that the copy runs beside it however far behind the
                # device is.
                self._lane.fetch_ahead(previous, current=self)
            transfer.wait(stream, self._copy)
            self._check_version()
            if self._was_changed:
                raise RuntimeError(
                    "the input of a checkpointed layer was modified by an inplace operation before the layer's "
                    "recompute; make it out of place, or call the layer with a clone"
                )
            assert self._on_device is not None
            tensor, self._on_device = self._on_device, None
            return tensor.requires_grad_(self._requires_grad)

    def start_reload(self) -> None:
        """Start to copy the input in, unless it is still or already on the device."""
        if self._on_device is not None:
            return
        transfer, host = self._lane.transfer, self._host
        self._stream = transfer.compute_stream()
        # From the compute stream's own memory, so that it may use that again without being told when.
        self._on_device = torch.empty_strided(host.size(), host.stride(), dtype=host.dtype, device=self._device)
        self._copy = transfer.copy(self._on_device, host, after=transfer.mark(self._stream))
        self._version = self._on_device._version
        self._lane.bytes_in += host.nbytes

    def leave_device(self) -> None:
        """Keep the input in host memory alone. Its device memory is used again only after the copy under way."""
        if self._on_device is not None:
            self._lane.transfer.wait(self._stream, self._copy)
            self._check_version()
            self._on_device = None

    def _check_version(self) -> None:
        if self._on_device is not None and self._on_device._version != self._version:
            self._was_changed = True

    def __del__(self) -> None:
        with self._lane.lock:
            self.leave_device()
        self._lane.pool.give_back(self._buffer)


def _alive(reference: weakref.ref[Handle] | None) -> Handle | None:
    return None if reference is None else reference()
