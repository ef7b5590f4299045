"""What a trainer does with the model of a run, where that decides whether a feature can be on."""

from __future__ import annotations

from torch import nn

from fastft_plugins.run import Run


def is_data_parallel(run: Run) -> bool:
    """Whether `nn.DataParallel` copies the model to several GPUs at each step."""
    args = getattr(run.target.trainer, "args", None)
    return isinstance(run.model, nn.DataParallel) or getattr(args, "n_gpu", 1) > 1


def makes_model_anew(run: Run) -> bool:
    """Whether the run stands around a Trainer that replaces its model when it trains."""
    return getattr(run.target.trainer, "model_init", None) is not None and not run.target.in_training
