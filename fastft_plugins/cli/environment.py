"""What an issue needs to know about a machine: versions, hardware, settings and plugins."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = (
    "fastft-plugins", "torch", "triton", "transformers", "trl", "lightning", "peft", "accelerate", "datasets", "pluggy",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Return plain values, ready for JSON. A package that is not installed has the version None."""
    from fastft_plugins.manager import get_plugin_manager

    return {
        "packages": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": _gpus(),
        "cuda": _cuda(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith("FASTFT_")},
        "plugins": [asdict(status) for status in get_plugin_manager().statuses],
    }


def as_text(found: dict[str, Any]) -> str:
    """Return `environment`'s result as an aligned list."""
    rows = [(name, number or "not installed") for name, number in found["packages"].items()]
    rows += [("platform", f"{found['platform']}, {found['cpus']} CPUs")]
    rows += [("GPU", "none")] if not found["gpus"] else []
    rows += [("GPU", f"{gpu['name']}, sm_{gpu['capability']}, {gpu['memory_gib']} GiB") for gpu in found["gpus"]]
    rows += [(f"CUDA {key}", value or "none") for key, value in found["cuda"].items()]
    rows += list(found["variables"].items()) or [("FASTFT_ variables", "none set")]
    for plugin in found["plugins"]:
        state = plugin["state"] + (f": {plugin['error']}" if plugin["error"] else "")
        rows.append(
            (f"plugin {plugin['name']}", f"{plugin['source']} {plugin['version'] or ''}".strip() + f", {state}")
        )
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": gpu.name, "capability": f"{gpu.major}{gpu.minor}", "memory_gib": round(gpu.total_memory / 2**30, 1)}
        for gpu in devices
    ]


def _cuda() -> dict[str, str | None]:
    import torch

    return {"runtime": torch.version.cuda, "driver": _driver()}


def _driver() -> str | None:
    """Return the NVIDIA driver's version, which torch does not know."""
    import subprocess

    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0].strip() or None
