"""The memory of packed attention grows with the row and never with its square, whatever kernel serves."""

from __future__ import annotations

import itertools

import pytest
import torch
from family_models import tiny_family
from simulated_device import SimulatedDevice

from fastft_plugins import apply
from fastft_plugins.packing import PackedMetadata, PaddingFreeCollator, packed_attention

HEADS, KEY_HEADS = 4, 2
KINDS = {
    "causal": {},
    "window": {"window": 48},
    "softcap": {"softcap": 20.0},
    "softcap and window": {"softcap": 20.0, "window": 48},
}


def inputs(total, width, device, dtype):
    shapes = [(total, HEADS, width), (total, KEY_HEADS, width), (total, KEY_HEADS, width)]
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]


def assert_linear(peaks):
    """Peaks for rows of which each is twice as long as the one before; what does not grow makes the ratio smaller."""
    for shorter, longer in itertools.pairwise(peaks):
        assert longer <= 2.05 * shorter, peaks


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_linear_in_the_row(kind):
    peaks = []
    for documents in (16, 32, 64):
        metadata = PackedMetadata.from_lengths([64] * documents)
        device = SimulatedDevice()
        with device:
            out = packed_attention(*inputs(64 * documents, 16, "cpu", torch.float32), metadata, **KINDS[kind])
            out.sum().backward()
        peaks.append(device.highest)
    assert_linear(peaks)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_memory_of_a_model_is_linear_in_the_row(family):
    """Gemma2 has softcap and windows."""
    peaks = []
    for documents in (16, 32, 64):
        model = tiny_family(family).train()
        batch = row_of([64] * documents)
        device = SimulatedDevice()
        with apply(model, {"packing": "on"}), device:
            model(**batch).loss.backward()
        peaks.append(device.highest)
    assert_linear(peaks)


def row_of(lengths):
    """A packed batch on the host, all of whose tokens have labels."""
    ids = torch.ones(1, sum(lengths), dtype=torch.long)
    position_ids = PackedMetadata.from_lengths(lengths).position_ids[None]
    return PaddingFreeCollator(lambda batch: batch)({"input_ids": ids, "labels": ids, "position_ids": position_ids})


def gpu_peak(function):
    """Bytes that ``function`` takes at its worst moment, beyond what is there before."""
    function()  # the first call also loads libraries and their workspaces
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_on_a_gpu_is_linear_in_the_row(kind, dtype):
    """Rows of 8k, 16k and 32k tokens in documents of 2,048; a mask of pairs would be 1 GiB at 32k, or more."""
    peaks = []
    for total in (8192, 16384, 32768):
        metadata = PackedMetadata.from_lengths([2048] * (total // 2048)).to("cuda")

        def step(metadata=metadata, total=total):
            out = packed_attention(*inputs(total, 64, "cuda", dtype), metadata, **KINDS[kind])
            out.sum().backward()

        peaks.append(gpu_peak(step))
    print(f"{kind}, {dtype}: {[f'{peak / 2**20:.0f} MiB' for peak in peaks]}")
    assert_linear(peaks)
    if "softcap" not in kind:
        assert peaks[-1] < 2**30


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_memory_of_a_model_on_a_gpu_is_linear_in_the_row(family):
    """In documents of 256 tokens, beside whose scores a mask of all pairs would show."""
    model = tiny_family(family).train().cuda().to(torch.bfloat16)
    peaks = []
    for total in (8192, 16384, 32768):
        batch = row_of([256] * (total // 256)).to("cuda")

        def step(batch=batch):
            model.zero_grad()
            model(**batch).loss.backward()

        with apply(model, {"packing": "on"}):
            peaks.append(gpu_peak(step))
    print(f"{family}: {[f'{peak / 2**20:.0f} MiB' for peak in peaks]}")
    assert_linear(peaks)
