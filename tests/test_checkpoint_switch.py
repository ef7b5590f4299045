"""Checkpointing that is switched off and on in the middle of training, as TRL does around its references' forwards."""

from __future__ import annotations

import copy
import pickle

import pytest
import test_checkpointing_hf
import torch
import trl_helpers
from hf_helpers import losses, tiny_model
from test_checkpointing_hf import AUTO, ONLY, OPTIONS, assert_equal, checkpointed_model, functions, step
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback

import fastft_trl
from benchmarks.shapes import enable_checkpointing
from fastft_plugins import FastFTError, apply

lazy, room = test_checkpointing_hf.lazy, test_checkpointing_hf.room  # fixtures
SWITCHES = [("gradient_checkpointing_disable", "gradient_checkpointing_enable")]
if hasattr(tiny_model(), "activation_checkpointing_enable"):
    SWITCHES.append(("activation_checkpointing_disable", "activation_checkpointing_enable"))
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")


def entry_of(run):
    return run.report.features["checkpointing"]


class Functions(TrainerCallback):
    """The types of the layers' functions after each step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append({type(function).__name__ for function in functions(model).values()})


@pytest.mark.parametrize("bytes_left", [0, 2**40])
@pytest.mark.parametrize("make", ["dpo_trainer", "grpo_trainer", "kto_trainer"])
def test_trl_switches_around_forwards_and_the_planner_serves_on(make, bytes_left, lazy, room, tmp_path):
    room.bytes, results = bytes_left, []
    for flag in (False, True):
        trainer = getattr(trl_helpers, make)(tmp_path, max_steps=8, fastft=flag, **OPTIONS)
        trainer.add_callback(seen := Functions())
        trainer.train()
        results.append(trainer)
    stock, ours = results
    assert losses(ours) == losses(stock) and losses(ours)
    assert_equal(ours.model.state_dict(), stock.model.state_dict())
    assert seen.seen == 8 * [{"CheckpointFunction"}]
    report = fastft_trl.report_of(ours)
    entry = report.features["checkpointing"]
    assert entry.enabled and entry.metrics["planned_forwards"] >= 2, str(report)
    assert entry.metrics["kept_layers" if bytes_left else "offloaded_layers"] == 3
    assert entry.changes[0].startswith("checkpoint function in") and "until" not in entry.changes[0]
    assert not report.notes, report.notes
    assert all(getattr(function, "func", function) is checkpoint for function in functions(ours.model).values())
    for mine, theirs in zip(ours.model.modules(), stock.model.modules(), strict=True):
        assert vars(mine).keys() == vars(theirs).keys()
    assert lazy.live == []


@pytest.mark.parametrize(("off", "on"), SWITCHES)
def test_a_loop_of_ones_own_may_switch(off, on, lazy, room):
    model, expected = checkpointed_model(), step(checkpointed_model())
    with apply(model, ONLY) as run:
        for index in range(6):
            getattr(model, off)()
            assert {function for function in functions(model).values()} == {checkpoint}
            assert_equal(step(model), expected)
            getattr(model, on)({"use_reentrant": False})
            if index == 0:
                made = set(functions(model).values())
            assert set(functions(model).values()) == made, "what they have learned is lost"
            assert_equal(step(model), expected)
    assert entry_of(run).metrics["planned_forwards"] == 4 and not run.report.notes
    assert all(function.func is checkpoint for function in functions(model).values())
    assert not [module for module in model.modules() if "_set_gradient_checkpointing" in vars(module)]


def test_a_model_inside_may_switch_its_own_layers(lazy):
    model, expected = checkpointed_model(), step(checkpointed_model())
    with apply(model, ONLY) as run:
        for _ in range(4):
            model.model.gradient_checkpointing_disable()
            model.model.gradient_checkpointing_enable({"use_reentrant": False})
            assert_equal(step(model), expected)
    assert entry_of(run).metrics["planned_forwards"] == 2 and not run.report.notes


def test_switched_off_for_good_is_in_the_report(lazy):
    model, expected = checkpointed_model(), step(checkpointed_model())
    with apply(model, ONLY) as run:
        for _ in range(3):
            assert_equal(step(model), expected)
        model.gradient_checkpointing_disable()
        copies = lazy.copies
        assert_equal(step(model), expected)
        assert lazy.copies == copies
    entry = entry_of(run)
    assert entry.enabled and entry.metrics["planned_forwards"] == 1
    assert "modules, until checkpointing was switched off during training" in entry.changes[0] and not run.report.notes


def test_reentrant_from_now_on_is_in_the_report(lazy, caplog):
    model, expected = checkpointed_model(), step(checkpointed_model())
    with apply(model, AUTO) as run:
        for _ in range(3):
            assert_equal(step(model), expected)
        enable_checkpointing(model, {"use_reentrant": True})
        step(model)
    entry = entry_of(run)
    assert entry.enabled and "until checkpointing was switched on anew, and stayed stock" in entry.changes[0]
    assert "use_reentrant=True" in entry.changes[0] and not run.report.notes
    assert not [record for record in caplog.records if record.name == "fastft"]
    assert all(function.keywords == {"use_reentrant": True} for function in functions(model).values())


def test_reentrant_from_now_on_is_an_error_where_on_was_asked_for(lazy):
    model = checkpointed_model()
    with pytest.raises(FastFTError, match="use_reentrant=True"), apply(model, ONLY):
        enable_checkpointing(model, {"use_reentrant": True})
    assert not [module for module in model.modules() if "_set_gradient_checkpointing" in vars(module)]


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_made_inside_switches_itself_alone(copied, lazy):
    model = checkpointed_model()
    model.disable_input_require_grads()  # whose hook cannot be pickled
    with apply(model, ONLY):
        other = copied(model)
        ours = functions(model)
        other.gradient_checkpointing_disable()
        assert functions(model) == ours and model.model.layers[0].gradient_checkpointing
        assert not other.model.layers[0].gradient_checkpointing
        other.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(function.func is checkpoint for function in functions(other).values())
    assert_equal(step(other), step(checkpointed_model()))


def test_lora_switches_through_peft(lazy, room):
    peft = pytest.importorskip("peft")
    room.bytes = 2**40
    model = peft.get_peft_model(checkpointed_model(), peft.LoraConfig(r=2, target_modules="all-linear")).train()
    with apply(model, ONLY) as run:
        for _ in range(4):
            model.gradient_checkpointing_disable()
            model.gradient_checkpointing_enable({"use_reentrant": False})
            ids = torch.randint(1, 97, (2, 9))
            model(input_ids=ids, labels=ids).loss.backward()
        assert len(set(functions(model).values())) == 1
    assert entry_of(run).metrics["kept_layers"] == 3 and not run.report.notes
