"""One tensor on its way: from the device to host memory in the forward, and back in the backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastft_plugins.checkpointing.handle import Lane


class Offloaded:
    """A tensor of one call, wherever it is at the moment. Its lane's lock is held around each method that moves it.

    Args:
        lane: of the tensor's device.
        source: the tensor, dense in memory.
        buffer: of the lane's pool, which gets it back.
    """

    def __init__(self, lane: Lane, source: Tensor, buffer: Tensor) -> None:
        self._lane = lane
        self._buffer = buffer
        self._host = buffer[: source.nbytes].view(source.dtype).as_strided(source.size(), source.stride())
        self._device = source.device
        self._was_changed = False
        # What is on the device, the stream that uses it, and its copy under way to or from the host.
        self._on_device: Tensor | None = None
        self._stream = lane.transfer.compute_stream()
        lane.transfer.keep_for(source, self._stream)
        on_device = alias(source)
        self._copy = lane.transfer.copy(self._host, on_device, after=lane.transfer.mark(self._stream))
        self._on_device, self._version = on_device, on_device._version

    def take(self) -> Tensor | None:
        """The tensor as it was, for the current stream; None if it was changed in place before it had been copied."""
        transfer = self._lane.transfer
        stream = transfer.compute_stream()
        if self._stream != stream:
            self.leave_device()
        self.start_reload()
        transfer.wait(stream, self._copy)
        self._check_version()
        tensor, self._on_device = self._on_device, None
        return None if self._was_changed else tensor

    def start_reload(self) -> None:
        """Start to copy it in, unless it is still or already on the device."""
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
        """Keep it in host memory alone. Its device memory is used again only after the copy under way."""
        if self._on_device is not None:
            self._lane.transfer.wait(self._stream, self._copy)
            self._check_version()
            self._on_device = None

    def shares(self, memory: int) -> bool:
        """Whether it is on the device, in the storage that begins at the address ``memory``."""
        tensor = self._on_device
        return tensor is not None and tensor.untyped_storage().data_ptr() == memory

    def is_held(self) -> bool:
        """Whether it is on the device and another tensor is in its memory too."""
        tensor = self._on_device
        return tensor is not None and is_held(tensor)

    def _check_version(self) -> None:
        if self._on_device is not None and self._on_device._version != self._version:
            self._was_changed = True

    def __del__(self) -> None:
        with self._lane.lock:
            self.leave_device()
        self._lane.pool.give_back(self._buffer)


def alias(tensor: Tensor) -> Tensor:
    """The same memory and version counter, without the history that autograd is about to give ``tensor``.

    Where a mode sees an operation, torch would give what is made from its outputs counters of their own.
    """
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def version_counter(tensor: Tensor) -> Tensor:
    """An empty tensor whose version is that of ``tensor``, without its memory."""
    counter = alias(tensor)
    counter.data = counter.new_empty(0)
    return counter


def is_held(tensor: Tensor) -> bool:
    """Whether another tensor is in the memory of ``tensor`` too."""
    return _holders(tensor) > _ALONE


def _holders(tensor: Tensor) -> int:
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


_ALONE = _holders(torch.empty(0, device="cpu"))
