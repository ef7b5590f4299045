"""The benchmark of grouped products: what it accepts as right, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import grouped_products
from benchmarks.grouped_products import Product

COUNTS = (3, 0, 5)
OFFSETS = torch.tensor([3, 3, 8], dtype=torch.int32)


def product(gradient: bool) -> tuple[Product, torch.Tensor]:
    """A product, and its result expert by expert."""
    rows = torch.randn(8, 6)
    if gradient:
        grads = torch.randn(8, 4)
        parts = zip(rows.split(COUNTS), grads.split(COUNTS), strict=True)
        return Product("g", rows, None, grads, OFFSETS), torch.stack([a.t() @ b for a, b in parts])
    weight = torch.randn(3, 6, 4)
    parts = zip(rows.split(COUNTS), weight, strict=True)
    return Product("p", rows, weight, None, OFFSETS), torch.cat([a @ b for a, b in parts])


@pytest.mark.parametrize("gradient", [False, True])
def test_a_result_is_compared_expert_by_expert(gradient: bool) -> None:
    one, right = product(gradient)
    assert one.error(right) < 1e-6
    assert one.flops() == 2 * 8 * 6 * 4
    assert one.error(right * 1.01) == pytest.approx(0.01, rel=1e-3)
    wrong = right.clone()
    wrong[-1] += 1  # of the last expert alone
    assert one.error(wrong) > grouped_products.TOLERANCE


@pytest.mark.parametrize("gradient", [False, True])
def test_nan_is_not_right(gradient: bool) -> None:
    one, right = product(gradient)
    right[0] = math.nan
    assert not one.error(right) < grouped_products.TOLERANCE


def test_what_it_cannot_measure_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        grouped_products.parse(["--shapes", "unknown"])
    assert "unknown: the shape is unknown; there are qwen3-30b-a3b" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"--tokens 3: 24 rows of qwen3-30b-a3b do not fall into 128 equal parts"):
        grouped_products.products("qwen3-30b-a3b", 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert grouped_products.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
