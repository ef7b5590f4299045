"""The switch for transformers' Trainer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastft_hf import trainer as hf_trainer
from fastft_plugins.config import FastFTConfig
from fastft_plugins.errors import FastFTError
from fastft_plugins.report import Report
from fastft_plugins.run import Run, Target, joinable_run

logger = logging.getLogger("fastft")


class FastFTCallback(TrainerCallback):
    """``Trainer(..., callbacks=[FastFTCallback()])`` trains on packed rows; model, trainer and collator stay stock.

    Args:
        config: a `FastFTConfig`, or a dict of its fields.

    Attributes:
        report: what was on in the last training, why, and what it saved.

    Raises:
        FastFTConfigError: at once, for a bad config.
        FastFTError: before the first step, if a feature set to "on" cannot be on, or if another Trainer is still
            training with this callback.
    """

    def __init__(self, config: FastFTConfig | Mapping[str, Any] | None = None) -> None:
        self.config = FastFTConfig.coerce(config)
        self.report = Report()
        self._run: Run | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the run. Called again without an end after an exception or an out-of-memory retry: starts afresh."""
        trainer = hf_trainer.find_trainer(self)
        self._check_that_it_is_free(trainer)
        self._stop()
        model = kwargs["model"] if trainer is None else trainer.model
        outer = joinable_run(model, trainer)
        if outer is not None:  # an apply() around train(), or another callback, owns the run
            outer.join(self.config)
            self.report = outer.report
            return
        target = Target(model, trainer, "transformers", kwargs.get("train_dataloader"))
        self._run = Run(target, self.config, is_orphan=trainer is None)
        self.report = self._run.report
        self._run.start()
        if trainer is not None:
            hf_trainer.guard(self._run, trainer, self)
        if state.is_world_process_zero:
            logger.info("%s", self.report)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop()
        if state.is_world_process_zero:
            logger.info("%s", self.report)

    def is_asked_for(self, args: TrainingArguments) -> bool:
        """Whether whoever wrote the Trainer wants this callback to act; a default one may be there without that."""
        return True

    def _check_that_it_is_free(self, trainer: Any) -> None:
        """Raise if the run of another Trainer is still going on: one report cannot be that of both."""
        run = self._run
        if run is not None and run.active and not run.is_orphan and run.target.trainer is not trainer:
            raise FastFTError(
                "this FastFTCallback is still at work in another Trainer, whose training has not ended: give each "
                "Trainer a FastFTCallback of its own"
            )

    def _stop(self) -> None:
        if self._run is not None:
            self._run.stop()
            self._run = None
