"""The grouped products of a mixture-of-experts block, each by every kernel that can run here, forced, in turn.

    python -m benchmarks.grouped_products --out benchmarks/results/NAME.json
    python -m benchmarks.grouped_products --shapes mixtral-8x7b --tokens 8192

The six products are those of a training with trained experts: forward through both weights, backward through both, and
both weight gradients; weights lie in memory as stock stores them, rows are sorted, experts have the rows that chance
gives them. Beside the kernels stands cuBLAS's batched product of as many rows, all experts equally long: what cuBLAS
would take, had it a grouped product. A kernel counts once its results for the first, the middle and the last expert
have agreed with a product in fp32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import describe_command, describe_environment
from benchmarks.moe_shapes import SHAPES

CUBLAS = "cuBLAS, equal experts"
TOLERANCE = 5e-3  # of a result from fp32's, by the norm: bfloat16 rounds to 2e-3


@dataclass
class Product:
    """Sorted rows by their expert's weight, or, where ``weight`` is None, their gradient with ``grads``."""

    name: str
    rows_SK: Tensor
    weight_EKN: Tensor | None
    grads_SN: Tensor | None
    offsets_E: Tensor

    def flops(self) -> int:
        other = self.weight_EKN if self.grads_SN is None else self.grads_SN
        assert other is not None
        return 2 * self.rows_SK.numel() * other.shape[-1]

    def by(self, kernel: Any) -> Callable[[], Tensor]:
        from fastft_plugins.kernels.rows import Rows

        rows, run = Rows(self.rows_SK), kernel.run
        if self.grads_SN is None:
            return lambda: run(rows, self.weight_EKN, self.offsets_E, None)
        grads = Rows(self.grads_SN)
        return lambda: run(rows, grads, self.offsets_E)

    def by_cublas(self) -> Callable[[], Tensor]:
        experts = self.offsets_E.numel()
        a = self.rows_SK.view(experts, -1, self.rows_SK.shape[1])
        if self.grads_SN is None:
            weight_EKN = self.weight_EKN
            assert weight_EKN is not None
            return lambda: torch.bmm(a, weight_EKN)
        b = self.grads_SN.view(experts, -1, self.grads_SN.shape[1])
        return lambda: torch.bmm(a.mT, b)

    def error(self, result: Tensor) -> float:
        """Of the first, the middle and the last expert the worst, by the norm; NaN if one is."""
        ends = self.offsets_E.tolist()
        errors = []
        for expert in {0, len(ends) // 2, len(ends) - 1}:
            span = slice(ends[expert - 1] if expert else 0, ends[expert])
            rows = self.rows_SK[span].float()
            if self.grads_SN is None:
                assert self.weight_EKN is not None
                got, exact = result[span], rows @ self.weight_EKN[expert].float()
            else:
                got, exact = result[expert], rows.t() @ self.grads_SN[span].float()
            errors.append((got.float() - exact).norm() / exact.norm().clamp(min=1e-30))
        return float(torch.stack(errors).max())


def products(shape: str, tokens: int) -> list[Product]:
    values = SHAPES[shape]
    hidden = values["hidden_size"]
    inner = values.get("moe_intermediate_size") or values["intermediate_size"]
    experts = values.get("num_experts") or values.get("num_local_experts") or values["n_routed_experts"]
    size = tokens * values["num_experts_per_tok"]
    if size % experts:
        raise SystemExit(f"--tokens {tokens}: {size} rows of {shape} do not fall into {experts} equal parts for cuBLAS")
    generator = torch.Generator().manual_seed(0)
    chosen = torch.multinomial(torch.ones(experts), size, replacement=True, generator=generator)
    offsets_E = torch.bincount(chosen, minlength=experts).cumsum(0).int().cuda()
    stored_in_by_out = values["model_type"] == "gpt_oss"

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, device="cuda", dtype=torch.bfloat16)

    def weight(inner: int, width: int) -> Tensor:
        return normal(experts, inner, width) if stored_in_by_out else normal(experts, width, inner).mT

    x, dout, a, dz = (normal(size, width) for width in (hidden, hidden, inner, 2 * inner))
    up, down = weight(hidden, 2 * inner), weight(inner, hidden)
    by_weight = [("up", x, up), ("down", a, down), ("back of down", dout, down.mT), ("back of up", dz, up.mT)]
    gradients = [("gradient of up", x, dz), ("gradient of down", a, dout)]
    if not stored_in_by_out:
        gradients = [(name, right, left) for name, left, right in gradients]
    return [
        *(Product(name, rows, weight_EKN, None, offsets_E) for name, rows, weight_EKN in by_weight),
        *(Product(name, rows, None, grads, offsets_E) for name, rows, grads in gradients),
    ]


def measure(product: Product, turns: int, steps: int) -> dict[str, Any]:
    """Times of each kernel, the errors, and why a kernel has none."""
    from fastft_plugins.kernels import grouped_matmul as ours

    kernels = ours.GROUPED_MATMUL_KERNELS if product.grads_SN is None else ours.GROUPED_WEIGHT_GRAD_KERNELS
    entry: dict[str, Any] = {
        "product": product.name, "flops": product.flops(), "ms": {CUBLAS: []}, "errors": {}, "failed": {}
    }  # fmt: skip
    runs = {CUBLAS: product.by_cublas()}
    for kernel in kernels[:-1]:  # the last one is a loop on the host
        run = product.by(kernel)
        try:
            error = product.error(run())
        except Exception as problem:  # not for this card or this torch
            entry["failed"][kernel.name] = f"{type(problem).__name__}: {problem}"[:300]
            continue
        entry["errors"][kernel.name] = error
        if error < TOLERANCE:
            runs[kernel.name] = run
        else:
            entry["failed"][kernel.name] = f"wrong: {error:.1e} from fp32"
    for _ in range(turns):
        for name, run in runs.items():
            entry["ms"].setdefault(name, []).append(_milliseconds(run, steps))
    return entry


def _milliseconds(run: Callable[[], Tensor], steps: int) -> float:
    """Of one call, the mean over some that follow one another: the card's power limit sets the pace of all of them."""
    run()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(steps):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / steps


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("grouped_products: needs an NVIDIA GPU, and torch finds none", file=sys.stderr)
        return 2
    result: dict[str, Any] = {
        **describe_command("grouped_products", arguments),
        "environment": describe_environment(torch.device("cuda")),
        "tokens": options.tokens,
        "shapes": {},
    }
    for shape in options.shapes:
        entries = result["shapes"][shape] = []
        for product in products(shape, options.tokens):
            entry = measure(product, options.turns, options.steps)
            entries.append(entry)
            medians = [f"{name} {statistics.median(ms):.2f} ms" for name, ms in entry["ms"].items()]
            print(f"{shape} {product.name}: {', '.join(medians)}", flush=True)
            for name, problem in entry["failed"].items():
                print(f"  {name}: {problem}", flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.grouped_products", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--shapes", type=_shapes, default=["qwen3-30b-a3b", "gpt-oss-20b"], metavar="A,B", help=", ".join(SHAPES))
    add("--tokens", type=int, default=32768)
    add("--turns", type=int, default=3, help="how often each kernel has its turn (3)")
    add("--steps", type=int, default=9, help="of one turn (9)")
    add("--out", type=Path, default=Path("grouped_products.json"))
    return parser.parse_args(arguments)


def _shapes(text: str) -> list[str]:
    shapes = text.split(",")
    if unknown := [shape for shape in shapes if shape not in SHAPES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]}: the shape is unknown; there are {', '.join(SHAPES)}")
    return shapes


if __name__ == "__main__":
    sys.exit(main())
