"""Where a step is watched, and run again, in processes that train together.

In its forward, DistributedDataParallel copies buffers from the first process and readies the reduction of gradients:
once a step, and in every process. So a step is watched and repeated inside that forward, which then counts as one and
ends with the loss that is trained. The forwards of a sharded model gather weights from all processes wherever they run:
there a step is repeated by all processes, or by none.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from fastft_plugins.errors import FastFTError
from fastft_plugins.ledger import Ledger

_NAME = "training_step"
_ARRIVED = "fastft/again"  # in the store that the processes share
# The forwards of a sharded model keep processes in step, so that those that repeat it are there at nearly one time.
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


def agree(trainer: Any) -> None:
    """Return once all processes are about to repeat their step, where one alone would wait for the others for ever.

    Raises:
        FastFTError: the others go on.
    """
    is_alone = trainer.world_size == 1 or not torch.distributed.is_initialized()
    if is_alone or isinstance(trainer.strategy.model, DistributedDataParallel):
        return
    # Not a collective: those who do not repeat their step would have to take part, in every step.
    store = torch.distributed.distributed_c10d._get_default_store()
    arrived = store.add(_ARRIVED, 1)
    all_have = f"{_ARRIVED}/{-(-arrived // trainer.world_size)}"  # the number of times, as all arrive each time
    if arrived % trainer.world_size == 0:
        store.set(all_have, "")
    try:
        store.wait([all_have], _PATIENCE)
    except torch.distributed.DistStoreError as error:
        store.add(_ARRIVED, -1)
        raise FastFTError(
            "training_step returned a loss that is not the model's alone, in some processes only. It would have to be "
            "run again on the padded batch, which a sharded model can do in all of them or none: train with "
            "packing='off'"
        ) from error
