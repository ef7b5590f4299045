"""Finds out which activation an experts module has by trying it: a new model's gate needs no entry in a list."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastft_plugins.kernels.gate import ACTIVATIONS, GATED, Gate

_WIDTH = 64
_known: weakref.WeakKeyDictionary[nn.Module, Gate] = weakref.WeakKeyDictionary()


def gate_of(module: Any) -> Gate:
    """The gate of an experts module of transformers; found once, on the CPU, then remembered."""
    gate = _known.get(module)
    if gate is None:
        gate = _known[module] = _recognise(module)
    return gate


def _recognise(module: Any) -> Gate:
    function = module._apply_gate if module.has_gate else module.act_fn
    layout = ("concatenated" if module.is_concatenated else "interleaved") if module.has_gate else "ungated"
    floats = {float(value) for value in vars(module).values() if isinstance(value, float) and value > 0}
    # Wide enough to pass every clamp, dense enough to tell the kinds of GELU apart.
    reach = 4 * max([2.0, *floats])
    # Device and dtype by name: the model may be built and run under other defaults.
    probe = torch.linspace(-reach, reach, _WIDTH * 33, dtype=torch.float32, device="cpu").reshape(33, _WIDTH)
    shuffled = torch.randperm(_WIDTH, generator=_seed(), device="cpu")
    probe = torch.cat([probe, probe / reach * 3, probe.flip(0)[:, shuffled]])
    try:
        with torch.no_grad():
            expected = function(probe)
            for gate in _candidates(layout, floats):
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


def _seed() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


def _weakly(module: Any) -> Any:
    """The module's own gate, without keeping the module alive as a value of the dictionary it is a key of."""
    reference = weakref.ref(module)

    def function(z: torch.Tensor) -> torch.Tensor:
        alive = reference()
        assert alive is not None, "a gate outlives its module only in a graph that holds the module's weights"
        result: torch.Tensor = alive._apply_gate(z) if alive.has_gate else alive.act_fn(z)
        return result

    return function
