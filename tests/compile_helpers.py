"""Compiles the Triton kernels, exactly as their host functions launch them, for a GPU that is not there.

Run as a script, ``compile_helpers.py CAPABILITY WHAT``: prints one JSON object per compiled kernel. WHAT is "one",
"products", "rest" or several of them; see `main`. With "keys" nothing is compiled: the output is, by kernel, the number
of specialisations that one batch asks for and that 50 batch sizes ask for.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
import sys
import time
from collections.abc import Iterable
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastft_plugins.kernels.gate import ACTIVATIONS, GATED, Gate
from fastft_plugins.kernels.rows import Rows
from fastft_plugins.kernels.triton import grouped_matmul as matmul
from fastft_plugins.kernels.triton import grouped_matmul_tma as tma
from fastft_plugins.kernels.triton.counting_sort import counting_sort
from fastft_plugins.kernels.triton.gate import gate_backward, gate_forward
from fastft_plugins.kernels.triton.rows import combine_rows, gather_rows
from fastft_plugins.kernels.triton.segment_sum import segment_sum

EXPERTS, TOKENS, TOP_K, WIDTH, RANK = 8, 64, 4, 512, 16
ODD = 515  # a width whose rows start at any address


class Driver:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def pretend(capability: int) -> None:
    """Have the host functions, given tensors on the CPU, launch what they launch on such a GPU."""
    triton.runtime.driver.set_active(Driver(capability))
    tiles = matmul.tiles_for(divmod(capability, 10))
    matmul._tiles_on = lambda device: tiles
    tma.multiprocessors = lambda device: 132


def compile_launches() -> None:
    """Compile and report instead of launching."""
    triton.knobs.nvidia.dump_ptxas_log = True  # on stdout
    run, seen = JITFunction.run, set()

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        log, start = io.StringIO(), time.perf_counter()
        with contextlib.redirect_stdout(log):
            kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            spills = re.search(r"(\d+) bytes spill stores", log.getvalue())
            registers = re.search(r"Used (\d+) registers", log.getvalue())
            report = {
                "kernel": f"{self.__module__.rsplit('.', 1)[1]}.{self.__name__}",
                "options": {name: value for name, value in options.items() if value is not False},
                "dtype": dtype_of(args),
                "shared": kernel.metadata.shared,
                "spilled": int(spills[1]) if spills else 0,
                "registers": int(registers[1]) if registers else None,
                "seconds": round(time.perf_counter() - start, 2),
            }
            print(json.dumps(report), flush=True)
        return kernel

    JITFunction.run = compile_only


def dtype_of(args: tuple[Any, ...]) -> str:
    tensors = (getattr(arg, "base", arg) for arg in args)
    floating = (tensor.dtype for tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.is_floating_point())
    return str(next(floating, "")).removeprefix("torch.")


def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


class Calls:
    """The host functions' calls, for a number of tokens and a dtype."""

    def __init__(self, dtype: torch.dtype, tokens: int = TOKENS) -> None:
        self.dtype, self.tokens, self.size = dtype, tokens, tokens * TOP_K
        self.ids = zeros(tokens, TOP_K, dtype=torch.int64)
        self.order, self.inverse, self.offsets = zeros(self.size), zeros(tokens, TOP_K), zeros(EXPERTS)

    def data(self, *shape: int) -> torch.Tensor:
        return zeros(*shape, dtype=self.dtype)

    def rows(self, width: int, indexed: bool = False) -> Rows:
        return Rows(self.data(self.tokens, width), self.order, TOP_K) if indexed else Rows(self.data(self.size, width))

    def counting_sort(self, experts: int = EXPERTS) -> None:
        counting_sort(self.ids.reshape(-1), experts)

    def gather(self) -> None:
        gather_rows(Rows(self.data(self.tokens, WIDTH), self.order, TOP_K))
        gather_rows(Rows(self.data(self.tokens, WIDTH), self.order, TOP_K, self.inverse))

    def combine(self, weighted: bool = True, biased: bool = True) -> None:
        weights = self.data(self.tokens, TOP_K) if weighted else None
        bias = self.data(EXPERTS, WIDTH) if biased else None
        combine_rows(self.data(self.size, WIDTH), self.inverse, self.offsets, weights, bias, self.ids)

    def segment_sum(self, indexed: bool = True, weighted: bool = True) -> None:
        segment_sum(self.rows(WIDTH, indexed), self.offsets, self.data(self.size) if weighted else None)

    def gate(self, kind: str, layout: str, biased: bool = True, scaled: bool = True, width: int = WIDTH) -> None:
        gate, columns = Gate(kind, layout, 1.702, 7.0), width if layout == "ungated" else 2 * width
        z, bias = self.data(self.size, columns), self.data(EXPERTS, columns) if biased else None
        common = (self.order, self.offsets)
        gate_forward(gate, z, bias, *common)
        da, s_a = self.data(self.size, width), self.data(self.size, width) if scaled else None
        weights, dweights = self.data(self.size), torch.zeros(self.size)
        gate_backward(gate, z, bias, da, weights, *common, z, dweights, s_a)

    def weight(self, inner: int, width: int, transposed: bool = False) -> torch.Tensor:
        return self.data(EXPERTS, width, inner).mT if transposed else self.data(EXPERTS, inner, width)

    def matmul(
        self, inner: int = WIDTH, width: int = WIDTH,
        indexed: bool = False, transposed: bool = False, accumulate: bool = False,
    ) -> None:  # fmt: skip
        out = self.data(self.size, width) if accumulate else None
        matmul.grouped_matmul(self.rows(inner, indexed), self.weight(inner, width, transposed), self.offsets, out)

    def weight_grad(self, inner: int = WIDTH, width: int = WIDTH) -> None:
        matmul.grouped_weight_grad(self.rows(inner), self.rows(width), self.offsets)

    def tma(self) -> None:
        for transposed in (False, True):
            tma.grouped_matmul(self.rows(WIDTH), self.weight(WIDTH, WIDTH, transposed), self.offsets)

    def one_of_each(self) -> None:
        self.counting_sort()
        self.gather()
        self.combine()
        self.segment_sum()
        self.gate("clamped_swiglu", "interleaved")
        self.gate("silu", "concatenated", biased=False)
        self.lora()
        self.matmul(indexed=True)
        self.matmul(transposed=True)
        self.weight_grad()

    def lora(self) -> None:
        """Products with a width of one rank, forward and backward, and their weight gradients."""
        self.matmul(width=RANK, indexed=True)
        self.matmul(inner=RANK, accumulate=True)
        self.matmul(width=RANK, transposed=True)
        self.matmul(inner=RANK, transposed=True, accumulate=True)
        self.weight_grad(width=RANK)
        self.weight_grad(inner=RANK)

    def small_kernels(self) -> None:
        for experts in (1, 128, 300):
            self.counting_sort(experts)
        for first, second in itertools.product((False, True), repeat=2):
            self.combine(weighted=first, biased=second)
            self.segment_sum(indexed=first, weighted=second)

    def gates(self) -> None:
        gated = itertools.product(GATED, ("concatenated", "interleaved"))
        for kind, layout in (*gated, *((kind, "ungated") for kind in ACTIVATIONS)):
            self.gate(kind, layout, biased=False, scaled=False)
            self.gate(kind, layout, biased=True, scaled=True)
        self.gate("silu", "concatenated", biased=True, scaled=False)
        self.gate("silu", "concatenated", biased=False, scaled=True)
        self.gate("clamped_swiglu", "interleaved", width=2880)  # wider tiles

    def products(self) -> None:
        for indexed, transposed in itertools.product((False, True), repeat=2):
            self.matmul(indexed=indexed, transposed=transposed)
        self.matmul(accumulate=True)
        self.matmul(inner=ODD, width=2 * ODD)
        self.weight_grad(inner=ODD, width=2 * ODD)
        self.matmul(inner=RANK, width=ODD, accumulate=True)
        self.weight_grad(inner=RANK, width=ODD)
        self.lora()


