"""Finds out which activation an experts module has by trying it: a new model's gate needs no entry in a list."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastft_plugins.kernels.gate import ACTIVATIONS, GATED, Gate

_WIDTH = 64
_FURTHEST = 4.0  # a power of ten: no activation clamps beyond it

# By experts module: what its gate was made of, and the gate. A loop may change it between two forwards.
_known: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Gate]] = weakref.WeakKeyDictionary()


def gate_of(module: Any) -> Gate:
    """The gate of an experts module of transformers; found once, on the CPU, then remembered while it is the same."""
    parts = _parts(module)
    known = _known.get(module)
    if known is None or known[0] != parts:
        known = _known[module] = parts, _recognise(module)
    return known[1]


def why_no_gate(module: Any) -> str | None:
    """The reason if the module's activation does not give the same each time: the backward computes it again."""
    act_fn = getattr(module, "act_fn", None)
    inside = list(act_fn.modules()) if isinstance(act_fn, nn.Module) else []
    modes = [part.training for part in inside]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for part in inside:
                part.training = True
            first, second = (_function(module)(_probe(module)) for _ in range(2))
    except Exception:  # it works in the model, just not on the probe
        return None
    finally:
        for part, mode in zip(inside, modes, strict=True):
            part.training = mode
    same = torch.equal(first.nan_to_num(), second.nan_to_num())
    return None if same else f"the activation of {type(module).__name__} is random, and the backward computes it again"


def _function(module: Any) -> Callable[[Tensor], Tensor]:
    function: Callable[[Tensor], Tensor] = module._apply_gate if module.has_gate else module.act_fn
    return function


def _parts(module: Any) -> tuple[Any, ...]:
    """What changes when somebody replaces the activation, or one of its numbers. Asked in every forward."""
    act_fn = getattr(module, "act_fn", None)
    replaced = vars(module).get("_apply_gate")  # by its id: it may be a method that would keep the module alive
    return act_fn, replaced and id(replaced), *_floats(module), *_numbers(act_fn)


def _floats(module: Any) -> list[float]:
    return [value for value in vars(module).values() if type(value) is float]


def _numbers(part: Any) -> list[float]:
    return [value for value in getattr(part, "__dict__", {}).values() if type(value) in (float, int)]


def _probe(module: Any) -> Tensor:
    """Rows to try a gate on: dense enough to tell the kinds of GELU apart, and wide enough to pass every clamp."""
    reach = 4 * max([2.0, *_floats(module)])
    # Device and dtype by name: the model may be built and run under other defaults.
    near = torch.linspace(-reach, reach, _WIDTH * 33, dtype=torch.float32, device="cpu").reshape(33, _WIDTH)
    generator = torch.Generator("cpu").manual_seed(0)
    shuffled = torch.randperm(_WIDTH, generator=generator, device="cpu")
    powers = torch.linspace(-_FURTHEST, _FURTHEST, _WIDTH * 33, dtype=torch.float32, device="cpu")
    far = powers.sign() * 10 ** powers.abs()
    far = far[torch.randperm(far.numel(), generator=generator, device="cpu")].reshape(33, _WIDTH)
    return torch.cat([near, near / reach * 3, near.flip(0)[:, shuffled], far])


def _recognise(module: Any) -> Gate:
    layout = ("concatenated" if module.is_concatenated else "interleaved") if module.has_gate else "ungated"
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            probe = _probe(module)
            expected = _function(module)(probe)
            for gate in _candidates(layout, {value for value in _floats(module) if value > 0}):
                got = gate(probe)
                if got.shape == expected.shape and torch.allclose(got, expected.to(got.dtype), rtol=1e-5, atol=1e-6):
                    return gate
    except Exception:  # a gate with weights on another device, say: it works in the model, just not on the probe
        pass
    return Gate("other", layout, function=_weakly(module))


def _candidates(layout: str, floats: set[float]) -> Iterator[Gate]:
    if layout == "ungated":
        yield from (Gate(kind, layout) for kind in ACTIVATIONS)
        return
    for other in (layout, "concatenated", "interleaved"):
        yield from (Gate(kind, other) for kind in GATED if kind in ACTIVATIONS)
        yield from (Gate("limited_silu", other, limit=limit) for limit in floats)
        yield from (Gate("clamped_swiglu", other, alpha, limit) for alpha, limit in itertools.product(floats, repeat=2))


def _weakly(module: Any) -> Callable[[Tensor], Tensor]:
    """The module's own gate, without keeping the module alive as a value of the dictionary it is a key of."""
    reference = weakref.ref(module)

    def function(z: Tensor) -> Tensor:
        alive = reference()
        assert alive is not None, "a gate outlives its module only in a graph that holds the module's weights"
        return _function(alive)(z)

    return function
