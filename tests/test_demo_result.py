"""What the demo makes of its measurements: the headline, the tables, the files, and reports that were damaged."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastft_plugins.cli.saved import show_saved
from fastft_plugins.demo import output
from fastft_plugins.demo.figures import batch_tokens, relative_difference
from fastft_plugins.demo.model import _no_gguf_progress_bar
from fastft_plugins.demo.show import show
from fastft_plugins.demo.verdict import busy_note, headline
from fastft_plugins.errors import FastFTConfigError
from fastft_plugins.report import FeatureReport, Report

REPLACEMENTS = (None, 0, -1, 1.5, "", "text", [], [1], {}, {"a": 1}, True, 10**400, float("nan"))


def run_of(speed: float) -> dict[str, Any]:
    return {
        "losses": [2.25, 1.123456],
        "step_seconds": [1.0, 1.0],
        "step_cpu_seconds": [2.0, 2.0],
        "median_step_seconds": 1 / speed,
        "seconds": 2 / speed,
        "cpu_seconds": 4 / speed,
        "real_tokens_per_second": 123_456.0 * speed,
        "peak_memory_bytes": 123 * 2**30,
    }


@pytest.fixture
def result() -> dict[str, Any]:
    packing = FeatureReport("packing", True, "because of the padding", ["one"], {"padding_share": 0.5})
    return {
        "kind": "fastft demo",
        "model": "Tiny",
        "data": "data.jsonl",
        "trained": "all weights",
        "device": "CPU, 2 threads",
        "settings": {"steps": 2, "batch_size": 8, "seed": 0},
        "real_tokens": [123_456, 123_456],
        "padded_tokens": [1_234_567, 1_234_567],
        "padding_share": 0.5,
        "stock": run_of(1.0),
        "fastft": run_of(1.85),
        "speedup": 1.85,
        "largest_relative_loss_difference": 1.2e-7,
        "largest_weight_difference": 1e-9,
        "weight_difference_over_update": 1e-4,
        "fastft_report": Report({"packing": packing}, model="Tiny", state="finished", notes=["fine"]).to_dict(),
    }


def shown(result: dict[str, Any], width: int = 120) -> str:
    console = Console(width=width, file=io.StringIO())
    show(result, console)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "text", "is_good"),
    [
        ({}, "1.85x the speed of the stock Trainer, losses equal to 1e-07 relative", True),
        ({"largest_relative_loss_difference": 0.0}, "1.85x the speed of the stock Trainer, losses identical", True),
        ({"largest_relative_loss_difference": 0.05}, "losses differ by up to 5e-02 relative", False),
        ({"largest_relative_loss_difference": float("nan")}, "losses differ by up to nan relative", False),
        ({"speedup": 0.9}, "0.90x the speed", False),
        ({"fastft": run_of(1.85) | {"seconds": 4.0}}, "1.85x the speed", False),
        (
            {"fastft_report": Report({"packing": FeatureReport("packing", reason="no padding here")}).to_dict()},
            "fastft stayed off: no padding here; losses equal to 1e-07 relative",
            False,
        ),
    ],
)
def test_headline(result: dict[str, Any], changes: dict[str, Any], text: str, is_good: bool) -> None:
    found, found_good = headline(result | changes)
    assert text in found and found_good == is_good
    assert text in shown(result | changes)


def test_a_busy_machine_is_told_from_a_slow_run(result: dict[str, Any]) -> None:
    assert busy_note(result) is None
    result["fastft"]["seconds"] *= 1.29  # a little is noise
    assert busy_note(result) is None
    result["fastft"]["seconds"] = 2 / 0.29
    note = busy_note(result)
    assert note is not None and "0.29x by the clock, 1.85x by processor time" in note
    assert "the machine was busy" in shown(result)
    del result["stock"]["cpu_seconds"]  # saved by an older version
    assert busy_note(result) is None
    assert "processor time" not in shown(result)


@pytest.mark.parametrize("width", [20, 50, 64, 79])
def test_narrow_terminals_cut_no_number(result: dict[str, Any], width: int) -> None:
    text = shown(result, width)
    assert "…" not in text
    for number in ("123,456", "228,394", "1,234,567", "2.25000", "1.12346", "123.00", "1.2e-07"):
        assert number in text


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside."""
    if path:
        yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def damaged(saved: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield copies with one value deleted or replaced."""
    for *parents, last in places(saved):
        for replacement in ("deleted", *REPLACEMENTS):
            other = copy.deepcopy(saved)
            holder = other
            for key in parents:
                holder = holder[key]
            if replacement == "deleted":
                del holder[last]
            else:
                holder[last] = replacement
            yield other


@pytest.mark.parametrize("kind", ["demo", "report"])
def test_a_damaged_report_is_shown_or_refused(result: dict[str, Any], tmp_path: Path, kind: str) -> None:
    file = tmp_path / "report.json"
    refused = 0
    for saved in damaged(result if kind == "demo" else result["fastft_report"]):
        file.write_text(json.dumps(saved))
        try:
            show_saved(file, Console(file=io.StringIO()))
        except FastFTConfigError as error:
            assert str(file) in str(error) and "\n" not in str(error) and len(str(error)) < 500
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("real_tokens",), [], "real_tokens has 0 entries, and stock.losses 2"),
        (("data",), None, "data is None, not text"),
        (("stock", "losses", 1), "x", "stock.losses[1] is 'x', not a number"),
        (("fastft_report", "model"), 1, "model is 1, not text"),
    ],
)
def test_the_field_of_a_damaged_demo_is_named(
    result: dict[str, Any], tmp_path: Path, path: tuple[Any, ...], value: Any, problem: str
) -> None:
    *parents, last = path
    holder = result
    for key in parents:
        holder = holder[key]
    holder[last] = value
    file = tmp_path / "report.json"
    file.write_text(json.dumps(result))
    with pytest.raises(FastFTConfigError) as raised:
        show_saved(file, Console(file=io.StringIO()))
    assert problem in str(raised.value)


def test_divisors_of_zero_are_shown(result: dict[str, Any]) -> None:
    result["stock"]["peak_memory_bytes"] = result["stock"]["losses"][0] = 0
    assert "inf" in shown(result)
    assert relative_difference(0.0, 0.0) == 0.0


def test_checking_the_output_leaves_nothing_and_changes_nothing(tmp_path: Path) -> None:
    output.check_output(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "report.json").write_text("an earlier one")
    output.check_output(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "an earlier one"


def test_a_disk_that_fills_up_is_one_line_and_keeps_the_table(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastft_plugins.cli import main

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastft_plugins.demo.run_demo", lambda *_, **__: result)
    monkeypatch.setattr(output, "plot", full)
    monkeypatch.setattr("sys.argv", ["fastft", "demo", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    text, errors = capsys.readouterr()
    assert "1.85x the speed" in text
    assert "plot.png: cannot be written (No space left on device)" in errors and errors.count("\n") == 1
    assert json.loads((tmp_path / "out" / "report.json").read_text())["speedup"] == 1.85


def test_the_plot_names_what_the_speed_is_compared_with(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    titles = []
    plain_set = Axes.set

    def recorded(axes: Axes, **options: Any) -> Any:
        titles.append(options.get("title"))
        return plain_set(axes, **options)

    monkeypatch.setattr(Axes, "set", recorded)
    _, picture = output.save(result, tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "real tokens/s: 1.85x of stock" in titles


def test_the_gguf_reader_shows_no_progress_bar() -> None:
    from transformers import modeling_gguf_pytorch_utils as reader

    bar = reader.tqdm
    with _no_gguf_progress_bar():
        assert list(reader.tqdm([1, 2], desc="converting")) == [1, 2]
        assert reader.tqdm is not bar
    assert reader.tqdm is bar


def test_batch_tokens_counts_padding() -> None:
    documents = [{"input_ids": [0] * length} for length in (3, 5, 2, 2, 7)]
    assert batch_tokens(documents, 2) == ([8, 4, 7], [10, 4, 7])
