"""The class of a module as somebody wrote it."""

from __future__ import annotations

from torch import nn


def written_class(module: nn.Module) -> type:
    """``type(module)``, or what that was before ``fully_shard`` or ``replicate`` put a class of torch's in front."""
    return next(base for base in type(module).__mro__ if not base.__module__.startswith("torch.distributed."))
