"""The demo's two files: the JSON from which all can be made again, and a plot."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastft_plugins.errors import FastFTConfigError


def check_output(folder: Path) -> None:
    """Raise if the files cannot be written, and leave nothing behind: nobody wants to lose a training to a path."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        _create(folder)
        for file in files_in(folder):
            _try_to_write(file)
    finally:
        for path in created:
            with contextlib.suppress(OSError):  # it could not be created
                path.rmdir()


def save(result: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write ``report.json`` and ``plot.png``; return their paths."""
    _create(folder)
    report, picture = files_in(folder)
    with _explained(report, "written"):
        report.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with _explained(picture, "written"):
        plot(result, picture)
    return report, picture


def files_in(folder: Path) -> tuple[Path, Path]:
    return folder / "report.json", folder / "plot.png"


def _create(folder: Path) -> None:
    with _explained(folder, "created"):
        folder.mkdir(parents=True, exist_ok=True)


def _try_to_write(file: Path) -> None:
    is_new = not file.exists()
    with _explained(file, "written"):
        with file.open("ab"):  # what an earlier demo saved stays as it is
            pass
        if is_new:
            file.unlink()


@contextlib.contextmanager
def _explained(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FastFTConfigError(f"{path}: cannot be {what} ({error.strerror or error}). Remedy: --out DIR.") from error


def plot(result: dict[str, Any], file: Path) -> None:
    """Draw the losses, the speed and the times of both runs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stock, fastft = result["stock"], result["fastft"]
    steps = range(1, len(stock["losses"]) + 1)
    colors = {"stock Trainer": "#8a8f98", "with fastft": "#1a7f4b"}
    figure, (losses, speed, times) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for (label, color), run, style in zip(colors.items(), (stock, fastft), ("o-", "x--"), strict=True):
        losses.plot(steps, run["losses"], style, label=label, color=color)
        times.plot(steps, run["step_seconds"], "o-", label=label, color=color)
    losses.set(title="loss of each step", xlabel="step", ylabel="loss")
    times.set(title="time of each step", xlabel="step", ylabel="seconds", ylim=(0, None))
    rates = [run["real_tokens_per_second"] for run in (stock, fastft)]
    bars = speed.bar(list(colors), rates, color=list(colors.values()), width=0.6)
    speed.bar_label(bars, fmt="{:,.0f}")
    speed.set(title=f"real tokens/s: {result['speedup']:.2f}x of stock", ylabel="tokens/s, padding not counted")
    for axes in (losses, times):
        axes.legend(frameon=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in (losses, speed, times):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{result['model']}, {result['trained']}, {result['device']}")
    figure.savefig(file, dpi=130)
    plt.close(figure)
