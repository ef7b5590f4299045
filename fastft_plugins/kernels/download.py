"""A few numbers on their way from a device to the host, which does not wait for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Download:
    """Begins when it is made, behind what the tensor's device has been given so far on the current stream.

    Args:
        tensor: any dtype and shape; it may be let go of, or written to by what the stream is given later.
    """

    def __init__(self, tensor: Tensor) -> None:
        is_far = tensor.device.type == "cuda"
        # The host would wait for a copy to memory that is not page-locked.
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=is_far)
        self._host.copy_(tensor.detach(), non_blocking=is_far)
        self._reached = torch.cuda.current_stream(tensor.device).record_event() if is_far else None

    def get(self) -> Any:
        """The values as `Tensor.tolist` gives them; None as long as they are not there."""
        return self._host.tolist() if self._reached is None or self._reached.query() else None
