"""A run around the Trainer's whole training loop, for what must be there before the Trainer counts its steps.

A callback hears of a training when the steps are planned already: ``on_train_begin`` is too late to give the Trainer
another number of batches. What it can do when the Trainer is made is to stand around the loop.
"""

from __future__ import annotations

import functools
import sys
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
    if _LOOP not in vars(trainer):  # else somebody stands there, another callback of ours for instance
        _put_around(trainer, callback)


class _AroundLoop:
    """The training loop of one Trainer inside a run of its callback. A copy or pickle belongs to the copies of both."""

    def __init__(self, trainer: Trainer, callback: FastFTCallback, ledger: Ledger) -> None:
        # Weak: an attribute that holds its owner would keep the Trainer, and with it the model, alive.
        self._trainer, self._callback, self._ledger = weakref.ref(trainer), weakref.ref(callback), ledger
        functools.update_wrapper(self, getattr(type(trainer), _LOOP))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        trainer, callback = self._calling(), self._callback()
        loop = functools.partial(getattr(type(trainer), _LOOP), trainer)
        if callback is None or callback not in trainer.callback_handler.callbacks:
            self._ledger.close()
            return loop(*args, **kwargs)
        with callback.run_around(trainer):
            return loop(*args, **kwargs)

    def _calling(self) -> Any:
        """The Trainer that is calling: a shallow copy has this very object among its attributes."""
        frame = sys._getframe(2)
        while frame is not None:
            candidate = frame.f_locals.get("self")
            if isinstance(candidate, Trainer) and vars(candidate).get(_LOOP) is self:
                return candidate
            frame = frame.f_back  # type: ignore[assignment]
        return self._trainer()

    def __reduce__(self) -> Any:
        trainer, callback = self._trainer(), self._callback()
        if trainer is None or callback is None:
            return getattr, (Trainer, _LOOP)
        return _put_around, (trainer, callback)


def _put_around(trainer: Trainer, callback: FastFTCallback) -> _AroundLoop:
    """In a copy or pickle ``trainer`` has no attributes yet; among those it gets then is the returned one."""
    ledger = Ledger()
    around = _AroundLoop(trainer, callback, ledger)
    ledger.setattr(trainer, _LOOP, around)
    weakref.finalize(callback, ledger.close).atexit = False
    return around
