"""The Triton kernels against plain torch: on a GPU where there is one, otherwise under Triton's interpreter.

The interpreter (``TRITON_INTERPRET``, set in conftest.py) works in fp32 only and takes about 0.5 ms a program. Truth is
the reference of the same operation, computed in fp64 from the same inputs.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from fastft_plugins.kernels.gate import ACTIVATIONS, GATED, Gate, reference_gate_backward, reference_gate_forward
from fastft_plugins.kernels.grouped_matmul_reference import reference_grouped_matmul, reference_grouped_weight_grad
from fastft_plugins.kernels.rows import Rows, reference_combine_rows, reference_segment_sum
from fastft_plugins.kernels.triton import counting_sort as counting_sort_module
from fastft_plugins.kernels.triton import grouped_matmul_tma
from fastft_plugins.kernels.triton.counting_sort import counting_sort
from fastft_plugins.kernels.triton.gate import clamp_has_slope_at_limit, gate_backward, gate_forward
from fastft_plugins.kernels.triton.grouped_matmul import grouped_matmul, grouped_weight_grad
from fastft_plugins.kernels.triton.rows import combine_rows, gather_rows
from fastft_plugins.kernels.triton.segment_sum import segment_sum

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# The fp32 products go through TF32 on a GPU; nothing asks for them there.
MATMUL_DTYPES = [torch.bfloat16, torch.float16] if GPU else [torch.float32]
all_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, *([torch.bfloat16, torch.float16] if GPU else [])], ids=str
)
matmul_dtypes = pytest.mark.parametrize("dtype", MATMUL_DTYPES, ids=str)
NAN = float("nan")


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)


def int32(values):
    return torch.as_tensor(values, dtype=torch.int32, device=DEVICE)


def ends(counts):
    return int32(list(itertools.accumulate(counts)))


def double(*values):
    return [
        value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value for value in values
    ]


def assert_near(got, truth, dtype):
    tolerance = TOLERANCE[dtype]
    scale = max(1.0, truth.abs().max().item()) if truth.numel() else 1.0
    torch.testing.assert_close(got.double(), truth.double(), rtol=tolerance, atol=tolerance * scale)


# --- counting sort


def assert_sorted(ids_S, experts):
    order, inverse, counts, offsets = counting_sort(ids_S, experts)
    ids = ids_S.long()
    buckets = torch.where((ids >= 0) & (ids < experts), ids, experts)
    expected = torch.argsort(buckets, stable=True)
    assert all(result.dtype == torch.int32 for result in (order, inverse, counts, offsets))
    assert torch.equal(order.long(), expected)
    assert torch.equal(inverse.long(), torch.argsort(expected))
    assert torch.equal(counts.long(), torch.bincount(buckets, minlength=experts + 1)[:experts])
    assert torch.equal(offsets.long(), counts.long().cumsum(0))


@pytest.mark.parametrize("size", [0, 1, 127, 128, 129, 511, 512, 513, 1537])
@pytest.mark.parametrize("experts", [1, 8, 300])
def test_counting_sort_at_the_edges_of_its_blocks(size, experts):
    assert_sorted(torch.randint(-2, experts + 3, (size,), device=DEVICE), experts)


def test_counting_sort_scans_more_blocks_than_it_loads_at_a_time(monkeypatch):
    monkeypatch.setattr(counting_sort_module, "_BLOCK", 32)
    monkeypatch.setattr(counting_sort_module, "_CHUNK", 16)
    assert_sorted(torch.randint(0, 4, (65 * 32 + 1,), device=DEVICE), 4)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 300),
    st.lists(st.integers(-3, 310), max_size=700) | st.lists(st.sampled_from([-1, 0, 5, 2**31 - 1]), max_size=300),
)
def test_counting_sort_of_any_ids(experts, ids):
    assert_sorted(torch.tensor(ids, dtype=torch.int64, device=DEVICE), experts)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_counting_sort_of_any_integers(dtype):
    """256 experts: the bucket of the sentinels is no uint8."""
    assert_sorted(torch.randint(0, 256, (600,), device=DEVICE).to(dtype), 256)


def test_counting_sort_does_not_cut_long_ids():
    assert_sorted(torch.tensor([2**32, 1, -(2**32), 2**40 + 1, 0], device=DEVICE), 3)


# --- rows


@all_dtypes
@pytest.mark.parametrize("width", [1, 24, 515])
@pytest.mark.parametrize("top_k", [1, 3])
def test_gather(dtype, width, top_k):
    source = normal(9, 2 * width, dtype=dtype)[:, :width]  # rows that are not adjacent
    slots = torch.randint(0, 9 * top_k, (37,), device=DEVICE, dtype=torch.int32)
    assert torch.equal(gather_rows(Rows(source, slots, top_k)), source[slots // top_k])
    assert gather_rows(Rows(source, slots[:0], top_k)).shape == (0, width)


@all_dtypes
@pytest.mark.parametrize("width", [1, 24, 515])
@pytest.mark.parametrize("top_k", [1, 3])
def test_gather_that_reads_each_row_once(dtype, width, top_k):
    source = normal(9, 2 * width, dtype=dtype)[:, :width]
    order = torch.randperm(9 * top_k, device=DEVICE)
    inverse = torch.argsort(order).int().view(9, top_k)
    rows = Rows(source, order.int(), top_k, inverse)
    assert torch.equal(gather_rows(rows), source[order // top_k])
    assert torch.equal(gather_rows(rows.part(slice(4, 9))), source[order[4:9] // top_k])
    assert gather_rows(Rows(source[:0], order[:0].int(), top_k, inverse[:0])).shape == (0, width)


def routed(tokens, top_k, experts):
    """Random routing with about a third of sentinels: ids, inverse, offsets and the number of rows that are used."""
    ids = torch.randint(-1, experts + experts // 2 + 1, (tokens, top_k), device=DEVICE)
    _, inverse, _, offsets = counting_sort(ids.reshape(-1), experts)
    return ids, inverse.view_as(ids), offsets, int(offsets[-1])


@all_dtypes
@pytest.mark.parametrize("tokens, top_k, experts, width", [(0, 2, 3, 8), (1, 1, 1, 1), (13, 4, 5, 40), (5, 2, 6, 1030)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_combine_leaves_out_the_rows_of_sentinels(dtype, tokens, top_k, experts, width, weighted, biased):
    ids, inverse, offsets, used = routed(tokens, top_k, experts)
    rows = normal(tokens * top_k, width, dtype=dtype)
    rows[used:] = NAN
    weights = normal(tokens, top_k, dtype=dtype) if weighted else None
    if weighted:
        weights[(ids < 0) | (ids >= experts)] = NAN
    bias = normal(width, experts, dtype=dtype).t() if biased else None  # not contiguous
    got = combine_rows(rows, inverse, offsets, weights, bias, ids)
    truth = reference_combine_rows(*double(rows, inverse, offsets, weights, bias), ids)
    assert got.dtype == dtype
    assert_near(got, truth, dtype)


@all_dtypes
@pytest.mark.parametrize("counts", [[0], [1], [3, 0, 256, 257, 0], [0, 0, 700, 0]])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_segment_sum(dtype, counts, indexed, weighted):
    size = sum(counts) + 3  # three rows of sentinels
    source = normal(size, 150, dtype=dtype)[:, :133]
    rows, in_order = Rows(source), source
    if indexed:
        slots = torch.randint(0, 2 * size, (size,), device=DEVICE, dtype=torch.int32)
        rows, in_order = Rows(source, slots, 2), source[slots // 2]
    else:
        source[-3:] = NAN
    weights = normal(size) if weighted else None
    got = segment_sum(rows, ends(counts), weights)
    assert got.dtype == torch.float32
    truth = reference_segment_sum(Rows(in_order.double()), ends(counts), *double(weights))
    assert_near(got, truth, torch.float32)


# --- gate

GATES = [*itertools.product(GATED, ["concatenated", "interleaved"]), *((kind, "ungated") for kind in ACTIVATIONS)]


class GateCase:
    """Seven sorted rows of three experts and sentinels, with values on both sides of the clamps."""

    def __init__(self, kind, layout, biased, dtype=torch.float32, width=37):
        self.gate = Gate(kind, layout, alpha=1.702, limit=1.5)
        self.dtype, columns = dtype, width if layout == "ungated" else 2 * width
        self.ids = torch.tensor([2, 0, 3, 0, 2, -1, 2], device=DEVICE)
        self.order, _, _, self.offsets = counting_sort(self.ids, 3)
        self.z = 2 * normal(7, columns, dtype=dtype)
        self.bias = normal(columns, 3, dtype=dtype).t() if biased else None  # not contiguous
        self.da, self.weights = normal(7, width, dtype=dtype), normal(7, dtype=dtype)
        self.z[5:], self.da[5:] = NAN, NAN  # the sentinels' rows

    def forward(self, function, convert=lambda *values: values):
        z, bias = convert(self.z, self.bias)
        return function(self.gate, z, bias, self.order, self.offsets)[:5]

    def backward(self, function, in_place=False, scaled=True, convert=lambda *values: values):
        z, bias, da, weights = convert(self.z.clone(), self.bias, self.da, self.weights)
        dz = z if in_place else torch.full_like(z, NAN)
        dweights = torch.zeros(7, device=DEVICE, dtype=torch.float64 if z.dtype == torch.float64 else torch.float32)
        s_a = torch.full_like(da, NAN) if scaled else None
        function(self.gate, z, bias, da, weights, self.order, self.offsets, dz, dweights, s_a)
        return dz[:5], dweights, None if s_a is None else s_a[:5]


@all_dtypes
@pytest.mark.parametrize("kind, layout", GATES)
@pytest.mark.parametrize("biased", [False, True])
def test_gate(dtype, kind, layout, biased):
    case = GateCase(kind, layout, biased, dtype)
    a = case.forward(gate_forward)
    assert a.dtype == dtype
    assert_near(a, case.forward(reference_gate_forward, double), dtype)
    truth = case.backward(reference_gate_backward, convert=double)
    for got, expected in zip(case.backward(gate_backward), truth, strict=True):
        assert_near(got, expected, dtype)
    dweights = truth[1]
    assert (dweights[(case.ids < 0) | (case.ids > 2)] == 0).all() and (dweights != 0).sum() == 5


@pytest.mark.parametrize("layout", ["concatenated", "interleaved", "ungated"])
@pytest.mark.parametrize("width", [1, 3, 256, 1100])
def test_gate_backward_in_place_is_the_same_bit_for_bit(layout, width):
    case = GateCase("silu", layout, biased=True, width=width)
    apart, together = case.backward(gate_backward), case.backward(gate_backward, in_place=True, scaled=False)
    assert torch.equal(apart[0], together[0]) and torch.equal(apart[1], together[1])
    for got, expected in zip(apart, case.backward(reference_gate_backward, convert=double), strict=True):
        assert_near(got, expected, torch.float32)


def clamp_with(slope_at_limit):
    def clamp(x, min=-math.inf, max=math.inf):
        inside = ((x >= min) & (x <= max)) if slope_at_limit else ((x > min) & (x < max))
        return torch.where(inside, x, x.detach().maximum(torch.tensor(min)).minimum(torch.tensor(max)))

    return clamp


@pytest.fixture(params=["torch's", True, False])
def slope_at_limit(request, monkeypatch):
    """What torch's clamp does at a limit: that of the installed torch, of torch up to 2.13, and from 2.14 on."""
    clamp_has_slope_at_limit.cache_clear()
    if request.param != "torch's":
        monkeypatch.setattr(torch.Tensor, "clamp", clamp_with(request.param))
        assert clamp_has_slope_at_limit() == request.param
    yield
    clamp_has_slope_at_limit.cache_clear()


