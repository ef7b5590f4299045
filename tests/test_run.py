"""A run asks features and adapters, keeps or refuses, and puts everything back; and how a kernel is chosen."""

from __future__ import annotations

import gc
import logging
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastft_plugins import FastFTConfigError, FastFTError, apply, hookimpl
from fastft_plugins.errors import Declined
from fastft_plugins.kernels import dispatch
from fastft_plugins.kernels.dispatch import Kernel, choices, choose
from fastft_plugins.manager import PluginManager
from fastft_plugins.packing import PackedMetadata, packed_attention
from fastft_plugins.run import Run, Target, active_run


def fast_forward(x):
    return x


class Swapped:
    """A feature that replaces the model's forward, then maybe fails."""

    name = "packing"

    def __init__(self, error=None, at_stop=None):
        self.error, self.at_stop, self.events = error, at_stop, []

    def start(self, run):
        self.events.append("start")
        run.ledger.setattr(run.model, "forward", fast_forward)
        if self.error is not None:
            raise self.error
        return "the forward is swapped"

    def stop(self, run):
        self.events.append("stop")
        run.report.features[self.name].metrics["steps"] = 3
        if self.at_stop is not None:
            raise self.at_stop


class Features:
    """A plugin that brings features."""

    def __init__(self, *features):
        self.features = features

    @hookimpl
    def fastft_features(self):
        return self.features


class Adapter:
    """A plugin that serves the packing feature's seam by ``inject``, and knows trainers that have a ``.net``."""

    def __init__(self, inject):
        self.inject = inject

    @hookimpl
    def fastft_matches(self, target):
        return Target(target.net, target, framework="mini") if hasattr(target, "net") else None

    @hookimpl
    def fastft_inject_metadata(self, run, wrap_collator):
        return self.inject(run)


@pytest.fixture
def model():
    """A model that must be as it was when the test ends."""
    model = nn.Linear(2, 2)
    before = dict(vars(model))
    yield model
    assert vars(model) == before
    assert active_run(model) is None


@pytest.fixture
def install(plugin_manager: PluginManager, monkeypatch):
    """Replace all plugins by those given (the built-in one stays registered under its name)."""
    for status in plugin_manager.statuses:
        if status.state == "loaded" and status.name != "built-in":
            plugin_manager.unregister(status.name)
    monkeypatch.setattr(dispatch, "_choices", {})

    def register(*plugins):
        for plugin in plugins:
            plugin_manager.register(plugin, f"test-{type(plugin).__name__.lower()}-{id(plugin)}")
        return plugin_manager

    return register


@pytest.fixture
def only(install, plugin_manager):
    """Replace all plugins, the built-in one included."""
    plugin_manager.unregister("built-in")
    return install


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# A run that works


def test_a_feature_is_on_inside_the_block_and_gone_after_it(only, model):
    only(Features(Swapped()))
    with apply(model) as run:
        assert model.forward is fast_forward and active_run(model) is run
        packing = run.report.features["packing"]
        assert packing.enabled and packing.reason == "the forward is swapped"
        assert run.report.state == "running"
    assert run.report.state == "finished"
    assert packing.metrics == {"steps": 3}


def test_start_and_stop_may_be_repeated(only, model):
    feature = Swapped()
    only(Features(feature))
    run = Run(Target(model))
    run.start().start()
    run.stop()
    run.stop()
    assert feature.events == ["start", "stop"]


def test_a_trainer_is_found_by_the_plugin_that_matches_it(only, model):
    only(Features(Swapped()), Adapter(lambda run: None))
    with apply(SimpleNamespace(net=model)) as run:
        assert run.target.framework == run.report.framework == "mini"
        assert model.forward is fast_forward


def test_a_plugin_may_match_with_true(only, model):
    class Matcher:
        @hookimpl
        def fastft_matches(self, target):
            return hasattr(target, "model") or None

    only(Matcher())
    trainer = SimpleNamespace(model=model)
    with apply(trainer) as run:
        assert run.model is model and run.target.trainer is trainer


def test_a_plugin_that_crashes_at_matching_does_not_hide_the_others(only, model):
    class Crash:
        @hookimpl
        def fastft_matches(self, target):
            raise RuntimeError("no luck")

    only(Adapter(lambda run: None), Crash())
    with apply(SimpleNamespace(net=model)) as run:
        assert run.target.framework == "mini"


