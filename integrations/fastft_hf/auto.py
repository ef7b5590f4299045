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
        self.speaks_for_run = True

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Go last, as the flag's callback does, or go and leave the last word to another."""
        trainer = find_trainer(self)
        if trainer is None:
            return
        move_last(self, trainer)
        *others, _ = trainer.callback_handler.callbacks
        asked_for = [other for other in others if isinstance(other, FastFTCallback) and other.is_asked_for(args)]
        if asked_for:
            asked_for[0].speaks_for_run = True  # of several, the first one's run is that of all
            trainer.callback_handler.callbacks = others
            return
        super().on_init_end(args, state, control, **kwargs)


def switch_on() -> None:
    """Make transformers give every new Trainer an `AutoCallback`."""
    if AutoCallback not in DEFAULT_CALLBACKS:
        DEFAULT_CALLBACKS.append(AutoCallback)