@pytest.mark.parametrize("kind", ["clamped_swiglu", "limited_silu"])
def test_gate_at_and_beyond_its_limits(kind, slope_at_limit):
    """At a limit the slope is that of torch's clamp; beyond it is 0."""
    case = GateCase(kind, "interleaved", biased=False, width=36)
    edges = torch.tensor([-100.0, -1.5, 0.0, 1.5, 1.6, 100.0])
    case.z = torch.cartesian_prod(edges, edges).reshape(1, -1).repeat(7, 1).to(DEVICE)
    assert_near(case.forward(gate_forward), case.forward(reference_gate_forward, double), torch.float32)
    for got, expected in zip(
        case.backward(gate_backward), case.backward(reference_gate_backward, convert=double), strict=True
    ):
        assert_near(got, expected, torch.float32)


@pytest.mark.parametrize("kind, layout", GATES)
def test_gate_shows_nan(kind, layout):
    case = GateCase(kind, layout, biased=False)
    case.z[0] = NAN
    assert case.forward(gate_forward)[0].isnan().all()


def test_gate_of_no_rows():
    case = GateCase("silu", "concatenated", biased=True)
    none = case.order[:0]
    assert gate_forward(case.gate, case.z[:0], case.bias, none, case.offsets * 0).shape == (0, 37)


