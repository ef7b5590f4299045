"""The repository's benchmarks, which an installed package does not hold."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from fastft_plugins.errors import FastFTError

_REPOSITORY = Path(__file__).parents[2]
_WITHOUT_A_GPU = {"--smoke", "--device", "--help", "-h"}


def bench(arguments: Sequence[str]) -> None:
    """Run ``python -m benchmarks`` with these arguments, in this process, and leave it with that program's exit code.

    Raises:
        FastFTError: this is not a checkout of the repository, or there is no GPU and none of the arguments says that
            none is needed.
    """
    if not (_REPOSITORY / "benchmarks" / "run.py").is_file():
        raise FastFTError(
            f"the benchmarks are part of the repository, and {_REPOSITORY} holds the packages alone: clone it, and run "
            "make bench there, or fastft bench after pip install -e ."
        )
    if not _WITHOUT_A_GPU.intersection(argument.partition("=")[0] for argument in arguments):
        import torch

        if not torch.cuda.is_available():
            raise FastFTError(
                "the benchmarks compare real shapes on an NVIDIA GPU, and torch finds none here: --smoke tries the "
                "harness on the CPU in under a minute, --device cpu measures a CPU, for hours if the shape is large"
            )
    sys.path.insert(0, str(_REPOSITORY))
    sys.argv = ["benchmarks", *arguments]
    runpy.run_module("benchmarks", run_name="__main__")
