"""The hooks of the TRL adapter: why packing is off in the trainers that do not sum over tokens.

TRL's trainers are transformers' Trainers, so all the rest is the transformers adapter's work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastft_plugins.errors import Declined
from fastft_plugins.hookspecs import hookimpl
from fastft_plugins.run import Run

_NOT_PACKED = {
    "DPOTrainer": "its loss compares whole sequences, row by row, and TRL itself has no padding-free DPO",
    "GRPOTrainer": "its loss weighs whole completions, row by row, and needs their log-probabilities in that shape",
    "RLOOTrainer": "its loss weighs whole completions, row by row, and needs their log-probabilities in that shape",
    "KTOTrainer": "its loss compares whole sequences, row by row",
    "RewardTrainer": "it scores whole sequences by their last token, row by row",
}


@hookimpl
def fastft_inject_metadata(run: Run, wrap_collator: Callable[[Any], Any]) -> str | None:
    for base in type(run.target.trainer).__mro__:
        if base.__module__.startswith("trl.") and base.__name__ in _NOT_PACKED:
            raise Declined(f"{base.__name__} trains on padded batches: {_NOT_PACKED[base.__name__]}")
    return None
