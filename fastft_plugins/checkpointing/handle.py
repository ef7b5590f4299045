"""What one checkpointed call has offloaded: to host memory in the forward, and back in the backward.

A handle belongs to one checkpointed call of one graph and dies with it, so graphs may be nested, interleaved, kept or
dropped in any order. The chain of calls says only what to fetch ahead: where it guesses wrong, a reload is late.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastft_plugins.checkpointing.offloaded import Offloaded
from fastft_plugins.kernels.pinned import HostPool
from fastft_plugins.kernels.transfer import Transfer

_ALIGNMENT = 16  # bytes: kernels may add in another order where memory begins at odd places


class Lane:
    """What is offloaded from one device: its copy queue, its host buffers, and which call comes before which."""

    def __init__(self, transfer: Transfer, budget: int) -> None:
        self.transfer = transfer
        self.pool = HostPool(transfer, budget)
        self.bytes_out = 0
        self.bytes_in = 0
        # Backward runs in threads of autograd's own, and finalisers in any.
        self.lock = threading.RLock()
        self._newest: weakref.ref[Handle] | None = None
        self._leaving: weakref.ref[Handle] | None = None
        self._ahead: weakref.ref[Handle] | None = None

    def offload(self, source: Tensor) -> Handle | None:
        """Start to copy ``source``, a call's input, out; None if there is no host memory for it.

        What the calls before it have offloaded leaves the device now, if its copies have had a layer's forward to
        finish in: of the call before, an input, which was copied from the beginning, but no product.
        """
        with self.lock:
            previous = _alive(self._newest)
            before = _alive(self._leaving)
            if before is not None:
                before.leave_device()
            if previous is not None and not previous.products:
                previous.leave_device()
            self._leaving = self._newest
            offloaded = self.take(source)
            if offloaded is None:
                self._newest = None
                return None
            handle = Handle(self, offloaded, source.requires_grad, previous)
            self._newest = weakref.ref(handle)
            return handle

    def take(self, source: Tensor) -> Offloaded | None:
        """Start to copy a tensor out; None if there is no host memory for it."""
        buffer = self.pool.take(source.nbytes)
        if buffer is None:
            return None
        self.bytes_out += source.nbytes
        return Offloaded(self, source, buffer)

    def fetch_ahead(self, handle: Handle, current: Handle) -> None:
        """Start to copy ``handle`` in while ``current`` is used. One waits at a time: it takes the place of another."""
        other = _alive(self._ahead)
        if other is not None and other not in (handle, current):
            other.leave_device()
        handle.start_reload()
        self._ahead = weakref.ref(handle)


class Handle:
    """What one checkpointed call has offloaded: its input, and products of its layer."""

    def __init__(self, lane: Lane, source: Offloaded, requires_grad: bool, previous: Handle | None) -> None:
        self.products: list[Offloaded] = []
        self._lane = lane
        self._input = source
        self._requires_grad = requires_grad
        self._previous = None if previous is None else weakref.ref(previous)

    def offload_product(self, product: Tensor) -> Offloaded | None:
        """Start to copy a product of the call's layer out; it comes back with the input, to be taken once.

        None if it cannot be offloaded.
        """
        with self._lane.lock, _disable_current_modes():
            offloaded = self._lane.take(product) if is_dense(product) else None
            if offloaded is not None:
                self.products.append(offloaded)
            return offloaded

    def get(self) -> Tensor:
        """The input as it was in the forward, a leaf, for a recompute on the current stream.

        Raises:
            RuntimeError: it was changed in place before it had been copied.
        """
        # Selective checkpointing watches every operation of a recompute, and these are none of the layer's.
        with self._lane.lock, _disable_current_modes():
            self.start_reload()
            previous = _alive(self._previous)
            if previous is not None:
                # Before this layer's recompute is queued, so that the copy runs beside it however far behind the
                # device is.
                self._lane.fetch_ahead(previous, current=self)
            tensor = self._input.take()
            if tensor is None:
                raise RuntimeError(
                    "the input of a checkpointed layer was modified by an inplace operation before the layer's "
                    "recompute; make it out of place, or call the layer with a clone"
                )
            return tensor.requires_grad_(self._requires_grad)

    def take_product(self, product: Offloaded) -> Tensor | None:
        """A product, for the one recompute that asks for it; None if it was changed in place before it was copied."""
        with self._lane.lock, _disable_current_modes():
            self.products.remove(product)
            return product.take()

    def forget(self, products: Iterable[Offloaded]) -> None:
        """They will not be asked for."""
        with self._lane.lock:
            for product in products:
                self.products.remove(product)

    def start_reload(self) -> None:
        """Start to copy in what is not on the device, the input first."""
        for each in (self._input, *self.products):
            each.start_reload()

    def leave_device(self) -> None:
        """Keep everything in host memory alone."""
        for each in (self._input, *self.products):
            each.leave_device()


def is_dense(tensor: Tensor) -> bool:
    """Whether a copy can have its strides: no memory lies between the elements, and none is shared by two of them."""
    aligned = tensor.layout == torch.strided and not tensor.data_ptr() % _ALIGNMENT
    return aligned and torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def _alive(reference: weakref.ref[Handle] | None) -> Handle | None:
    return None if reference is None else reference()
