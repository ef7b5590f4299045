"""`OffloadCheckpoint`: torch's own checkpointing, with the first input of each call kept in host memory.

torch's non-reentrant checkpoint does all it always does: random states, autocast, early stop, checks, `retain_graph`.
It is only given an empty tensor in place of the input, and a function that fetches the input when it is run again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastft_plugins.checkpointing.handle import Handle, Lane, is_dense
from fastft_plugins.kernels import transfer
from fastft_plugins.kernels.host_memory import fair_share
from fastft_plugins.kernels.pinned import rounded


class OffloadCheckpoint:
    """Called like `torch.utils.checkpoint.checkpoint`, with the same results bit by bit, without reentrant autograd.

    A call whose first input cannot or need not be offloaded is torch's checkpoint and no more.

    Args:
        min_bytes: inputs smaller than this stay on the device.
        budget: bytes of host memory to use at most; by default half of what is available to this process.
    """

    def __init__(self, *, min_bytes: int = 2**20, budget: int | None = None) -> None:
        self.min_bytes = min_bytes
        self.budget = budget
        self.kept: Counter[str] = Counter()  # calls whose input stayed on the device, by reason
        self.refused = 0  # of these, those that there was no room for in the budget
        self.offloaded = 0
        self._lanes: dict[torch.device, Lane] = {}

    def __call__(
        self,
        function: Callable[..., Any],
        *args: Any,
        use_reentrant: bool | None = False,
        contexts: Callable[[Handle | None], Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Raises ValueError for ``use_reentrant=True``; see `torch.utils.checkpoint.checkpoint` for the rest.

        ``contexts`` takes the place of torch's ``context_fn``. It is given the handle of what the call has offloaded,
        None if that is nothing.
        """
        if use_reentrant:
            raise ValueError("use_reentrant=True is not supported; leave it out, or use torch.utils.checkpoint itself")
        handle = self._offload(args[0]) if args and may_offload() else None
        if contexts is not None:
            kwargs["context_fn"] = partial(contexts, handle)
        if handle is None:
            return checkpoint(function, *args, use_reentrant=False, **kwargs)
        given = [args[0]]  # for the forward; a recompute finds none

        def with_input(_: Tensor, *rest: Any, **named: Any) -> Any:
            return function(given.pop() if given else handle.get(), *rest, **named)

        # On the input's device, which is where torch looks for the random state to keep.
        stand_in = args[0].detach().new_empty(0)
        return checkpoint(with_input, stand_in, *args[1:], use_reentrant=False, **kwargs)

    def holds(self, sizes: Sequence[float]) -> bool:
        """Whether tensors of so many bytes are to be offloaded and have room in the budget, all at once."""
        budgets = [lane.pool.budget for lane in self._lanes.values()]
        budget = min(budgets) if budgets else self._expected_budget
        return min(sizes) >= self.min_bytes and sum(rounded(int(size)) for size in sizes) <= budget

    @cached_property
    def _expected_budget(self) -> int:
        # Read once, as that takes a millisecond. The budget proper is read when the first input is offloaded.
        return self._new_budget()

    def speed(self) -> float | None:
        """Bytes that lately were copied in a millisecond; None if that is not known."""
        speeds = [speed for lane in self._lanes.values() if (speed := lane.transfer.speed()) is not None]
        return min(speeds, default=None)

    def hidden_share(self) -> float | None:
        """Of the time of the last copies, the part in which the computation did not wait.

        None if that is not known, or if no copy has been waited for since the last answer.
        """
        shares = [share for lane in self._lanes.values() if (share := lane.transfer.hidden_share()) is not None]
        return min(shares, default=None)

    def close(self) -> None:
        """Free the host memory, that of graphs that are still alive when they die."""
        for lane in self._lanes.values():
            lane.pool.close()
        self._lanes.clear()

    def metrics(self) -> dict[str, float]:
        """Figures for a report; waits for the device."""
        lanes = self._lanes.values()
        totals: Counter[str] = Counter()
        for lane in lanes:
            totals["bytes_out"] += lane.bytes_out
            totals["bytes_in"] += lane.bytes_in
            totals["host_bytes"] += lane.pool.allocated
            totals["host_allocations"] += lane.pool.allocations
        figures = {"offloaded_calls": float(self.offloaded), "kept_calls": float(self.kept.total())}
        figures |= {name: float(value) for name, value in totals.items()}
        for lane in lanes:
            figures |= lane.transfer.metrics()
        return figures

    def __reduce__(self) -> Any:
        """A copy or pickle, as part of a model, is torch's checkpoint: copies of a model are stock."""
        return partial, (checkpoint,)

    def _offload(self, source: Any) -> Handle | None:
        reason = self._why_not(source)
        handle = None
        if reason is None:
            handle = self._lane(source.device).offload(source)
            if handle is None:
                self.refused += 1
                reason = "no room in the budget of host memory"
        if reason is None:
            self.offloaded += 1
        else:
            self.kept[reason] += 1
        return handle

    def _why_not(self, source: Any) -> str | None:
        """Why an input stays on the device, in words for a report."""
        if type(source) is not Tensor or source.layout != torch.strided or not source.is_floating_point():
            return "the first input is no plain tensor of floating-point numbers"
        if source.is_inference():
            return "the first input was made in inference mode"
        if source.is_cuda and torch.cuda.is_current_stream_capturing():
            return "a CUDA graph is being captured"
        if source.device not in self._lanes:
            reason = transfer.why_no_transfer(source.device)
            if reason is not None:
                return reason
        if source.nbytes < self.min_bytes:
            return f"the first input is smaller than {self.min_bytes:,} bytes"
        if not is_dense(source):
            return "the first input is a view of a larger tensor"
        return None

    def _lane(self, device: torch.device) -> Lane:
        if device not in self._lanes:
            self._lanes[device] = Lane(transfer.make_transfer(device), self._new_budget())
        return self._lanes[device]

    def _new_budget(self) -> int:
        return fair_share() if self.budget is None else self.budget


def may_offload() -> bool:
    """Not where nothing is saved, while a compiler traces, or under somebody's saved-tensor hooks.

    Those hooks may be another checkpoint's, which makes this one's input again, or offload what is saved by themselves.
    """
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    )
