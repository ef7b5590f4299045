"""Step time against peak memory of the plans in results of `benchmarks.checkpoint_sweep`, as a picture beside them.

    python -m benchmarks.checkpoint_plot benchmarks/results/NAME.json [MORE.json]

Each file's plans are put in relation to its own plain checkpointing, so files of several processes share a picture.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

_GRAY, _GREEN, _BLUE = "#8a8f98", "#1a7f4b", "#2f6fb5"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoint_plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path)
    options = parser.parse_args(arguments)
    results = [json.loads(file.read_text()) for file in options.files]
    picture = options.files[0].with_suffix(".png")
    plans = points(results)
    draw(plans, title_of(results[0]), picture)
    for name, share in above(plans).items():
        print(f"{name:<12} planned takes {share:.3f} of its time in the same memory")
    print(f"written to {picture}")
    return 0


def points(results: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Of each plan, gigabytes at the worst moment and time as a share of plain checkpointing's in the same file."""
    found = {}
    for result in results:
        plain = result["plans"]["plain"]["median_ms"]
        for name, outcome in result["plans"].items():
            if outcome["status"] == "ok" and "peak_bytes" in outcome and name != "plain-again":
                found[name] = outcome["peak_bytes"] / 1e9, outcome["median_ms"] / plain
    return found


def above(plans: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Of each plan set by hand, the planner's time in the same memory as a share of its own.

    Between two of the planner's points the line between them counts. Plans that took less memory than the planner was
    ever given are left out.
    """
    curve = sorted(place for name, place in plans.items() if name.startswith("planned"))
    found = {}
    for name, (memory, share) in plans.items():
        if name.startswith("planned") or not curve or memory < curve[0][0]:
            continue
        lower = max(place for place in curve if place[0] <= memory)
        upper = min((place for place in curve if place[0] > memory), default=lower)
        way = (memory - lower[0]) / (upper[0] - lower[0]) if upper is not lower else 0.0
        found[name] = (lower[1] + way * (upper[1] - lower[1])) / share
    return found


def title_of(result: dict[str, Any]) -> str:
    device = result["environment"].get("device") or result["environment"].get("gpu") or ""
    return f"{sum(result['lengths']):,} tokens in {len(result['lengths'])} documents, one row  {device}"


def draw(plans: dict[str, tuple[float, float]], title: str, picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    planned = sorted(place for name, place in plans.items() if name.startswith("planned"))
    axis.plot(*zip(*planned, strict=True), "o-", color=_GREEN, label="fastft, planned")
    for name, (gigabytes, share) in plans.items():
        if name.startswith("planned"):
            continue
        is_ours = name.startswith(("early", "products", "keep")) or name == "offload"
        axis.plot(gigabytes, share, "s" if is_ours else "o", color=_BLUE if is_ours else _GRAY)
        axis.annotate(name, (gigabytes, share), xytext=(5, 4), textcoords="offset points", fontsize=8, color=_GRAY)
    axis.set(xlabel="peak memory, GB", ylabel="time of forward and backward, plain checkpointing = 1", title=title)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(picture, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
