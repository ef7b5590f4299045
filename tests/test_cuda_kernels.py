"""The CUDA C++ kernel of the grouped products: it compiles without a GPU, and computes what plain torch does on one."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from gpu_helpers import host_syncs_are_errors, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft_plugins.kernels import grouped_matmul_rejects as rejects
from fastft_plugins.kernels.cuda import compiler
from fastft_plugins.kernels.cuda import grouped_matmul as cuda
from fastft_plugins.kernels.dispatch import choose
from fastft_plugins.kernels.grouped_matmul import grouped_matmul, grouped_weight_grad
from fastft_plugins.kernels.grouped_matmul_reference import reference_grouped_matmul, reference_grouped_weight_grad
from fastft_plugins.kernels.grouped_matmul_rejects import MatmulCall
from fastft_plugins.kernels.rows import Rows, reference_segment_sum

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not HOPPER, reason="is written for compute capability 9.0")
KB = 1024
NAN = float("nan")
DTYPES = [torch.bfloat16, torch.float16]
DISTRIBUTIONS = {
    "even": [256] * 8,
    "odd": [201] * 7,
    "around a tile": [255, 256, 257, 64, 65, 63, 1],
    "empty experts": [0, 0, 700, 0, 1, 0],
    "one row": [0] * 17 + [1] + [0] * 14,
    "one hot expert": [0] * 31 + [3000],
    "nothing": [0, 0, 0],
}


# --- without a GPU


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize(
    "weight_grad, along_n, sums",
    [(False, False, False), (False, True, False), (True, True, False), (True, True, True)],
)
def test_compiles_for_hopper_within_its_memory(weight_grad, along_n, sums, dtype, tmp_path):
    pytest.importorskip("cuda.bindings.nvrtc")
    assert cuda._SHARED_BYTES + KB <= 228 * KB  # the system keeps 1 KB of each block
    file = tmp_path / "kernel.cubin"
    file.write_bytes(cuda.compile_variant(weight_grad, along_n, sums, dtype))
    triton = find_spec("triton")
    if sys.platform != "linux" or triton is None or triton.origin is None:
        pytest.skip("what reads machine code comes with triton")
    reader = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([reader, "-res-usage", file], capture_output=True, text=True, check=True)
    numbers = dict(re.findall(r"(REG|STACK):(\d+)", usage.stdout + usage.stderr))
    assert int(numbers["REG"]) == 168  # which setmaxnreg gives from those who load to those who multiply
    assert int(numbers["STACK"]) <= 16  # sums in memory would make it slow; a few addresses of the one who loads do not


def test_the_compiler_says_what_it_does_not_understand():
    pytest.importorskip("cuda.bindings.nvrtc")
    with pytest.raises(RuntimeError, match=r"cannot compile wrong\.cu: .*\n?.*unknown_thing"):
        compiler.compile_cuda("__global__ void f() { unknown_thing(); }", "wrong.cu", "sm_90a")


def test_what_cannot_be_loaded_is_said_and_another_kernel_serves(on_a_hopper, monkeypatch):
    device = torch.device("cuda", 0)
    reason = cuda.cannot_run.__wrapped__(device, torch.bfloat16)
    if not HOPPER:
        assert reason.startswith("cannot be compiled or loaded here: ")
    monkeypatch.setattr(rejects, "cannot_run", lambda *call: "cannot be loaded")
    call = MatmulCall(device, torch.bfloat16, 2880, 5760)
    assert rejects.cuda_rejects(call) == rejects.cuda_sums_reject(call) == "cannot be loaded"


def test_an_old_compiler_is_refused(monkeypatch):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setattr(nvrtc, "nvrtcVersion", lambda: (nvrtc.nvrtcResult.NVRTC_SUCCESS, 12, 3))
    with pytest.raises(RuntimeError, match=r"needs NVRTC 12\.4 or newer, found 12\.3"):
        compiler.compile_cuda("", "any.cu", "sm_90a")


def test_without_a_gpu_it_says_so():
    call = MatmulCall(torch.device("cpu"), torch.bfloat16, 2880, 5760)
    for reject in (rejects.cuda_rejects, rejects.cuda_sums_reject):
        assert reject(call) == "needs an NVIDIA GPU, the tensors are on cpu"


@pytest.fixture
def on_a_hopper(monkeypatch):
    """Reasons are given as on such a GPU."""
    monkeypatch.setattr(rejects, "not_on_nvidia", lambda device: None)
    monkeypatch.setattr(rejects, "cannot_run", lambda *call: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_is_chosen_where_it_was_measured_to_be_faster(on_a_hopper):
    def product(inner, width, **more):
        return rejects.cuda_rejects(call(inner, width, **more))

    def call(inner, width, dtype=torch.bfloat16, **more):
        return MatmulCall(torch.device("cuda", 0), dtype, inner, width, **more)

    assert product(1536, 2048) is product(2048, 768) is None  # both weight gradients of Qwen3's experts
    assert product(2880, 5760) is product(5760, 2880) is product(768, 2048, dtype=torch.float16) is None
    assert product(14336, 4096) == "has tiles of 192 columns, which fit a width of 4096 worse than others"
    assert product(512, 1024) == "wastes its tiles of 192 columns on a width of 1024"
    assert product(2880, 16) == "wastes its tiles on a width of 16"
    assert product(2880, 5760, accumulate=True) == "cannot add to its output"
    assert product(2880, 5760, dtype=torch.float32) == "needs bfloat16 or float16, got torch.float32"
    assert product(2880, 5760, dense=False) == "needs a dense weight"
    assert product(2880, 5760, aligned=False) == "needs matrices and rows that start at a multiple of 16 bytes"
    assert rejects.cuda_sums_reject(call(2880, 5760)) is None
    for inner in (200, 512):
        wanted = f"needs an inner width in steps of 64, but not of 256, got {inner}"
        assert rejects.cuda_sums_reject(call(inner, 576)) == wanted


def test_other_generations_keep_their_kernels(on_a_hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    call = MatmulCall(torch.device("cuda", 0), torch.bfloat16, 2880, 5760)
    assert rejects.cuda_rejects(call) == "is written for compute capability 9.0"


# --- on a GPU


def ends(counts):
    return torch.tensor(list(itertools.accumulate(counts)), dtype=torch.int32, device="cuda")


def some_rows(counts, width, dtype, spare=3):
    """Rows of the experts, not adjacent, and those of sentinels, NaN."""
    size = sum(counts)
    rows = torch.randn(size + spare, width + 8, device="cuda").to(dtype)[:, :width]
    rows[size:] = NAN
    return Rows(rows)


def exactly(rows, counts):
    return Rows(rows.source_XH[: sum(counts)].double())


def assert_near(got, truth, dtype):
    if truth.numel() == 0:
        return
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-11
    scale = truth.square().mean().sqrt().item()
    torch.testing.assert_close(got.double(), truth, rtol=rounding, atol=max(2e-3 * scale, 1e-6))


def assert_product(counts, inner, width, transposed, dtype):
    rows = some_rows(counts, inner, dtype)
    weight = (torch.randn(len(counts), *((width, inner) if transposed else (inner, width)), device="cuda") / 8).to(
        dtype
    )
    weight = weight.transpose(1, 2) if transposed else weight
    got = cuda.grouped_matmul(rows, weight, ends(counts))
    assert got.dtype == dtype and got.shape == (sum(counts) + 3, width)
    truth = reference_grouped_matmul(exactly(rows, counts), weight.double(), ends(counts))
    assert_near(got[: sum(counts)], truth, dtype)


def assert_weight_grad(counts, inner, width, dtype):
    rows, grads = some_rows(counts, inner, dtype), some_rows(counts, width, dtype)
    truth = reference_grouped_weight_grad(exactly(rows, counts), exactly(grads, counts), ends(counts))
    got = cuda.grouped_weight_grad(rows, grads, ends(counts))
    assert_near(got, truth, dtype)
    if inner % 64:
        return
    for weights in (None, torch.randn(sum(counts) + 3, device="cuda").to(dtype)):
        again, sums = cuda.grouped_weight_bias_grad(rows, grads, ends(counts), weights)
        assert torch.equal(again, got)
        scale = None if weights is None else weights[: sum(counts)].double()
        assert_near(sums, reference_segment_sum(exactly(grads, counts), ends(counts), scale), dtype)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "inner, width", [(2880, 576), (136, 264), (64, 5760), (320, 200), (256, 192), (192, 576), (384, 264)]
)
@pytest.mark.parametrize("counts", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_products_and_gradients_are_those_of_plain_torch(counts, inner, width, dtype):
    for transposed in (False, True):
        assert_product(counts, inner, width, transposed, dtype)
    assert_weight_grad(counts, inner, width, dtype)


@pytest.mark.gpu
@on_hopper
@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from([0, 1, 63, 64, 65, 128, 250, 256, 511]), min_size=1, max_size=12),
    st.integers(8, 60), st.integers(8, 60), st.booleans(), st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_distribution_and_width(counts, inner, width, transposed, dtype):
    assert_product(counts, inner * 8, width * 8, transposed, dtype)
    assert_weight_grad(counts, inner * 8, width * 8, dtype)


@pytest.mark.gpu
@on_hopper
def test_waits_for_nobody_repeats_itself_and_can_be_captured():
    """One result whoever takes which tile; a graph replayed with other routings computes theirs."""
    first, second = [300, 0, 1000, 748], [0, 2047, 1, 0]
    rows, grads = some_rows(first, 576, torch.bfloat16), some_rows(first, 384, torch.bfloat16)
    weight = torch.randn(4, 576, 384, device="cuda").bfloat16()
    offsets = ends(first)

    def everything():
        return (
            cuda.grouped_matmul(rows, weight, offsets),
            cuda.grouped_matmul(grads, weight.transpose(1, 2), offsets),
            *cuda.grouped_weight_bias_grad(rows, grads, offsets, None),
        )

    once = everything()
    with host_syncs_are_errors():
        repeated = [everything() for _ in range(10)]
    for again in repeated:
        assert all(torch.equal(a[:2048], b[:2048]) for a, b in zip(again, once, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    for counts in (second, first):
        offsets.copy_(ends(counts))
        graph.replay()
        for got, expected in zip(captured, everything(), strict=True):
            assert torch.equal(got[: sum(counts)], expected[: sum(counts)])


@pytest.mark.gpu
@on_hopper
def test_more_than_two_billion_numbers():
    """The last expert's products and gradients lie beyond what 32 bits can number."""
    counts = [350_000, 100, 60_000]  # 410,100 rows of 5760
    rows = Rows(torch.randn(sum(counts), 64, device="cuda").bfloat16())
    weight = torch.randn(3, 64, 5760, device="cuda").bfloat16()
    got = cuda.grouped_matmul(rows, weight, ends(counts))
    assert got.numel() > 2**31
    expected = rows.source_XH[-1000:].float() @ weight[2].float()
    assert relative_error(got[-1000:], expected) < 4e-3
    grad = cuda.grouped_weight_grad(rows, Rows(got), ends(counts))
    expected = rows.source_XH[-60_000:].float().t() @ got[-60_000:].float()
    assert relative_error(grad[2], expected) < 4e-3


