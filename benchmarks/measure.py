"""Measure one stack in this process: a real HF Trainer, or a bare loop of forward and backward."""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.documents import Document, make_steps
from benchmarks.recorder import Recorder
from benchmarks.settings import Settings
from benchmarks.shapes import build_model, checkpointing_argument, vocab_size

Batch = dict[str, Any]
LEARNING_RATE = 1e-4


def steps_of(settings: Settings) -> list[list[Document]]:
    return make_steps(
        settings.total_steps,
        settings.tokens,
        settings.lengths,
        vocab_size(settings.shape),
        settings.seed,
        settings.accumulate,
    )


def features_of(documents: Iterable[Document]) -> list[dict[str, list[int]]]:
    return [{"input_ids": document, "labels": document} for document in documents]


def measure_trainer(
    settings: Settings,
    collator: Callable[..., Batch],
    callbacks: Sequence[TrainerCallback] = (),
    *,
    attention: str | None = None,
    liger: bool = False,
) -> dict[str, Any]:
    """Train with the stock Trainer. A callback that has a report, as FastFTCallback does, gets it into the result.

    Args:
        attention: an implementation of transformers'; by default the shape's.
        liger: the Trainer's ``use_liger_kernel``.
    """
    steps = steps_of(settings)
    recorder = Recorder(settings)
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(
            model=build_model(settings, attention),
            args=_training_arguments(settings, directory, len(steps[0]), liger),
            train_dataset=features_of(document for step in steps for document in step),
            data_collator=collator,
            callbacks=[Clock(recorder), *callbacks],
        )
        time_parts(trainer, recorder)
        settle_garbage()
        recorder.start()
        trainer.train()
    reports = [callback.report.to_dict() for callback in callbacks if getattr(callback, "report", None)]
    return recorder.result(real_tokens(steps), logged_losses(trainer), reports[0] if reports else None)


def measure_model(
    settings: Settings,
    model: torch.nn.Module,
    make_batch: Callable[[list[dict[str, list[int]]]], Batch],
) -> dict[str, Any]:
    """Forward and backward only, one batch a step, each batch on the device before its step begins."""
    steps = steps_of(settings)
    device = settings.torch_device()
    recorder = Recorder(settings)
    settle_garbage()
    losses = []
    for documents in steps:
        batch = {
            key: value.to(device) if hasattr(value, "to") else value
            for key, value in make_batch(features_of(documents)).items()
        }
        recorder.start()
        with recorder.part("forward"):
            loss = model(**batch).loss
        with recorder.part("backward"):
            loss.backward()
        recorder.end_step()
        model.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if recorder.over_budget:
            break
    return recorder.result(real_tokens(steps), losses, report=None)


class Clock(TrainerCallback):  # type: ignore[misc, unused-ignore]  # untyped base
    """Tells the recorder where steps end, and stops the training when the process has used up its time."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self._recorder.end_step()
        if self._recorder.over_budget:
            control.should_training_stop = True
        return control


def common_arguments(settings: Settings, directory: str, liger: bool) -> dict[str, Any]:
    """What every Trainer of a comparison is given, transformers' or one made from it."""
    return {
        "output_dir": directory,
        "max_steps": settings.total_steps,
        "gradient_accumulation_steps": settings.accumulate,
        "train_sampling_strategy": "sequential",  # step i of every stack trains on the same documents
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "bf16": settings.dtype == "bf16",
        "fp16": settings.dtype == "fp16",
        "use_liger_kernel": liger,
        "use_cpu": settings.torch_device().type == "cpu",
        "logging_steps": 1,  # the loss of every step
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": settings.seed,
    }


def _training_arguments(settings: Settings, directory: str, documents: int, liger: bool) -> TrainingArguments:
    batch = {"per_device_train_batch_size": documents // settings.accumulate}
    checkpointing = {checkpointing_argument(): settings.checkpointing}
    return TrainingArguments(**common_arguments(settings, directory, liger), **batch, **checkpointing)


def time_parts(trainer: Trainer, recorder: Recorder) -> None:
    # No hooks on the model: what somebody hooks into could be anything, so that fastft would decline.
    around_loss = trainer.compute_loss_context_manager
    backward = trainer.accelerator.backward

    @contextlib.contextmanager
    def timed_forward() -> Iterator[None]:
        with recorder.part("forward"), around_loss():
            yield

    def timed_backward(*args: Any, **kwargs: Any) -> None:
        with recorder.part("backward"):
            backward(*args, **kwargs)

    trainer.compute_loss_context_manager = timed_forward
    trainer.accelerator.backward = timed_backward


def logged_losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def settle_garbage() -> None:
    """Keep the collector from walking the model and the imported libraries: on a host, that costs a step 200 ms."""
    gc.collect()
    gc.freeze()


def real_tokens(steps: list[list[Document]]) -> list[int]:
    return [sum(len(document) for document in step) for step in steps]
