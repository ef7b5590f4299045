"""The results page: it is what the committed files give, and its numbers are those of the single times in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import page

ENVIRONMENT = {"gpu": "Card 9", "packages": {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0"}}


def result(program: str, **parts: Any) -> dict[str, Any]:
    command = f"python -m benchmarks.{program} --out /somewhere/{program}.json"
    head = {"schema": 1, "date": "2026-11-24T16:11:50+00:00", "commit": "abcdef0123456789-dirty", "command": command}
    return {**head, "environment": ENVIRONMENT, **parts}


def run(stack: str, repeat: int, step_s: list[float], loss: float, peak: float) -> dict[str, Any]:
    return {
        "stack": stack, "repeat": repeat, "status": "ok", "error": None, "first_step_s": 9.0, "step_s": step_s,
        "forward_s": [], "backward_s": [], "tokens_per_s": [1000 / seconds for seconds in step_s], "loss": [loss],
        "peak_memory_bytes": int(peak * 1e9),
    }  # fmt: skip


SETTINGS = {
    "shape": "toy", "layers": 2, "trainable": "lora", "dtype": "bf16", "checkpointing": True, "tokens": 1000,
    "lengths": "fixed-100", "accumulate": 1,
}  # fmt: skip
# tokens/s of the pairs: 5000 against 1000, then 4000 against 2000. Stock is named second, and is the reference.
TRAINING = result(
    "run",
    settings=SETTINGS,
    runs=[
        run("fastft-padded", 0, [0.2, 0.2, 0.2], 4.004, 1.5),
        run("stock-padded", 0, [1.0, 1.0, 1.0], 4.0, 3.0),
        run("fastft-padded", 1, [0.25, 0.25, 0.25], 4.0, 1.5),
        run("stock-padded", 1, [0.5, 0.5, 0.5], 4.0, 3.25),
        {"stack": "broken", "repeat": 0, "status": "failed", "error": "no | room"},
    ],
)
CASE = {"shape": "toy-moe", "tokens": 8192, "mode": "frozen", "routing": "skewed"}
BLOCK = result(
    "moe_block",
    peers={"absent": {"error": "ImportError: no absent"}},
    cases=[
        {
            **CASE,
            "ms": {"stock": [9.0, 6.0, 6.0], "fastft": [3.0, 3.0, 4.0], "liger": [5.0]},
            "peak": {"stock": 5_000_000_000, "fastft": 2_000_000_000},
            "peers": {"liger": {"error": "RuntimeError: half way"}},
        }
    ],
)
GRADIENTS = result(
    "gradient_accuracy",
    settings={
        "shape": "toy", "layers": 2, "dtype": "bf16", "documents": "fixed-100", "stock": ["grouped_mm", "eager"],
        "limit": 1.1,
    },
    lengths=[[400, 600], [300, 300, 390]],
    flips={"fastft": [0.01, 0.02], "eager": [0.0, 0.0]},
    kinds={
        "sinks": {"fastft": 3e-3, "grouped_mm": 6e-3, "eager": 2e-3},
        "nothing": {"fastft": 0.0, "grouped_mm": 0.0, "eager": 0.0},
    },
    worst={"ratio": 1.5, "kind": "sinks", "stock": "eager"},
    peak_bytes=80_500_000_000,
)  # fmt: skip
OLD_PLANS = {
    "plain": {"status": "ok", "gradients": "equal", "distance": 0.0, "step_ms": [30.0, 10.0, 20.0],
              "peak_bytes": 8e9, "after_forward_bytes": 6e9, "engine": {}},
    "offload": {"status": "ok", "gradients": "different", "distance": 0.25, "step_ms": [25.0],
                "engine": {"hidden_share": 0.509}},
}  # fmt: skip
NEW_PLANS = {
    **OLD_PLANS,
    "planned@40": {"status": "ok", "settling_s": [3.5, 1.0, 0.5], "gradients": "equal", "distance": 0.0,
                   "step_ms": [16.0, 16.0, 12.0, 17.0], "explanation": "there is memory", "engine": {}},
    "planned@9": {"status": "out of memory: CUDA out of memory.\nSee there", "gradients": "equal", "distance": 0.0},
    "planned": {"status": "skipped: out of time"},
}  # fmt: skip


def write(folder: Path, name: str, content: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def row_of(text: str, *cells: str) -> list[str]:
    """The cells of the one row that has all of these."""
    rows = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("|")]
    (found,) = [row for row in rows if set(cells) <= set(row)]
    return found


def test_the_committed_page_is_what_the_result_files_give(capsys: pytest.CaptureFixture[str]) -> None:
    assert page.main(["--check"]) == 0, capsys.readouterr().err


def test_stacks_are_compared_pair_by_pair_with_the_one_that_is_not_ours(tmp_path: Path) -> None:
    write(tmp_path, "padded_toy", TRAINING)
    text = page.page(tmp_path)
    assert "## Padded batches" in text
    ours = row_of(text, "fastft-padded")
    # (5 + 2) / 2; 200 and 250 ms, three times each; |4.004 - 4| / 4
    assert ours[3:] == [
        "6 in 2 processes", "225.0 (200.0–250.0)", "4,500", "**3.50×** (5.00, 2.00)", "stock-padded", "1.5", "1.0e-03",
    ]  # fmt: skip
    stock = row_of(text, "stock-padded", "6 in 2 processes", "3.2")
    assert stock[3:] == ["6 in 2 processes", "750.0 (500.0–1,000.0)", "1,500", "–", "–", "3.2", "–"]
    assert row_of(text, "[toy (2 layers)](padded_toy.json)")[1] == (
        "lora, bf16, checkpointing on, 1,000 tokens of fixed-100"
    )
    assert row_of(text, "broken")[3] == "failed" and "broken, repeat 0: **failed** `no | room`" in text
    assert row_of(text, "[padded_toy](padded_toy.json)")[1:] == [
        "Card 9, torch 2.11.0, transformers 5.17.0", "abcdef012345-dirty", "2026-11-24", "`python -m benchmarks.run`",
    ]  # fmt: skip


def test_a_block_is_compared_with_stock_and_a_failed_peer_is_named(tmp_path: Path) -> None:
    write(tmp_path, "experts_block_toy", BLOCK)
    text = page.page(tmp_path)
    # 6 / 3, and turn by turn 9 / 3, 6 / 3, 6 / 4; 5 GB / 2 GB
    assert row_of(text, "fastft") == [
        "[toy-moe](experts_block_toy.json)", "8,192", "frozen", "skewed", "fastft", "6.00 → 3.00",
        "**2.00×** (3.00, 2.00, 1.50)", "5.00 → 2.00", "2.50×",
    ]  # fmt: skip
    assert "liger: **failed** `RuntimeError: half way`" in text and "`ImportError: no absent`" in text


def test_products_stand_beside_each_other_and_a_failed_kernel_is_named(tmp_path: Path) -> None:
    ms = {"cuBLAS": [1.0], "torch grouped_mm": [3.0, 2.0, 9.0], "Triton": [4.0]}
    failed = {"CUDA for Hopper": "RuntimeError: no Hopper"}
    entry = {"product": "up", "flops": 1, "ms": ms, "errors": {}, "failed": failed}
    write(tmp_path, "experts_products_toy", result("grouped_products", tokens=64, shapes={"toy-moe": [entry]}))
    text = page.page(tmp_path)
    row = row_of(text, "[toy-moe](experts_products_toy.json)")
    assert row[1:] == ["64", "up", "1.00", "3.00", "4.00", "0.75"]
    assert "up, CUDA for Hopper: **failed** `RuntimeError: no Hopper`" in text


@pytest.mark.parametrize("plans", [OLD_PLANS, NEW_PLANS], ids=["older", "newer"])
def test_plans_are_compared_with_plain_in_both_layouts(tmp_path: Path, plans: dict[str, Any]) -> None:
    write(
        tmp_path, "checkpointing_toy", result("checkpoint_sweep", lengths=[3000, 96], weights_bytes=14e9, plans=plans)
    )
    text = page.page(tmp_path)
    assert "3,096 tokens in 2 documents, one row, weights of 14.0 GB" in text
    assert row_of(text, "plain") == [
        "plain", "3", "20.0 (10.0–30.0)", "1.000×", "8.0", "6.0", "–", "–", "equal",
    ]  # fmt: skip
    assert row_of(text, "offload")[3:] == ["0.800×", "–", "–", "50.9%", "–", "**differ by 2.5e-01**"]
    assert ("planned@40" in plans) == ("- planned@40: there is memory" in text)
    if plans is NEW_PLANS:
        assert row_of(text, "planned@40")[1:4] == ["4", "16.0 (12.0–17.0)", "1.250×"]
        assert row_of(text, "planned@40")[7] == "5.0 s, 3 steps"
        assert row_of(text, "planned@9")[-1] == "equal; **out of memory** `CUDA out of memory. See there`"
        assert row_of(text, "planned")[-1] == "–; **skipped** `out of time`"


def test_gradients_are_compared_with_every_stock_that_was_named(tmp_path: Path) -> None:
    write(tmp_path, "gradients_toy", GRADIENTS)
    text = page.page(tmp_path)
    assert "## Accuracy of gradients" in text
    assert "1,000 and 990 tokens of fixed-100 in 2 and 3 documents. Worst ratio **1.500** (sinks, against eager" in text
    assert "fastft 1.50%, eager 0.00%" in text and "Peak 80.5 GB" in text
    assert row_of(text, "sinks") == ["sinks", "3.00e-03", "6.00e-03", "0.500", "2.00e-03", "1.500"]
    assert row_of(text, "nothing")[2:] == ["0.00e+00", "–", "0.00e+00", "–"]


def test_a_picture_of_the_name_is_shown_and_what_a_file_lacks_is_said(tmp_path: Path) -> None:
    sweep = result("checkpoint_sweep", lengths=[8], weights_bytes=1, plans=OLD_PLANS)
    write(tmp_path, "checkpointing_one", sweep | {"command": sweep["command"] + " --plans plain,offload,every-2"})
    write(tmp_path, "checkpointing_two", sweep)
    (tmp_path / "checkpointing_one.png").touch()
    text = page.page(tmp_path)
    assert "![checkpointing_one](checkpointing_one.png)" in text and "two.png" not in text
    assert "[checkpointing_one](checkpointing_one.json) has nothing of every-2" in text
    assert "compared with those of" not in text
    write(tmp_path, "checkpointing_two", sweep | {"plans": {"keep-0": OLD_PLANS["plain"], "plain": OLD_PLANS["plain"]}})
    assert "- The gradients are compared with those of `keep-0`." in page.page(tmp_path)


def test_an_unknown_layout_is_listed_with_its_command(tmp_path: Path) -> None:
    write(tmp_path, "padded_new", {"command": "python -m benchmarks.other --out x --loud", "runs": 3})
    write(tmp_path, "padded_older", [1, 2])
    write(tmp_path, "novel_toy", TRAINING)
    text = page.page(tmp_path)
    assert text.index("## Novel") < text.index("## Other files")
    assert row_of(text, "[padded_new](padded_new.json)")[1] == "`python -m benchmarks.other --loud`"
    assert row_of(text, "[padded_older](padded_older.json)")[1] == "unknown"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "not valid JSON"),
        (json.dumps({**TRAINING, "runs": []}), "not a complete result"),
        (json.dumps({key: value for key, value in TRAINING.items() if key != "date"}), "not a complete result"),
        (json.dumps(result("moe_block", peers={}, cases=[{**CASE, "peers": {}}])), "not a complete result"),
        (json.dumps(result("checkpoint_sweep", plans=OLD_PLANS)), "not a complete result"),
    ],
)
def test_a_malformed_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, problem: str
) -> None:
    (tmp_path / "padded_bad.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        page.main([str(tmp_path)])
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and str(tmp_path / "padded_bad.json") in shown and problem in shown
    assert not (tmp_path / "README.md").exists()


def test_check_says_what_is_out_of_date_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert page.main([str(tmp_path), "--check"]) == 1  # there is no page yet
    assert page.main([str(tmp_path)]) == 0 and page.main([str(tmp_path), "--check"]) == 0
    before = (tmp_path / "README.md").read_bytes()
    write(tmp_path, "padded_toy", TRAINING)
    capsys.readouterr()
    assert page.main([str(tmp_path), "--check"]) == 1
    shown = capsys.readouterr().err
    assert "+## Padded batches" in shown and "run python -m benchmarks.page" in shown
    assert (tmp_path / "README.md").read_bytes() == before
