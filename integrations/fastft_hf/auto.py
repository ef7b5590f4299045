"""The callback behind ``fastft run``: every Trainer of the process gets one."""

from __future__ import annotations

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import DEFAULT_CALLBACKS

from fastft_hf.callback import FastFTCallback
from fastft_hf.trainer import find_trainer, move_last
from fastft_plugins import auto


class AutoCallback(FastFTCallback):
    """`FastFTCallback` with the config of the environment. It gives way to one that the script asks for itself."""

    def __init__(self) -> None:
        super().__init__(auto.config())

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Go last, as the flag's callback does, or go."""
        trainer = find_trainer(self)
        if trainer is None:
            return
        move_last(self, trainer)
        *others, _ = trainer.callback_handler.callbacks
        if any(isinstance(other, FastFTCallback) and other.is_asked_for(args) for other in others):
            trainer.callback_handler.callbacks = others
            return
        super().on_init_end(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_end(args, state, control, **kwargs)
        if state.is_world_process_zero:
            auto.announce(self.report)


def switch_on() -> None:
    """Make transformers give every new Trainer an `AutoCallback`."""
    if AutoCallback not in DEFAULT_CALLBACKS:
        DEFAULT_CALLBACKS.append(AutoCallback)
