"""The seam of mixture-of-experts models: transformers asks a registry which function computes a module's experts."""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from fastft_hf import experts_lora
from fastft_hf.foreign import foreign_home
from fastft_hf.stand_in import StandInConfig, stock_config
from fastft_hf.targets import is_data_parallel
from fastft_plugins.errors import Declined, NothingToWin
from fastft_plugins.moe.gates import why_no_gate
from fastft_plugins.run import Run

logger = logging.getLogger("fastft")

_EXPERTS_NAME = "fastft"

# What transformers may choose by itself. Whoever asks for another implementation keeps it.
_REPLACED = ("grouped_mm", "batched_mm", "eager", None)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# The function that a run put in place for an experts module. A copy of the module made meanwhile has none: it is stock.
_active: weakref.WeakKeyDictionary[nn.Module, Callable[..., Tensor]] = weakref.WeakKeyDictionary()


def inject_experts(run: Run, experts_fn: Callable[..., Tensor]) -> str | None:
    """Make the experts modules of transformers call ``experts_fn``; None if the model is not transformers' own."""
    if not any(isinstance(module, PreTrainedModel) for module in run.model.modules()):
        return None
    experts = [module for module in run.model.modules() if _is_experts(module)]
    if not experts:
        raise NothingToWin("the model has no experts behind transformers' experts interface")
    if is_data_parallel(run):
        raise Declined("DataParallel copies the experts to every GPU at each step; launch one process per GPU")
    reasons = [_why_not(module) for module in experts]
    kept = Counter(filter(None, reasons))
    served = [module for module, reason in zip(experts, reasons, strict=True) if reason is None]
    if not served:
        raise Declined("; ".join(kept))
    if ALL_EXPERTS_FUNCTIONS.get(_EXPERTS_NAME, _experts_forward) is not _experts_forward:
        raise Declined(f"another function is registered as experts implementation '{_EXPERTS_NAME}'")
    run.ledger.share("transformers' experts function 'fastft'", _register, _unregister)
    for module in served:
        _install(run, module, experts_fn)
    changes = [f"experts function in {len(served)} layers"]
    changes += experts_lora.inject_lora(run, served, experts_fn, serves)
    changes += [f"{count} experts modules stay stock: {reason}" for reason, count in kept.items()]
    return "; ".join(changes)


def serves(module: Any) -> bool:
    """Whether a forward is one that trains, by the function we replaced: an evaluation stays stock, bit for bit.

    Reentrant checkpointing runs the first forward without gradients, in training mode.
    """
    if not (module.training or torch.is_grad_enabled()):
        return False
    name = _implementation(module)
    if name != module.config._fastft_replaced:
        _warn_of_another(name)
        return False
    return True


def _is_experts(module: nn.Module) -> bool:
    """Whether transformers' decorator made this module's class ask the registry that we enter."""
    forward = inspect.getattr_static(type(module), "forward", None)
    if not inspect.isfunction(forward) or not hasattr(module, "has_gate"):
        return False
    return inspect.getclosurevars(forward).nonlocals.get("experts_interface") is ALL_EXPERTS_FUNCTIONS


def _why_not(module: Any) -> str | None:
    if isinstance(module.config, StandInConfig):
        return "another run, on a module around the model or inside it, serves them"
    implementation = module.config._experts_implementation
    if implementation not in _REPLACED:
        return f"experts implementation '{implementation}' is kept: it is none of {', '.join(filter(None, _REPLACED))}"
    home = foreign_home(ALL_EXPERTS_FUNCTIONS.get_interface(implementation, _eager(module)))
    if home is not None:
        return f"experts implementation '{implementation}' is code of {home}"
    first = "gate_up_proj" if module.has_gate else "up_proj"
    for name in (first, "down_proj"):
        weight = getattr(module, name, None)
        if not isinstance(weight, Tensor) or weight.dim() != 3:
            return f"{name} is not one weight for all experts"
        if weight.dtype not in _DTYPES:
            return f"{name} is stored as {weight.dtype}"
        if not {type(weight), type(weight.data)} <= {Tensor, nn.Parameter} and not _is_dtensor(weight):
            return f"{name} is a {type(weight.data).__name__}, which may have products of its own"
    for name, _ in module.named_parameters():  # biases begin as their weights do
        if not name.startswith((first, "down_proj", "post_expert_norm.")):
            return f"{name} is a weight of the activation of {type(module).__name__}: only stock computes its gradient"
    return why_no_gate(module)


def _install(run: Run, module: Any, experts_fn: Callable[..., Tensor]) -> None:
    names = {"_experts_implementation": _EXPERTS_NAME, "_fastft_replaced": _implementation(module)}
    run.ledger.setattr(module, "config", StandInConfig(module.config, **names))
    _active[module] = experts_fn
    reference = weakref.ref(module)

    def deactivate() -> None:
        module = reference()
        if module is not None:
            _active.pop(module, None)

    run.ledger.record("the function of an experts module", deactivate)


# Dynamo once compiled the first layer's function into all layers: it found that layer's entry of `_active` for each.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _experts_forward(module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """transformers' signature: hidden_states ``[T, H]``, top_k_index and top_k_weights ``[T, K]`` → ``[T, H]``."""
    experts_fn = _active.get(module)
    if experts_fn is None or kwargs or not serves(module) or _is_sharded(module.down_proj):
        return _stock(module)(module, hidden_states, *args, **kwargs)
    return experts_fn(module, hidden_states, *args)


def _is_sharded(weight: Tensor) -> bool:
    """Tensor parallelism leaves DTensors as weights in the forward; FSDP puts whole tensors there."""
    sharded = _is_dtensor(weight)
    if sharded:
        _warn_of_sharding()
    return sharded


def _is_dtensor(weight: Tensor) -> bool:
    return "DTensor" in (type(weight).__name__, type(weight.data).__name__)


@functools.cache  # once
def _warn_of_sharding() -> None:
    logger.warning("fastft: the experts' weights are sharded tensors in the forward; stock computes those layers")


@functools.cache  # once
def _warn_of_another(name: str | None) -> None:
    logger.warning("fastft: the experts implementation became '%s' in a run; it computes them from here on", name)


def _stock(module: Any) -> Callable[..., Tensor]:
    function: Callable[..., Tensor] = ALL_EXPERTS_FUNCTIONS.get_interface(_implementation(module), _eager(module))
    return function


def _implementation(module: Any) -> str | None:
    """The name that stock would ask the registry for."""
    name: str | None = stock_config(module)._experts_implementation
    return name


def _eager(module: Any) -> Callable[..., Tensor]:
    forward: Callable[..., Tensor] = inspect.getclosurevars(type(module).forward).nonlocals["original_forward"]
    return forward


def _register() -> None:
    ExpertsInterface.register(_EXPERTS_NAME, _experts_forward)


def _unregister() -> None:
    ExpertsInterface._global_mapping.pop(_EXPERTS_NAME, None)
