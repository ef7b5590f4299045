"""A Lightning Trainer's seams, all on its strategy: the dataloaders it processes, the batches it moves, its step."""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from fastft_lightning.batches import TwinCollator, packer
from fastft_lightning.step import Step
from fastft_plugins.errors import Declined
from fastft_plugins.hooks import RunHook
from fastft_plugins.packing.dataloader import wrap_dataloader
from fastft_plugins.run import Run

_TRANSFER_HOOKS = ("transfer_batch_to_device", "on_after_batch_transfer")


def inject_batches(run: Run, causal_lm: nn.Module, wrap_collator: Callable[[Any], Any]) -> str:
    """Make packed rows in the train dataloader and give them to the model inside ``training_step``."""
    trainer = run.target.trainer
    _check(trainer, run.model)
    step, run_ref, strategy = Step(run, causal_lm, packer(wrap_collator)), weakref.ref(run), trainer.strategy
    process, move, train = strategy.process_dataloader, strategy.batch_to_device, strategy.training_step

    @functools.wraps(process)
    def process_dataloader(dataloader: Any) -> Any:
        loader, run = process(dataloader), run_ref()
        if run is not None and run.active and trainer.training and not step.is_off:
            with contextlib.suppress(Declined):  # a loader of another kind, whose batches `Step` packs
                wrap_dataloader(run, loader, functools.partial(TwinCollator, wrap_collator=wrap_collator))
        return loader

    @functools.wraps(move)
    def batch_to_device(batch: Any, *args: Any, **kwargs: Any) -> Any:
        return step.move(batch, lambda batch: move(batch, *args, **kwargs), trainer.training)

    @functools.wraps(train)
    def training_step(*args: Any, **kwargs: Any) -> Any:
        return step.training_step(train, args, kwargs)

    for function in (process_dataloader, batch_to_device, training_step):
        run.ledger.setattr(strategy, function.__name__, function)
    for hook in (
        causal_lm.register_forward_pre_hook(_StepHook(run, step.give_row), with_kwargs=True),
        causal_lm.register_forward_hook(_StepHook(run, step.take_output), with_kwargs=True),
    ):
        run.ledger.record("a forward hook of the model", hook.remove)
    return "packed rows beside the batches of the train dataloader, given to the model inside training_step"


class _StepHook(RunHook):
    def __init__(self, run: Run, method: Callable[..., Any]) -> None:
        super().__init__(run)
        self.method = method

    def __call__(self, *arguments: Any) -> Any:
        return self.method(*arguments)


def _check(trainer: Any, module: Any) -> None:
    if not module.automatic_optimization:
        raise Declined("manual optimization uses the loss inside training_step, before it can be checked")
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise Declined("training_step takes a dataloader_iter, so it moves the batches itself")
    if getattr(module, "_compiler_ctx", None) is not None:
        raise Declined("torch.compile would compile again for every new set of document lengths")
    for owner in filter(None, (module, trainer.datamodule)):
        for name in _TRANSFER_HOOKS:
            if not getattr(type(owner), name).__module__.startswith(("lightning.pytorch.", "pytorch_lightning.")):
                raise Declined(f"{type(owner).__name__} overrides {name}, which may change the batch on its device")
    mesh = getattr(trainer.strategy, "_device_mesh", None)
    if mesh is not None and mesh["tensor_parallel"].size() > 1:
        raise Declined("tensor parallelism splits rows in ways packing does not know")
