"""fastft's numbers among those that a Trainer logs.

A callback's ``on_log`` comes too late: ``log_history`` has its entry by then, and the reporting integrations have sent
theirs. So the Trainer's own ``log`` is wrapped for the time of a run.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

from transformers import Trainer

from fastft_plugins.metrics import Window
from fastft_plugins.run import Run


class _Log:
    """``Trainer.log``, with our numbers beside the loss; evaluations and the summary at the end stay as they are."""

    def __init__(self, run: Run, trainer: Trainer) -> None:
        self._stock, self._trainer, self._window = trainer.log, weakref.ref(trainer), Window(run)
        functools.update_wrapper(self, trainer.log)

    def __call__(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        trainer = self._trainer()
        if "loss" in logs and trainer is not None:
            logs.update(self._window.close(trainer.state.global_step))
        self._stock(logs, *args, **kwargs)


def add_to_log(run: Run) -> None:
    """Put the run's numbers into its Trainer's logs, once."""
    trainer = run.target.trainer
    if isinstance(trainer, Trainer) and not isinstance(vars(trainer).get("log"), _Log):
        run.ledger.setattr(trainer, "log", _Log(run, trainer))
