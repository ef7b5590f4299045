"""`OffloadCheckpoint` against torch's checkpoint, bit by bit, through a copy queue that is as late as it may be."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from checkpointing_helpers import (
    SCHEDULES,
    Layer,
    Stack,
    assert_same,
    gradients,
    lazy_engine,
    make_input,
    stock,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastft_plugins.checkpointing import OffloadCheckpoint
from fastft_plugins.checkpointing.offloaded import Offloaded


@pytest.fixture
def engine(monkeypatch):
    return lazy_engine(monkeypatch)


def seeded(schedule, checkpoint_fn):
    torch.manual_seed(1)
    return schedule(checkpoint_fn), torch.get_rng_state()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.__name__)
def test_every_schedule_gives_the_gradients_of_torch_checkpointing(schedule, engine):
    ours, lazy = engine
    expected, random_state = seeded(schedule, stock)
    got, our_random_state = seeded(schedule, ours)
    assert_same(got, expected)
    assert torch.equal(our_random_state, random_state)
    assert ours.offloaded and not lazy.corrupted
    gc.collect()
    ours.close()
    assert lazy.live == []


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_order_of_forwards_and_backwards(data):
    """Graphs are made, run backward once or twice, on one stream or another, and dropped, in any order."""
    actions = data.draw(
        st.lists(
            st.tuples(st.sampled_from(["forward", "backward", "retain", "drop", "evaluate"]), st.integers(0, 3)),
            min_size=3,
            max_size=12,
        )
    )
    streams = data.draw(st.lists(st.sampled_from(["main", "side"]), min_size=len(actions), max_size=len(actions)))
    with pytest.MonkeyPatch.context() as monkeypatch:
        ours, lazy = lazy_engine(monkeypatch)
        expected = run_actions(actions, ["main"] * len(actions), stock, None)
        assert_same(run_actions(actions, streams, ours, lazy), expected)
        assert not lazy.corrupted


def run_actions(actions, streams, checkpoint_fn, lazy):
    torch.manual_seed(0)
    model, inputs, graphs = Stack(3), [], []
    for (action, which), stream in zip(actions, streams, strict=True):
        if lazy is not None:
            lazy.stream = stream
        if action == "forward":
            inputs.append(make_input(len(inputs)))
            graphs.append(model(inputs[-1], checkpoint_fn).square().sum())
        elif action == "evaluate":
            with torch.no_grad():
                model(make_input(which), checkpoint_fn)
        elif graphs:
            place = which % len(graphs)
            if action == "retain":
                graphs[place].backward(retain_graph=True)
            else:
                loss = graphs.pop(place)
                if action == "backward":
                    loss.backward()
    return gradients(model, *inputs)


# What is on the device, and when


def on_device():
    """How many inputs are on the device."""
    return sum(each._on_device is not None for each in gc.get_objects() if type(each) is Offloaded)


def test_the_reload_of_the_layer_before_is_queued_before_a_recompute(engine):
    ours, lazy = engine
    model, copies_at_recompute = Stack(4), []

    def counted(layer):
        def function(x):
            copies_at_recompute.append(lazy.copies)
            return layer(x)

        return function

    x = make_input(0)
    for layer in model.layers:
        x = ours(counted(layer), x)
    x.sum().backward()
    # Four copies out; the last input is still there when backward begins, and only three have to come back.
    assert copies_at_recompute == [1, 2, 3, 4, 5, 6, 7, 7]


def test_an_input_leaves_the_device_when_the_next_layer_starts(engine):
    ours, _ = engine
    model, x = Stack(4), make_input(0)
    for layer in model.layers:
        x = ours(layer, x)
        assert on_device() == 1
    x.sum().backward()
    assert on_device() == 0


def test_at_most_one_input_is_fetched_ahead(engine):
    ours, lazy = engine
    one, two = Stack(4), Stack(4)
    a, b = make_input(0), make_input(1)
    x, y = a, b
    for left, right in zip(one.layers, two.layers, strict=True):
        x, y = ours(left, x), ours(right, y)
    x.sum().backward()  # guesses each time that a layer of the other model comes next
    assert on_device() == 2  # the one fetched ahead, and that of the layer that came last
    y.sum().backward()
    assert not lazy.corrupted


def test_steps_after_the_first_allocate_nothing(engine):
    ours, lazy = engine
    model = Stack(4)
    for rows in (64, 64, 60, 64, 33, 63):
        x = make_input(0, rows)
        model(x, ours).sum().backward()
    assert ours.metrics()["host_allocations"] == 4
    assert len(lazy.live) == 4


# What is not offloaded


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Parameter(torch.randn(5, 8)), "no plain tensor"),
        (lambda: torch.randn(5, 16)[:, ::2].requires_grad_(), "a view of a larger tensor"),
        (lambda: torch.randn(1, 8).expand(5, 8).requires_grad_(), "a view of a larger tensor"),
        (lambda: torch.randn(41)[1:].view(5, 8).requires_grad_(), "a view of a larger tensor"),
    ],
    ids=["parameter", "gaps", "expanded", "odd place"],
)
def test_inputs_that_stay_give_the_same_and_are_counted(make, reason, engine):
    ours, _ = engine
    layer, results = Layer(0), []
    for checkpoint_fn in (ours, stock):
        torch.manual_seed(0)
        x = make()
        layer.zero_grad()
        checkpoint_fn(layer, x).sum().backward()
        results.append([grad.clone() for grad in gradients(layer, x)])
    assert_same(*results)
    assert ours.offloaded == 0 and any(reason in kept for kept in ours.kept)


def test_small_inputs_and_inputs_beyond_the_budget_stay(monkeypatch):
    small, _ = lazy_engine(monkeypatch, min_bytes=1000)
    Stack(2)(make_input(0), small).sum().backward()
    assert small.kept == {"the first input is smaller than 1,000 bytes": 2}
    poor, _ = lazy_engine(monkeypatch, budget=2 * 4096)
    model, x = Stack(4), make_input(0)
    model(x, poor).sum().backward()
    assert poor.offloaded == 2 and poor.kept == {"no room in the budget of host memory": 2}


def test_without_a_gpu_it_is_torch_checkpointing():
    ours, model, x = OffloadCheckpoint(min_bytes=0), Stack(2), make_input(0)
    model(x, ours).sum().backward()
    assert ours.offloaded == 0
    (reason,) = ours.kept
    assert "no NVIDIA GPU" in reason


def test_under_saved_tensor_hooks_of_others_it_is_torch_checkpointing(engine):
    ours, lazy = engine
    model, x = Stack(2), make_input(0)
    with torch.autograd.graph.save_on_cpu():
        model(x, ours).sum().backward()
    assert ours.offloaded == lazy.copies == 0


# The signature of torch's function


def test_reentrant_is_an_error_with_the_remedy():
    with pytest.raises(ValueError, match=r"use_reentrant=True is not supported; leave it out"):
        OffloadCheckpoint()(torch.sin, torch.ones(1), use_reentrant=True)


def test_keywords_of_torch_and_of_the_function_and_any_outputs(engine):
    ours, _ = engine
    layer = Layer(0)

    def function(x, y, *, scale):
        return {"both": (layer(x, scale), y * 2)}, None

    results = []
    for checkpoint_fn in (ours, stock):
        torch.manual_seed(0)
        layer.zero_grad()
        x, y = make_input(0), make_input(1)
        outputs, nothing = checkpoint_fn(
            function, x, y, scale=0.5, preserve_rng_state=True, determinism_check="none", use_reentrant=False
        )
        assert nothing is None
        sum(part.sum() for part in outputs["both"]).backward()
        results.append([grad.clone() for grad in gradients(layer, x, y)])
    assert_same(*results)
    assert ours.offloaded == 1


def test_selective_checkpointing_inside(engine):
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    ours, _ = engine
    model, results = Stack(3), []

    def policy(context, op, *args, **kwargs):
        saved = op == torch.ops.aten.addmm.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    for checkpoint_fn in (ours, stock):
        torch.manual_seed(0)
        model.zero_grad()
        x = make_input(0)
        out = x
        for layer in model.layers:
            out = checkpoint_fn(layer, out, context_fn=lambda: create_selective_checkpoint_contexts(policy))
        out.sum().backward()
        results.append([grad.clone() for grad in gradients(model, x)])
    assert_same(*results)
    assert ours.offloaded == 3


# Changes in place


@pytest.mark.parametrize("when", ["in the layer", "before the next layer", "before backward"])
def test_an_input_changed_in_place_before_it_is_copied_is_an_error(when, engine):
    ours, _ = engine
    first, second = Layer(0), Layer(1)

    def changes(x):
        out = first(x)
        with torch.no_grad():
            x.add_(1)
        return out

    x = make_input(0) * 1
    out = ours(changes if when == "in the layer" else first, x)
    if when == "before the next layer":
        with torch.no_grad():
            x.add_(1)
        out = ours(second, out)
    elif when == "before backward":
        with torch.no_grad():
            x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_change_after_the_copy_does_no_harm(engine):
    ours, _ = engine
    results = []
    for change in (False, True):
        torch.manual_seed(0)
        leaf = make_input(0)
        model, x = Stack(2), leaf * 1
        out = model(x, ours)
        if change:
            with torch.no_grad():
                x.add_(1)
        out.sum().backward()
        results.append(gradients(model, leaf))
    assert_same(*results)


# Copies and the end


def test_a_copy_of_it_is_torch_checkpointing(engine):
    ours, _ = engine
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert other.func is checkpoint
        x = make_input(0)
        Stack(1)(x, other).sum().backward()
        assert x.grad is not None


def test_a_graph_outlives_the_engine(engine):
    ours, lazy = engine
    model, x, expected = Stack(3), make_input(0), make_input(0)
    torch.manual_seed(0)
    out = model(x, ours)
    ours.close()
    assert len(lazy.live) == 3
    out.sum().backward()
    del out
    gc.collect()
    assert lazy.live == []
    other = Stack(3)
    torch.manual_seed(0)
    other(expected, stock).sum().backward()
    assert torch.equal(x.grad, expected.grad)
