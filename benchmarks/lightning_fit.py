"""Measure a stock lightning.Trainer with the module most people write around a transformers model."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

from benchmarks.measure import LEARNING_RATE, Batch, features_of, real_tokens, settle_garbage, steps_of
from benchmarks.recorder import Recorder
from benchmarks.settings import Settings
from benchmarks.shapes import build_model, enable_checkpointing

_PRECISION = {"bf16": "bf16-mixed", "fp16": "16-mixed", "fp32": "32-true"}


def measure_lightning(settings: Settings, collator: Callable[..., Batch], plugin: Any = None) -> dict[str, Any]:
    """Fit with the stock Trainer, and a `FastFTPlugin` if one is given, whose report gets into the result."""
    steps = steps_of(settings)
    recorder = Recorder(settings)
    model = build_model(settings)
    if settings.checkpointing:
        enable_checkpointing(model)
    module = _Module(model, recorder)
    # One batch after the other from the same documents as every Trainer's, collated in this process as theirs are.
    loader: DataLoader[Any] = DataLoader(
        features_of(document for step in steps for document in step),  # type: ignore[arg-type]
        batch_size=len(steps[0]) // settings.accumulate,
        collate_fn=collator,
    )
    with tempfile.TemporaryDirectory() as directory:
        trainer = lightning.Trainer(
            default_root_dir=directory,
            max_steps=settings.total_steps,
            accumulate_grad_batches=settings.accumulate,
            gradient_clip_val=1.0,  # as transformers' Trainer does by default
            precision=_PRECISION[settings.dtype],
            accelerator="gpu" if settings.torch_device().type == "cuda" else "cpu",
            devices=1,
            plugins=None if plugin is None else [plugin],
            callbacks=[_Clock(recorder, settings.accumulate)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        settle_garbage()
        recorder.start()
        trainer.fit(module, loader)
    losses = [loss.item() for loss in module.losses]
    per_step = [
        statistics.fmean(losses[at : at + settings.accumulate]) for at in range(0, len(losses), settings.accumulate)
    ]
    return recorder.result(real_tokens(steps), per_step, None if plugin is None else plugin.report.to_dict())


class _Module(lightning.LightningModule):  # type: ignore[misc, unused-ignore]  # untyped base
    def __init__(self, model: torch.nn.Module, recorder: Recorder) -> None:
        super().__init__()
        self.model = model
        self.losses: list[torch.Tensor] = []
        self._recorder = recorder

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        with self._recorder.part("forward"):
            loss: torch.Tensor = self.model(**batch).loss
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=LEARNING_RATE)


class _Clock(lightning.Callback):  # type: ignore[misc, unused-ignore]  # untyped base
    """Tells the recorder where steps end, and stops the training when the process has used up its time."""

    def __init__(self, recorder: Recorder, accumulate: int) -> None:
        self._recorder = recorder
        self._accumulate = accumulate

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
        self._recorder.begin_part("backward")

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self._recorder.end_part("backward")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % self._accumulate == 0:
            self._recorder.end_step()
            trainer.should_stop = self._recorder.over_budget
