"""LoRA on the experts through PEFT's ``target_parameters``, without the sum of the weight and its update.

PEFT wraps an experts module once for each adapted weight, and in every forward makes W + scale · B·A for all experts.
Here the outermost wrapper hands the factors to the experts function instead.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastft_plugins.run import Run

# What `_is_plain` refuses, in words.
_NOT_PLAIN = "not one active adapter alone, or a hook or another forward on its module"


def inject_lora(
    run: Run, experts: Sequence[nn.Module], experts_fn: Callable[..., Tensor], serves: Callable[[nn.Module], bool]
) -> list[str]:
    """Replace the forward of the outermost wrapper of each of ``experts`` that has one; returns what that changes."""
    wrappers = [module for module in run.model.modules() if type(module).__name__ == "ParamWrapper"]
    inner = {id(wrapper.base_layer) for wrapper in wrappers}
    served = {id(module) for module in experts}
    plain = merging = 0
    for wrapper in wrappers:
        if id(wrapper) in inner or id(_chain(wrapper)[-1]) not in served:
            continue
        if all(map(_is_plain, _chain(wrapper))):
            plain += 1
        else:  # for now
            merging += 1
        if "forward" not in vars(wrapper):
            run.ledger.setattr(wrapper, "forward", _Forward(wrapper, experts_fn, serves))
    changes = [f"LoRA on the experts of {plain} layers (W + ΔW is never made)"] if plain else []
    changes += [f"LoRA on the experts of {merging} layers is PEFT's own: {_NOT_PLAIN}"] if merging else []
    return changes


class _Forward:
    """The forward of a wrapper. A copy or pickle of it is the stock forward of the wrapper's copy."""

    def __init__(self, wrapper: Any, experts_fn: Callable[..., Tensor], serves: Callable[[nn.Module], bool]) -> None:
        self._wrapper, self._experts_fn, self._serves = weakref.ref(wrapper), experts_fn, serves
        functools.update_wrapper(self, type(wrapper).forward)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        wrapper: Any = self._wrapper()
        *wrappers, module = _chain(wrapper)
        if (
            kwargs
            or _has_any_global_hook()
            or not self._serves(module)
            or not all(_is_plain(each, ours=each is wrapper) for each in (*wrappers, module))
        ):
            return type(wrapper).forward(wrapper, hidden_states, *args, **kwargs)
        lora = {each.parameter_name: _factors(each) for each in wrappers}
        return self._experts_fn(module, hidden_states, *args, lora=lora)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return getattr, (self._wrapper(), "forward")  # the copy's own attributes are not set yet


def _chain(wrapper: Any) -> list[Any]:
    """The wrapper, those inside it, and the experts module inside all of them."""
    chain = [wrapper]
    while type(chain[-1]).__name__ == "ParamWrapper":
        chain.append(chain[-1].base_layer)
    return chain


def _is_plain(module: Any, ours: bool = False) -> bool:
    """Whether nothing but one active adapter stands between the experts and their input; ``ours``: our forward."""
    if "forward" in vars(module) and not ours:
        return False
    if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)):
        return False
    if type(module).__name__ != "ParamWrapper":
        return True
    active = [name for name in module.active_adapters if name in module.lora_A]
    return len(active) == 1 and module.num_experts > 1 and not module.disable_adapters and not module.merged


def _factors(wrapper: Any) -> tuple[Tensor, Tensor]:
    """LoRA's factors as they multiply rows: ``[E, in, R]``, and ``[E, R, out]`` with the scale."""
    (adapter,) = (name for name in wrapper.active_adapters if name in wrapper.lora_A)
    experts, dtype = wrapper.num_experts, wrapper.get_param().dtype
    a_ERI = wrapper.lora_A[adapter].weight.unflatten(0, (experts, -1))
    b_ORE = wrapper.lora_B[adapter].weight.unflatten(1, (-1, experts))
    b_ERO = (b_ORE.permute(2, 1, 0) * wrapper.scaling[adapter]).contiguous()
    return a_ERI.transpose(1, 2).to(dtype), b_ERO.to(dtype)
