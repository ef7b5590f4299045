"""Render result files, by default all of benchmarks/results/, into a Markdown table for each machine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.summary import model_text, pairs_text, ratios, training_text

RESULTS = Path(__file__).parent / "results"
_HEADER = (
    "| file | model | training | stack | tokens/s | step ms | forward ms | backward ms | peak GB | against "
    "| speed (pairs) |\n"
    "|---|---|---|---|--:|--:|--:|--:|--:|---|---|"
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="result files of benchmarks.run")
    parser.add_argument("--against", metavar="STACK", help="the reference of every ratio; by default the run's first")
    options = parser.parse_args(arguments)
    given = options.files
    files = given or sorted(RESULTS.glob("*.json"))
    results: dict[str, dict[str, Any]] = {}
    for file in files:
        try:
            result = read(file)
        except ValueError as error:
            parser.error(f"{file}: {error}")
        if result is None:
            print(f"{file}: skipped, it is not of benchmarks.run", file=sys.stderr)
        else:
            if options.against is not None:
                result["ratios"] = ratios(result["runs"], options.against)
            results[str(file) if file.stem in results else file.stem] = result
    if not results:
        parser.error(f"no result files in {', '.join(map(str, given)) or RESULTS}: make one with "
                     f"python -m benchmarks.run --out {RESULTS}/NAME.json")  # fmt: skip
    print(markdown(results))


def read(file: Path) -> dict[str, Any] | None:
    """Return a result of benchmarks.run, or None for the JSON of another program, as benchmarks.moe_block.

    Raises:
        ValueError: the file cannot be read, or lacks part of a result.
    """
    result = load(file)
    if not isinstance(result, dict) or "schema" not in result or result.keys() & {"cases", "plans", "kinds", "shapes"}:
        return None
    try:
        markdown({file.stem: result})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"not a complete result of benchmarks.run ({error!r})") from error
    return result


def load(file: Path) -> Any:
    """Raises ValueError for a file that cannot be read or is not JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from error


def markdown(results: Mapping[str, dict[str, Any]]) -> str:
    """One table for each machine, since absolute times of different GPUs do not compare; the keys name the files."""
    tables: dict[str, list[str]] = {}
    for name, result in results.items():
        rows = tables.setdefault(machine(result["environment"]), [])
        rows += [_row(name, result, stack, numbers) for stack, numbers in result["summary"].items() if numbers]
    return "\n\n".join(f"{machine}:\n\n{_HEADER}\n" + "\n".join(rows) for machine, rows in tables.items())


def machine(environment: dict[str, Any] | None) -> str:
    """The GPU and the versions of torch and transformers."""
    if environment is None:
        return "unknown machine"
    packages = environment["packages"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers") if name in packages)
    return f"{environment['gpu'] or 'CPU'}, {versions}"


def _row(name: str, result: dict[str, Any], stack: str, numbers: dict[str, Any]) -> str:
    settings, peak = result["settings"], numbers["peak_memory_bytes"]
    ratio = next((row for row in result["ratios"] if row["stack"] == stack), None)
    speed = ratio and ratio["tokens_per_s"]
    cells = [
        name,
        model_text(settings),
        f"{training_text(settings)}, {settings['tokens']} tokens of {settings['lengths']}",
        stack,
        f"{numbers['tokens_per_s']['p50']:,.0f}",
        _milliseconds(numbers["step_s"]),
        _milliseconds(numbers["forward_s"]),
        _milliseconds(numbers["backward_s"]),
        "–" if peak is None else f"{peak / 1e9:.1f}",
        ratio["against"] if ratio else "–",
        f"**{speed['median']:.2f}×** ({pairs_text(speed['pairs'])})" if speed else "–",
    ]
    return f"| {' | '.join(cells)} |"


def _milliseconds(values: dict[str, float] | None) -> str:
    return "–" if values is None else f"{values['p50'] * 1e3:,.0f}"


if __name__ == "__main__":
    main()
