"""The demo's result for people: a table, a plot, and the JSON from which both can be made again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fastft_plugins.errors import FastFTConfigError
from fastft_plugins.report import Report


def show(result: dict[str, Any], console: Console) -> None:
    """Print the comparison, the losses of each step and fastft's own report.

    Raises:
        KeyError, TypeError, ValueError: ``result`` is not what `run_demo` returned.
    """
    settings = result["settings"]
    counts = f"{settings['steps']} steps of {settings['batch_size']} documents, seed {settings['seed']}"
    headline = Text(
        f"{result['speedup']:.2f}x the speed of the stock Trainer, "
        f"losses equal to {result['largest_relative_loss_difference']:.0e} relative",
        style="bold green" if result["speedup"] > 1 else "bold yellow",
    )
    texts = [Text(f"{result['model']}, {result['trained']}, on {result['device']}"), Text(result["data"]), Text(counts)]
    console.print(Panel(Group(*texts, headline), title="fastft demo"))
    console.print(_figures(result))
    console.print(_losses(result))
    # Not console.print: the report breaks its own lines, and a narrower console would break them again.
    console.out(str(Report.from_dict(result["fastft_report"])), highlight=False)


def _figures(result: dict[str, Any]) -> Table:
    stock, fastft = result["stock"], result["fastft"]
    table = Table(title="the same training, twice", title_justify="left")
    table.add_column("")
    for name in ("stock Trainer", "with fastft", "fastft / stock"):
        table.add_column(name, justify="right")

    def row(label: str, key: str, shown: Callable[[float], str]) -> None:
        table.add_row(label, shown(stock[key]), shown(fastft[key]), f"{fastft[key] / stock[key]:.2f}")

    row("real tokens/s", "real_tokens_per_second", "{:,.0f}".format)
    row("median step", "median_step_seconds", _seconds)
    row("peak memory", "peak_memory_bytes", lambda value: f"{value / 2**30:.2f} GiB")
    removed = Report.from_dict(result["fastft_report"]).features["packing"].enabled
    share = f"{100 * result['padding_share']:.0f} %"
    table.add_row("padding", share, "0 %" if removed else share, "")
    table.add_section()
    for label, key in (
        ("largest loss difference, relative", "largest_relative_loss_difference"),
        ("largest weight difference", "largest_weight_difference"),
        ("weight difference / update", "weight_difference_over_update"),
    ):
        table.add_row(label, "", f"{result[key]:.1e}", "")
    return table


def _losses(result: dict[str, Any]) -> Table:
    table = Table(title="loss, step by step", title_justify="left")
    for name in ("step", "real tokens", "with padding", "stock", "fastft", "relative difference"):
        table.add_column(name, justify="right")
    pairs = list(zip(result["stock"]["losses"], result["fastft"]["losses"], strict=True))
    stride = max(1, len(pairs) // 10)  # a long run shows about ten lines, the JSON holds all
    for index in [*range(0, len(pairs) - 1, stride), len(pairs) - 1]:
        stock, fastft = pairs[index]
        table.add_row(
            str(index + 1),
            f"{result['real_tokens'][index]:,}",
            f"{result['padded_tokens'][index]:,}",
            f"{stock:.5f}",
            f"{fastft:.5f}",
            f"{abs(fastft - stock) / abs(stock):.1e}",
        )
    return table


def save(result: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write ``report.json`` and ``plot.png``; return their paths."""
    report, picture = folder / "report.json", folder / "plot.png"
    report.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _plot(result, picture)
    return report, picture


def make_folder(folder: Path) -> None:
    """Create the output folder; called before the training, which nobody wants to lose to a path."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FastFTConfigError(f"{folder}: cannot be created ({error.strerror}). Remedy: --out DIR.") from error


def _plot(result: dict[str, Any], file: Path) -> None:
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
    speed.set(title=f"real tokens/s: {result['speedup']:.2f}x", ylabel="tokens/s, padding not counted")
    for axes in (losses, times):
        axes.legend(frameon=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in (losses, speed, times):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{result['model']}, {result['trained']}, {result['device']}")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"
