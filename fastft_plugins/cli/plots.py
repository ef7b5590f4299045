"""The picture beside a saved report, for ``fastft report``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastft_plugins.errors import FastFTError
from fastft_plugins.report import Report

_GRAY, _GREEN = "#8a8f98", "#1a7f4b"  # the demo's colors of stock and fastft


def save_beside(file: Path, draw: Callable[[Path], None]) -> Path:
    """Draw into the file of that name with the ending .png.

    Raises:
        FastFTError: matplotlib is missing, or the file cannot be written; the report can be read without it.
    """
    picture = file.with_suffix(".png")
    if importlib.util.find_spec("matplotlib") is None:
        raise FastFTError("no plot, matplotlib is not installed: pip install 'fastft-plugins[demo]'")
    try:
        draw(picture)
    except OSError as error:
        raise FastFTError(f"no plot, {picture} cannot be written ({error.strerror or error})") from error
    return picture


def draw_run(report: Report, picture: Path) -> None:
    """What became of the padded batches, and each measured number over the steps that were logged.

    Raises:
        FastFTError: nothing was measured.
    """
    import matplotlib

    names = list(dict.fromkeys(name for entry in report.history for name in entry if name != "step"))
    panels: list[Callable[[Report, Any], None]] = (
        [_draw_tokens] if report.features["packing"].metrics.get("tokens") else []
    )
    panels += [partial(_draw_history, name) for name in names]
    if not panels:
        raise FastFTError("no plot, this run has measured nothing")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 4), layout="constrained", squeeze=False)
    for draw, axis in zip(panels, axes[0], strict=True):
        draw(report, axis)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(", ".join(part for part in (report.model, report.framework, report.state) if part))
    figure.savefig(picture, dpi=130)
    plt.close(figure)


def _draw_tokens(report: Report, axis: Any) -> None:
    metrics = report.features["packing"].metrics
    real, removed = metrics["tokens"], metrics.get("padding_removed", 0)
    bars = axis.bar(["padded", "packed"], [real, real], color=_GREEN, width=0.6, label="real tokens")
    axis.bar_label(bars, fmt="{:,.0f}", label_type="center", color="white")
    axis.bar(["padded"], [removed], bottom=[real], color=_GRAY, width=0.6, label="padding")
    axis.set(title="tokens of the packed batches")
    axis.legend(frameon=False)


def _draw_history(name: str, report: Report, axis: Any) -> None:
    points = [(entry["step"], entry[name]) for entry in report.history if name in entry and "step" in entry]
    axis.plot([step for step, _ in points], [value for _, value in points], "o-", color=_GREEN)
    axis.set(title=name.replace("_", " "), xlabel="step")
    axis.set_ylim(bottom=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
