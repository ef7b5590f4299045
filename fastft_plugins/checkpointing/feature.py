"""The checkpointing feature: hands its checkpoint function to the adapters where there is other memory to copy to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from fastft_plugins.checkpointing.engine import OffloadCheckpoint
from fastft_plugins.checkpointing.gauge import make_gauge
from fastft_plugins.checkpointing.planned import PlannedCheckpoint
from fastft_plugins.device import training_device
from fastft_plugins.errors import Declined, NoAdapter, NothingToWin
from fastft_plugins.kernels import transfer

if TYPE_CHECKING:
    from fastft_plugins.run import Run

_REASON = "what there is memory for is kept or stored, the rest is computed again as in stock checkpointing"
_SHARDED = "the parameters are sharded (FSDP, ZeRO-3), and ranks that run other layers again would wait for each other"


class CheckpointingFeature:
    """Of the layers that the user has checkpointed, only those run again in the backward that memory is needed for."""

    name = "checkpointing"

    def __init__(self) -> None:
        self._checkpoint: PlannedCheckpoint | None = None

    def start(self, run: Run) -> str:
        """See `fastft_plugins.run.Feature`."""
        device = training_device(run.model)
        if device is None:
            raise NothingToWin("the model has no parameters")
        devices = {parameter.device for parameter in run.model.parameters()}
        if len(devices) > 1:
            raise NothingToWin(f"the model's parameters are on {len(devices)} devices, and it plans for one")
        reason = transfer.why_no_transfer(device)
        if reason is not None:
            raise NothingToWin(reason)
        gauge = make_gauge(device, run.config.memory_budget)
        self._checkpoint = PlannedCheckpoint(gauge, OffloadCheckpoint(), run.model)
        try:
            changes = run.call("fastft_inject_reloader", checkpoint_fn=self._checkpoint)
        except NoAdapter as unknown:  # nothing says that the model is checkpointed at all
            raise NothingToWin(str(unknown)) from unknown
        # Only now, so that nobody is warned whose checkpointing is off; what was injected is taken back.
        if _is_sharded(run.model):
            raise Declined(_SHARDED)
        run.report.features[self.name].changes.extend(changes)
        run.ledger.record("the host memory of checkpoints", self._checkpoint.close)
        return _REASON

    def measure(self, run: Run) -> dict[str, float]:
        """See `fastft_plugins.run.Feature`."""
        assert self._checkpoint is not None  # a feature that has not started is not asked
        share = self._checkpoint.engine.hidden_share()
        return {} if share is None else {"overlap": share}

    def stop(self, run: Run) -> None:
        """See `fastft_plugins.run.Feature`."""
        entry, planned = run.report.features[self.name], self._checkpoint
        assert planned is not None  # a feature that has not started is not stopped
        entry.metrics.update(planned.metrics())
        entry.changes.append(planned.explain())
        for reason, calls in planned.engine.kept.most_common():
            entry.changes.append(f"{calls:,} inputs of layers stayed on the GPU: {reason}")
        if entry.enabled and not planned.calls["kept"] + planned.calls["stored"] and not planned.engine.offloaded:
            entry.enabled, entry.reason = False, "nothing was kept, stored or offloaded, as in stock checkpointing"


def _is_sharded(model: nn.Module) -> bool:
    """By FSDP2, FSDP1 or DeepSpeed's ZeRO-3, whose layers gather their weights whenever they run."""
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        return True  # it may show parameters that look like any
    return any(
        type(parameter).__name__ in ("DTensor", "FlatParameter") or hasattr(parameter, "ds_id")
        for parameter in model.parameters()
    )
