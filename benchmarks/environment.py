"""What a result depends on beside its settings: the GPU, the versions, the commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from typing import Any

import torch

SCHEMA = 1
PACKAGES = (
    "fastft-plugins", "torch", "triton", "transformers", "accelerate", "peft", "trl", "datasets", "lightning",
    "liger-kernel", "bitsandbytes", "unsloth",
)  # fmt: skip


def describe_command(module: str, arguments: list[str] | None) -> dict[str, Any]:
    """The head of every result: when it was made, from which commit, and the command that makes it again."""
    given = sys.argv[1:] if arguments is None else arguments
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "command": shlex.join(["python", "-m", f"benchmarks.{module}", *given]),
    }


def describe_environment(device: torch.device) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    return {"gpu": gpu, "cuda": torch.version.cuda, "python": platform.python_version(), "packages": _versions()}


def git_commit() -> str | None:
    """The commit, `-dirty` when files differ from it; None outside a checkout.

    A copy of the tree without its history gets it from the environment variable FASTFT_BENCH_COMMIT.
    """
    if given := os.environ.get("FASTFT_BENCH_COMMIT"):
        return given
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
