"""What a run measures while it trains, for the trainer's own logs: numbers that the host has anyway.

Only `Window.close` may wait for the GPU, so trainers call it on the steps they log, where they wait for the loss.
"""

from __future__ import annotations

import time
import weakref
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fastft_plugins.run import Run

PREFIX = "fastft/"
_COUNTS = ("tokens", "padding_removed", "unpacked_batches")


class Window:
    """The time between two logs of one run, in one process; evaluation and saving count as time like training."""

    def __init__(self, run: Run) -> None:
        self._run = weakref.ref(run)
        self._start = time.perf_counter()
        self._before = dict.fromkeys(_COUNTS, 0.0)

    def close(self, step: int) -> dict[str, float]:
        """What has happened since the last call, under names that begin with ``fastft/``; the report keeps it too."""
        run = self._run()
        if run is None or not run.active:
            return {}
        measured = self._packing(run)
        measured |= run.measure()
        if torch.cuda.is_initialized():
            measured["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if measured:
            run.report.history.append({"step": step} | measured)
        return {PREFIX + name: value for name, value in measured.items()}

    def _packing(self, run: Run) -> dict[str, float]:
        metrics, now = run.report.features["packing"].metrics, time.perf_counter()
        counts = {name: metrics.get(name, 0.0) for name in _COUNTS}
        tokens, removed, unpacked = (counts[name] - self._before[name] for name in _COUNTS)
        seconds, self._start, self._before = now - self._start, now, counts
        if not tokens or unpacked:  # how many tokens of a padded batch are real, only its device knows
            return {}
        return {"real_tokens_per_second": tokens / seconds, "padding_share": removed / (tokens + removed)}
