"""Activation checkpointing of transformers' models with the engine in its place, in loops and in the Trainer."""

from __future__ import annotations

import contextlib
import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from hf_helpers import Gradients, documents, losses, make_trainer, tiny_model
from lazy_transfer import LazyTransfer
from torch.utils.checkpoint import checkpoint

from benchmarks.shapes import checkpointing_argument, enable_checkpointing
from fastft_plugins import FastFTCallback, FastFTError, apply
from fastft_plugins.checkpointing import OffloadCheckpoint
from fastft_plugins.checkpointing import feature as feature_module
from fastft_plugins.kernels import transfer as transfer_module

ONLY = {"packing": "off", "moe": "off", "checkpointing": "on"}
AUTO = ONLY | {"checkpointing": "auto"}


def options_of(**checkpoint_options):
    """The TrainingArguments that switch checkpointing on."""
    name = checkpointing_argument()
    return {name: True, f"{name}_kwargs": {"use_reentrant": False} | checkpoint_options}


OPTIONS = options_of()


class Room:
    """A device that always has ``bytes`` left."""

    bytes = 0
    restart_peak = allocated = peak = failures = mark = lambda self: 0

    def room(self):
        return self.bytes

    def milliseconds(self, begin, end):
        return 1.0


@pytest.fixture
def room(monkeypatch):
    """There is no room to keep a layer, or its input: from the second step on, all of them are offloaded."""
    found = Room()
    monkeypatch.setattr(feature_module, "make_gauge", lambda device, budget: found)
    return found


@pytest.fixture
def lazy(monkeypatch, room):
    """Tensors on the CPU are offloaded, however small."""
    transfer = LazyTransfer()
    monkeypatch.setattr(transfer_module, "why_no_transfer", lambda device: None)
    monkeypatch.setattr(transfer_module, "make_transfer", lambda device: transfer)
    monkeypatch.setattr(
        feature_module, "OffloadCheckpoint", functools.partial(OffloadCheckpoint, min_bytes=0, budget=2**30)
    )
    return transfer


def checkpointed_model(**options):
    model = tiny_model(attention_dropout=0.1, attn_implementation="eager").train()
    enable_checkpointing(model, **options)
    return model


