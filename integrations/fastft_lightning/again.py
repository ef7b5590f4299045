"""Where a step is watched, and run again, in processes that train together.

In its forward, DistributedDataParallel copies buffers from the first process and readies the reduction of gradients:
once a step, and in every process. So a step is watched and repeated inside that forward, which then counts as one and
ends with the loss that is trained. The forwards of a sharded model gather weights from all processes wherever they run,
and a step may have collectives of its own (``sync_dist=True``, ``all_gather``): such a step is repeated by all
processes, or by none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from fastft_plugins.errors import FastFTError
from fastft_plugins.ledger import Ledger

_NAME = "training_step"
_ARRIVED = "fastft/again"  # in the store that the processes share
_AGREED, _GIVEN_UP = "agreed", "given up"
# The collectives of a step keep processes together, so that those that repeat it are there at nearly one time.
_PATIENCE = timedelta(seconds=60)


def watched(module: Any, watch: Callable[..., Any], run: Callable[[], Any]) -> Any:
    """Call ``run``, Lightning's way to ``module.training_step``, which then gets to ``watch`` instead.

    Args:
        watch: given the module's own ``training_step``, and its arguments.
    """
    ledger = Ledger()

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        ledger.close()  # at once, as Lightning does with `forward`: a copy of the module made in a step is stock
        return watch(getattr(module, _NAME), *args, **kwargs)

    ledger.setattr(module, _NAME, stand_in)
    try:
        return run()
    finally:
        ledger.close()


def collectives() -> int:
    """A number that grows with each collective of this process, in whatever group; read in a few microseconds."""
    if not torch.distributed.is_initialized():
        return 0
    issued = 0
    for group in torch.distributed.distributed_c10d._world.pg_map:
        for device in group._device_types:  # a group may have a backend for each, and one backend may serve several
            with contextlib.suppress(RuntimeError):  # MPI does not count
                backend: Any = group._get_backend(device)
                issued += backend._get_sequence_number_for_group()
    return issued


def agree(trainer: Any, has_collectives: bool) -> None:
    """Return once all processes are about to repeat their step, where one alone would wait for the others for ever.

    Args:
        has_collectives: whether the step to be repeated issued any.

    Raises:
        FastFTError: the others go on.
    """
    if trainer.world_size == 1 or not torch.distributed.is_initialized():
        return
    if isinstance(trainer.strategy.model, DistributedDataParallel) and not has_collectives:
        return
    # Not a collective: those who do not repeat their step would have to take part, in every step.
    store = torch.distributed.distributed_c10d._get_default_store()
    arrived = store.add(_ARRIVED, 1)
    verdict = f"{_ARRIVED}/{-(-arrived // trainer.world_size)}"  # the number of times, as all arrive each time
    is_last = arrived % trainer.world_size == 0
    if not is_last:
        with contextlib.suppress(torch.distributed.DistStoreError):
            store.wait([verdict], _PATIENCE)
    # The first one to set it decides for all: the last process may arrive just as another one loses its patience.
    if store.compare_set(verdict, "", _AGREED if is_last else _GIVEN_UP) != _AGREED.encode():
        raise FastFTError(
            "training_step returned a loss that is not the model's alone, in some processes only. It would have to be "
            "run again on the padded batch, which all of them or none can do where the model is sharded, or the step "
            "has collectives (sync_dist=True, all_gather): train with packing='off'"
        )
