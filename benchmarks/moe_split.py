"""Where a block's time goes: matrix products and the rest, and the fewest bytes that the rest could move."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable

import torch

from benchmarks.moe_shapes import Block

_PRODUCTS = ("gemm", "cutlass", "nvjet", "_product", "_weight_grad", "grouped_matmul", "cublas")


def kernel_times(step: Callable[[], None]) -> dict[str, float]:
    """Milliseconds on the GPU in matrix products and in everything else, of one step."""
    # Otherwise every launch of the process takes longer from here on: Qwen3's LoRA at 8,192 tokens 4.9 ms for 4.2.
    os.environ["TEARDOWN_CUPTI"] = "1"
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    events = [(event.key.lower(), event.self_device_time_total / 1e3) for event in trace.key_averages()]
    products = sum(ms for name, ms in events if any(part in name for part in _PRODUCTS))
    return {"products": products, "rest": sum(ms for _, ms in events) - products}


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy on the device."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target, seconds = torch.empty_like(source), []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return 2 * source.numel() / statistics.median(seconds[2:])


def glue_bytes(block: Block, tokens: int, mode: str) -> int:
    """What must be read and written around the products, each tensor once: gathers, activation, combination.

    Per row of H hidden and I intermediate numbers: gather x 2H, activation 2I + I, combine H; in the backward gather dO
    2H, activation 2I + I + 2I, combine dx H. Trained experts add s·a (I) and x gathered again (2H), biases one more
    reading of dz and dO.
    """
    experts = block.experts
    hidden, rows = block.x.shape[-1], tokens * block.top_k
    weight = experts.down_proj
    intermediate = weight.shape[1] if experts.is_transposed else weight.shape[2]
    per_row = 6 * hidden + 8 * intermediate
    if mode == "trained":
        per_row += intermediate + 2 * hidden
        if experts.has_bias:
            per_row += 2 * intermediate + hidden
    return block.x.element_size() * (rows * per_row + 2 * tokens * hidden)
