"""transformers' Trainer: how to find it from a callback, whether its loss allows packing, and where its collator is."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any

from transformers import Trainer

from fastft_hf import foreign
from fastft_hf.token_budget import inject_token_budget
from fastft_plugins.errors import Declined
from fastft_plugins.packing.dataloader import wrap_dataloader
from fastft_plugins.run import Run

# Methods that decide the loss, and the modules whose versions are known to sum over tokens.
_LOSS_METHODS = (
    "compute_loss",
    "training_step",
    "_prepare_inputs",
    "_prepare_input",
    "get_batch_samples",
    "_get_num_items_in_batch",
)
_STOCK_MODULES = ("transformers.trainer", "transformers.trainer_seq2seq", "trl.trainer.sft_trainer")

# What the Trainer runs between on_train_begin and the end of train(); an exception inside one of them ends the run.
_GUARDED = ("_run_epoch", "_evaluate", "_finalize_training")

_WRAPPED = "collator of the train dataloader"
_NOT_YET = ", when training makes it"


def find_trainer(callback: Any) -> Trainer | None:
    """The Trainer that is calling ``callback``: callbacks are not given it, but it is ``self`` in a calling frame."""
    frame = sys._getframe(1)
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Trainer) and callback in candidate.callback_handler.callbacks:
            return candidate
        frame = frame.f_back  # type: ignore[assignment]
    return None


def move_last(callback: Any, trainer: Trainer) -> None:
    """Make ``callback`` the last one: another that fails in on_train_begin then fails before anything is changed."""
    handler = trainer.callback_handler
    # A new list: the old one may be being iterated over.
    handler.callbacks = [*(other for other in handler.callbacks if other is not callback), callback]


def guard(run: Run, trainer: Trainer, starter: Any) -> None:
    """Stop ``run`` when an exception leaves the training loop: no callback event is fired then.

    One that leaves a call inside another guarded call has not left it: a callback may evaluate, fail and go on.
    ``starter`` is the callback in whose on_train_begin this happens; those after it can still fail in theirs, which
    this event's own call, already under way, would not notice.
    """
    run_ref, depth = weakref.ref(run), 0

    def stop_on_error(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                return function(*args, **kwargs)
            except BaseException as error:
                run = run_ref()
                if run is not None and depth == 1:
                    run.stop(error)
                raise
            finally:
                depth -= 1

        return guarded

    for name in _GUARDED:
        if hasattr(trainer, name):
            run.ledger.setattr(trainer, name, stop_on_error(getattr(trainer, name)))
    handler = trainer.callback_handler
    run.ledger.setattr(handler, "call_event", stop_on_error(handler.call_event))
    for callback in handler.callbacks[handler.callbacks.index(starter) + 1 :]:
        run.ledger.setattr(callback, "on_train_begin", stop_on_error(callback.on_train_begin))


def inject_collator(run: Run, wrap_collator: Callable[[Any], Any]) -> str:
    """Wrap the collator of the train dataloader: of the one given, or of each one the Trainer will make."""
    trainer = run.target.trainer
    _check_loss(trainer)
    if run.config.max_tokens_per_batch is not None:
        inject_token_budget(run)  # before the collator's: its loader is the one to be wrapped
    if run.target.train_dataloader is not None:
        _wrap(run, run.target.train_dataloader, wrap_collator)
        return _WRAPPED
    run_ref, make_loader = weakref.ref(run), trainer.get_train_dataloader

    @functools.wraps(make_loader)
    def get_train_dataloader(*args: Any, **kwargs: Any) -> Any:
        loader, run = make_loader(*args, **kwargs), run_ref()
        if run is not None and run.active:
            try:
                _wrap(run, loader, wrap_collator)
                changes = run.report.features["packing"].changes
                changes[:] = [change.replace(_WRAPPED + _NOT_YET, _WRAPPED) for change in changes]
            except Declined as declined:
                run.switch_off("packing", declined)
        return loader

    run.ledger.setattr(trainer, "get_train_dataloader", get_train_dataloader)
    return _WRAPPED + _NOT_YET


def why_not_loss(trainer: Trainer) -> str | None:
    """The reason if the loss of ``trainer`` may not be a sum over tokens; quick to find."""
    try:
        _check_loss(trainer)
    except Declined as declined:
        return str(declined)
    return None


def _check_loss(trainer: Trainer) -> None:
    if trainer.compute_loss_func is not None:
        raise Declined("compute_loss_func is set: the loss of your own may not be a sum over tokens")
    for name in _LOSS_METHODS:
        method = getattr(trainer, name)
        *_, owner = foreign.layers(method)  # below decorators, which are known as a rule
        is_stock = foreign.foreign_home(method) is None and foreign.home_of(owner) in _STOCK_MODULES
        if name in vars(trainer) or not is_stock:
            where = getattr(owner, "__qualname__", name)
            raise Declined(f"{where} overrides {name}: its loss may not be a sum over tokens")
    if foreign.foreign_home(trainer.label_smoother) is not None:
        raise Declined("label_smoother was replaced: its loss may not be a sum over tokens")
    if trainer.neftune_noise_alpha:
        raise Declined("neftune_noise_alpha is set: the size of its noise depends on the length of the padded rows")
    if not getattr(trainer, "_loss_shifts_labels", True):
        raise Declined("the Trainer counts first labels that it never trains, which a packed row cannot reproduce")
    if trainer.args.n_gpu > 1:
        raise Declined("DataParallel splits batches by rows, and a packed batch has one; launch one process per GPU")
    if trainer.args.torch_compile:
        raise Declined("torch_compile would compile again for every new set of document lengths")
    if getattr(trainer.accelerator, "parallelism_config", None) is not None:
        raise Declined("context, sequence and tensor parallelism split rows in ways packing does not know")


def _wrap(run: Run, train_dataloader: Any, wrap_collator: Callable[[Any], Any]) -> None:
    loader = getattr(train_dataloader, "base_dataloader", train_dataloader)
    if type(train_dataloader).__name__ == "DataLoaderDispatcher":
        raise Declined(
            "the dataloader dispatches slices of one batch to all processes, the default for a stream even with one "
            "process; set accelerator_config={'dispatch_batches': False}"
        )
    home = foreign.foreign_home(type(loader).__iter__)
    if home is not None:
        raise Declined(f"{type(loader).__name__} makes its batches by code of {home}, which may change packed rows")
    wrap_dataloader(run, loader, wrap_collator)