def test_a_feature_that_is_off_is_not_asked(only, model, caplog):
    feature = Swapped()
    only(Features(feature))
    with apply(model, {"packing": "off"}) as run:
        assert run.report.features["packing"].reason == "switched off in the config"
    assert feature.events == [] and warnings_in(caplog) == []


# Declined


@pytest.mark.parametrize("mode", ["auto", True])
def test_a_feature_nobody_brings(only, model, mode, caplog):
    only()
    if mode is True:
        with pytest.raises(FastFTError, match="moe='on', but moe cannot be on here: not part of this version"):
            apply(model, {"moe": mode}).__enter__()
    else:
        with apply(model, {"moe": mode}) as run:
            assert run.report.features["moe"].reason == "not part of this version"
    assert warnings_in(caplog) == []


def test_declined_means_stock_with_one_warning_and_the_reason(only, model, caplog):
    only(Features(Swapped(Declined("the moon is full"))))
    with apply(model) as run:
        assert "forward" not in vars(model)  # what had been changed before declining is undone at once
        packing = run.report.features["packing"]
        assert not packing.enabled and packing.reason == "the moon is full"
    assert packing.metrics == {}
    assert warnings_in(caplog) == ["fastft: packing stays off, training is stock there: the moon is full"]


@pytest.mark.parametrize(
    ("config", "asked"), [({"packing": "on"}, "packing='on'"), ({"strict": True}, "strict=True")], ids=["on", "strict"]
)
def test_declined_raises_before_training_when_asked_for(only, model, config, asked):
    only(Features(Swapped(Declined("the moon is full"))))
    context = apply(model, config)
    with pytest.raises(FastFTError, match=f"{asked}, but packing cannot be on here: the moon is full"):
        context.__enter__()
    assert context._run.report.state == "stopped by FastFTError"
    assert "forward" not in vars(model)


def test_a_later_refusal_undoes_the_features_that_were_on(only, model):
    declining = SimpleNamespace(name="moe", stop=None)

    def start(run):
        assert model.forward is fast_forward
        raise Declined("no experts")

    declining.start = start
    feature = Swapped()
    only(Features(feature, declining))
    with pytest.raises(FastFTError, match="no experts"), apply(model, {"moe": "on"}):
        pytest.fail("training began")
    assert feature.events == ["start", "stop"]


def test_a_feature_found_impossible_during_training_is_reported(only, model, caplog):
    only(Features(Swapped()))
    with apply(model) as run:
        run.switch_off("packing", Declined("too late"))
        packing = run.report.features["packing"]
        assert (packing.enabled, packing.reason) == (False, "too late")
    assert warnings_in(caplog) == ["fastft: packing stays off, training is stock there: too late"]


# Seams, through the built-in packing feature


def test_a_crash_in_an_adapter_becomes_the_reason(install, model, caplog):
    def crash(run):
        run.ledger.setattr(run.model, "forward", fast_forward)
        raise RuntimeError("no luck")

    install(Adapter(crash))
    with apply(model) as run:
        assert "forward" not in vars(model)
        reason = run.report.features["packing"].reason
    assert reason.endswith("failed: RuntimeError: no luck") and "test-adapter" in reason
    assert len(warnings_in(caplog)) == 1


def test_what_one_adapter_did_is_undone_when_another_declines(install, model):
    def change(run):
        run.ledger.setattr(run.model, "forward", fast_forward)
        return "changed the forward"

    def decline(run):
        assert run.model.forward is fast_forward
        raise Declined("not with me")

    install(Adapter(decline), Adapter(change))
    with apply(model) as run:
        assert "forward" not in vars(model)
        assert run.report.features["packing"].reason == "not with me"


def test_no_adapter_that_serves_the_target_is_a_reason(install, model):
    install(Adapter(lambda run: None))
    with apply(model) as run:
        assert run.report.features["packing"].reason == "no plugin knows how to serve this torch target (Linear)"


def test_the_reason_names_the_plugins_that_were_left_out(monkeypatch, model):
    monkeypatch.setenv("FASTFT_PLUGINS", "-hf")
    manager = PluginManager()
    monkeypatch.setattr("fastft_plugins.run.get_plugin_manager", lambda: manager)
    with apply(model) as run:
        assert "FASTFT_PLUGINS leaves out: hf" in run.report.features["packing"].reason


