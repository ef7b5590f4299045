"""From the raw numbers of all processes to medians, spread and ratios pair by pair, and to a table in plain text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

# What a ratio compares, and whether more is better. Every ratio reads "above 1: better than the reference stack".
_METRICS = {"tokens_per_s": True, "step_s": False, "forward_s": False, "backward_s": False, "first_step_s": False}

_PAIRS_SHOWN = 4


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Per stack: p20, p50 and p80 over the steps of all its repeats that succeeded."""
    summary: dict[str, Any] = {}
    for stack in dict.fromkeys(run["stack"] for run in runs):
        good = [run for run in runs if run["stack"] == stack and run["status"] == "ok"]
        if not good:
            summary[stack] = None
            continue
        summary[stack] = {
            metric: spread([value for run in good for value in values_of(run, metric)]) for metric in _METRICS
        }
        peaks = [run["peak_memory_bytes"] for run in good if run["peak_memory_bytes"] is not None]
        summary[stack]["peak_memory_bytes"] = max(peaks, default=None)
        summary[stack]["final_loss"] = good[-1]["loss"][-1]
    return summary


def ratios(runs: list[dict[str, Any]], reference: str | None = None) -> list[dict[str, Any]]:
    """Each stack against one, by default the first, repeat by repeat: neighbours in time share the machine's mood."""
    stacks = list(dict.fromkeys(run["stack"] for run in runs))
    reference = reference or stacks[0]
    good = {(run["stack"], run["repeat"]): run for run in runs if run["status"] == "ok"}
    rows = []
    for stack in stacks:
        pairs = [(run, good[reference, repeat]) for (name, repeat), run in good.items()
                 if name == stack and (reference, repeat) in good]  # fmt: skip
        if pairs and stack != reference:
            rows.append({"stack": stack, "against": reference, **_compare(pairs)})
    return rows


def spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    return {"p20": tenths[1], "p50": statistics.median(values), "p80": tenths[7]}


def pairs_text(pairs: Sequence[float], separator: str = ", ") -> str:
    """Every pair, or beyond a few their range: the median stands before it."""
    if len(pairs) <= _PAIRS_SHOWN:
        return separator.join(f"{pair:.2f}" for pair in pairs)
    return f"{min(pairs):.2f}–{max(pairs):.2f}, {len(pairs)} pairs"


def values_of(run: dict[str, Any], metric: str) -> list[float]:
    value = run[metric]
    if isinstance(value, list):
        return value
    return [] if value is None else [value]


def model_text(settings: dict[str, Any]) -> str:
    layers = f" ({settings['layers']} layers)" if settings["layers"] else ""
    return f"{settings['shape']}{layers}"


def training_text(settings: dict[str, Any]) -> str:
    """What is trained and how; a result of before an option was there lacks it."""
    base = f" on {settings['quantize']}" if settings.get("quantize") else ""
    cap = f", in {settings['cap']:g} GB" if settings.get("cap") else ""
    checkpointing = "on" if settings["checkpointing"] else "off"
    return f"{settings['trainable']}{base}, {settings['dtype']}, checkpointing {checkpointing}{cap}"


def render(result: dict[str, Any]) -> str:
    """The table that `benchmarks.run` prints."""
    settings, documents = result["settings"], result["documents"]
    gpu = (result["environment"] or {}).get("gpu") or "CPU"
    lines = [
        f"{settings['shape']} · {training_text(settings)} · {documents['per_step']} documents a step "
        f"({settings['lengths']}, {documents['padding_share']:.0%} of a padded batch is padding) · {gpu}",
        "",
        _ROW.format("stack", "tokens/s", "step ms (p20–p80)", "forward", "backward", "first step", "peak GB", "loss"),
    ]
    lines += [_stack_row(stack, numbers) for stack, numbers in result["summary"].items()]
    for row in result["ratios"]:
        compared = ", ".join(
            f"{_LABELS[metric]} {row[metric]['median']:.2f}× ({pairs_text(row[metric]['pairs'], ' ')})"
            for metric in _LABELS
            if row[metric]
        )
        lines.append(f"\n{row['stack']} against {row['against']}: {compared}; "
                     f"largest relative loss difference {row['loss_difference']:.1e}")  # fmt: skip
    lines += [
        f"\n{run['stack']}, repeat {run['repeat']}: {run['status']}: {run['error']}"
        for run in result["runs"]
        if run["status"] != "ok"
    ]
    return "\n".join(lines)


_LABELS = {"tokens_per_s": "tokens/s", "forward_s": "forward", "backward_s": "backward"}
_ROW = "{:<28} {:>9} {:>24} {:>9} {:>9} {:>11} {:>8} {:>8}"


def _compare(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for metric, more_is_better in _METRICS.items():
        quotients = []
        for run, reference in pairs:
            ours, theirs = values_of(run, metric), values_of(reference, metric)
            if ours and theirs:
                quotient = statistics.median(ours) / statistics.median(theirs)
                quotients.append(quotient if more_is_better else 1 / quotient)
        row[metric] = {"pairs": quotients, "median": statistics.median(quotients)} if quotients else None
    row["loss_difference"] = max(
        abs(ours - theirs) / abs(theirs)
        for run, reference in pairs
        for ours, theirs in zip(run["loss"], reference["loss"], strict=False)  # a budget may have cut one short
    )
    return row


def _stack_row(stack: str, numbers: dict[str, Any] | None) -> str:
    if numbers is None:
        return _ROW.format(stack, *["–"] * 7)
    step, peak = numbers["step_s"], numbers["peak_memory_bytes"]
    return _ROW.format(
        stack,
        f"{numbers['tokens_per_s']['p50']:,.0f}",
        f"{step['p50'] * 1e3:,.1f} ({step['p20'] * 1e3:,.1f}–{step['p80'] * 1e3:,.1f})",
        _milliseconds(numbers["forward_s"]),
        _milliseconds(numbers["backward_s"]),
        f"{numbers['first_step_s']['p50']:.2f} s",
        "–" if peak is None else f"{peak / 1e9:.1f}",
        f"{numbers['final_loss']:.4f}",
    )


def _milliseconds(values: dict[str, float] | None) -> str:
    return "–" if values is None else f"{values['p50'] * 1e3:,.1f}"
