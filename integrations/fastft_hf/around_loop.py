"""A run around the Trainer's whole training loop, for what must be there before the Trainer counts its steps.

A callback hears of a training when the steps are planned already: ``on_train_begin`` is too late to give the Trainer
another number of batches. What it can do when the Trainer is made is to stand around the loop.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from fastft_plugins.ledger import Ledger

if TYPE_CHECKING:
    from fastft_hf.callback import FastFTCallback

_LOOP = "_inner_training_loop"  # the part of train() after the model is made


def stand_around_loop(trainer: Trainer, callback: FastFTCallback) -> None:
    """Make each training loop of ``trainer`` run inside ``callback.run_around``.

    The attribute that does it stays on the Trainer until the callback is removed from it, or dies; between trainings it
    does nothing.
    """
    if _LOOP in vars(trainer):  # somebody else stands there, another callback of ours for instance
        return
    ledger, loop = Ledger(), getattr(type(trainer), _LOOP)
    # Weak: an attribute that holds its owner would keep the Trainer, and with it the model, alive.
    trainer_ref, callback_ref = weakref.ref(trainer), weakref.ref(callback)

    @functools.wraps(loop)
    def inside_a_run(*args: Any, **kwargs: Any) -> Any:
        trainer, callback = trainer_ref(), callback_ref()
        assert trainer is not None  # it is calling
        if callback is None or callback not in trainer.callback_handler.callbacks:
            ledger.close()
            return loop(trainer, *args, **kwargs)
        with callback.run_around(trainer):
            return loop(trainer, *args, **kwargs)

    ledger.setattr(trainer, _LOOP, inside_a_run)
    weakref.finalize(callback, ledger.close).atexit = False