@pytest.mark.gpu
@on_hopper
def test_a_new_thread_needs_no_warm_up():
    """Its first call of CUDA is ours when torch takes the output from memory that it kept."""
    rows, weight = some_rows([300, 724], 576, torch.bfloat16), torch.randn(2, 576, 384, device="cuda").bfloat16()
    offsets = ends([300, 724])
    expected = cuda.grouped_matmul(rows, weight, offsets)[:1024].clone()
    moved = Rows(torch.cat([rows.source_XH, rows.source_XH]))  # elsewhere: its tensor map is not known yet
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(cuda.grouped_matmul, moved, weight, offsets).result()
    assert torch.equal(got[:1024], expected)


@pytest.mark.gpu
@on_hopper
def test_sums_with_weights_of_higher_precision():
    counts = [700, 0, 333]
    rows, grads = some_rows(counts, 576, torch.bfloat16), some_rows(counts, 384, torch.bfloat16)
    weights = torch.rand(sum(counts) + 3, device="cuda")
    _, sums = cuda.grouped_weight_bias_grad(rows, grads, ends(counts), weights)
    truth = reference_segment_sum(exactly(grads, counts), ends(counts), weights[: sum(counts)].double())
    assert relative_error(sums, truth) < 4e-3


@pytest.mark.gpu
@on_hopper
def test_numbers_that_start_anywhere_go_to_another_kernel():
    rows = torch.randn(301 * 576 + 1, device="cuda").bfloat16()
    weight = torch.randn(2 * 576 * 384 + 1, device="cuda").bfloat16()
    aligned = Rows(rows[:-1].view(301, 576)), weight[:-1].view(2, 576, 384)
    for these_rows, this_weight in (
        (Rows(rows[1:].view(301, 576)), aligned[1]),
        (aligned[0], weight[1:].view(2, 576, 384)),
    ):
        got = grouped_matmul(these_rows, this_weight, ends([101, 200]))
        truth = reference_grouped_matmul(Rows(these_rows.source_XH.double()), this_weight.double(), ends([101, 200]))
        assert_near(got, truth, torch.bfloat16)
    grads = Rows(torch.randn(301, 384, device="cuda").bfloat16())
    got = grouped_weight_grad(Rows(rows[1:].view(301, 576)), grads, ends([101, 200]))
    exact = Rows(rows[1:].view(301, 576).double()), Rows(grads.source_XH.double())
    assert_near(got, reference_grouped_weight_grad(*exact, ends([101, 200])), torch.bfloat16)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("op", ["grouped_matmul", "grouped_weight_grad", "grouped_weight_bias_grad"])
def test_is_the_first_choice(op):
    assert str(choose(op, MatmulCall(torch.device("cuda", 0), torch.bfloat16, 2880, 5760))) == "CUDA for Hopper"
