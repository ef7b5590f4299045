"""The whole contract between the features and the trainers they serve.

A plugin is a module or an object with functions marked by `hookimpl` and named as below. It is found through the
entry-point group ``fastft``. Every change that a hook makes to somebody else's object goes through ``run.ledger``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from fastft_plugins.kernels.dispatch import Kernel
    from fastft_plugins.run import Feature, Run, Target

hookspec = pluggy.HookspecMarker("fastft")
hookimpl = pluggy.HookimplMarker("fastft")


@hookspec(firstresult=True)
def fastft_matches(target: Any) -> Target | bool | None:
    """Is this trainer yours? Return a `Target` (or True if it has a ``.model``); None leaves it to other plugins."""


@hookspec
def fastft_features() -> Sequence[Feature]:
    """Return the features you bring; each decides for a run whether it is on, and says why."""


@hookspec
def fastft_kernels(op: str) -> Sequence[Kernel]:
    """Return your kernels for the operation ``op`` ("attention", ...), each with its own test of what it can run."""


@hookspec
def fastft_inject_metadata(run: Run, wrap_collator: Callable[..., Any]) -> str | None:
    """Put packed-sequence metadata into the run's batches and model.

    ``wrap_collator(collator)`` returns the collator to use instead; with ``move_positions=False`` it keeps batches
    padded in which padding stands before a document. Return what you changed in a few words, or None if nothing here
    is yours; raise `Declined` with the reason if packing cannot be exact here.
    """


@hookspec
def fastft_inject_reloader(run: Run, checkpoint_fn: Callable[..., Any]) -> str | None:
    """Make the run's activation checkpointing call ``checkpoint_fn``, which has `torch.utils.checkpoint`'s signature.

    With ``offload=True`` beside it, for users who asked for that, it keeps the inputs of checkpointed layers in host
    memory; otherwise it decides.

    Return what you changed in a few words, or None; raise `Declined` with the reason if it cannot be done here.
    """


@hookspec
def fastft_inject_router(run: Run, experts_fn: Callable[..., Any]) -> str | None:
    """Make the run's mixture-of-experts modules call ``experts_fn``.

    Its arguments are ``(module, hidden_TH, top_k_index_TK, top_k_weights_TK)``. Return what you changed in a few
    words, or None; raise `Declined` with the reason if it cannot be done here.
    """
