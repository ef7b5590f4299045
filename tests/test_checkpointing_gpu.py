"""Races that only a GPU has: copies and computation that take long, memory that is used again at once, other streams.

The schedules are those of the tests without a GPU. Around each layer memory is filled with NaN and given back, so that
whoever reads too late, or writes too early, meets it.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from types import SimpleNamespace

import checkpointing_helpers
import pytest
import torch
from checkpointing_helpers import SCHEDULES, Layer, Stack, assert_same, gradients, make_input, stock
from gpu_helpers import host_syncs_are_errors
from test_checkpointing_copied_products import copying, many_steps
from test_checkpointing_waits import mutant, waits

from fastft_plugins.checkpointing import OffloadCheckpoint
from fastft_plugins.checkpointing import handle as handle_module
from fastft_plugins.checkpointing import products as products_module
from fastft_plugins.kernels import transfer as transfer_module
from fastft_plugins.kernels.transfer import CudaTransfer

pytestmark = pytest.mark.gpu

CYCLES = 2_000_000  # about a millisecond
SLOW = ["copies", "computing", "neither"]


class DisturbedTransfer(CudaTransfer):
    """Copies that may begin late. A copy that is not told what to wait for begins at once."""

    is_slow = False

    def copy(self, destination, source, after):
        after = torch.cuda.Event() if after is None else after  # never recorded: no wait at all
        self._queue.wait_event(after)
        if self.is_slow:
            with torch.cuda.stream(self._queue):
                torch.cuda._sleep(CYCLES)
        return super().copy(destination, source, torch.cuda.Event())


def disturb(monkeypatch, slow):
    """Layers on the GPU with NaN left in free memory around them, and whatever is ``slow``."""
    monkeypatch.setattr(checkpointing_helpers, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(transfer_module, "make_transfer", DisturbedTransfer)
    monkeypatch.setattr(DisturbedTransfer, "is_slow", slow == "copies")
    forward = Layer.forward

    def disturbed(self, x, *args):
        leave_garbage(x)
        if slow == "computing":
            torch.cuda._sleep(CYCLES)
        out = forward(self, x, *args)
        leave_garbage(x)
        return out

    monkeypatch.setattr(Layer, "forward", disturbed)


def leave_garbage(like):
    with torch.no_grad():
        garbage = [torch.full_like(like, torch.nan) for _ in range(32)]
    del garbage


def engine():
    return OffloadCheckpoint(min_bytes=0, budget=2**30)


def run(schedule, checkpoint_fn):
    torch.manual_seed(1)
    found = schedule(checkpoint_fn)
    torch.cuda.synchronize()
    return found


@pytest.mark.parametrize("slow", SLOW)
@pytest.mark.parametrize("stream", ["default", "own"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.__name__)
def test_no_schedule_has_a_race(schedule, stream, slow, monkeypatch):
    disturb(monkeypatch, slow)
    ours = engine()
    with torch.cuda.stream(torch.cuda.Stream()) if stream == "own" else contextlib.nullcontext():
        expected = run(schedule, stock)
        assert_same(run(schedule, stock), expected)
        for _ in range(2):  # the second time in host memory that was used before
            assert_same(run(schedule, ours), expected)
    assert ours.offloaded
    ours.close()


@pytest.mark.parametrize("slow", SLOW)
@pytest.mark.parametrize("stored", [False, True])
def test_products_in_host_memory_have_no_race(stored, slow, monkeypatch):
    disturb(monkeypatch, slow)
    monkeypatch.setattr(products_module, "MIN_BYTES", 1)
    ours, copied = copying(monkeypatch, engine(), stored)
    expected = run(many_steps, stock)
    assert_same(run(many_steps, stock), expected)
    assert_same(run(many_steps, ours), expected)
    assert len(copied) > 20 and None not in copied
    ours.close()


@pytest.mark.parametrize("number", range(len(waits())), ids=[f"line {line}" for line in waits()])
def test_every_wait_is_needed(number, monkeypatch):
    monkeypatch.setattr(handle_module, "Offloaded", mutant(number).Offloaded)
    monkeypatch.setattr(sys.modules[__name__], "CYCLES", 10 * CYCLES)  # the host must not be slower than a copy
    wrong = []
    for slow in ("copies", "computing"):
        with pytest.MonkeyPatch.context() as inner:
            disturb(inner, slow)
            for schedule in SCHEDULES:
                ours = engine()
                run(schedule, ours)  # page-locking waits for the device, so the second time tells
                expected, got = run(schedule, stock), run(schedule, ours)
                same = all(a is b is None or torch.equal(a, b) for a, b in zip(got, expected, strict=True))
                wrong += [] if same else [f"{schedule.__name__}, slow {slow}"]
    print(f"line {waits()[number]}: {len(wrong)} schedules fail, {wrong[:3]}")
    assert wrong


def test_graphs_on_streams_that_change(monkeypatch):
    disturb(monkeypatch, "copies")
    streams, ours, results = [torch.cuda.Stream() for _ in range(3)], engine(), []
    for checkpoint_fn in (stock, ours):
        torch.manual_seed(1)
        model, inputs, losses = Stack(), [make_input(seed) for seed in range(3)], []
        for x, stream in zip(inputs, streams, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                losses.append(model(x, checkpoint_fn).square().sum())
        for loss, stream in zip(losses, reversed(streams), strict=True):
            for other in streams:
                stream.wait_stream(other)
            with torch.cuda.stream(stream):
                loss.backward()
        torch.cuda.synchronize()
        results.append(gradients(model, *inputs))
    assert_same(*results)


def large_stack(depth=6):
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as context:
        context.setattr(checkpointing_helpers, "DEVICE", torch.device("cuda"))
        return Stack(depth, 1024)


def large_input(rows=4096):
    return torch.randn(rows, 1024, device="cuda", requires_grad=True)


def test_the_inputs_are_gone_after_the_forward_and_two_come_back_at_a_time():
    model, size = large_stack(), large_input().nbytes

    def step(checkpoint_fn):
        x = large_input()
        gc.collect()
        before = torch.cuda.memory_allocated()
        loss = model(x, checkpoint_fn).sum()
        torch.cuda.synchronize()
        after = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        loss.backward()
        peak = torch.cuda.max_memory_allocated() - before
        model.zero_grad(set_to_none=False)  # gradients that come as inputs go would hide it
        return after, peak

    ours = OffloadCheckpoint()
    step(stock), step(ours)
    (stock_after, stock_peak), (our_after, our_peak) = step(stock), step(ours)
    # The first input is the caller's; of the five others, the last one is still there.
    print(f"after the forward {stock_after / size:.2f} and {our_after / size:.2f} inputs, "
          f"peak {stock_peak / size:.2f} and {our_peak / size:.2f}")  # fmt: skip
    assert stock_after - our_after >= 4 * size
    assert our_peak <= stock_peak - 2 * size


def test_many_steps_neither_grow_nor_wait_for_the_host():
    model, ours, sizes = large_stack(), OffloadCheckpoint(), [4096, 4000, 3000, 4096, 2048]
    for rows in sizes:
        model(large_input(rows), ours).sum().backward()
    torch.cuda.synchronize()
    device, host = torch.cuda.memory_allocated(), ours.metrics()
    for step in range(200):
        x = large_input(sizes[step % len(sizes)])
        with host_syncs_are_errors():
            model(x, ours).sum().backward()
    del x
    torch.cuda.synchronize()
    after = ours.metrics()
    assert torch.cuda.memory_allocated() <= device
    assert after["host_allocations"] == host["host_allocations"] == 6
    assert after["host_bytes"] == host["host_bytes"]
    print(after)


def test_host_memory_is_page_locked_and_released(monkeypatch):
    model, ours = large_stack(2), OffloadCheckpoint()
    model(large_input(), ours).sum().backward()
    (lane,) = ours._lanes.values()
    gc.collect()
    lane.pool._collect()
    buffers = list(lane.pool._free)
    assert buffers and all(buffer.is_pinned() for buffer in buffers)
    addresses = [buffer.data_ptr() for buffer in buffers]
    del buffers
    ours.close()
    assert lane.pool.allocated == 0
    # No longer registered: CUDA refuses to unregister it.
    assert all(int(torch.cuda.cudart().cudaHostUnregister(address)) for address in addresses)
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")  # takes the error that those calls have left


def test_an_engine_that_was_never_closed_leaves_no_page_locked_memory():
    for _ in range(20):  # memory is mapped again where it was unmapped
        for depth in (2, 4, 3):
            model = large_stack(depth)
            model(large_input(), OffloadCheckpoint()).sum().backward()
    gc.collect()


def test_without_page_locked_memory_it_still_works_and_says_so(monkeypatch):
    model, ours = large_stack(3), OffloadCheckpoint()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=lambda *args: 2))
    results = []
    for checkpoint_fn in (stock, ours):
        torch.manual_seed(0)
        model.zero_grad()
        x = large_input()
        model(x, checkpoint_fn).sum().backward()
        results.append([grad.clone() for grad in gradients(model, x)])
    assert_same(*results)
    assert ours.metrics()["pageable_bytes"] > 0
    ours.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_strides_come_back(dtype):
    ours, seen = engine(), []
    weight = torch.randn(64, 64, device="cuda", dtype=dtype, requires_grad=True)

    def function(x):
        seen.append((x.dtype, x.stride(), x.requires_grad, x.detach().clone()))
        return (x @ weight).sin()

    for make in (lambda x: x, lambda x: x.t(), lambda x: x.view(4, 16, 64).permute(2, 0, 1).reshape(64, 64)):
        seen.clear()
        x = make(torch.randn(64, 64, device="cuda", dtype=dtype)).requires_grad_()
        ours(function, x).sum().backward()
        first, again = seen
        assert first[:3] == again[:3] and torch.equal(first[3], again[3])
    assert ours.offloaded == 3
