"""The switch for transformers' Trainer."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastft_hf import trainer as hf_trainer
from fastft_hf.around_loop import stand_around_loop
from fastft_plugins import auto
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

        speaks_for_run: whether it shows and saves its report at the end of each training, for ``fastft run``.

    Raises:
        FastFTConfigError: at once, for a bad config.
        FastFTError: before the first step, if a feature set to "on" cannot be on, or if another Trainer is still
            training with this callback.
    """

    def __init__(self, config: FastFTConfig | Mapping[str, Any] | None = None) -> None:
        self.config = FastFTConfig.coerce(config)
        self.report = Report()
        self.speaks_for_run = False
        self._run: Run | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Prepare for what `on_train_begin` would be too late for: batches by tokens change the number of steps."""
        trainer = hf_trainer.find_trainer(self) if self.config.max_tokens_per_batch is not None else None
        if trainer is not None:
            stand_around_loop(trainer, self)

    state_key = "FastFTCallback"  # Lightning's name for a callback, read before it calls one

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """The first thing that Lightning asks of a callback, which this is not one of: say what is."""
        raise FastFTError(
            "FastFTCallback is the switch for transformers' Trainer; in Lightning it is "
            "lightning.Trainer(plugins=[FastFTPlugin()]), from fastft_plugins"
        )

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        """The last thing, which must not hide the error of `setup`."""

    @contextlib.contextmanager
    def run_around(self, trainer: Any) -> Iterator[None]:
        """A run from before the Trainer makes its train dataloader to the end of its training."""
        self._check_that_it_is_free(trainer)
        self._stop()
        if joinable_run(trainer.model, trainer) is not None:  # an apply() around train(): joined in on_train_begin
            yield
            return
        run = self._begin(Target(trainer.model, trainer, "transformers", in_training=True))
        try:
            yield
        except BaseException as error:
            run.stop(error)
            raise
        finally:
            self._stop()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the run. Called again without an end after an exception or an out-of-memory retry: starts afresh."""
        trainer = hf_trainer.find_trainer(self)
        self._check_that_it_is_free(trainer)
        if self._is_around(trainer):
            self._announce(state)
            return
        self._stop()
        model = kwargs["model"] if trainer is None else trainer.model
        outer = joinable_run(model, trainer)
        if outer is not None:  # an apply() around train(), or another callback, owns the run
            outer.join(self.config)
            self.report = outer.report
            return
        run = self._begin(Target(model, trainer, "transformers", kwargs.get("train_dataloader"), in_training=True))
        if trainer is not None:
            hf_trainer.guard(run, trainer, self)
        self._announce(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop()
        self._announce(state)
        if self.speaks_for_run and state.is_world_process_zero:
            auto.announce(self.report)

    def is_asked_for(self, args: TrainingArguments) -> bool:
        """Whether whoever wrote the Trainer wants this callback to act; a default one may be there without that."""
        return True

    def _begin(self, target: Target) -> Run:
        self._run = Run(target, self.config, is_orphan=target.trainer is None)
        self.report = self._run.report
        return self._run.start()

    def _is_around(self, trainer: Any) -> bool:
        """Whether `run_around` has begun the run of this training, which sees to its end as well."""
        run = self._run
        return run is not None and run.active and run.target.trainer is trainer and run.target.train_dataloader is None

    def _announce(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            logger.info("%s", self.report)

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
