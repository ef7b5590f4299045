"""Forward and backward under different plans of activation checkpointing: gradients, time and memory of each.

    python -m benchmarks.checkpoint_sweep --out benchmarks/results/NAME.json
    python -m benchmarks.checkpoint_sweep --shape llama-8b --liger --cap 40 --plans plain,offload,every-4

A shape with random bf16 weights, LoRA of rank 16 on all linear layers, and one packed row of documents of up to 4,096
tokens (``--longest``). So that the logits do not decide the memory, the vocabulary is the shape's own with Liger's
fused cross-entropy (``--liger``), or a small one. The plans (`benchmarks.checkpoint_plans`) take turns on one model, in
several rounds. Before a plan is timed, its gradients under deterministic algorithms are compared with those of the
first plan, by default ``plain``, torch's checkpointing. That one is run twice, to see whether it repeats itself.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.checkpoint_plans import Plans
from benchmarks.environment import describe_command, describe_environment
from benchmarks.settings import Settings
from benchmarks.shapes import SHAPES, build_model
from fastft_plugins import apply
from fastft_plugins.checkpointing.planned import PlannedCheckpoint
from fastft_plugins.checkpointing.planner import Plan
from fastft_plugins.packing import PaddingFreeCollator

_ROW = "{:<18} {:>9} {:>7} {:>8} {:>9}  {}"
_MOST_STEPS = 16  # in which a plan settles


def main(arguments: list[str] | None = None) -> int:
    began = time.perf_counter()
    options = parse(arguments)
    device = Settings(device=options.device).torch_device()
    if device.type == "cuda":  # for deterministic products; read when CUDA starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    limit_memory(device, options.cap)
    model = make_model(options)
    batch = make_batch(options.tokens, options.vocab, device, options.longest, options.seed)
    result: dict[str, Any] = {
        **describe_command("checkpoint_sweep", arguments),
        "environment": describe_environment(device),
        "settings": {name: value for name, value in vars(options).items() if name not in ("out", "device")},
        "lengths": list(batch["fastft_metadata"].lengths),
        "weights_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "plans": {},
    }
    print(_ROW.format("plan", "step ms", "speed", "peak GB", "after fwd", "gradients"), flush=True)
    with apply(model, {"packing": "on", "checkpointing": "off", "moe": "off"}):
        plans = Plans(model)
        truth: dict[str, Tensor] = {}
        for turn in range(options.rounds):
            for name in options.plans or plans.names:
                outcome = result["plans"].setdefault(name, {"status": "ok"})
                if time.perf_counter() - began > options.budget:
                    outcome["status"] = "skipped: out of time" if "median_ms" not in outcome else "ok"
                elif outcome["status"] == "ok":
                    measure(name, plans, model, batch, truth, outcome, options)
                    print(row(name, outcome, result["plans"]), flush=True)
                    if turn == 0 and "explanation" in outcome:
                        print("    " + outcome["explanation"], flush=True)
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    options.out.write_text(json.dumps(result, indent=1) + "\n")
    wrong = [name for name, outcome in result["plans"].items() if outcome.get("gradients") == "different"]
    print(f"{time.perf_counter() - began:.0f} s" + (f"; gradients differ: {', '.join(wrong)}" if wrong else ""))
    return 1 if wrong else 0


def measure(
    name: str,
    plans: Plans,
    model: nn.Module,
    batch: dict[str, Any],
    truth: dict[str, Tensor],
    outcome: dict[str, Any],
    options: Any,
) -> None:
    """One turn of a plan: what it finds goes into ``outcome``.

    In its first turn also the gradients, and then the memory. ``truth`` is filled by the plan that comes first.
    """
    plans.set(name)
    _settle()
    limit_memory(torch.device(options.device), float(name.partition("@")[2]) if "@" in name else options.cap)
    try:
        is_first = "gradients" not in outcome
        if plans.planned is not None:
            outcome["settling_s"] = _settle_plan(plans.planned, lambda: gradients(model, batch))
        if is_first:
            outcome |= compare(model, batch, truth)
        found = memory(model, batch)  # warms up, too
        if is_first:
            outcome |= found
        marks = [time_step(model, batch) for _ in range(options.steps)]
        outcome.setdefault("step_ms", []).extend(round(sum(mark), 3) for mark in marks)
        outcome.setdefault("forward_ms", []).extend(round(mark[0], 3) for mark in marks)
        outcome["median_ms"] = statistics.median(outcome["step_ms"])
        outcome["engine"] = plans.offload.metrics() if plans.offload.offloaded else {}
        outcome["stayed"] = dict(plans.offload.kept)
        if plans.planned is not None:
            outcome |= {"planner": plans.planned.metrics(), "explanation": plans.planned.explain()}
    except torch.OutOfMemoryError as error:
        outcome["status"] = f"out of memory: {error}"
    _forget(model)


def _settle_plan(planned: PlannedCheckpoint, step: Callable[[], Any]) -> list[float]:
    """Step until the plan stays as it is: it measures, checks what it will look up, and shrinks its margin.

    The seconds of each step come back: host memory is allocated in some.
    """
    seen: list[Plan | None] = []
    seconds = []
    while len(seen) < _MOST_STEPS and (len(seen) < 5 or len(set(seen[-3:])) > 1):
        began = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(round(time.perf_counter() - began, 3))
        seen.append(planned.plan)
    return seconds


def limit_memory(device: torch.device, gigabytes: float | None) -> None:
    """Let this process use no more of a GPU's memory; all of it for None."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (gigabytes or total / 1e9) * 1e9 / total))