def step(model):
    torch.manual_seed(0)
    model.zero_grad()
    ids = torch.randint(1, 97, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def functions(model):
    return {
        name: module._gradient_checkpointing_func
        for name, module in model.named_modules()
        if "_gradient_checkpointing_func" in vars(module)
    }


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_a_loop_of_ones_own_gets_the_same_gradients_and_its_model_back(lazy):
    model = checkpointed_model()
    expected, before = step(model), functions(model)
    with apply(model, ONLY) as run:
        for _ in range(4):
            assert_equal(step(model), expected)
        assert all(functions(model)[name] is not function for name, function in before.items())
        assert len(lazy.live) == 3
    assert functions(model) == before
    assert lazy.live == [] and not lazy.corrupted
    entry = run.report.features["checkpointing"]
    assert entry.enabled and entry.metrics["offloaded_calls"] == 6 and entry.metrics["host_allocations"] == 3
    assert entry.metrics["bytes_out"] == 2 * 3 * 2 * 9 * 32 * 4
    assert "hidden_share" in entry.metrics
    assert "host memory" in str(run.report)


def test_layers_that_there_is_room_for_are_kept_whole(lazy, room):
    model, room.bytes = checkpointed_model(), 2**40
    expected = step(model)
    with apply(model, ONLY) as run:
        for _ in range(4):
            assert_equal(step(model), expected)
    entry = run.report.features["checkpointing"]
    assert entry.enabled and entry.metrics["kept_layers"] == 3 and entry.metrics["planned_forwards"] == 2
    assert "3 of 3 layers kept whole" in str(run.report)
    assert lazy.copies == 0


def test_one_step_alone_is_stock_and_not_called_on(lazy, room):
    model = checkpointed_model()
    expected = step(model)
    with apply(model, ONLY) as run:
        assert_equal(step(model), expected)
    assert not run.report.features["checkpointing"].enabled
    assert "as in stock checkpointing" in run.report.features["checkpointing"].reason


def test_the_budget_of_the_config_is_the_gauges(lazy, room, monkeypatch):
    budgets = []
    monkeypatch.setattr(feature_module, "make_gauge", lambda device, budget: budgets.append(budget) or room)
    for given in ({}, {"memory_budget": 0.5}):
        with apply(checkpointed_model(), ONLY | given):
            pass
    assert budgets == ["auto", 0.5]


def test_a_copy_made_inside_is_stock(lazy):
    model = checkpointed_model()
    expected = step(model)
    with apply(model, ONLY):
        other = copy.deepcopy(model)
    copies = lazy.copies
    assert_equal(step(other), expected)
    assert lazy.copies == copies


def test_every_second_layer(lazy):
    model = checkpointed_model(every_n_layers=2)
    expected = step(model)
    with apply(model, ONLY) as run:
        for _ in range(3):
            assert_equal(step(model), expected)
    assert run.report.features["checkpointing"].metrics["offloaded_calls"] == 2


@pytest.mark.parametrize("switch", ["callback", "apply"])
@pytest.mark.parametrize("packing", ["off", "auto"])
def test_the_trainer_trains_as_with_stock_checkpointing(switch, packing, lazy, tmp_path):
    results = {}
    for checkpointing in ("off", "on"):
        config = {"packing": packing, "moe": "off", "checkpointing": checkpointing}
        gradients = Gradients()
        callback = FastFTCallback(config)
        callbacks = [gradients, *([callback] if switch == "callback" else [])]
        trainer = make_trainer(tmp_path / checkpointing, tiny_model(), callbacks=callbacks, **OPTIONS)
        if switch == "apply":
            with apply(trainer, config) as run:
                trainer.train()
            report = run.report
        else:
            trainer.train()
            report = callback.report
        results[checkpointing] = losses(trainer), gradients.steps
        entry = report.features["checkpointing"]
        assert entry.enabled == (checkpointing == "on")
        if entry.enabled:
            assert entry.metrics["offloaded_calls"] == 3 * entry.metrics["planned_forwards"] > 3, str(report)
            assert entry.changes[0].startswith("checkpoint function in"), entry.changes
        assert all(function.func is checkpoint for function in functions(trainer.model).values())
        assert not report.notes, report.notes
    assert results["on"][0] == results["off"][0]
    for ours, theirs in zip(results["on"][1], results["off"][1], strict=True):
        assert_equal(ours, theirs)
    assert lazy.live == []


def test_reentrant_checkpointing_is_an_error_that_says_why(lazy):
    model = tiny_model().train()
    enable_checkpointing(model, {"use_reentrant": True})
    before = functions(model)
    with pytest.raises(FastFTError, match="use_reentrant=True"), apply(model, ONLY):
        pass
    assert functions(model) == before


@pytest.mark.parametrize("bytes_left", [0, 2**40])
def test_offload_of_transformers_is_replaced_from_the_first_step_on(bytes_left, lazy, room):
    room.bytes, expected = bytes_left, step(checkpointed_model())
    model = checkpointed_model(offload=True)  # without a GPU, transformers' own function would fail
    before = functions(model)
    with apply(model, ONLY) as run:
        for _ in range(3):
            assert_equal(step(model), expected)
    metrics = run.report.features["checkpointing"].metrics
    assert metrics["offloaded_calls"] == (6 if bytes_left else 9)
    assert metrics["kept_layers" if bytes_left else "offloaded_layers"] == 3
    assert functions(model) == before and lazy.live == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "not switched on"),
        (options_of(use_reentrant=True), "use_reentrant=True"),
    ],
    ids=["off", "reentrant"],
)
@pytest.mark.parametrize("switch", ["callback", "apply"])
def test_trainers_of_other_ways_do_not_begin(switch, options, reason, lazy, tmp_path):
    callbacks = [FastFTCallback(ONLY)] if switch == "callback" else []
    trainer = make_trainer(tmp_path, tiny_model(), callbacks=callbacks, **options)
    block = apply(trainer, ONLY) if switch == "apply" else contextlib.nullcontext()
    with pytest.raises(FastFTError, match=reason), block:
        trainer.train()
    assert trainer.state.global_step == 0 and lazy.copies == 0


def test_auto_takes_over_where_checkpointing_is_on(lazy, caplog):
    model = checkpointed_model()
    expected = step(model)
    with apply(model, AUTO | {"strict": True}) as run:
        for _ in range(3):
            assert_equal(step(model), expected)
        assert run.report.features["checkpointing"].enabled
    assert run.report.features["checkpointing"].metrics["offloaded_layers"] == 3 and not caplog.records


class Plain(torch.nn.Linear):
    """A model that no plugin knows."""


def sharded(model):
    class DTensor(torch.Tensor):
        pass

    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().as_subclass(DTensor))
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (tiny_model, "not switched on"),
        (lambda: enable_checkpointing(model := tiny_model(), {"use_reentrant": True}) or model, "use_reentrant=True"),
        (lambda: Plain(2, 2), "no plugin knows"),
        (lambda: torch.nn.DataParallel(tiny_model()), "not switched on"),
        (lambda: sharded(tiny_model()), "not switched on"),
    ],
    ids=["off", "reentrant", "unknown", "off in parallel", "off and sharded"],
)
def test_what_was_not_asked_for_is_said_in_the_report_alone(make, reason, lazy, caplog):
    model = make().train()
    before = functions(model)
    with apply(model, AUTO | {"strict": True}) as run:
        assert functions(model) == before
    entry = run.report.features["checkpointing"]
    assert not entry.enabled and reason in entry.reason
    assert not caplog.records


