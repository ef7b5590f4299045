"""The planner's closed function, and planned checkpointing against torch's on simulated devices of many sizes."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
from dataclasses import replace

import pytest
import torch
from checkpointing_helpers import (
    SCHEDULES,
    Layer,
    Stack,
    assert_as_stock,
    assert_same,
    gradients,
    lazy_engine,
    make_input,
    stock,
)
from hypothesis import given
from hypothesis import strategies as st
from simulated_device import SimulatedDevice
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastft_plugins.checkpointing import OffloadCheckpoint
from fastft_plugins.checkpointing.calls import layer_of
from fastft_plugins.checkpointing.gauge import CudaGauge
from fastft_plugins.checkpointing.planned import PlannedCheckpoint
from fastft_plugins.checkpointing.planner import Costs, Plan, choose

DEPTH, WIDTH, ROWS = 6, 64, 512


@st.composite
def costs(draw):
    inputs = draw(st.lists(st.integers(0, 1000), min_size=1, max_size=12))
    whole = tuple(size + draw(st.integers(0, 5000)) for size in inputs)
    fixed = tuple(draw(st.integers(0, size - own)) for size, own in zip(whole, inputs, strict=True))
    # None, or as many as are worth storing.
    products = tuple(draw(st.integers(0, (size - own) // 2)) for size, own in zip(whole, inputs, strict=True))
    halves = tuple((size // 2, size - size // 2) for size in products)
    products = halves if draw(st.booleans()) else ((),) * len(inputs)
    rest = tuple(draw(st.integers(0, 5000)) for _ in inputs)
    return Costs(draw(st.integers(1, 500)), whole, tuple(inputs), products, fixed, rest, draw(st.integers(0, 20000)))


def rank(costs, plan):
    """How much a plan runs again: the plans in the order in which the planner prefers them."""
    return costs.plans(offloads=plan.offloads).index(plan)


TOKENS, ROOM = st.integers(1, 1000), st.integers(-1000, 200_000)


def bump(costs, tokens):
    """By how much plans may be out of order: a layer with stored products computes the rest of itself beside them."""
    return max(costs.stored) * tokens / costs.tokens + 1e-6


@given(costs(), TOKENS, ROOM)
def test_a_plan_needs_no_more_than_there_is_unless_nothing_does(costs, tokens, room):
    plan = choose(costs, tokens, room)
    depth = len(costs.whole)
    everything = [other for offloads in (False, True) for other in costs.plans(offloads=offloads)]
    if costs.need(plan, tokens) > room:
        assert plan == Plan(depth, offloads=True)
        assert all(costs.need(other, tokens) > room for other in everything)
    else:
        better = [other for other in everything if rank(costs, other) < rank(costs, plan)]
        assert all(costs.need(other, tokens) > room - bump(costs, tokens) for other in better)
        assert not plan.offloads or costs.need(replace(plan, offloads=False), tokens) > room - bump(costs, tokens)


@given(costs(), TOKENS, st.booleans())
def test_each_plan_needs_hardly_more_than_the_one_before(costs, tokens, offloads):
    needs = [costs.need(plan, tokens) for plan in costs.plans(offloads=offloads)]
    assert all(after <= before + bump(costs, tokens) for before, after in itertools.pairwise(needs))


@given(costs(), TOKENS, ROOM, st.integers(0, 100_000))
def test_more_memory_keeps_no_fewer_layers(costs, tokens, room, more):
    assert rank(costs, choose(costs, tokens, room + more)) <= rank(costs, choose(costs, tokens, room))


@given(costs(), TOKENS, st.integers(0, 1000), ROOM)
def test_longer_rows_keep_no_more_layers(costs, tokens, longer, room):
    assert rank(costs, choose(costs, tokens + longer, room)) >= rank(costs, choose(costs, tokens, room))


@given(costs(), TOKENS, ROOM)
def test_where_offloading_is_asked_for_it_keeps_no_fewer_layers(costs, tokens, room):
    plan = choose(costs, tokens, room, always_offload=True)
    assert plan.offloads and rank(costs, plan) <= rank(costs, choose(costs, tokens, room))


@given(costs(), TOKENS)
def test_inputs_that_all_stay_need_what_they_need_without_offloading(costs, tokens):
    costs = replace(costs, staying=frozenset(range(len(costs.whole))))
    for plan in costs.plans(offloads=True):
        assert costs.need(plan, tokens) == pytest.approx(costs.need(replace(plan, offloads=False), tokens))


def test_it_offloads_only_to_keep_more():
    costs = Costs(
        tokens=10, whole=(50, 50, 50, 50), inputs=(20,) * 4, products=((),) * 4, fixed=(0,) * 4, rest=(0,) * 4, loss=100
    )
    assert costs.need(Plan(4), 10) == 180 and costs.need(Plan(4, offloads=True), 10) == 140
    assert choose(costs, 10, 300) == Plan(0)
    assert choose(costs, 10, 190) == Plan(3, offloads=True)
    assert choose(costs, 10, 150) == Plan(4, offloads=True)
    assert choose(costs, 10, 10) == Plan(4, offloads=True)
    assert choose(costs, 5, 225) == Plan(0)  # 100 and a half of 200
    assert costs.need(Plan(4), 20) == 360


def test_layers_are_kept_whole_only_once_all_products_are_stored():
    costs = Costs(
        tokens=10, whole=(50,) * 3, inputs=(10,) * 3, products=((12, 8),) * 3, fixed=(0,) * 3, rest=(0,) * 3, loss=0
    )
    assert [costs.need(plan, 10) for plan in costs.plans(offloads=False)] == [150, 130, 110, 130, 110, 90, 70]
    assert choose(costs, 10, 150) == Plan(0)
    assert choose(costs, 10, 149) == Plan(0, 1)
    assert choose(costs, 10, 129) == Plan(0, 2, offloads=True)
    assert choose(costs, 10, 109) == Plan(1, 2, offloads=True)
    assert choose(costs, 10, 79) == Plan(3)


# On a device


def planned_on(device, engine=None):
    """As after a first step."""
    planned = PlannedCheckpoint(device, engine or OffloadCheckpoint())
    planned.planning._is_warm = True
    return planned


def train(device, checkpoint_fn, rows=(ROWS, ROWS, ROWS), after_step=lambda: None, head=1):
    """Gradients of each step of a stack on a device."""
    model, found = Stack(DEPTH, WIDTH), []
    head = torch.ones(WIDTH, head)
    torch.manual_seed(3)
    for count in rows:
        x = make_input(0, count, WIDTH)
        with device:
            (model(x, checkpoint_fn) @ head).square().sum().backward()
        found.append([grad.clone() for grad in gradients(model, x)])
        model.zero_grad()
        after_step()
    return found


def assert_same_steps(got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        assert_same(ours, theirs)


@pytest.fixture(scope="module")
def sizes():
    """The peaks of a step with all layers checkpointed, and with all kept."""
    peaks = {}
    for name, function in (("checkpointed", stock), ("kept", lambda layer, x, **_: layer(x))):
        device = SimulatedDevice()
        train(device, function, [ROWS])
        peaks[name] = device.highest
    assert peaks["kept"] > 1.5 * peaks["checkpointed"]
    return peaks


@pytest.mark.parametrize("head", [1, 2000], ids=["small loss", "large loss"])
@pytest.mark.parametrize("kept", range(DEPTH + 1))
def test_what_a_plan_is_said_to_need_is_what_it_takes_and_hardly_more(kept, head):
    measured = SimulatedDevice()
    ours = planned_on(measured)
    train(measured, ours, [ROWS, ROWS], head=head)
    taken, positions = SimulatedDevice(), itertools.count()

    def by_hand(layer, x, use_reentrant):
        return layer(x) if next(positions) >= DEPTH - kept else stock(layer, x)

    train(taken, by_hand, [ROWS], head=head)
    need = ours.planning.costs.need(Plan(DEPTH - kept), ROWS)
    assert taken.highest <= need <= 1.3 * taken.highest


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.6])
def test_the_same_gradients_in_any_memory_and_never_more_of_it(share, sizes):
    capacity = int(sizes["checkpointed"] + share * (sizes["kept"] - sizes["checkpointed"]))
    device = SimulatedDevice(capacity)
    ours = planned_on(device)
    assert_same_steps(train(device, ours), train(SimulatedDevice(), stock))
    assert ours.calls["retried"] == 0 and ours.forwards == 2
    kept = ours.calls["kept"] / ours.forwards
    # Its figures are not below the truth: of these six small layers, two may stay checkpointed that would just fit.
    assert min(DEPTH, int(share * DEPTH)) - 2 <= kept
    assert kept == DEPTH or share < 1.6


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("budget", [0, 10_000, 2**40])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.__name__)
def test_every_schedule_gives_the_gradients_of_torch_checkpointing(schedule, budget, offload, monkeypatch):
    engine, lazy = lazy_engine(monkeypatch)
    ours = planned_on(SimulatedDevice(budget=budget), engine)
    assert_as_stock(schedule, functools.partial(ours, offload=offload))
    assert not lazy.corrupted


@pytest.mark.parametrize("fitting", range(DEPTH - 1))
def test_a_layer_without_room_is_run_again_checkpointed_and_plans_get_smaller(fitting, sizes, monkeypatch):
    """There is room for ``fitting`` whole layers at a time, and the next one finds out at its end."""
    device = SimulatedDevice(sizes["kept"] * 1.4)
    ours, kept, forward = planned_on(device), [], Layer.forward

    def without_room(layer, x, *args):
        out = forward(layer, x, *args)
        is_kept = torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        if is_kept and device.allocated() > fitting * ours.planning.costs.whole[-1] + sizes["checkpointed"] // 2:
            raise torch.OutOfMemoryError("fragmented")
        return out

    rows = [ROWS] * 6
    expected = train(SimulatedDevice(), stock, rows)
    monkeypatch.setattr(Layer, "forward", without_room)
    assert_same_steps(train(device, ours, rows, lambda: kept.append(ours.calls["kept"])), expected)
    in_each_step = [after - before for before, after in itertools.pairwise(kept)]
    assert in_each_step == sorted(in_each_step, reverse=True)
    assert in_each_step[1:] == in_each_step[-1:] * 4, "not found at the first try"
    assert ours.calls["retried"] == 1


def test_the_first_step_is_not_measured():
    device, costs = SimulatedDevice(), []
    ours = PlannedCheckpoint(device, OffloadCheckpoint())
    assert_same_steps(
        train(device, ours, [ROWS] * 3, lambda: costs.append(ours.planning.costs)), train(SimulatedDevice(), stock)
    )
    assert costs[:2] == [None, None] and costs[2] is not None and ours.forwards == 1


def test_running_out_of_memory_elsewhere_is_the_callers_affair(sizes):
    device = SimulatedDevice(sizes["checkpointed"] // 2)
    with pytest.raises(torch.OutOfMemoryError):
        train(device, planned_on(device))


def test_much_longer_rows_are_measured_and_others_planned():
    device = SimulatedDevice()
    ours, forwards = planned_on(device), []
    rows = [40, 40, 128, 40, 128, 150, 161, 161]
    got = train(device, ours, rows, lambda: forwards.append(ours.forwards))
    assert_same_steps(got, train(SimulatedDevice(), stock, rows))
    assert forwards == [0, 1, 1, 2, 3, 4, 4, 5]
    assert ours.planning.costs.tokens == 161


def test_copies_of_weights_that_autocast_makes_do_not_shrink_with_the_row():
    device = SimulatedDevice()
    ours, model, copies = planned_on(device), Stack(2, WIDTH), 2 * 2 * (2 * WIDTH * WIDTH) + 2 * 3 * WIDTH
    with device:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                out = model(make_input(0, 16, WIDTH), ours)
            out.sum().backward()
    assert ours.planning.costs.fixed == (copies, copies)
    assert ours.planning.costs.need(Plan(0), 1) > 2 * copies


@pytest.mark.parametrize(
    ("budget", "fraction", "expected"),
    [
        ("auto", 1.0, 0.94 * 80e9),
        ("auto", 0.5, 0.94 * 50e9),
        (0.3, 1.0, 30e9),
        (0.9, 1.0, 80e9),  # 20e9 are others'
        (int(40e9), 1.0, 40e9),
        (int(40e9), 0.25, 25e9),
    ],
)
def test_the_room_on_a_gpu(budget, fraction, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(70e9), int(100e9)))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction)
    figures = {
        "allocated_bytes": {"all": {"current": 6, "peak": 9}},
        "reserved_bytes": {"all": {"current": int(10e9)}},
        "num_alloc_retries": 3,
    }
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: figures)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    gauge, emptied, usable = CudaGauge(torch.device("cuda"), budget), [], min(80e9, fraction * 100e9)
    rooms = [gauge.room() for _ in range(6)]
    # All of it only once some steps have shown that the allocator finds its memory.
    assert rooms == sorted(rooms) and rooms[0] <= 0.94 * usable
    assert rooms[3:] == [int(expected) - 6] * 3 and emptied == [True]
    for retries in (4, 4, 6):
        figures["num_alloc_retries"] = retries
        rooms.append(gauge.room())
    for room, less in zip(rooms[6:], (0.02, 0.02, 0.04), strict=True):
        left = expected - less * usable if budget == "auto" else min(expected, (1 - less) * usable)
        assert room == pytest.approx(left, abs=10)
    assert (gauge.allocated(), gauge.peak()) == (6, 9)


def test_a_layer_that_appears_later_is_checkpointed_until_it_is_measured():
    device = SimulatedDevice()
    ours, model, late = planned_on(device), Stack(2, WIDTH), Layer(7, WIDTH)
    with device:
        for step in range(5):
            out = model(make_input(0, ROWS, WIDTH), ours)
            out = ours(late, out) if step >= 2 else out
            out.sum().backward()
            if step == 2:
                assert ours.calls == {"kept": 4, "checkpointed": 1}
    assert ours.calls == {"kept": 7, "checkpointed": 1}


def test_a_dropped_graph_teaches_nothing():
    device = SimulatedDevice()
    ours, model = planned_on(device), Stack(DEPTH, WIDTH)
    with device:
        for _ in range(2):
            model(make_input(0, ROWS, WIDTH), ours)
        assert ours.planning.costs is None and "without a plan all layers are checkpointed" in ours.explain()
        for _ in range(2):
            model(make_input(0, ROWS, WIDTH), ours).sum().backward()
    assert ours.planning.costs is not None and ours.forwards == 1


def test_a_forward_that_another_one_overtakes_leaves_the_peak_alone():
    device = SimulatedDevice()
    ours, model, restarts = planned_on(device), Stack(DEPTH, WIDTH), []
    with device:
        first = model(make_input(0, ROWS, WIDTH), ours)
        second = model(make_input(1, ROWS, WIDTH), ours)
        device.restart_peak = lambda: restarts.append(1)
        first.sum().backward()
        second.sum().backward()
        assert not restarts


@pytest.mark.parametrize("steps_before", [0, 3], ids=["from the start", "later"])
def test_forwards_that_wait_for_one_backward_stay_checkpointed(steps_before):
    """The first one would take the memory of the second."""
    device = SimulatedDevice()
    ours, model, found = planned_on(device), Stack(DEPTH, WIDTH), []
    with device:
        for _ in range(steps_before):
            loss = model(make_input(0, ROWS, WIDTH), ours).sum()
            loss.backward()
        model.zero_grad()
        kept = ours.calls["kept"]
        for checkpoint_fn in (stock, ours):
            for _ in range(3):
                torch.manual_seed(0)
                pair = [model(make_input(seed, ROWS, WIDTH), checkpoint_fn) for seed in (1, 2)]
                (pair[0] * pair[1]).sum().backward()
            found.append([grad.clone() for grad in gradients(model)])
            model.zero_grad()
    assert_same(*found)
    assert ours.calls["kept"] == kept + DEPTH * bool(steps_before), "of the first of a pair, before there was a second"
    assert "before the backward" in ours.explain()


def test_a_loss_that_is_held_until_the_next_step_or_never_used_is_no_overlap():
    device = SimulatedDevice()
    ours, model, losses = planned_on(device), Stack(DEPTH, WIDTH), []
    with device:
        for step in range(4):
            loss = model(make_input(0, ROWS, WIDTH), ours).sum()
            loss.backward()
            losses.append(loss)
            if step == 2:
                model(make_input(0, ROWS, WIDTH), ours)
    assert ours.calls["kept"] == 4 * DEPTH


def test_layers_below_the_first_trained_one_hold_nothing():
    device = SimulatedDevice()
    ours, model = planned_on(device), Stack(DEPTH, WIDTH)
    model.layers[:2].requires_grad_(False)
    x = make_input(0, ROWS, WIDTH).detach()
    with device:
        for _ in range(2):
            model(x, ours).sum().backward()
    assert len(ours.planning.costs.whole) == ours.calls["kept"] == DEPTH - 2
    assert all(size > 2 * x.nbytes for size in ours.planning.costs.whole)


def test_layers_with_rows_of_their_own_stay_checkpointed():
    device = SimulatedDevice()
    ours, short, long = planned_on(device), Stack(2), Stack(2)
    with device:
        for _ in range(3):
            loss = short(make_input(0, 5), ours).sum() + long(make_input(1, 9), ours).sum()
            loss.backward()
    assert ours.forwards == 0


def test_the_report_explains_itself(sizes):
    device = SimulatedDevice((sizes["checkpointed"] + sizes["kept"]) // 2)
    ours = planned_on(device)
    train(device, ours)
    text, metrics = ours.explain(), ours.metrics()
    assert text.startswith(f"rows of {ROWS} tokens") and f"of {DEPTH} layers kept whole" in text
    assert metrics["planned_forwards"] == 2
    assert metrics["kept_layers"] + metrics["checkpointed_layers"] == DEPTH
    assert metrics["layer_forward_ms"] > 0


def test_a_copy_of_it_is_torch_checkpointing():
    ours = planned_on(SimulatedDevice())
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert other.func is checkpoint


def test_reentrant_is_an_error_with_the_remedy():
    with pytest.raises(ValueError, match="use_reentrant=True is not supported"):
        planned_on(SimulatedDevice())(Layer(0), make_input(0), use_reentrant=True)


def test_which_layer_is_called():
    layer = Layer(0)
    for function in (
        layer,
        layer.forward,
        functools.partial(layer.__call__, scale=2.0),
        functools.partial(Layer.forward, layer, scale=2.0),
        functools.partial(layer, scale=2.0),
    ):
        assert layer_of(function) is layer
    assert layer_of(torch.sin) is layer_of(lambda x: x) is layer_of(functools.partial(torch.add, 1)) is None
    assert isinstance(layer_of(nn.Identity()), nn.Identity)
