"""What one comparison measures. Every process of a comparison reads the same settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Settings:
    shape: str = "llama-1b"
    layers: int | None = None  # None: as many as the shape has
    dtype: str = "bf16"
    device: str = "auto"
    trainable: str = "lora"
    quantize: str | None = None  # "nf4": the linear layers' weights, which adapters are then trained on
    checkpointing: bool = True
    tokens: int = 8192  # real tokens of one step, about
    lengths: str = "loguniform-64-1024"
    accumulate: int = 1  # the documents of a step are split into this many batches
    warmup: int = 3
    steps: int = 10
    split_steps: int = 3  # extra steps that time forward and backward apart
    seed: int = 0
    budget: float = 300.0  # seconds one process may take
    cap: float | None = None  # GB of GPU memory that a process may use; None: all there is
    weights: str | None = None  # a folder of weights to load, in place of making them

    @property
    def total_steps(self) -> int:
        return self.warmup + self.steps + self.split_steps

    def torch_device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    def torch_dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.dtype]


# Runs in seconds on a CPU: proves that the harness works, measures nothing worth reporting.
SMOKE: dict[str, Any] = {
    "shape": "tiny-llama",
    "dtype": "fp32",
    "device": "cpu",
    "trainable": "full",
    "checkpointing": False,
    "tokens": 512,
    "lengths": "loguniform-16-128",
    "warmup": 1,
    "steps": 2,
    "split_steps": 1,
}
