"""packed_attention on the CPU against softmax written out token by token in fp64, and what it must never do.

Shape suffixes: T tokens, H query heads, G key heads, D head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastft_plugins.kernels.attention_flash import split_documents
from fastft_plugins.packing import PackedMetadata, packed_attention

LENGTHS = [5, 1, 7, 5, 2]


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors of a few numbers are not worth waking threads for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Inputs:
    q_THD: torch.Tensor
    k_TGD: torch.Tensor
    v_TGD: torch.Tensor
    dout_THD: torch.Tensor
    sinks_H: torch.Tensor


def make_inputs(lengths=LENGTHS, heads=4, key_heads=2, width=8, value_width=None, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total, value_width = sum(lengths), value_width or width

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)

    return Inputs(
        draw(total, heads, width),
        draw(total, key_heads, width),
        draw(total, key_heads, value_width),
        draw(total, heads, value_width),
        draw(heads),
    )


def naive_attention(q_THD, k_TGD, v_TGD, lengths, window=None, softcap=None, sinks=None, scale=None):
    """One token and head at a time, over the tokens of its document that it may see."""
    scale = 1 / math.sqrt(q_THD.shape[2]) if scale is None else scale
    group = q_THD.shape[1] // k_TGD.shape[1]
    rows, start = [], 0
    for length in lengths:
        for token in range(start, start + length):
            first = start if window is None else max(start, token - window + 1)
            heads = []
            for head in range(q_THD.shape[1]):
                scores = (k_TGD[first : token + 1, head // group] * q_THD[token, head]).sum(-1) * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head : head + 1]])
                weights = scores.softmax(0)[: token + 1 - first]
                heads.append((weights[:, None] * v_TGD[first : token + 1, head // group]).sum(0))
            rows.append(torch.stack(heads))
        start += length
    return torch.stack(rows)


def output_and_gradients(function, inputs, *, sinks=False, dtype=None, **options):
    leaves = [inputs.q_THD, inputs.k_TGD, inputs.v_TGD] + ([inputs.sinks_H] if sinks else [])
    leaves = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in leaves]
    if sinks:
        options["sinks"] = leaves[3]
    out = function(*leaves[:3], **options)
    out.backward(inputs.dout_THD.to(out.dtype))
    return {"out": out.detach()} | dict(zip(("dq", "dk", "dv", "dsinks"), [leaf.grad for leaf in leaves], strict=False))


def ours(inputs, lengths=LENGTHS, **options):
    return output_and_gradients(packed_attention, inputs, metadata=PackedMetadata.from_lengths(lengths), **options)


def oracle(inputs, lengths=LENGTHS, **options):
    return output_and_gradients(naive_attention, inputs, lengths=lengths, dtype=torch.float64, **options)


def assert_same(result, truth, tolerance=1e-10):
    assert result.keys() == truth.keys()
    for name in truth:
        difference = (result[name].double() - truth[name]).abs()
        assert bool((difference <= tolerance * (1 + truth[name].abs())).all()), f"{name} is off by {difference.max()}"


# Output and gradients


OPTIONS = {
    "plain": {},
    "window 1": {"window": 1},
    "window smaller than most documents": {"window": 3},
    "window as long as two documents": {"window": 5},
    "window as long as the longest document": {"window": 7},
    "window larger than any document": {"window": 100},
    "scale": {"scale": 0.7},
    "sinks": {"sinks": True},
    "softcap": {"softcap": 0.8},
    "sinks and window": {"sinks": True, "window": 3},
    "everything": {"sinks": True, "window": 3, "softcap": 0.8, "scale": 0.7},
}


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_output_and_gradients_are_those_of_attention_written_out(options, key_heads):
    inputs = make_inputs(key_heads=key_heads)
    assert_same(ours(inputs, **options), oracle(inputs, **options))


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"sinks": True}], ids=str)
@pytest.mark.parametrize("value_width", [4, 12])
def test_values_may_be_narrower_or_wider_than_queries(value_width, options):
    inputs = make_inputs(value_width=value_width)
    assert_same(ours(inputs, **options), oracle(inputs, **options))


@pytest.mark.parametrize("window", [1, 4, 127, 128, 129, 150, 300])
def test_windows_around_the_size_of_a_block(window):
    """Documents longer than one block of queries, where a window reaches back into the block before."""
    lengths = [131, 260, 1]
    inputs = make_inputs(lengths, heads=1, key_heads=1, width=2)
    assert_same(ours(inputs, lengths, window=window), oracle(inputs, lengths, window=window))


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1, 1], [9], [4, 4, 4], [4, 2, 4, 2, 4]], ids=str)
def test_documents_of_one_length_and_of_one_token(lengths):
    inputs = make_inputs(lengths)
    assert_same(ours(inputs, lengths), oracle(inputs, lengths))


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    window=st.none() | st.integers(1, 11),
    softcap=st.none() | st.floats(0.3, 5),
    scale=st.none() | st.floats(0.05, 1.5),
    sinks=st.booleans(),
)
def test_random_documents_and_options(lengths, heads, window, softcap, scale, sinks):
    inputs = make_inputs(lengths, *heads, width=4)
    options = {"window": window, "softcap": softcap, "scale": scale, "sinks": sinks}
    assert_same(ours(inputs, lengths, **options), oracle(inputs, lengths, **options))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"sinks": True}], ids=str)
def test_training_dtypes(dtype, tolerance, options):
    inputs = make_inputs(dtype=dtype)
    result = ours(inputs, **options)
    assert result["out"].dtype == result["dq"].dtype == dtype
    assert_same(result, oracle(inputs, **options), tolerance)


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 1.0}], ids=str)
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_that_of_the_inputs(options):
    inputs = make_inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result = ours(inputs, **options)
    assert result["out"].dtype == torch.bfloat16 and result["dk"].dtype == torch.float32
    assert_same(result, oracle(inputs, **options), 6e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_autocast_casts_what_sdpa_casts(dtype):
    q = make_inputs([9], key_heads=4, dtype=dtype).q_THD
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = torch.nn.functional.scaled_dot_product_attention(*[q.transpose(0, 1)[None]] * 3, is_causal=True)
        out = packed_attention(q, q, q, PackedMetadata.from_lengths([9]))
    torch.testing.assert_close(out, stock[0].transpose(0, 1))  # the dtype too


def test_strided_heads_of_a_model_are_taken_as_they_are():
    """Models pass transposed views ``[H, T, D]``."""
    inputs = make_inputs()
    truth = oracle(inputs)
    for name in ("q_THD", "k_TGD", "v_TGD"):
        setattr(inputs, name, getattr(inputs, name).transpose(0, 1).contiguous().transpose(0, 1))
    assert_same(ours(inputs), truth)


def test_the_result_is_that_of_each_document_alone():
    inputs = make_inputs()
    together = ours(inputs)
    start = 0
    for length in LENGTHS:
        rows = slice(start, start + length)
        q, k, v, dout = (tensor[rows] for tensor in (inputs.q_THD, inputs.k_TGD, inputs.v_TGD, inputs.dout_THD))
        alone = Inputs(q, k, v, dout, inputs.sinks_H)
        assert_same(ours(alone, [length]), {name: value[rows] for name, value in together.items()})
        start += length


# The comparison notices what could go wrong


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ([6, 7, 5, 2], {}),  # the first boundary is missing
        ([5, 1, 12, 2], {}),  # another one is missing
        ([4, 2, 7, 5, 2], {}),  # a boundary is one token early
        ([20], {}),  # no boundary at all, as if positions had gone on
        (LENGTHS, {"window": 4}),
        (LENGTHS, {"window": 2}),
        (LENGTHS, {"window": None}),
        (LENGTHS, {"window": 3, "scale": 0.3}),
        (LENGTHS, {"window": 3, "softcap": 2.0}),
        (LENGTHS, {"window": 3, "sinks": True}),
    ],
    ids=str,
)
def test_the_comparison_fails_for_a_wrong_boundary_window_or_option(lengths, options):
    inputs = make_inputs()
    right = {"window": 3}
    if not options:
        right = options = {}
    result = ours(inputs, lengths, **options)
    result.pop("dsinks", None)
    with pytest.raises(AssertionError):
        assert_same(result, oracle(inputs, **right), tolerance=1e-3)


# No leak between documents


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"sinks": True}, {"softcap": 1.0}], ids=str)
@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_not_one_bit_of_a_document_depends_on_another(changed, options, dtype):
    inputs, others = make_inputs(dtype=dtype), make_inputs(dtype=dtype, seed=1)
    document_T = PackedMetadata.from_lengths(LENGTHS).seq_idx
    is_changed = (document_T == changed)[:, None, None]
    mixed = Inputs(
        *(
            torch.where(is_changed, getattr(others, name) * 100, getattr(inputs, name))
            for name in ("q_THD", "k_TGD", "v_TGD", "dout_THD")
        ),
        inputs.sinks_H,
    )
    before, after = ours(inputs, **options), ours(mixed, **options)
    for name in ("out", "dq", "dk", "dv"):
        assert torch.equal(before[name][document_T != changed], after[name][document_T != changed]), name
    assert not torch.equal(before["out"][document_T == changed], after["out"][document_T == changed])


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"sinks": True}], ids=str)
def test_nan_in_a_document_stays_there(options):
    inputs = make_inputs()
    document_T = PackedMetadata.from_lengths(LENGTHS).seq_idx
    for tensor in (inputs.q_THD, inputs.k_TGD, inputs.v_TGD):
        tensor[document_T == 2] = torch.nan
    result = ours(inputs, **options)
    for name in ("out", "dq", "dk", "dv"):
        assert result[name][document_T == 2].isnan().any(), name
        assert result[name][document_T != 2].isfinite().all(), name


# What it must never do


class Watch(TorchDispatchMode):
    """Records the largest tensor that any operator returns, and every operator that makes the host read a tensor."""

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2", "item")

    def __init__(self):
        super().__init__()
        self.largest, self.reads, self.calls = 0, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.calls += 1
        if name in self.READS:
            self.reads.append(name)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


@pytest.mark.parametrize("options", [{}, {"window": 16}, {"sinks": True}], ids=str)
def test_no_tensor_grows_with_the_square_of_the_row(options):
    lengths = [460, 500, 540] * 13 + [500]
    assert sum(lengths) == 20_000
    inputs = make_inputs(lengths, heads=1, key_heads=1, width=2, dtype=torch.float32)
    with Watch() as watch:
        ours(inputs, lengths, **options)
    assert watch.calls > 10
    assert watch.largest < 20_000**2 / 30  # 13 documents of one length at once, with room


def test_a_windowed_document_takes_memory_by_its_window():
    inputs = make_inputs([6000], heads=1, key_heads=1, width=2, dtype=torch.float32)
    with Watch() as watch:
        ours(inputs, [6000], window=64)
    assert watch.largest <= 6000 * 2 * 128


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_host_reads_no_tensor(options):
    inputs, metadata = make_inputs(), PackedMetadata.from_lengths(LENGTHS)
    with Watch() as watch:
        output_and_gradients(packed_attention, inputs, metadata=metadata, **options)
    assert watch.calls > 10 and watch.reads == []


def test_the_watch_sees_what_reads():
    with Watch() as watch:
        torch.ones(3).sum().item()
        torch.ones(3).nonzero()
    assert watch.reads == ["_local_scalar_dense", "nonzero"]


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_THD": torch.zeros(1, 4, 20, 8)}, r"q_THD: has shape \[1, 4, 20, 8\].*\[20, heads, width\]"),
        ({"q_THD": torch.zeros(19, 4, 8)}, r"q_THD: has shape \[19, 4, 8\]"),
        ({"k_TGD": torch.zeros(21, 2, 8)}, r"k_TGD: has shape \[21, 2, 8\]"),
        ({"v_TGD": torch.zeros(20, 16)}, r"v_TGD: has shape \[20, 16\]"),
        ({"k_TGD": torch.zeros(20, 2, 8).half()}, "k_TGD: is torch.float16 on cpu; q_THD is torch.float32"),
        ({"v_TGD": torch.zeros(20, 2, 8, device="meta")}, "v_TGD: is torch.float32 on meta; q_THD is .* on cpu"),
        ({"k_TGD": torch.zeros(20, 3, 8), "v_TGD": torch.zeros(20, 3, 8)}, r"\[20, 3, 8\].*divides 4"),
        ({"k_TGD": torch.zeros(20, 0, 8), "v_TGD": torch.zeros(20, 0, 8)}, r"k_TGD: has shape \[20, 0, 8\]"),
        ({"q_THD": torch.zeros(20, 4, 0)}, r"q_THD: has shape \[20, 4, 0\]; needs .* a width above 0"),
        ({"q_THD": torch.zeros(20, 0, 8)}, r"q_THD: has shape \[20, 0, 8\]; needs at least one head"),
        ({"v_TGD": torch.zeros(20, 2, 0)}, r"v_TGD: has shape \[20, 2, 0\]; needs .* a width above 0"),
        ({"v_TGD": torch.zeros(20, 4, 8)}, r"\[20, 2, 8\] and \[20, 4, 8\].*for both"),
        ({"k_TGD": torch.zeros(20, 2, 4)}, r"need the width of q_THD \(8\)"),
        ({"metadata": PackedMetadata.from_lengths(LENGTHS).to("meta")}, r"metadata: is on meta.*metadata.to\('cpu'\)"),
        ({"window": 0}, "window: is 0; needs a whole number, at least 1, or None"),
        ({"window": -1}, "window: is -1; needs a whole number, at least 1, or None"),
        ({"window": 3.0}, "window: is 3.0; needs a whole number"),
        ({"window": True}, "window: is True; needs a whole number"),
        ({"softcap": 0.0}, "softcap: is 0.0; needs a finite number, more than 0, or None"),
        ({"softcap": math.nan}, "softcap: is nan; needs a finite number"),
        ({"softcap": math.inf}, "softcap: is inf; needs a finite number"),
        ({"scale": 0.0}, "scale: is 0.0; needs a finite number, more than 0, or None"),
        ({"scale": -0.5}, "scale: is -0.5; needs a finite number, more than 0, or None"),
        ({"scale": math.nan}, "scale: is nan; needs a finite number"),
        ({"scale": torch.ones(1)}, r"scale: is tensor\(\[1.\]\); needs a finite number"),
        ({"sinks": torch.zeros(2)}, r"sinks: has shape \[2\]; needs \[4\], one per query head"),
        ({"sinks": torch.zeros(4, dtype=torch.int64)}, "sinks: is torch.int64 on cpu; needs a floating-point dtype"),
        ({"sinks": torch.zeros(4, device="meta")}, "sinks: is torch.float32 on meta; needs .* on cpu"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:24],
)
def test_bad_arguments_are_refused_with_name_value_and_what_is_needed(change, message):
    arguments = {
        "q_THD": torch.zeros(20, 4, 8),
        "k_TGD": torch.zeros(20, 2, 8),
        "v_TGD": torch.zeros(20, 2, 8),
        "metadata": PackedMetadata.from_lengths(LENGTHS),
    }
    with pytest.raises(ValueError, match=message):
        packed_attention(**{**arguments, **change})


# Rows too long for the 32-bit indices of the flash kernel


def rows_addressed(lengths, heads, head_dim):
    """Elements of the buffer that the kernel's backward indexes for these documents."""
    return (sum(lengths) + 128 * len(lengths)) * heads * math.ceil(head_dim / 32) * 32


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 400_000), min_size=1, max_size=40),
    heads=st.sampled_from([1, 8, 20, 32]),
    head_dim=st.sampled_from([8, 64, 72, 96]),
)
def test_launches_cover_all_documents_in_order_each_within_the_limit(lengths, heads, head_dim):
    ranges = split_documents(lengths, heads, head_dim)
    assert [document for first, last in ranges for document in range(first, last)] == list(range(len(lengths)))
    for first, last in ranges:
        assert first < last
        assert rows_addressed(lengths[first:last], heads, head_dim) < 2**31
    for first, last in ranges[:-1]:  # no launch stops before it is full
        assert rows_addressed(lengths[first : last + 1], heads, head_dim) >= 2**31


def test_an_ordinary_row_is_one_launch():
    assert split_documents([1024] * 64, heads=32, head_dim=128) == [(0, 64)]


def test_the_longest_document_the_error_names_is_accepted_and_one_more_token_is_not():
    heads, head_dim = 64, 256
    longest = 2**31 // (heads * head_dim) - 129
    assert split_documents([7, longest], heads, head_dim) == [(0, 1), (1, 2)]
    with pytest.raises(ValueError, match=f"document 1 has {longest + 1} tokens.*can address {longest}: use shorter"):
        split_documents([7, longest + 1], heads, head_dim)