def compare(model: nn.Module, batch: dict[str, Any], truth: dict[str, Tensor]) -> dict[str, Any]:
    """How the gradients are to the first plan's, and, for that itself, to those of a second run."""
    torch.use_deterministic_algorithms(True)  # a warning alone leaves flash attention's backward as it is
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        if not truth:
            truth |= gradients(model, batch)
        found = gradients(model, batch)
    finally:
        torch.use_deterministic_algorithms(False)
    if all(torch.equal(found[name], tensor) for name, tensor in truth.items()):
        return {"gradients": "equal", "distance": 0.0}
    error = sum(float((found[name].double() - tensor.double()).square().sum()) for name, tensor in truth.items())
    size = sum(float(tensor.double().square().sum()) for tensor in truth.values())
    return {"gradients": "different", "distance": (error / size) ** 0.5}


def gradients(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """The loss and the gradient of every parameter that is trained."""
    _forget(model)
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach()} | {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def time_step(model: nn.Module, batch: dict[str, Any]) -> tuple[float, float]:
    """Milliseconds of forward and of backward, in the device's time."""
    _forget(model)
    if not batch["input_ids"].is_cuda:
        clock = [time.perf_counter()]
        loss = model(**batch).loss
        clock.append(time.perf_counter())
        loss.backward()
        return (clock[1] - clock[0]) * 1e3, (time.perf_counter() - clock[1]) * 1e3
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    events[0].record()
    loss = model(**batch).loss
    events[1].record()
    loss.backward()
    events[2].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]), events[1].elapsed_time(events[2])


def memory(model: nn.Module, batch: dict[str, Any]) -> dict[str, int]:
    """Bytes on the GPU at the worst moment of a step, between its forward and backward, and what torch reserves."""
    if not batch["input_ids"].is_cuda:
        gradients(model, batch)
        return {}
    _forget(model)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    loss = model(**batch).loss
    torch.cuda.synchronize()
    after_forward = torch.cuda.memory_allocated()
    loss.backward()
    torch.cuda.synchronize()
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "after_forward_bytes": after_forward,
        "reserved_bytes": torch.cuda.memory_reserved(),
    }


def make_model(options: Any) -> nn.Module:
    settings = Settings(
        shape=options.shape, layers=options.layers, device=options.device, dtype=options.dtype, trainable="lora"
    )
    model = build_model(settings) if options.liger else build_model(settings, vocab_size=options.vocab)
    if options.liger:
        from transformers.integrations.liger import apply_liger_kernel

        others = dict.fromkeys(("rope", "swiglu", "rms_norm", "cross_entropy"), False)
        apply_liger_kernel(model, {"fused_linear_cross_entropy": True, **others})
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, and so would half of the gradients be
            nn.init.normal_(parameter, std=0.02)
    return model


def make_batch(tokens: int, vocab: int, device: torch.device, longest: int = 4096, seed: int = 0) -> dict[str, Any]:
    """One packed row of exactly ``tokens`` tokens, its first document ``longest`` long and no other one longer."""
    rng, lengths = random.Random(seed), [min(tokens, longest)]
    while sum(lengths) < tokens:
        lengths.append(min(rng.randint(min(64, tokens, longest), longest), tokens - sum(lengths)))
    documents = [torch.tensor([rng.randrange(1, vocab) for _ in range(length)]) for length in lengths]
    ids = nn.utils.rnn.pad_sequence(documents, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in documents], batch_first=True)
    padded = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    row = PaddingFreeCollator(lambda features: padded, flash_arguments=False)([])
    return {key: value.to(device) for key, value in row.items()}


def row(name: str, outcome: dict[str, Any], plans: dict[str, Any]) -> str:
    if outcome["status"] != "ok":
        return f"{name:<18} {outcome['status'].splitlines()[0]}"
    plain = plans.get("plain", {}).get("median_ms")
    gigabytes = [
        f"{outcome[key] / 1e9:.1f}" if key in outcome else "–" for key in ("peak_bytes", "after_forward_bytes")
    ]
    share = outcome["engine"].get("hidden_share")
    text = outcome["gradients"] if not outcome["distance"] else f"differ by {outcome['distance']:.1e}"
    text += f", {100 * share:.1f} % of the copying hidden" if share is not None else ""
    speed = f"{plain / outcome['median_ms']:.3f}" if plain else "–"
    return _ROW.format(name, f"{outcome['median_ms']:.1f}", speed, *gigabytes, text)


def _forget(model: nn.Module) -> None:
    model.zero_grad(set_to_none=True)


def _settle() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def parse(arguments: list[str] | None) -> Any:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoint_sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shape", default="llama-8b", choices=SHAPES)
    add("--layers", type=int, help="fewer than the shape has")
    add("--tokens", type=int, default=16384)
    add("--vocab", type=int, default=4096, help="ids are below it; without --liger the whole vocabulary (4096)")
    add("--longest", type=int, default=4096, help="tokens of the longest document, the row's first (4096)")
    add("--seed", type=int, default=0, help="of the documents' lengths and tokens (0)")
    add("--liger", action="store_true", help="the shape's own vocabulary, with Liger's fused linear cross-entropy")
    add("--dtype", default="bf16", choices=("bf16", "fp32"))
    add("--rounds", type=int, default=2, help="how often the plans take turns (2)")
    add("--steps", type=int, default=2, help="timed steps of each turn; the median of all counts (2)")
    add("--cap", type=float, metavar="GB", help="let this process use no more GPU memory")
    add("--plans", type=lambda text: text.split(","), metavar="A,B", help="all of them by default")
    add("--budget", type=float, default=220.0, help="seconds after which no further plan is begun (220)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, default=Path("checkpoint_sweep.json"))
    options = parser.parse_args(arguments)
    if options.longest < 1:
        parser.error("--longest: a document has at least one token")
    return options


if __name__ == "__main__":
    sys.exit(main())
