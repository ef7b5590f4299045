"""The clock of one process: warm-up steps, timed steps, then steps that time forward and backward apart."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.settings import Settings


class Recorder:
    """Call `start`, then `end_step` after every step; `part` marks a piece of a step.

    A timed step is measured whole, from the end of the step before, so that fetching and collating the batch counts.
    Timing its parts would make the host wait inside the step, hence the separate steps for them at the end.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._device = settings.torch_device()
        self._deadline = time.perf_counter() + settings.budget
        self._parts: dict[str, float] = {}
        self._last = 0.0
        self._index = 0
        self.first_step_s: float | None = None
        self.step_s: list[float] = []
        self.part_s: dict[str, list[float]] = {"forward": [], "backward": []}
        self.peak_memory_bytes: int | None = None

    @property
    def over_budget(self) -> bool:
        return time.perf_counter() > self._deadline

    @property
    def _splitting(self) -> bool:
        return self._index >= self._settings.warmup + self._settings.steps

    def start(self) -> None:
        self._last = self._now()

    def end_step(self) -> None:
        now = self._now()
        seconds, self._last = now - self._last, now
        if self._index == 0:
            self.first_step_s = seconds
        if self._splitting:
            for name, total in self._parts.items():
                self.part_s[name].append(total)
        elif self._index >= self._settings.warmup:
            self.step_s.append(seconds)
            self.peak_memory_bytes = self._peak_memory()
        self._parts.clear()
        self._index += 1
        if self._index == self._settings.warmup and self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a piece of the step, summed over the step's batches; free in the steps that are timed whole."""
        self.begin_part(name)
        yield
        self.end_part(name)

    def begin_part(self, name: str) -> None:
        if self._splitting:
            self._parts[name] = self._parts.get(name, 0.0) - self._now()

    def end_part(self, name: str) -> None:
        if self._splitting:
            self._parts[name] += self._now()

    def result(self, step_tokens: list[int], losses: list[float], report: dict[str, Any] | None) -> dict[str, Any]:
        """What one process hands back; `step_tokens` and `losses` cover every step, warm-up included."""
        timed = slice(self._settings.warmup, self._settings.warmup + len(self.step_s))
        return {
            "first_step_s": self.first_step_s,
            "step_s": self.step_s,
            "forward_s": self.part_s["forward"],
            "backward_s": self.part_s["backward"],
            "tokens_per_s": [tokens / s for tokens, s in zip(step_tokens[timed], self.step_s, strict=True)],
            "peak_memory_bytes": self.peak_memory_bytes,
            "loss": losses,
            "report": report,
        }

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _peak_memory(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self._device.type == "cuda" else None
