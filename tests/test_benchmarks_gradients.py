"""The accuracy of gradients: a tiny gpt-oss end to end, and errors that the comparison must find."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the benchmarks train transformers' models")

from benchmarks import gradient_accuracy, gradient_runs, table
from benchmarks.fixed_routing import FixedRouting, padded_layout, row_layout

# fp32 against fp64 is all noise, some kinds are of eight numbers: the limit is wide, and an error is far beyond it.
TINY = ["--shape", "tiny", "--layers", "2", "--tokens", "128", "--documents", "loguniform-8-64", "--vocab", "64"]
OPTIONS = [*TINY, "--dtype", "fp32", "--device", "cpu", "--limit", "20"]


def compare(out: Path, *options: str) -> tuple[int, dict[str, Any]]:
    code = gradient_accuracy.main([*OPTIONS, *options, "--out", str(out)])
    return code, json.loads(out.read_text())


def test_ours_is_as_accurate_as_stock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = compare(tmp_path / "new" / "result.json", "--stock", "grouped_mm,eager", "--draws", "2")
    assert code == 0
    kinds = result["kinds"]
    assert list(kinds)[-1] == "all parameters"
    assert {"self_attn.sinks", "mlp.router.bias", "mlp.experts.down_proj_bias", "embed_tokens", "lm_head"} < set(kinds)
    for errors in kinds.values():
        assert set(errors) == {"fastft", "grouped_mm", "eager"}
        assert all(0 < error < 1e-5 for error in errors.values())
    for name in ("fastft", "grouped_mm", "eager"):
        assert result["losses"][name] == pytest.approx(result["losses"]["truth"], rel=1e-5)
        assert len(result["flips"][name]) == len(result["lengths"]) == 2
    features = result["report"]["features"]
    assert features["packing"]["enabled"] and features["moe"]["enabled"]
    printed = capsys.readouterr().out
    assert f"worst ratio {result['worst']['ratio']:.3f}" in printed and "less accurate" not in printed
    assert table.read(tmp_path / "new" / "result.json") is None  # another program's


def test_a_boundary_that_is_missing_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    packed_row = gradient_runs.packed_row

    def merged(run: Any, documents: list[list[int]], device: torch.device) -> dict[str, Any]:
        row = packed_row(run, documents, device)
        return packed_row(run, [documents[0] + documents[1], *documents[2:]], device) | {"labels": row["labels"]}

    monkeypatch.setattr(gradient_runs, "packed_row", merged)
    code, result = compare(tmp_path / "result.json")
    assert code == 1
    assert result["kinds"]["self_attn.v_proj"]["fastft"] > 1e-3
    assert result["worst"]["ratio"] > 1e3
    assert "less accurate than stock: all parameters" in capsys.readouterr().out


def test_the_weights_come_back_and_the_truth_is_exact() -> None:
    options = gradient_accuracy.parse([*TINY, "--dtype", "bf16", "--device", "cpu"])
    model = gradient_runs.make_model(options)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert {parameter.dtype for parameter in before.values()} == {torch.bfloat16}
    assert all(parameter.float().std() > 0 for parameter in before.values())
    documents = [[5, 6, 7, 8], [9, 10, 11]]
    _, truth = gradient_runs.exact_gradients(model, documents, FixedRouting(model))
    assert {gradient.dtype for gradient in truth.values()} == {torch.float64}
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16 and parameter.equal(before[name]) and parameter.grad is None
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert "forward" not in vars(model.model.norm)


def test_tokens_go_where_they_went_in_the_truth() -> None:
    model = gradient_runs.make_model(gradient_accuracy.parse([*TINY, "--dtype", "fp32", "--device", "cpu"]))
    routing = FixedRouting(model)
    router = model.model.layers[0].mlp.router
    choices = []
    for number, tokens in enumerate((3, 2)):
        routing.record(number)
        choices.append(router(torch.randn(tokens, 64))[2])
    routing.give(padded_layout)
    logits, weights, ids = router(hidden := torch.randn(6, 64))
    assert ids[:3].equal(choices[0]) and ids[3:5].equal(choices[1])
    assert ids[5].equal(logits[5].topk(2).indices)  # padding
    torch.testing.assert_close(weights, logits.gather(1, ids).softmax(1))
    own = logits.topk(2).indices.sort(1).values
    assert routing.flips() == int((own[:5] != ids[:5].sort(1).values).any(1).sum()) / 5 > 0
    routing.give(row_layout)
    assert router(hidden[:5])[2].equal(torch.cat(choices))


def test_an_error_that_is_no_number_is_not_accurate() -> None:
    kinds = {"a": {"fastft": 2.0, "grouped_mm": 1.0}, "b": {"fastft": math.nan, "grouped_mm": 1.0}}
    worst, wrong = gradient_accuracy.verdict(kinds, ["grouped_mm"], 1.1)
    assert worst["kind"] == "b" and len(wrong) == 2
    assert gradient_accuracy.verdict(kinds, ["grouped_mm"], 3.0)[1] == ["b, nan times grouped_mm"]


@pytest.mark.parametrize("arguments", [["--stock", "flex"], ["--documents", "some"], ["--shape", "llama-8b"]])
def test_bad_options_end_with_a_message(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gradient_accuracy.parse(arguments)
    assert arguments[0] in capsys.readouterr().err
