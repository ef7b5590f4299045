"""The demo's result for people: a headline and two tables, and fastft's own report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console, Group
from rich.measure import Measurement
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fastft_plugins.demo.figures import quotient, relative_difference
from fastft_plugins.demo.verdict import busy_note, headline
from fastft_plugins.report import Report


def show(result: dict[str, Any], console: Console) -> None:
    """Print the comparison, the losses of each step and fastft's own report."""
    settings = result["settings"]
    counts = f"{settings['steps']} steps of {settings['batch_size']} documents, seed {settings['seed']}"
    texts = [Text(f"{result['model']}, {result['trained']}, on {result['device']}"), Text(result["data"]), Text(counts)]
    sentence, is_good = headline(result)
    texts.append(Text(sentence, style="bold green" if is_good else "bold yellow"))
    note = busy_note(result)
    if note is not None:
        texts.append(Text(note, style="yellow"))
    console.print(Panel(Group(*texts), title="fastft demo"))
    _print(_figures(result), console)
    _print(_losses(result), console)
    # Not console.print: the report breaks its own lines.
    console.out(Report.from_dict(result["fastft_report"]).to_text(min(console.width, 100)), highlight=False)


def _print(table: Table, console: Console) -> None:
    """Print a table as wide as its numbers need: a console that is narrower breaks lines, but must not cut a number."""
    for column in table.columns:
        cells = [Text(str(cell)) for cell in (column.header, *column.cells)]
        column.min_width = max(Measurement.get(console, console.options, cell).minimum for cell in cells)
    unlimited = console.options.update(max_width=10_000)
    least = Measurement.get(console, unlimited, table).minimum
    if least > console.width:
        table.width = least
    console.print(table, crop=False)


def _figures(result: dict[str, Any]) -> Table:
    stock, fastft = result["stock"], result["fastft"]
    table = Table(title="the same training, twice", title_justify="left")
    table.add_column("")
    for name in ("stock Trainer", "with fastft", "fastft / stock"):
        table.add_column(name, justify="right")

    def row(label: str, key: str, shown: Callable[[float], str]) -> None:
        table.add_row(label, shown(stock[key]), shown(fastft[key]), f"{quotient(fastft[key], stock[key]):.2f}")

    row("real tokens/s", "real_tokens_per_second", "{:,.0f}".format)
    row("median step", "median_step_seconds", _seconds)
    row("peak memory", "peak_memory_bytes", lambda value: f"{value / 2**30:.2f} GiB")
    if "cpu_seconds" in stock and "cpu_seconds" in fastft:
        row("processor time", "cpu_seconds", _seconds)
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
            f"{relative_difference(fastft, stock):.1e}",
        )
    return table


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"
