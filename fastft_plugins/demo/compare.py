"""The two runs, and the figures that compare them."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastft_plugins.demo import data
from fastft_plugins.errors import FastFTConfigError

Say = Callable[[str], None]


@dataclass(frozen=True)
class DemoSettings:
    """What to train on what. A ``steps`` or ``max_length`` of None is chosen by the hardware."""

    model: Path | None = None  # a local Hugging Face model; None: SmolLM2-135M-Instruct
    data: Path | None = None  # a JSONL file; None: Python's standard library
    steps: int | None = None
    batch_size: int = 8
    max_length: int | None = None  # tokens; longer documents are cut
    trainable: str = "lora"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("max_length", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise FastFTConfigError(f"{name}={value}: must be at least {least}")
        if self.trainable not in ("lora", "full"):
            raise FastFTConfigError(f"trainable={self.trainable!r} is not allowed; allowed: 'lora', 'full'")

    def resolved(self) -> tuple[int, int]:
        """Return steps and max_length. On two CPU cores a stock step takes half a minute or more."""
        steps, max_length = (40, 1024) if torch.cuda.is_available() else (5, 384)
        return self.steps or steps, self.max_length or max_length


def run_demo(settings: DemoSettings, say: Say = print) -> dict[str, Any]:
    """Train twice, first stock and then with fastft; return everything measured, ready for JSON.

    Raises:
        FastFTConfigError: a path, a record or a setting cannot be used; the message says what to do.
    """
    steps, max_length = settings.resolved()
    # Read the data first: its errors should not wait until a model has been loaded.
    count = steps * settings.batch_size
    if settings.data is None:
        source, records = "Python's standard library, docstring → body", data.standard_library(2 * count, settings.seed)
    else:
        source, records = str(settings.data), data.read_jsonl(settings.data)

    from fastft_plugins import FastFTCallback
    from fastft_plugins.cli.environment import environment

    try:
        from transformers import set_seed

        from fastft_plugins.demo.model import load, trainable
        from fastft_plugins.demo.train import train
    except ImportError as error:
        raise ImportError(f"the demo needs '{error.name}': pip install 'fastft-plugins[demo]'") from error

    # LoRA leaves the base weights alone, so on a GPU they can be bf16; weights that are trained stay fp32.
    on_gpu = torch.cuda.is_available()
    say("loading the model ...")
    base, tokenizer, model_name = load(
        settings.model, torch.bfloat16 if on_gpu and settings.trainable == "lora" else torch.float32
    )
    documents = data.batches(records, tokenizer, max_length, count, source)
    callback = FastFTCallback()
    runs = {}
    start: dict[str, torch.Tensor] = {}
    for name, callbacks in (("stock", []), ("fastft", [callback])):
        say(f"{name}: {steps} steps of {settings.batch_size} documents")
        set_seed(settings.seed)
        model = trainable(copy.deepcopy(base), settings.trainable)
        start = {key: weight.detach().clone() for key, weight in model.named_parameters() if weight.requires_grad}
        every = max(1, steps // 10)

        def on_step(step: int, loss: float, seconds: float, every: int = every) -> None:
            if step % every == 0 or step == 1:
                say(f"  step {step}/{steps}   loss {loss:.4f}   {seconds:.2f} s")

        runs[name] = train(
            model,
            tokenizer,
            documents,
            batch_size=settings.batch_size,
            trainable=settings.trainable,
            seed=settings.seed,
            on_step=on_step,
            callbacks=callbacks,
        )
        del model

    real, padded = batch_tokens(documents, settings.batch_size)
    stock, fastft = (
        {
            "losses": run.losses,
            "step_seconds": run.step_seconds,
            "median_step_seconds": statistics.median(_warm(run.step_seconds)),
            "real_tokens_per_second": sum(_warm(real)) / sum(_warm(run.step_seconds)),
            "peak_memory_bytes": run.peak_memory_bytes,
        }
        for run in runs.values()
    )
    return {
        "kind": "fastft demo",
        "model": model_name,
        "data": source,
        "trained": "LoRA, r=16, all linear layers" if settings.trainable == "lora" else "all weights",
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()}
        | {"steps": steps, "max_length": max_length},
        "real_tokens": real,
        "padded_tokens": padded,
        "padding_share": 1 - sum(real) / sum(padded),
        "stock": stock,
        "fastft": fastft,
        "speedup": fastft["real_tokens_per_second"] / stock["real_tokens_per_second"],
        "largest_relative_loss_difference": max(
            abs(ours - theirs) / abs(theirs)
            for ours, theirs in zip(runs["fastft"].losses, runs["stock"].losses, strict=True)
        ),
        **weight_differences(runs["stock"].weights, runs["fastft"].weights, start),
        "fastft_report": callback.report.to_dict(),
        "environment": environment(),
    }


def batch_tokens(documents: list[dict[str, Any]], batch_size: int) -> tuple[list[int], list[int]]:
    """Return for each batch its tokens without and with padding to the longest document."""
    lengths = [len(document["input_ids"]) for document in documents]
    rows = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    return [sum(row) for row in rows], [max(row) * len(row) for row in rows]


def weight_differences(
    stock: dict[str, torch.Tensor], fastft: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Return the largest difference of one trained weight, and the difference as a share of what training changed."""
    largest = difference = update = 0.0
    for name, weight in stock.items():
        delta = (fastft[name] - weight).double()
        largest = max(largest, delta.abs().max().item())
        difference += delta.square().sum().item()
        update += (weight.double() - start[name].double()).square().sum().item()
    return {
        "largest_weight_difference": largest,
        "weight_difference_over_update": (difference / update) ** 0.5 if update else 0.0,
    }


def _warm(values: list[Any]) -> list[Any]:
    """Leave the first step out, which warms up, where enough remain."""
    return values[1:] if len(values) >= 3 else values
