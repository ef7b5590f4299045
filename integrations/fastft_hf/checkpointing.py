"""The seam of activation checkpointing: each checkpointed layer of transformers keeps the function that it calls."""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from fastft_hf.adapter_first import AdaptersFirst, has_adapters
from fastft_plugins.errors import Declined, NothingToWin
from fastft_plugins.ledger import Ledger
from fastft_plugins.run import Run

_FUNCTION = "_gradient_checkpointing_func"
# Newer transformers says "activation" where older ones say "gradient"; an alias of the other name calls this one.
_NAMES = ("activation_checkpointing", "gradient_checkpointing")

_OFF = "activation checkpointing is not switched on"
_REENTRANT = "use_reentrant=True: set gradient_checkpointing_kwargs={'use_reentrant': False}"
_SPLIT = (
    "the model is split over processes (FSDP, ZeRO-3, tensor, context or sequence parallelism), and ranks that run "
    "other layers again would wait for each other"
)


def inject_reloader(run: Run, checkpoint_fn: Callable[..., Any]) -> str | None:
    """Make checkpointed layers call ``checkpoint_fn``; None if the model is not transformers' own."""
    if not any(isinstance(module, PreTrainedModel) for module in run.model.modules()):
        return None
    args = getattr(run.target.trainer, "args", None)
    is_later = any(getattr(args, name, False) for name in _NAMES) and not run.target.in_training
    if not is_later and not any(map(_is_checkpointed, run.model.modules())):
        raise NothingToWin(_OFF)
    if isinstance(run.model, nn.DataParallel) or getattr(args, "n_gpu", 1) > 1:
        raise Declined("DataParallel copies the layers to every GPU at each step; launch one process per GPU")
    if getattr(args, "activation_offloading", False):
        raise Declined("activation_offloading=True: TRL's own offloading copies all that is saved")
    if _is_split(run):
        raise Declined(_SPLIT)
    return (_inject_later if is_later else _inject)(run, checkpoint_fn)


def _inject(run: Run, checkpoint_fn: Callable[..., Any], ledger: Ledger | None = None) -> str:
    ledger = run.ledger if ledger is None else ledger
    modules = [module for module in run.model.modules() if _is_checkpointed(module)]
    if not modules:
        raise NothingToWin(_OFF)
    kept: Counter[str] = Counter()
    functions: dict[Any, Any] = {}  # one of ours for each of theirs
    has_lora, stores_products = has_adapters(run.model), not any(map(_is_flex, run.model.modules()))
    for module in modules:
        stock = getattr(module, _FUNCTION)
        reason = _why_not(stock)
        if reason is not None:
            kept[reason] += 1
            continue
        if stock not in functions:
            # Asked for offloading, transformers copies on the stream that computes; the one that replaces it does not.
            ours = {"offload": _offloads(stock), "stores_products": stores_products}
            function = _Checkpoint(checkpoint_fn, ours, _keywords(stock))
            functions[stock] = AdaptersFirst(function) if has_lora else function
        ledger.setattr(module, _FUNCTION, functions[stock])
    if not functions:  # the user's own choice of reentrant checkpointing is no shortcoming
        raise (NothingToWin if set(kept) == {_REENTRANT} else Declined)("; ".join(kept))
    changes = [f"checkpoint function in {len(modules) - kept.total()} modules"]
    changes += ["LoRA's last adapter of a layer runs before its base product"] if has_lora else []
    changes += [f"{count} modules keep theirs: {reason}" for reason, count in kept.items()]
    return "; ".join(changes)


def _inject_later(run: Run, checkpoint_fn: Callable[..., Any]) -> str:
    """In a block around a Trainer: checkpointing is switched on, anew, when training starts."""
    name = next(name for name in (f"{word}_enable" for word in _NAMES) if hasattr(run.model, name))
    enable, run_ref, ledger = getattr(run.model, name), weakref.ref(run), Ledger()

    @functools.wraps(enable)
    def enable_and_inject(*args: Any, **kwargs: Any) -> None:
        ledger.close()  # of the training before
        enable(*args, **kwargs)
        run = run_ref()
        if run is None or not run.active:
            return
        try:
            change = _inject(run, checkpoint_fn, ledger)
        except Declined as declined:
            run.switch_off("checkpointing", declined)
        else:
            run.report.features["checkpointing"].changes[:] = [change]

    run.ledger.setattr(run.model, name, enable_and_inject)
    run.ledger.record("the checkpoint functions of the layers", ledger.close)
    return "checkpoint function of the layers, when training switches checkpointing on"


class _Checkpoint:
    """A checkpoint function of ours in the place of a stock one. A copy or pickle, as part of a model, is stock."""

    def __init__(self, checkpoint_fn: Callable[..., Any], ours: dict[str, Any], keywords: dict[str, Any]) -> None:
        self._checkpoint_fn, self._ours, self._keywords = checkpoint_fn, ours, keywords

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._checkpoint_fn(*args, **self._keywords | kwargs, **self._ours)

    def __reduce__(self) -> Any:
        return functools.partial(functools.partial, checkpoint, **self._keywords), ()


def _is_split(run: Run) -> bool:
    """Whether the trainer splits the layers over processes; a run may start before it has done so."""
    state = getattr(getattr(run.target.trainer, "accelerator", None), "state", None)
    plugins = (getattr(state, name, None) for name in ("fsdp_plugin", "parallelism_config"))
    shards = getattr(getattr(state, "deepspeed_plugin", None), "zero_stage", 0) == 3
    return shards or any(plugin is not None for plugin in plugins) or (getattr(run.model, "tp_size", None) or 1) > 1


def _is_flex(module: nn.Module) -> bool:
    """Whether its attention is flex_attention, which is compiled inside the layer."""
    config = getattr(module, "config", None)
    config = getattr(config, "_fastft_stock_config", config)
    return getattr(config, "_attn_implementation", None) == "flex_attention"


def _is_checkpointed(module: nn.Module) -> bool:
    return bool(getattr(module, "gradient_checkpointing", False)) and _FUNCTION in vars(module)


def _why_not(stock: Any) -> str | None:
    inner = _inner(stock)
    if inner is not checkpoint and not _offloads(stock):
        return f"they call {getattr(inner, '__qualname__', type(inner).__name__)}, not torch's checkpoint"
    if _keywords(stock).get("use_reentrant") is not False:
        return _REENTRANT
    return None


def _inner(stock: Any) -> Any:
    return stock.func if isinstance(stock, functools.partial) else stock


def _offloads(stock: Any) -> bool:
    """Whether it is what transformers makes for ``offload=True``: torch's checkpoint, what it saves put on the CPU."""
    name: str = getattr(_inner(stock), "__qualname__", "")
    return name.startswith("PreTrainedModel.") and name.endswith("checkpointing_enable.<locals>.checkpoint_func")


def _keywords(stock: Any) -> dict[str, Any]:
    return dict(stock.keywords) if isinstance(stock, functools.partial) else {}
