"""The two runs, and everything measured in them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastft_plugins.demo import data
from fastft_plugins.demo.figures import batch_tokens, relative_difference, run_figures, weight_differences
from fastft_plugins.demo.model import check_folder, load, trainable
from fastft_plugins.errors import FastFTConfigError

Say = Callable[[str], None]
_LARGEST_SEED = 2**32 - 1  # numpy takes no larger one


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
        for name, least in (("steps", 1), ("batch_size", 1), ("max_length", 2), ("seed", 0)):
            value, option = getattr(self, name), name.replace("_", "-")  # the errors name what users type
            if value is not None and value < least:
                raise FastFTConfigError(f"--{option} {value}: must be at least {least}")
        if self.seed > _LARGEST_SEED:
            raise FastFTConfigError(f"--seed {self.seed}: must be at most {_LARGEST_SEED}")
        if self.trainable not in ("lora", "full"):
            raise FastFTConfigError(f"--trainable {self.trainable}: is not allowed; allowed: 'lora', 'full'")

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
    # Look at the paths and read the data first: their errors should not wait until a model has been loaded.
    if settings.model is not None:
        check_folder(settings.model)
    count = steps * settings.batch_size
    if settings.data is None:
        source, records = "Python's standard library, docstring → body", data.standard_library(2 * count, settings.seed)
    else:
        source, records = str(settings.data), data.read_jsonl(settings.data)

    from fastft_plugins import FastFTCallback
    from fastft_plugins.cli.environment import environment

    try:
        from transformers import set_seed

        from fastft_plugins.demo.train import train
    except ImportError as error:
        raise ImportError(f"the demo needs '{error.name}': pip install 'fastft-plugins[demo]'") from error

    # LoRA leaves the base weights alone, so on a GPU they can be bf16; weights that are trained stay fp32.
    on_gpu = torch.cuda.is_available()
    say("loading the model ...")
    base, tokenizer, model_name = load(
        settings.model, torch.bfloat16 if on_gpu and settings.trainable == "lora" else torch.float32
    )
    usable = data.documents(records, tokenizer, max_length, count, source)
    documents = data.repeated(usable, count)
    if len(usable) < count:
        source += f" ({len(usable)} usable records, repeated until there are {count})"
        say(f"data: {source}")
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
    stock, fastft = (run_figures(run, real) for run in runs.values())
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
            relative_difference(ours, theirs)
            for ours, theirs in zip(runs["fastft"].losses, runs["stock"].losses, strict=True)
        ),
        **weight_differences(runs["stock"].weights, runs["fastft"].weights, start),
        "fastft_report": callback.report.to_dict(),
        "environment": environment(),
    }
