"""One training run with the Hugging Face Trainer, timed step by step from the host."""

from __future__ import annotations

import ctypes
import gc
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

OnStep = Callable[[int, float, float], None]  # step from 1, loss, seconds
LEARNING_RATE = {"lora": 2e-4, "full": 2e-5}


@dataclass
class Run:
    """What one run measured. ``weights`` are the trained tensors after the last step, on the CPU."""

    losses: list[float]
    step_seconds: list[float]
    step_cpu_seconds: list[float]  # of all threads of the process
    peak_memory_bytes: int
    weights: dict[str, torch.Tensor]


class StepTimer(TrainerCallback):
    """Measures the time from the end of one step to the end of the next, so that collating the batch counts.

    The processor time beside it tells a slow run from one that had to share the machine.
    """

    def __init__(self, on_step: OnStep) -> None:
        self.on_step = on_step
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self._before = self._cpu_before = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._before, self._cpu_before = _now(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now, cpu_now = _now(), time.process_time()
        self.seconds.append(now - self._before)
        self.cpu_seconds.append(cpu_now - self._cpu_before)
        self._before, self._cpu_before = now, cpu_now

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:  # the summary at the end has none
            self.losses.append(logs["loss"])
            self.on_step(state.global_step, logs["loss"], self.seconds[-1])


class PeakMemory:
    """Context manager for the most memory in use: on the GPU what torch allocated, else that of the whole process."""

    INTERVAL_S = 0.02

    def __enter__(self) -> PeakMemory:
        self.bytes = 0
        gc.collect()
        _give_back_free_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(self.INTERVAL_S):
            self.bytes = max(self.bytes, process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated()
        else:
            self._stop.set()
            self._thread.join()


def train(
    model: Any,
    tokenizer: Any,
    documents: list[dict[str, Any]],
    *,
    batch_size: int,
    trainable: str,
    seed: int,
    on_step: OnStep,
    callbacks: list[Any],
) -> Run:
    """Train ``model`` once over ``documents``, in their order, ``batch_size`` a step.

    Everything here is what a user of the stock Trainer writes; ``callbacks`` is where fastft comes in.
    """
    with tempfile.TemporaryDirectory() as folder:  # the Trainer wants a folder; nothing is saved
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch_size,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            learning_rate=LEARNING_RATE[trainable],
            lr_scheduler_type="constant",
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
            seed=seed,
        )
        timer = StepTimer(on_step)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=documents,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            callbacks=[timer, *callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        with PeakMemory() as memory:
            trainer.train()
    weights = {name: weight.detach().cpu() for name, weight in model.named_parameters() if weight.requires_grad}
    return Run(timer.losses, timer.seconds, timer.cpu_seconds, memory.bytes, weights)


def _give_back_free_memory() -> None:
    """glibc keeps gigabytes that an earlier run has freed, and they would count as this run's."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
