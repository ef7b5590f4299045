"""The planner with the allocator and clock of a GPU: what it predicts, what is taken, and that nothing waits."""

from __future__ import annotations

import gc

import pytest
import torch
from checkpointing_helpers import assert_same, gradients, stock
from gpu_helpers import host_syncs_are_errors
from test_checkpointing_gpu import large_input, large_stack

from fastft_plugins.checkpointing import OffloadCheckpoint
from fastft_plugins.checkpointing.gauge import CudaGauge
from fastft_plugins.checkpointing.planned import PlannedCheckpoint
from fastft_plugins.checkpointing.random_state import RandomState

pytestmark = pytest.mark.gpu

DEPTH, ROWS = 8, 16384


def planned(budget):
    gauge = CudaGauge(torch.device("cuda", torch.cuda.current_device()), budget)
    return PlannedCheckpoint(gauge, OffloadCheckpoint())


def step(model, checkpoint_fn):
    torch.manual_seed(0)
    model.zero_grad()
    x = large_input(ROWS)
    model(x, checkpoint_fn).square().sum().backward()
    return [grad.clone() for grad in gradients(model, x)]


def test_random_numbers_come_again_without_a_wait():
    device = torch.device("cuda", torch.cuda.current_device())
    torch.rand(8, device=device)
    with host_syncs_are_errors():
        state = RandomState(device)
    drawn = torch.rand(8), torch.rand(8, device=device)
    state.restore()
    assert torch.equal(torch.rand(8), drawn[0]) and torch.equal(torch.rand(8, device=device), drawn[1])


def peak_of(model, checkpoint_fn):
    gc.collect()
    model.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    model(large_input(ROWS), checkpoint_fn).square().sum().backward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("share", [0.1, 0.4, 0.7, 1.3])
def test_a_budget_is_kept_and_used_and_the_gradients_are_the_same(share):
    model = large_stack(DEPTH)
    least = peak_of(model, stock)
    most = peak_of(model, lambda layer, x, **_: layer(x))
    budget = int(least + share * (most - least))
    ours, expected = planned(budget), step(model, stock)
    for _ in range(10):  # measured, checked, and from then on with products in host memory
        assert_same(step(model, ours), expected)
    peak = peak_of(model, ours)
    kept = ours.calls["kept"] / ours.forwards
    print(f"{peak / budget:.3f} of the budget, {kept} of {DEPTH} layers kept; {ours.explain()}", ours.plan)
    assert peak <= budget
    assert kept >= int(min(1, share) * DEPTH) - 2
    ours.engine.close()


def test_a_planned_step_neither_waits_nor_grows():
    model, ours = large_stack(DEPTH), planned("auto")
    for _ in range(3):
        step(model, ours)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(100):
        with host_syncs_are_errors():
            model(large_input(ROWS), ours).square().sum().backward()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 2 * large_input(ROWS).nbytes
    assert ours.calls["kept"] and not ours.calls["retried"]
    metrics = ours.metrics()
    print(metrics)
    assert metrics["layer_forward_ms"] > 0


def test_a_cap_of_the_process_is_the_budget():
    ours = planned("auto")
    whole = ours.planning._gauge.room()
    torch.cuda.set_per_process_memory_fraction(0.25)
    try:
        total = torch.cuda.get_device_properties(0).total_memory
        assert ours.planning._gauge.room() <= 0.25 * total < whole
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
