"""One process of a comparison: measure one stack, write the result. Started by `benchmarks.run`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.documents import describe
from benchmarks.environment import describe_environment
from benchmarks.measure import steps_of
from benchmarks.settings import Settings
from benchmarks.stacks import find_stack


def main(stack: str, settings_file: str, result_file: str) -> None:
    Path(result_file).write_text(json.dumps(measure(stack, Settings(**json.loads(Path(settings_file).read_text())))))


def measure(stack: str, settings: Settings) -> dict[str, Any]:
    if settings.cap is not None:
        total = torch.cuda.get_device_properties(settings.torch_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, settings.cap * 1e9 / total))
    result = find_stack(stack)(settings)
    result["documents_digest"] = describe(steps_of(settings))["digest"]
    result["environment"] = describe_environment(settings.torch_device())
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