# --- grouped products

WIDTHS = [(16, 16), (17, 40), (100, 33), (48, 100), (68, 72)]  # the last one has tiles of its own


def some_rows(counts, width, dtype, indexed):
    """Rows of the experts and two of sentinels, NaN; rows read by their slots, two a row, have NaN between them."""
    size = sum(counts) + 2
    if not indexed:
        rows = Rows(normal(size, width + 8, dtype=dtype)[:, :width])  # rows that are not adjacent
        rows.source_XH[-2:] = NAN
        return rows
    source = normal(size + 5, width, dtype=dtype)
    index = torch.randperm(size + 5, device=DEVICE)[:size].int()
    unused = torch.ones(size + 5, dtype=torch.bool, device=DEVICE).index_fill_(0, index[:-2].long(), False)
    source[unused] = NAN
    return Rows(source, 2 * index + torch.randint_like(index, 2), 2)


def gathered(rows, size):
    """The first rows in order, in fp64, for the reference."""
    source = rows.source_XH.double()
    return Rows((source if rows.slot_S is None else source[rows.slot_S // rows.top_k])[:size])


def weight_of(layout, experts, inner, width, dtype):
    if layout == "in by out":
        return normal(experts, inner, width, dtype=dtype)
    if layout == "out by in":
        return normal(experts, width, inner, dtype=dtype).transpose(1, 2)
    return normal(inner, 2 * width, experts, dtype=dtype).permute(2, 0, 1)[:, :, ::2]


def assert_product(counts, inner, width, layout, dtype, indexed=False, accumulate=False, product=grouped_matmul):
    rows, size = some_rows(counts, inner, dtype, indexed), sum(counts)
    weight = weight_of(layout, len(counts), inner, width, dtype)
    out = normal(size + 2, 2 * width, dtype=dtype)[:, width:] if accumulate else None
    expected = reference_grouped_matmul(
        gathered(rows, size), weight.double(), ends(counts), out[:size].double() if accumulate else None
    )
    got = product(rows, weight, ends(counts), out)
    assert got.dtype == dtype and (out is None or got is out)
    assert_near(got[:size], expected, dtype)


@matmul_dtypes
@pytest.mark.parametrize("inner, width", WIDTHS)
@pytest.mark.parametrize("layout", ["in by out", "out by in", "any strides"])
@pytest.mark.parametrize("indexed", [False, True])
def test_grouped_matmul(dtype, inner, width, layout, indexed):
    assert_product([3, 0, 16, 17, 0], inner, width, layout, dtype, indexed)


@matmul_dtypes
@pytest.mark.parametrize("indexed", [False, True])
def test_grouped_matmul_adds_to_its_output(dtype, indexed):
    assert_product([5, 0, 33], 24, 20, "out by in", dtype, indexed, accumulate=True)


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.sampled_from([0, 1, 15, 16, 17, 40]), min_size=1, max_size=6),
    st.sampled_from(MATMUL_DTYPES), st.booleans(), st.booleans(),
)  # fmt: skip
def test_grouped_matmul_of_any_distribution(counts, dtype, indexed, accumulate):
    assert_product(counts, 20, 18, "in by out", dtype, indexed, accumulate)


def assert_weight_grad(counts, inner, width, dtype, indexed, grad_indexed):
    rows, grads = some_rows(counts, inner, dtype, indexed), some_rows(counts, width, dtype, grad_indexed)
    size, offsets = sum(counts), ends(counts)
    got = grouped_weight_grad(rows, grads, offsets)
    assert got.dtype == dtype and got.is_contiguous()
    assert_near(got, reference_grouped_weight_grad(gathered(rows, size), gathered(grads, size), offsets), dtype)
    assert (got[int32(counts) == 0] == 0).all()


@matmul_dtypes
@pytest.mark.parametrize("inner, width", WIDTHS)
@pytest.mark.parametrize("indexed, grad_indexed", [(False, False), (True, False), (False, True), (True, True)])
def test_grouped_weight_grad(dtype, inner, width, indexed, grad_indexed):
    assert_weight_grad([3, 0, 16, 17, 0], inner, width, dtype, indexed, grad_indexed)


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.sampled_from([0, 1, 15, 16, 17, 40]), min_size=1, max_size=6),
    st.sampled_from(MATMUL_DTYPES), st.booleans(),
)  # fmt: skip
def test_grouped_weight_grad_of_any_distribution(counts, dtype, indexed):
    assert_weight_grad(counts, 20, 18, dtype, indexed, not indexed)


@pytest.mark.skipif(GPU and torch.cuda.get_device_capability()[0] != 9, reason="is tuned for compute capability 9.0")
@matmul_dtypes
@pytest.mark.parametrize("layout", ["in by out", "out by in"])
@pytest.mark.parametrize("counts", [[0, 0], [5], [130, 0, 1, 128, 0]])
@pytest.mark.parametrize("inner, width", [(64, 264), (128, 72)])
def test_grouped_matmul_through_tensor_descriptors(dtype, layout, counts, inner, width, monkeypatch):
    if not GPU:
        monkeypatch.setattr(grouped_matmul_tma, "multiprocessors", lambda device: 3)

    def product(rows, weight, offsets, out):
        source = rows.source_XH.contiguous()
        return grouped_matmul_tma.grouped_matmul(Rows(source, rows.slot_S, rows.top_k), weight, offsets)

    assert_product(counts, inner, width, layout, dtype, product=product)
