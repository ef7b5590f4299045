"""One process of a comparison: measure one stack, write the result. Started by `benchmarks.run`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.documents import describe
from benchmarks.environment import describe_environment
from benchmarks.measure import steps_of
from benchmarks.settings import Settings
from benchmarks.stacks import STACKS


def main(stack: str, settings_file: str, result_file: str) -> None:
    Path(result_file).write_text(json.dumps(measure(stack, Settings(**json.loads(Path(settings_file).read_text())))))


def measure(stack: str, settings: Settings) -> dict[str, Any]:
    result = STACKS[stack](settings)
    result["documents_digest"] = describe(steps_of(settings))["digest"]
    result["environment"] = describe_environment(settings.torch_device())
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
