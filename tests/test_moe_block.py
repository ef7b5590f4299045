"""The block benchmark works on a CPU, and its result holds what a reader needs to trust it."""

from __future__ import annotations

import json

import pytest

from benchmarks import moe_block
from benchmarks.moe_shapes import CASES, SHAPES

pytest.importorskip("transformers")


def test_every_stack_takes_its_turns_and_is_written_down(tmp_path, capsys):
    out = tmp_path / "block.json"
    cases = ",".join(f"tiny-qwen3-moe:16:{mode}" for mode in ("frozen", "trained", "lora"))
    options = ["--cases", cases, "--turns", "2", "--steps", "1", "--eager", "--device", "cpu", "--out", str(out)]
    assert moe_block.main(options) == 0
    result = json.loads(out.read_text())
    seen = [(case["mode"], case["routing"]) for case in result["cases"]]
    assert seen == [
        ("frozen", "balanced"), ("frozen", "skewed"), ("trained", "balanced"), ("trained", "skewed"),
        ("lora", "balanced"),
    ]  # fmt: skip
    for case in result["cases"]:
        stacks = {"stock", "fastft"} | ({"eager"} if case["mode"] != "lora" else set())
        assert case["ms"].keys() == stacks and all(len(turns) == 2 for turns in case["ms"].values())
        assert "moe            on" in case["report"]
    assert "LoRA on the experts" in result["cases"][-1]["report"]
    assert "tiny-qwen3-moe" in capsys.readouterr().out and "--cases" in result["command"]


@pytest.mark.parametrize("case", ["nobody:16:frozen", "tiny-qwen3-moe:16:melted"])
def test_a_wrong_case_is_named(case, capsys):
    with pytest.raises(SystemExit):
        moe_block.parse(["--cases", case])
    assert case in capsys.readouterr().err


def test_the_default_cases_have_shapes():
    assert {shape for shape, _, _ in CASES} <= SHAPES.keys()
