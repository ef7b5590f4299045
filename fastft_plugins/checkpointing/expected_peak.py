"""Whether planned steps take the memory that they were expected to take."""

from __future__ import annotations

from fastft_plugins.checkpointing.gauge import Gauge


class ExpectedPeak:
    """Compares the gauge's peak with the most that any step so far was expected to take.

    The peak is not started anew for it: users look at it, too. So only what goes beyond all steps before is seen, and
    once. What others take between two forwards, as an evaluation does, counts as the step's.
    """

    def __init__(self, gauge: Gauge) -> None:
        self._gauge = gauge
        self._highest = 0.0  # expected or seen since the peak was started anew
        self._is_planned = False  # the newest step

    def expect(self, nbytes: float) -> None:
        """A step begins that is planned to take at most so much, with what is there already."""
        self._highest = max(self._highest, nbytes)
        self._is_planned = True

    def pardon(self) -> None:
        """The newest step did not go as planned, and that has been dealt with."""
        self._is_planned = False

    def restart(self) -> None:
        """The peak is started anew."""
        self._highest = 0.0

    def excess(self) -> float:
        """Bytes that were taken beyond what was expected; from now on they are."""
        peak = self._gauge.peak()
        excess = max(0.0, peak - self._highest) if self._is_planned else 0.0
        self._highest, self._is_planned = max(self._highest, peak), False
        return excess