def test_what_adapters_changed_is_reported(install, model):
    install(Adapter(lambda run: "the loader"), Adapter(lambda run: "the model"))
    with apply(model) as run:
        assert run.report.features["packing"].enabled
        assert sorted(run.report.features["packing"].changes) == ["the loader", "the model"]


def test_a_plugin_that_crashes_when_asked_for_features_is_noted(only, model):
    class Crash:
        @hookimpl
        def fastft_features(self):
            raise RuntimeError("no luck")

    only(Crash(), Features(Swapped()))
    with apply(model) as run:
        assert run.report.features["packing"].enabled
        (note,) = run.report.notes
    assert "failed to offer features: no luck" in note


# Nested and repeated


def test_a_nested_block_joins_the_outer_run(only, model):
    feature = Swapped()
    only(Features(feature))
    with apply(model) as outer:
        with apply(model, {"packing": "off"}) as inner:
            assert inner is outer
        assert model.forward is fast_forward and outer.active
    assert feature.events == ["start", "stop"]


def test_an_exception_that_leaves_a_nested_block_leaves_the_outer_run_on(only, model):
    only(Features(Swapped()))
    with apply(model) as outer:
        with pytest.raises(RuntimeError), apply(model):
            raise RuntimeError
        assert model.forward is fast_forward
    assert outer.report.state == "finished"


def test_two_models_have_two_runs(only, model):
    only(Features(Swapped()))
    other = nn.Linear(2, 2)
    with apply(model) as one, apply(other) as two:
        assert one is not two
    assert "forward" not in vars(other)


def test_a_second_run_on_a_model_is_refused(only, model):
    only(Features(Swapped()))
    with apply(model) as run:
        with pytest.raises(FastFTError, match="already active on this Linear; stop it first"):
            Run(Target(model)).start()
        assert active_run(model) is run and model.forward is fast_forward


def test_a_model_can_be_trained_again(only, model):
    only(Features(Swapped()))
    for _ in range(2):
        with apply(model) as run:
            assert model.forward is fast_forward
        assert run.report.state == "finished"


# Whatever happens inside


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, torch.cuda.OutOfMemoryError])
def test_an_error_inside_the_block_restores_and_goes_on(only, model, error):
    only(Features(Swapped()))
    with pytest.raises(error), apply(model) as run:
        raise error("inside")
    assert "forward" not in vars(model)
    assert run.report.state == f"stopped by {error.__name__}"


def test_an_interrupt_while_a_feature_starts_restores(only, model):
    only(Features(Swapped(KeyboardInterrupt("starting"))))
    with pytest.raises(KeyboardInterrupt, match="starting"), apply(model):
        pytest.fail("training began")
    assert "forward" not in vars(model)


def test_a_feature_that_crashes_at_its_start_stays_off_with_the_reason(only, model):
    only(Features(Swapped(RuntimeError("starting"))))
    with apply(model) as run:
        assert "forward" not in vars(model)
    assert not run.report.features["packing"].enabled
    assert "RuntimeError: starting" in run.report.features["packing"].reason


def test_an_error_while_a_feature_stops_still_restores(only):
    model = nn.Linear(2, 2)
    only(Features(Swapped(at_stop=RuntimeError("stopping"))))
    try:
        with apply(model) as run:
            pass
    except RuntimeError:
        pass  # whether it is reported or raised, nothing may stay behind
    assert "forward" not in vars(model)
    assert active_run(model) is None and run.report.state != "running"


def test_what_someone_else_changed_is_in_the_report(only):
    model = nn.Linear(2, 2)
    only(Features(Swapped()))
    with apply(model) as run:
        model.forward = theirs = nn.Identity().forward
    assert model.forward is theirs
    assert run.report.notes == ["Linear.forward was changed by someone else during the run and is left as it is"]


def test_a_run_that_is_forgotten_restores(only, model):
    only(Features(Swapped()))
    run = Run(Target(model)).start()
    forgotten = weakref.ref(run)
    del run
    gc.collect()
    assert forgotten() is None and "forward" not in vars(model)


# Bad input


