"""Compares `launch_key` with Triton's own key, for a GPU that is not there.

Run as a script: launches a kernel with arguments of all kinds, of which two differ from one launch to the next, and
prints one JSON object: how many different keys are "ours", how many are "theirs", and how many of ours stand for
"several" of theirs.
"""

from __future__ import annotations

import json
import random
from typing import Any
from unittest import mock

import torch
from compile_helpers import pretend
from triton.runtime.jit import JITFunction

from fastft_plugins.kernels.triton.grouped_matmul import _product
from fastft_plugins.kernels.triton.launch import launch, launch_key

TENSORS = [
    torch.zeros(64, dtype=dtype)[start:]
    for dtype in (torch.bfloat16, torch.float32, torch.int32)
    for start in (0, 1, 2, 4, 16)
]
NUMBERS = [0, 1, 2, 8, 15, 16, 48, 2**31 - 1, 2**31, 2**31 + 16, 2**63 - 1, -1, -16, -(2**31), -(2**31) - 1]


def main(count: int) -> None:
    ours: list[Any] = []
    theirs: dict[Any, set[str]] = {}
    run, draw = JITFunction.run, random.Random(0)

    def remember_ours(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        ours.append(launch_key(self, 0, args, options))
        run(self, *args, grid=grid, warmup=True, **options)

    def remember_theirs(self: Any, key: str, *args: Any) -> None:
        theirs.setdefault(ours.pop(), set()).add(key)

    pretend(90)
    with mock.patch.multiple(JITFunction, run=remember_ours, _do_compile=remember_theirs):
        for _ in range(count):
            arguments: list[Any] = [*TENSORS[:1] * 5, *[64] * 8]  # the kernel's five tensors, then its numbers
            for place in draw.sample(range(13), 2):
                arguments[place] = draw.choice(TENSORS if place < 5 else NUMBERS)
            arguments[1] = draw.choice([None, arguments[1]])
            launch(
                _product, (1, 1, 1), *arguments,
                INDEXED=arguments[1] is not None, TOP_K=draw.choice([1, 8]), ACCUMULATE=False, EXPERTS=8,
                ROWS=64, COLUMNS=64, INNER=32, num_warps=draw.choice([4, 8]), num_stages=3,
            )  # fmt: skip
    several = sum(len(keys) > 1 for keys in theirs.values())
    print(json.dumps({"ours": len(theirs), "theirs": len(set().union(*theirs.values())), "several": several}))


if __name__ == "__main__":
    main(3000)
