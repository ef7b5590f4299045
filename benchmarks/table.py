"""Render result files, by default all of benchmarks/results/, into a Markdown table for each machine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_HEADER = (
    "| model | training | stack | tokens/s | step ms | forward ms | backward ms | peak GB | against | speed (pairs) |\n"
    "|---|---|---|--:|--:|--:|--:|--:|---|---|"
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="result files of benchmarks.run")
    files = parser.parse_args(arguments).files or sorted(RESULTS.glob("*.json"))
    if not files:
        sys.exit(f"no result files in {RESULTS}: make one with python -m benchmarks.run --out {RESULTS}/NAME.json")
    print(markdown(json.loads(file.read_text()) for file in files))


def markdown(results: Iterable[dict[str, Any]]) -> str:
    """One table for each GPU, since absolute times of different GPUs do not compare."""
    tables: dict[str, list[str]] = {}
    for result in results:
        rows = tables.setdefault(_machine(result["environment"]), [])
        rows += [_row(result, stack, numbers) for stack, numbers in result["summary"].items() if numbers]
    return "\n\n".join(f"{machine}:\n\n{_HEADER}\n" + "\n".join(rows) for machine, rows in tables.items())


def _machine(environment: dict[str, Any] | None) -> str:
    if environment is None:
        return "unknown machine"
    packages = environment["packages"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers") if name in packages)
    return f"{environment['gpu'] or 'CPU'}, {versions}"


def _row(result: dict[str, Any], stack: str, numbers: dict[str, Any]) -> str:
    settings, peak = result["settings"], numbers["peak_memory_bytes"]
    checkpointing = "on" if settings["checkpointing"] else "off"
    training = f"{settings['trainable']}, {settings['dtype']}, checkpointing {checkpointing}"
    ratio = next((row for row in result["ratios"] if row["stack"] == stack), None)
    speed = ratio and ratio["tokens_per_s"]
    model = settings["shape"] + (f" ({settings['layers']} layers)" if settings["layers"] else "")
    cells = [
        model,
        f"{training}, {settings['tokens']} tokens of {settings['lengths']}",
        stack,
        f"{numbers['tokens_per_s']['p50']:,.0f}",
        _milliseconds(numbers["step_s"]),
        _milliseconds(numbers["forward_s"]),
        _milliseconds(numbers["backward_s"]),
        "–" if peak is None else f"{peak / 1e9:.1f}",
        ratio["against"] if ratio else "–",
        f"**{speed['median']:.2f}×** ({', '.join(f'{pair:.2f}' for pair in speed['pairs'])})" if speed else "–",
    ]
    return f"| {' | '.join(cells)} |"


def _milliseconds(values: dict[str, float] | None) -> str:
    return "–" if values is None else f"{values['p50'] * 1e3:,.0f}"


if __name__ == "__main__":
    main()