def main(capability: int, what: str) -> None:
    """Compile one launch of each kernel, and what is asked for beyond it."""
    pretend(capability)
    if what == "keys":
        print(json.dumps([specialisations([TOKENS]), specialisations(range(1, 51))]))
        return
    compile_launches()
    bf16, fp16 = Calls(torch.bfloat16), Calls(torch.float16)
    bf16.one_of_each()
    if capability == 90:
        bf16.tma()
        fp16.tma()
    if "products" in what:
        bf16.products()
        fp16.matmul(indexed=True)
        fp16.weight_grad()
    if "rest" in what:
        bf16.small_kernels()
        bf16.gates()
        fp16.one_of_each()


def specialisations(batches: Iterable[int]) -> dict[str, int]:
    keys: set[tuple[str, str]] = set()
    run = JITFunction.run

    def key_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        run(self, *args, grid=grid, warmup=True, **options)

    def remember(self: Any, key: str, *args: Any) -> None:
        keys.add((f"{self.__module__.rsplit('.', 1)[1]}.{self.__name__}", key))

    with mock.patch.multiple(JITFunction, run=key_only, _do_compile=remember):
        for tokens in batches:
            calls = Calls(torch.bfloat16, tokens)
            calls.order = zeros(calls.size + tokens % 4)[tokens % 4 :]  # parts of the order start at any place
            calls.one_of_each()
            calls.tma()
    names = [name for name, _ in keys]
    return {name: names.count(name) for name in sorted(set(names))}


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
