"""How accurate the gradients of a packed gpt-oss model are: ours and stock's, both in bf16, against fp64.

    python -m benchmarks.gradient_accuracy --shape gpt-oss-20b --layers 4 --tokens 8192 --out NAME.json
    python -m benchmarks.gradient_accuracy --stock grouped_mm,eager --draws 3

gpt-oss has attention sinks, windows in every second layer, and experts with biases and a clamped activation. All of its
weights are trained: random ones of bf16 values, biases, norms and sinks too, with biases so large that the clamp acts.
The documents are random tokens.

- the truth: stock, document by document, all in fp64, the norms and the loss included, which stock computes in fp32;
- ours: `apply(model)`, packing and experts on, one packed row;
- stock: eager attention on the padded batch, the only one that stock has for sinks beside FlashAttention and flex, with
  the experts' implementation that ``--stock`` names: ``grouped_mm`` is transformers' default.

All of them checkpoint their layers, and none runs under autocast. Every run sends each token to the experts that the
truth has chosen, and weighs them by its own router's logits: a token that goes to another expert changes the gradients
far more than any rounding, and says nothing about kernels. How many would have gone elsewhere is counted ("flips").

The error of a kind of parameter, over all layers and draws: ‖gradient − truth‖ / ‖truth‖, in Frobenius norms. The exit
status is 1 if one of ours is more than ``--limit`` times stock's, where several are named, of any of them. The truth
decides the memory: for each layer of gpt-oss-20b 13 GB of weights and gradients, and some 30 GB at the worst moment.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.documents import make_steps, parse_lengths
from benchmarks.environment import describe_command, describe_environment
from benchmarks.fixed_routing import FixedRouting
from benchmarks.gradient_runs import (
    SHAPES,
    STOCKS,
    Gradients,
    exact_gradients,
    make_model,
    our_gradients,
    stock_gradients,
)

OURS, TRUTH, ALL = "fastft", "truth", "all parameters"
_CHUNK = 1 << 26  # elements compared at a time: an experts' weight has half a billion
_ROW = "{:<34}" + " {:>10}" * 2 + " {:>7}"


def main(arguments: list[str] | None = None) -> int:
    began = time.perf_counter()
    options = parse(arguments)
    device = torch.device(options.device)
    model = make_model(options)
    routing = FixedRouting(model)
    steps = make_steps(options.draws, options.tokens, options.documents, options.vocab, options.seed)
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "device")}
    result: dict[str, Any] = {
        **describe_command("gradient_accuracy", arguments),
        "environment": describe_environment(device),
        "settings": settings,
        "lengths": [[len(document) for document in documents] for documents in steps],
        "losses": defaultdict(list),
        "flips": defaultdict(list),
    }
    squares: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for documents in steps:
        loss, truth = exact_gradients(model, documents, routing)
        result["losses"][TRUTH].append(loss)
        add_squares(squares[TRUTH], truth)
        for stack in (OURS, *options.stock):
            if stack == OURS:
                loss, found, result["report"] = our_gradients(model, documents, routing)
            else:
                loss, found = stock_gradients(model, documents, routing, stack)
            result["losses"][stack].append(loss)
            result["flips"][stack].append(routing.flips())
            add_squares(squares[stack], found, truth)
            del found
        del truth
    result["kinds"] = relative(squares)
    if device.type == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    result["worst"], wrong = verdict(result["kinds"], options.stock, options.limit)
    result["seconds"] = round(time.perf_counter() - began, 1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(render(result))
    for line in wrong:
        print(f"less accurate than stock: {line}")
    return 1 if wrong else 0


def add_squares(sums: dict[str, float], found: Gradients, truth: Gradients | None = None) -> None:
    """Add ‖found − truth‖² of every kind of parameter, ‖found‖² without a truth."""
    for name, gradient in found.items():
        ours = gradient.flatten().split(_CHUNK)
        exact = truth[name].flatten().split(_CHUNK) if truth is not None else [0.0] * len(ours)
        square = sum((a.double() - b).square().sum().item() for a, b in zip(ours, exact, strict=True))
        for kind in (kind_of(name), ALL):
            sums[kind] += square


def kind_of(name: str) -> str:
    """A parameter's name without its layer."""
    return re.sub(r"^model\.(layers\.\d+\.)?|\.weight$", "", name)


def relative(squares: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """By kind and stack: the error relative to the truth."""
    stacks = [stack for stack in squares if stack != TRUTH]
    sizes = squares[TRUTH]
    return {
        kind: {stack: (squares[stack][kind] / max(sizes[kind], 1e-300)) ** 0.5 for stack in stacks}
        for kind in sorted(sizes, key=lambda kind: kind == ALL)  # otherwise in the model's order
    }


def ratio(errors: dict[str, float], stock: str) -> float:
    """Our error by stock's: below 1, ours is the smaller one."""
    return errors[OURS] / max(errors[stock], 1e-300)


def verdict(kinds: dict[str, dict[str, float]], stocks: list[str], limit: float) -> tuple[dict[str, Any], list[str]]:
    """The worst ratio of all, and what is above the limit, in words."""
    found = [(ratio(errors, stock), kind, stock) for stock in stocks for kind, errors in kinds.items()]
    worst = max(found, key=lambda one: (math.isnan(one[0]), one[0]))
    wrong = [f"{kind}, {value:.2f} times {stock}" for value, kind, stock in found if not value <= limit]
    return {"ratio": worst[0], "kind": worst[1], "stock": worst[2]}, wrong


def render(result: dict[str, Any]) -> str:
    lines = []
    for stock in result["settings"]["stock"]:
        lines.append(_ROW.format(f"error against fp64, stock: {stock}", "stock", "fastft", "ratio"))
        for kind, errors in result["kinds"].items():
            cells = [f"{errors[stock]:.2e}", f"{errors[OURS]:.2e}", f"{ratio(errors, stock):.3f}"]
            lines.append(_ROW.format(kind, *cells))
    flips = ", ".join(f"{stack} {100 * sum(values) / len(values):.2f} %" for stack, values in result["flips"].items())
    lines.append(f"tokens whose experts would have been others, of each layer: {flips}")
    worst, peak = result["worst"], result.get("peak_bytes")
    memory = f", {peak / 1e9:.1f} GB at the peak" if peak else ""
    lines.append(f"worst ratio {worst['ratio']:.3f}: {worst['kind']} ({result['seconds']:.0f} s{memory})")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> Any:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gradient_accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shape", default="gpt-oss-20b", choices=SHAPES)
    add("--layers", type=int, default=4)
    add("--tokens", type=int, default=8192, help="of all documents together, about (8192)")
    add("--documents", default="loguniform-256-2048", metavar="NAME", help="lengths, as --lengths of benchmarks.run")
    add("--vocab", type=int, default=4096)
    add("--stock", type=_stocks, default=["grouped_mm"], metavar="A,B", help=f"experts of stock: {', '.join(STOCKS)}")
    add("--dtype", default="bf16", choices=("bf16", "fp32"))
    add("--draws", type=int, default=1, help="of documents: squared errors are averaged over them (1)")
    add("--seed", type=int, default=0)
    add("--limit", type=float, default=1.1, help="our error may be this many times stock's (1.1)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, default=Path("gradient_accuracy.json"))
    options = parser.parse_args(arguments)
    try:
        parse_lengths(options.documents)
    except ValueError as error:
        parser.error(f"--documents: {error}")
    return options


def _stocks(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(STOCKS):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))} (there are: {', '.join(STOCKS)})")
    return names


if __name__ == "__main__":
    sys.exit(main())
