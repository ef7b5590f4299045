"""The MoE feature: hands its experts function to the adapters where there is something to win."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastft_plugins.device import training_device
from fastft_plugins.errors import NothingToWin
from fastft_plugins.kernels.dispatch import choices
from fastft_plugins.kernels.triton_support import TensorCall, triton_rejects
from fastft_plugins.moe import load
from fastft_plugins.moe.experts import experts_forward

if TYPE_CHECKING:
    from fastft_plugins.run import Run

_OPS = (
    "grouped_matmul", "grouped_weight_grad", "grouped_weight_bias_grad", "counting_sort", "gate_forward",
    "gate_backward",
)  # fmt: skip


class MoEFeature:
    """One sort, one count and one offset pass, and kernels for everything around the experts' products."""

    name = "moe"

    def start(self, run: Run) -> str:
        """See `fastft_plugins.run.Feature`."""
        if run.config.mode(self.name) != "on":
            self._check_that_it_helps(run)
        changes = run.call("fastft_inject_router", experts_fn=experts_forward)
        run.report.features[self.name].changes.extend(changes)
        return "experts run as one sort and a few grouped products, deterministic, without waiting for the host"

    def measure(self, run: Run) -> dict[str, float]:
        """See `fastft_plugins.run.Feature`."""
        ratio = load.imbalance(run.model)
        return {} if ratio is None else {"expert_imbalance": ratio}

    def stop(self, run: Run) -> None:
        """See `fastft_plugins.run.Feature`."""
        entry = run.report.features[self.name]
        load.forget(run.model)
        for op in _OPS:
            entry.changes.extend(f"{op} kernel: {choice}" for choice in choices(op))

    def _check_that_it_helps(self, run: Run) -> None:
        device = training_device(run.model)
        if device is None:
            raise NothingToWin("the model has no parameters")
        reason = triton_rejects(TensorCall(device, torch.bfloat16))
        if reason is not None:
            raise NothingToWin(
                f"nothing to win here, it {reason}; where the model has experts, moe='on' switches it on all the same"
            )
