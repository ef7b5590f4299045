"""The callback behind ``fastft=True``: every Trainer of the process gets one, and it does nothing without the flag."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import DEFAULT_CALLBACKS

from fastft_hf import FastFTCallback
from fastft_hf.trainer import find_trainer, move_last
from fastft_plugins.config import FastFTConfig
from fastft_plugins.report import Report


class FlagCallback(FastFTCallback):
    """`FastFTCallback` with the config that it finds in the Trainer's own arguments."""

    announces = False  # whether new ones print their report; transformers makes them, without arguments

    def __init__(self) -> None:
        super().__init__()
        self.speaks_for_run = self.announces

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Go last."""
        trainer = find_trainer(self) if _is_set(args) else None
        if trainer is not None:
            move_last(self, trainer)
            self.config = FastFTConfig.coerce(args.fastft_config)
            super().on_init_end(args, state, control, **kwargs)

    def is_asked_for(self, args: TrainingArguments) -> bool:
        return _is_set(args)

    @contextlib.contextmanager
    def run_around(self, trainer: Any) -> Iterator[None]:
        """As the arguments are now: they may have changed since the Trainer was made."""
        if not _is_set(trainer.args):
            yield
            return
        self.config = FastFTConfig.coerce(trainer.args.fastft_config)
        with super().run_around(trainer):
            yield

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if _is_set(args):
            self.config = FastFTConfig.coerce(args.fastft_config)
            super().on_train_begin(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if _is_set(args):
            super().on_train_end(args, state, control, **kwargs)


def register() -> None:
    """Make transformers give every new Trainer a `FlagCallback`; called when a config with ``fastft=True`` is built."""
    if FlagCallback not in DEFAULT_CALLBACKS:
        DEFAULT_CALLBACKS.append(FlagCallback)


@contextlib.contextmanager
def announced() -> Iterator[None]:
    """Print the reports of the Trainers made meanwhile, for a command whose user has no `report_of`."""
    FlagCallback.announces = True
    try:
        yield
    finally:
        FlagCallback.announces = False


def report_of(trainer: Trainer) -> Report:
    """The report of the last training of a trainer whose config has ``fastft=True``.

    Raises:
        ValueError: if the trainer was made without the flag.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, FlagCallback) and _is_set(trainer.args):
            return callback.report
    raise ValueError(
        f"trainer: this {type(trainer).__name__} has no fastft; make it with a config that has fastft=True"
    )


def _is_set(args: TrainingArguments) -> bool:
    return bool(getattr(args, "fastft", False))