@pytest.mark.parametrize("options", [{}, options_of(use_reentrant=True)], ids=["off", "reentrant"])
@pytest.mark.parametrize("switch", ["callback", "apply"])
def test_trainers_of_other_ways_train_on_and_nobody_is_warned(switch, options, lazy, tmp_path, caplog):
    callback = FastFTCallback(AUTO)
    trainer = make_trainer(tmp_path, tiny_model(), callbacks=[callback] if switch == "callback" else [], **options)
    with apply(trainer, AUTO) if switch == "apply" else contextlib.nullcontext() as run:
        trainer.train()
    entry = (run or callback).report.features["checkpointing"]
    assert not entry.enabled and ("use_reentrant=True" if options else "not switched on") in entry.reason
    assert not [record for record in caplog.records if record.name == "fastft"] and lazy.copies == 0


def test_a_copy_of_a_model_that_offloads_is_stock(lazy, room):
    model = checkpointed_model(offload=True)
    with apply(model, ONLY):
        copied = functions(copy.deepcopy(model))
    for function in copied.values():
        assert function.func is checkpoint and function.keywords.keys() <= {"use_reentrant"}


def test_training_twice_in_a_block_leaves_no_notes(lazy, tmp_path):
    trainer = make_trainer(tmp_path, tiny_model(), **OPTIONS)
    with apply(trainer, ONLY) as run:
        trainer.train()
        trainer.train()
    assert run.report.features["checkpointing"].enabled and not run.report.notes
    assert all(function.func is checkpoint for function in functions(trainer.model).values())


def test_data_parallel_is_declined(lazy):
    with (
        pytest.raises(FastFTError, match="one process per GPU"),
        apply(torch.nn.DataParallel(checkpointed_model()), ONLY),
    ):
        pass


def test_without_a_gpu_auto_says_so_and_on_is_an_error(caplog):
    model = checkpointed_model()
    with apply(model, AUTO) as run:
        step(model)
    entry = run.report.features["checkpointing"]
    assert not entry.enabled and "no NVIDIA GPU" in entry.reason
    assert not [record for record in caplog.records if record.name.startswith("fastft")]
    with pytest.raises(FastFTError, match="no NVIDIA GPU"), apply(model, ONLY):
        pass


def test_a_model_on_several_devices_is_left_alone(lazy, caplog):
    model = checkpointed_model()
    model.lm_head.to("meta")
    with apply(model, AUTO) as run:
        pass
    assert "on 2 devices" in run.report.features["checkpointing"].reason and not caplog.records


def test_sharded_parameters_are_an_error(lazy):
    model = sharded(checkpointed_model())
    before = functions(model)
    with pytest.raises(FastFTError, match="parameters are sharded"), apply(model, ONLY):
        pass
    assert functions(model) == before


@pytest.mark.parametrize(
    ("name", "plugin"),
    [("fsdp_plugin", object()), ("parallelism_config", object()), ("deepspeed_plugin", SimpleNamespace(zero_stage=3))],
)
def test_a_trainer_that_is_going_to_split_the_model_is_an_error(name, plugin, lazy, tmp_path):
    trainer = make_trainer(tmp_path, tiny_model(), **OPTIONS)
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(**{name: plugin}))
    with pytest.raises(FastFTError, match="split over processes"), apply(trainer, ONLY):
        pass


def test_a_failing_step_restores_everything(lazy):
    model = checkpointed_model()
    before = functions(model)
    with pytest.raises(KeyError), apply(model, ONLY):
        step(model)
        raise KeyError("mine")
    assert functions(model) == before and lazy.live == []


def test_trl_activation_offloading_stays(lazy, tmp_path):
    trainer = make_trainer(tmp_path, tiny_model(), **OPTIONS)
    trainer.args.activation_offloading = True  # as in TRL's configs; its trainers need an accelerator for it
    with pytest.raises(FastFTError, match="activation_offloading=True"), apply(trainer, ONLY):
        pass


def test_lora(lazy, room):
    peft = pytest.importorskip("peft")
    model = tiny_model()
    enable_checkpointing(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1)).train()

    def lora_step():
        torch.manual_seed(0)
        model.zero_grad()
        ids = torch.tensor([documents(1, 8, 8)[0]["input_ids"]])
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = lora_step()
    assert any("lora" in name for name in expected)
    for room.bytes, kind in ((0, "offloaded_layers"), (2**40, "kept_layers")):
        with apply(model, ONLY) as run:
            for _ in range(3):
                assert_equal(lora_step(), expected)
        assert run.report.features["checkpointing"].metrics[kind] == 3
