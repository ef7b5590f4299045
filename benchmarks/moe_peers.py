"""Open-source peers of the block benchmark: Liger-Kernel's fused MoE, and ScatterMoE as the axolotl wheel carries it.

Neither is part of fastft or of its requirements: a peer counts where it can be imported, as an experts function of
transformers. Both know the layout of concatenated SwiGLU alone, and both compute the experts' weight gradients also
where the experts are frozen, so "trained" is the mode in which every stack does the same work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from benchmarks.moe_shapes import Block

TOLERANCE = 2e-2  # of a peer's result from stock's, by the norm, in bfloat16


def _liger() -> Callable[..., Tensor]:
    from liger_kernel.ops import LigerFusedMoEFunction

    def experts_forward(module: Any, hidden_TH: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor) -> Tensor:
        ids_TK = top_k_index_TK.to(torch.int32)  # as Liger's own LigerExperts does
        out_TH: Tensor = LigerFusedMoEFunction.apply(
            hidden_TH, module.gate_up_proj, module.down_proj, ids_TK, top_k_weights_TK
        )
        return out_TH

    return experts_forward


def _scattermoe() -> Callable[..., Tensor]:
    from axolotl.integrations.kernels.libs.scattermoe_lora.experts import scattermoe_experts_forward

    function: Callable[..., Tensor] = scattermoe_experts_forward  # written for transformers' interface
    return function


PEERS = {"liger": ("liger-kernel", _liger), "scattermoe": ("axolotl", _scattermoe)}


def register() -> dict[str, dict[str, str]]:
    """Make the peers experts implementations of their names; by name, the version, or the error of an import."""
    from transformers.integrations.moe import ExpertsInterface

    states: dict[str, dict[str, str]] = {}
    for name, (distribution, load) in PEERS.items():
        with recorded(name, states):
            ExpertsInterface.register(name, load())
            states[name] = {distribution: metadata.version(distribution)}
    return states


@contextlib.contextmanager
def recorded(stack: str, states: dict[str, Any]) -> Iterator[None]:
    """Within it, a peer's exception is printed, becomes its state and goes no further; other stacks' pass."""
    try:
        yield
    except Exception as error:
        if stack not in PEERS:
            raise
        states[stack] = {"error": f"{type(error).__name__}: {error}"[:1000]}
        print(f"  {stack}: {states[stack]['error']}", flush=True)


def suits(block: Block) -> bool:
    experts = block.experts
    plain = experts.has_gate and experts.is_concatenated and not experts.is_transposed and not experts.has_bias
    return bool(plain and experts.config.hidden_act == "silu")


def check(block: Block, peer: str) -> dict[str, float]:
    """How far each of a step's results is from stock's, by the norm; raises ValueError beyond the tolerance."""
    ours, stock = _results(block, peer), _results(block, "stock")
    block.forget_grads()
    norm = torch.linalg.vector_norm
    distances = {
        name: float(norm(ours[name] - each, dtype=torch.float32) / norm(each, dtype=torch.float32))
        for name, each in stock.items()
    }
    if not all(distance <= TOLERANCE for distance in distances.values()):  # NaN fails, too
        raise ValueError(f"the results are wrong, by {distances} of stock's norm")
    return distances


def _results(block: Block, stack: str) -> dict[str, Tensor]:
    """The output and the gradients of the input and of trained experts."""
    block.forget_grads()
    with block.running(stack):
        out = block.block(block.x)
        out = out[0] if isinstance(out, tuple) else out
        out.backward(block.dout)
    grads = {name: weight.grad for name, weight in block.experts.named_parameters() if weight.requires_grad}
    return {"out": out.detach(), "dx": block.x.grad, **grads}
