"""The checkpointing feature: hands its checkpoint function to the adapters where there is other memory to copy to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastft_plugins.checkpointing.engine import OffloadCheckpoint
from fastft_plugins.errors import NothingToWin
from fastft_plugins.kernels import transfer

if TYPE_CHECKING:
    from fastft_plugins.run import Run

_REASON = "the inputs of checkpointed layers wait in host memory, copied beside the computation"
_UNMEASURED = "it saves device memory, but no time has been measured to be won yet; checkpointing='on' switches it on"


class CheckpointingFeature:
    """Checkpointed layers leave nothing on the device between forward and backward, and the step takes as long."""

    name = "checkpointing"

    def __init__(self) -> None:
        self._checkpoint = OffloadCheckpoint()

    def start(self, run: Run) -> str:
        """See `fastft_plugins.run.Feature`."""
        parameter = next(run.model.parameters(), None)
        if parameter is None:
            raise NothingToWin("the model has no parameters")
        reason = transfer.why_no_transfer(parameter.device)
        if reason is not None:
            raise NothingToWin(reason)
        if run.config.mode(self.name) == "auto":
            raise NothingToWin(_UNMEASURED)
        changes = run.call("fastft_inject_reloader", checkpoint_fn=self._checkpoint)
        run.report.features[self.name].changes.extend(changes)
        run.ledger.record("the host memory of checkpoints", self._checkpoint.close)
        return _REASON

    def stop(self, run: Run) -> None:
        """See `fastft_plugins.run.Feature`."""
        entry = run.report.features[self.name]
        entry.metrics.update(self._checkpoint.metrics())
        for reason, calls in self._checkpoint.kept.most_common():
            entry.changes.append(f"{calls:,} calls with stock checkpointing: {reason}")
        if entry.enabled and not self._checkpoint.offloaded:
            entry.enabled, entry.reason = False, "no checkpointed layer was offloaded"
