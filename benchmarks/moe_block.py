"""One mixture-of-experts block, router included, forward and backward: stock and fastft in turn, in one process.

    python -m benchmarks.moe_block --out benchmarks/results/NAME.json
    python -m benchmarks.moe_block --cases qwen3-30b-a3b:32768:frozen,gpt-oss-20b:8192:lora --routing skewed

A case is SHAPE:TOKENS:MODE. In the mode "frozen" only the block's input and router are trained, in "trained" the
experts too, and in "lora" adapters of rank 16 on both expert weights, through PEFT's ``target_parameters``. Routing is
the router's own ("balanced"), or one expert takes 30 % of the rows ("skewed", not with LoRA). With ``--peers`` two
open-source peers take turns too, see `benchmarks.moe_peers`, each once its results have agreed with stock's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import describe_command, describe_environment
from benchmarks.moe_peers import PEERS, check, recorded, register, suits
from benchmarks.moe_shapes import CASES, SHAPES, Block, build_block, skewed_ids
from benchmarks.moe_split import copy_bandwidth, glue_bytes, kernel_times

_HEADER = "{:<16} {:>6} {:<8} {:<9} {:>9} {:>9} {:>7} {:<18} {:>15} {:>20}"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    result: dict[str, Any] = {
        **describe_command("moe_block", arguments),
        "environment": describe_environment(device),
        "peers": register() if options.peers else {},
        "copy_bandwidth": copy_bandwidth() if device.type == "cuda" else None,
        "cases": [],
    }
    print(_HEADER.format("shape", "tokens", "experts", "routing", "stock ms", "fastft ms", "faster", "(each turn)",
                         "peak GB", "rest ms / its bytes"), flush=True)  # fmt: skip
    peers = [name for name, state in result["peers"].items() if "error" not in state]
    for case in options.cases:
        for routing in options.routing if case[2] != "lora" else ["balanced"]:
            entry = measure(case, routing, device, options, peers)
            result["cases"].append(entry)
            print(row(entry), flush=True)
            for peer, state in entry["peers"].items():
                print(f"  {peer}: {peer_row(entry, peer)}" if "error" not in state else f"  {peer}: failed", flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def measure(
    case: tuple[str, int, str], routing: str, device: torch.device, options: argparse.Namespace, peers: list[str]
) -> dict[str, Any]:
    shape, tokens, mode = case
    block = build_block(shape, tokens, mode, device)
    if routing == "skewed":
        block.force(skewed_ids(block, tokens))
    entry: dict[str, Any] = {
        "shape": shape,
        "tokens": tokens,
        "mode": mode,
        "routing": routing,
        "ms": {},
        "peak": {},
        "gpu_ms": {},
        "peers": {},
    }
    stacks = ["stock", "fastft", *(["eager"] if options.eager and mode != "lora" else [])]
    for peer in peers if mode != "lora" and suits(block) else []:
        with recorded(peer, entry["peers"]):
            entry["peers"][peer] = check(block, peer)
            stacks.append(peer)
    for stack in stacks:
        with recorded(stack, entry["peers"]), block.running(stack) as report:
            _times(block, 2)
            if device.type == "cuda":
                entry["peak"][stack] = _peak(block)
            if stack == "fastft":
                entry["report"] = report
    for _ in range(options.turns):
        for stack in stacks:
            if "error" in entry["peers"].get(stack, {}):
                continue
            with recorded(stack, entry["peers"]), block.running(stack):
                _times(block, 1)
                entry["ms"].setdefault(stack, []).append(statistics.median(_times(block, options.steps)))
    for stack in stacks:
        if device.type == "cuda" and stack not in PEERS:  # whose kernels are of other names, and some do both
            with block.running(stack):
                _times(block, 1)
                block.forget_grads()
                entry["gpu_ms"][stack] = kernel_times(block.step)
    entry["glue_bytes"] = glue_bytes(block, tokens, mode)
    del block
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return entry


def row(entry: dict[str, Any]) -> str:
    case = (entry["shape"], entry["tokens"], entry["mode"], entry["routing"])
    stock, ours = (statistics.median(entry["ms"][stack]) for stack in ("stock", "fastft"))
    each = " ".join(f"{a / b:.2f}" for a, b in zip(entry["ms"]["stock"], entry["ms"]["fastft"], strict=True))
    peak, gpu = entry["peak"], entry["gpu_ms"].get("fastft")
    memory = f"{peak['stock'] / 1e9:.2f} → {peak['fastft'] / 1e9:.2f}" if gpu else "–"
    rest = f"{gpu['rest']:.2f} / {entry['glue_bytes'] / 4.3e9:.2f}" if gpu else "–"
    faster = f"{stock / ours:.2f}×"
    return _HEADER.format(*case, f"{stock:.2f}", f"{ours:.2f}", faster, f"({each})", memory, rest)


def peer_row(entry: dict[str, Any], peer: str) -> str:
    ms = {stack: statistics.median(entry["ms"][stack]) for stack in ("stock", "fastft", peer)}
    peak = f", peak {entry['peak'][peer] / 1e9:.2f} GB" if peer in entry["peak"] else ""
    distances = ", ".join(f"{name} {distance:.1e}" for name, distance in entry["peers"][peer].items())
    faster = f"{ms['stock'] / ms[peer]:.2f}× stock, fastft {ms[peer] / ms['fastft']:.2f}× of it"
    return f"{ms[peer]:.2f} ms ({faster}){peak}; from stock: {distances}"


def _times(block: Block, steps: int) -> list[float]:
    """Milliseconds of each forward and backward, the steps right after one another, as in training."""
    if not block.x.is_cuda:
        return [_clock(block) for _ in range(steps)]
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(steps)]
    for start, end in marks:
        block.forget_grads()
        start.record()
        block.step()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in marks]


def _clock(block: Block) -> float:
    block.forget_grads()
    began = time.perf_counter()
    block.step()
    return (time.perf_counter() - began) * 1e3


def _peak(block: Block) -> int:
    """Bytes above what the block, its input and its output gradient hold, at the worst moment of a step."""
    block.forget_grads()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    block.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.moe_block", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cases", type=_cases, default=CASES, metavar="A,B", help=f"SHAPE:TOKENS:MODE (shapes: {', '.join(SHAPES)})")
    add("--routing", type=lambda text: text.split(","), default=["balanced", "skewed"], metavar="A,B")
    add("--turns", type=int, default=3, help="A B A B: how often each stack has its turn (3)")
    add("--steps", type=int, default=9, help="of one turn; its median counts (9)")
    add("--eager", action="store_true", help="stock's eager loop over experts as well")
    add("--peers", action="store_true", help=f"{' and '.join(PEERS)} as well, where they can be imported")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, default=Path("moe_block.json"))
    return parser.parse_args(arguments)


def _cases(text: str) -> list[tuple[str, int, str]]:
    cases = []
    for case in text.split(","):
        shape, tokens, mode = case.split(":")
        if shape not in SHAPES or mode not in ("frozen", "trained", "lora"):
            raise argparse.ArgumentTypeError(f"{case}: the shape or the mode is unknown")
        cases.append((shape, int(tokens), mode))
    return cases


if __name__ == "__main__":
    sys.exit(main())