@pytest.mark.parametrize("target", [None, 3, "a model", object(), nn.Linear])
def test_an_unsupported_target_is_refused_with_what_is_allowed(only, target):
    only()
    with pytest.raises(FastFTConfigError) as caught:
        apply(target)
    message = str(caught.value)
    assert f"{type(target).__module__}.{type(target).__name__} is not supported" in message
    assert all(word in message for word in ("target", "transformers", "TRL", "nn.Module", "`fastft plugins`"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"packing": "onn"}, ("packing", "'onn'", "'auto'", "'off'", "Did you mean 'on'?")),
        ({"pakcing": "on"}, ("'pakcing'", "'checkpointing'", "Did you mean 'packing'?")),
        ({"strict": "yes"}, ("strict", "'yes'", "True, False")),
        ("packing", ("mapping", "'packing'")),
    ],
)
def test_a_bad_config_is_refused_before_anything_is_touched(only, model, config, words):
    feature = Swapped()
    only(Features(feature))
    with pytest.raises(FastFTConfigError) as caught:
        apply(model, config)
    assert all(word in str(caught.value) for word in words)
    assert feature.events == []


# The choice of a kernel


class Kernels:
    """A plugin that brings kernels for one operation."""

    def __init__(self, *kernels, op="attention"):
        self.kernels, self.op = kernels, op

    @hookimpl
    def fastft_kernels(self, op):
        return self.kernels if op == self.op else None


def serves(call):
    return None


def zeros(q_THD, *others):
    return torch.zeros_like(q_THD)


def attend():
    q = torch.ones(3, 1, 8)
    return packed_attention(q, q, q, PackedMetadata.from_lengths([3]))


def test_a_third_party_kernel_of_the_best_rank_is_chosen_and_runs(install):
    install(Kernels(Kernel("theirs", -1, serves, zeros)))
    assert not attend().any()
    assert choices("attention") == ["theirs"]


def test_a_third_party_kernel_between_ours_is_chosen_after_the_better_one_rejects(install):
    install(Kernels(Kernel("theirs", 25, serves, zeros)))
    assert not attend().any()
    (choice,) = choices("attention")
    assert choice.startswith("theirs (not flash varlen: needs an NVIDIA GPU")


def test_a_kernel_of_a_worse_rank_is_not_asked(install):
    def never(call):
        pytest.fail("asked")

    install(Kernels(Kernel("theirs", 75, never, zeros)))
    assert attend().all()
    (choice,) = choices("attention")
    assert choice.startswith("SDPA per document")


def test_the_reasons_of_every_better_kernel_are_in_the_choice(only):
    only(
        Kernels(
            Kernel("third", 3, serves, zeros),
            Kernel("first", 1, lambda call: f"cannot do {call}", zeros),
            Kernel("second", 2, lambda call: "asleep", zeros),
        )
    )
    choice = choose("attention", "this")
    assert choice.kernel.name == "third"
    assert choice.rejected == ("not first: cannot do this", "not second: asleep")
    assert str(choice) == "third (not first: cannot do this; not second: asleep)"


def test_a_choice_is_made_once_per_call_and_again_when_a_plugin_comes(only):
    asked = []

    def rejects(call):
        asked.append(call)

    manager = only(Kernels(Kernel("old", 5, rejects, zeros)))
    assert [choose("attention", "a").kernel.name for _ in range(3)] == ["old"] * 3
    assert choose("attention", "b").kernel.name == "old" and asked == ["a", "b"]
    manager.register(Kernels(Kernel("new", 4, serves, zeros)), "new")
    assert choose("attention", "a").kernel.name == "new"


def test_kernels_of_other_operations_are_not_considered(only):
    only(Kernels(Kernel("theirs", 0, serves, zeros), op="activation"))
    with pytest.raises(FastFTError, match="no kernel can run attention for a"):
        choose("attention", "a")
    assert choose("activation", "a").kernel.name == "theirs"


def test_no_kernel_left_is_an_error_with_all_reasons(only):
    only(Kernels(*(Kernel(name, 0, lambda call, name=name: f"{name} is asleep", zeros) for name in ("one", "two"))))
    with pytest.raises(FastFTError, match="not one: one is asleep; not two: two is asleep"):
        choose("attention", "a")


def test_a_plugin_that_fails_to_offer_kernels_is_skipped_with_a_warning(install, caplog):
    class Crash:
        @hookimpl
        def fastft_kernels(self, op):
            raise RuntimeError("no luck")

    install(Crash())
    assert attend().all()
    assert any("failed to offer kernels for attention: no luck" in message for message in warnings_in(caplog))


def test_a_kernel_whose_test_crashes_is_skipped(install):
    def crash(call):
        raise RuntimeError("no luck")

    install(Kernels(Kernel("theirs", -1, crash, zeros)))
    assert attend().all()
    assert "no luck" in choices("attention")[0]
