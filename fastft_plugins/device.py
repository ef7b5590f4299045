"""Where a model is going to be trained: on which device, in which process."""

from __future__ import annotations

import torch
from torch import nn


def training_device(model: nn.Module) -> torch.device | None:
    """The device of its first parameter; None if it has none.

    A model on meta has no memory yet: `fastft doctor` asks about it, or it is going to be filled later. Its device is
    taken to be the one that this machine trains on.
    """
    parameter = next(model.parameters(), None)
    if parameter is None:
        return None
    return parameter.device if parameter.device.type != "meta" else this_machine()


def this_machine() -> torch.device:
    """The current GPU, or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def share_of_processes() -> str | None:
    """Which of several processes of `torch.distributed` this one is, in words; None where it is the only one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    processes = torch.distributed.get_world_size()
    return f"process {torch.distributed.get_rank()} of {processes}, counted from 0" if processes > 1 else None
