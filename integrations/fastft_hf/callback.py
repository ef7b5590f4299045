"""The switch for transformers' Trainer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastft_hf import trainer as hf_trainer
from fastft_plugins.config import FastFTConfig
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
        FastFTError: before the first step, if a feature set to "on" cannot be on.
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
        if self._run is not None and self._run.active and self._run.target.trainer is not trainer:
            logger.warning("fastft: this FastFTCallback ends in one Trainer and begins in another; give each its own")
        self._stop()
        model = kwargs["model"] if trainer is None else trainer.model
        outer = joinable_run(model, trainer)
        if outer is not None:  # an apply() around train() owns the run
            self.report = outer.report
            outer.join(self.config)
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

    def _stop(self) -> None:
        if self._run is not None:
            self._run.stop()
            self._run = None
