"""The experts of a transformers model during a run: parity, what stays stock, LoRA, and that nothing is left behind."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from hf_helpers import documents, grad_norms, losses, make_trainer, tiny_model
from moe_helpers import tiny_causal_lm
from torch import nn
from torch.testing import assert_close
from transformers import TrainerCallback
from transformers.integrations.moe import ExpertsInterface

from fastft_hf import experts
from fastft_plugins import FastFTCallback, FastFTError, apply
from fastft_plugins.moe import feature

ON = {"moe": "on", "packing": "off"}
REGISTRY = dict(ExpertsInterface._global_mapping)


def experts_of(model):
    return [module for module in model.modules() if experts._is_experts(module)]


def snapshot(model):
    """The attributes of every module, by identity where a run could have changed them."""
    return {
        (name, key): id(value) if key in ("config", "forward") else type(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in ("_is_accelerate_prepared", "_output_capturing_hooks_installed")  # stock runs set these
    }


def loss_and_gradients(model, ids):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


@pytest.fixture
def looks_like_a_gpu(monkeypatch):
    """Where there is something to win, "auto" switches on."""
    monkeypatch.setattr(feature, "triton_rejects", lambda call: None)


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert dict(ExpertsInterface._global_mapping) == REGISTRY and not experts._active


# ------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Qwen3Moe", {}),
        ("GptOss", {}),
        ("Qwen3Moe", {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}),
        ("Qwen3Moe", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}),
        ("GptOss", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    ],
)
def test_training_is_stock_training(tmp_path, family, options):
    callback = FastFTCallback(ON)
    stock = make_trainer(tmp_path, tiny_causal_lm(family), **options)
    ours = make_trainer(tmp_path, tiny_causal_lm(family), callbacks=[callback], **options)
    for trainer in (stock, ours):
        trainer.train()
    assert len(losses(ours)) == 5 and callback.report.features["moe"].enabled
    assert_close(losses(ours), losses(stock), rtol=5e-6, atol=5e-6)
    assert_close(grad_norms(ours), grad_norms(stock), rtol=5e-5, atol=1e-6)
    assert_close(ours.model.state_dict(), stock.model.state_dict(), rtol=0, atol=5e-6)


def test_packing_and_experts_together(tmp_path):
    callback, tiny = FastFTCallback({"moe": "on", "packing": "on"}), tiny_causal_lm(output_router_logits=False)
    stock, ours = make_trainer(tmp_path, tiny), make_trainer(tmp_path, tiny, callbacks=[callback])
    for trainer in (stock, ours):
        trainer.train()
    assert callback.report.features["packing"].metrics["packed_batches"] == 5
    assert_close(losses(ours), losses(stock), rtol=5e-6, atol=5e-6)
    assert_close(ours.model.state_dict(), stock.model.state_dict(), rtol=0, atol=5e-6)


def test_evaluation_inside_a_run_is_bitwise_stock(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "trainer_options": {"eval_dataset": documents(8, seed=3)}}
    seen = []
    for callbacks in ([], [FastFTCallback(ON)]):
        trainer = make_trainer(tmp_path, tiny_causal_lm(), learning_rate=0.0, callbacks=callbacks, **options)
        trainer.train()
        seen.append([entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry])
    assert seen[0] == seen[1] and len(seen[0]) == 3


def test_only_a_forward_that_trains_is_served():
    tiny, ids, calls = tiny_causal_lm(), torch.randint(97, (2, 7)), []
    with apply(tiny, ON):
        for module in experts_of(tiny):
            experts._active[module] = lambda module, x, *args: calls.append(1) or x
        with torch.no_grad():
            tiny.eval()(input_ids=ids)
            assert not calls
            tiny.train()(input_ids=ids)  # as reentrant checkpointing does
        assert len(calls) == 2


def test_switched_off_is_bitwise_stock(tmp_path):
    runs = []
    for callbacks in ([], [FastFTCallback({"moe": "off", "packing": "off"})]):
        trainer = make_trainer(tmp_path, tiny_causal_lm(), callbacks=callbacks)
        trainer.train()
        runs.append((losses(trainer), dict(trainer.model.state_dict())))
    assert_close(runs[1], runs[0], rtol=0, atol=0)


def test_a_call_with_keyword_arguments_is_served_by_stock():
    module = experts_of(tiny := tiny_causal_lm())[0]
    inputs = {"top_k_index": torch.tensor([[0, 1]]), "top_k_weights": torch.ones(1, 2)}
    expected = module(torch.ones(1, 32), **inputs)
    with apply(tiny, ON):
        assert torch.equal(module(torch.ones(1, 32), **inputs), expected)


# ---------------------------------------------------------------------------------- what is left: nothing


class FailAt(TrainerCallback):
    def __init__(self, error):
        self.error = error

    def on_step_end(self, args, state, control, **kwargs):
        if self.error is not None and state.global_step >= 2:
            raise self.error


@pytest.mark.parametrize("error", [None, RuntimeError("boom"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_run_leaves_nothing_however_it_ends(tmp_path, error, lora):
    tiny = lora_model() if lora else tiny_causal_lm()
    trainer = make_trainer(tmp_path, tiny, callbacks=[FastFTCallback(ON), FailAt(error)], max_steps=3)
    before = snapshot(trainer.model)
    if error is None:
        trainer.train()
    else:
        with pytest.raises(type(error)):
            trainer.train()
    assert snapshot(trainer.model) == before


def test_an_interrupted_apply_leaves_nothing():
    tiny, ids = lora_model(), torch.randint(97, (2, 7))
    before = snapshot(tiny)
    with pytest.raises(KeyboardInterrupt), apply(tiny, ON):
        tiny(input_ids=ids)
        assert snapshot(tiny) != before
        raise KeyboardInterrupt
    assert snapshot(tiny) == before


def test_apply_and_callback_together_change_the_model_once(tmp_path):
    callback = FastFTCallback(ON)
    trainer = make_trainer(tmp_path, tiny_causal_lm(), callbacks=[callback])
    stock = [module.config for module in experts_of(trainer.model)]
    with apply(trainer, ON) as run:
        trainer.train()
        assert [module.config._fastft_stock_config for module in experts_of(trainer.model)] == stock
    assert callback.report is run.report


def test_two_models_at_once_and_the_first_ends_first():
    first, second, ids = tiny_causal_lm(), tiny_causal_lm("GptOss"), torch.randint(97, (2, 7))
    stock = loss_and_gradients(second, ids)
    outer = apply(first, ON)
    outer.__enter__()
    with apply(second, ON):
        outer.__exit__(None, None, None)
        assert_close(loss_and_gradients(second, ids), stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inner_first", [True, False])
def test_a_second_run_through_another_root_declines(inner_first):
    model, ids = tiny_causal_lm(), torch.randint(97, (2, 7))
    roots = [model, nn.Sequential(model)] if inner_first else [nn.Sequential(model), model]
    stock = loss_and_gradients(model, ids)
    with apply(roots[0], ON):
        with pytest.raises(FastFTError, match="another run, on a module around the model or inside it"):
            apply(roots[1], ON).__enter__()
        assert_close(loss_and_gradients(model, ids), stock)


def test_a_retry_after_out_of_memory_starts_afresh(tmp_path):
    failures = []

    class RunsOutOnce(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if not failures:
                failures.append(state.global_step)
                raise RuntimeError("CUDA out of memory.")

    callback = FastFTCallback(ON)
    ours = make_trainer(
        tmp_path, tiny_causal_lm(), callbacks=[callback, RunsOutOnce()], auto_find_batch_size=True, max_steps=2
    )
    ours.train()
    assert failures and callback.report.features["moe"].enabled and len(losses(ours)) == 2


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_made_during_a_run_is_stock_and_outlives_it(copied, lora):
    make, ids = lora_model if lora else tiny_causal_lm, torch.randint(97, (2, 7))
    stock, tiny = loss_and_gradients(make(), ids), make()
    with apply(tiny, ON):
        other = copied(tiny)
        inside = loss_and_gradients(other, ids)
    assert_close(inside, stock, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.zero_()
    del tiny
    assert_close(loss_and_gradients(other, ids), stock, rtol=0, atol=0)
    assert len({id(module.config) for module in experts_of(other)}) == 1


# -------------------------------------------------------------------------------------------- what declines


def test_auto_without_a_gpu_stays_off_quietly(caplog):
    with (
        caplog.at_level(logging.INFO, logger="fastft"),
        apply(tiny_causal_lm(), {"packing": "off", "strict": True}) as run,
    ):
        pass
    moe = run.report.features["moe"]
    assert not moe.enabled and "nothing to win" in moe.reason and "GPU" in moe.reason
    assert not caplog.records


def test_a_dense_model_has_no_experts(looks_like_a_gpu, caplog):
    with caplog.at_level(logging.INFO, logger="fastft"), apply(tiny_model(), {"packing": "off", "strict": True}) as run:
        pass
    assert "no experts" in run.report.features["moe"].reason and not caplog.records
    with pytest.raises(FastFTError, match="no experts"):
        apply(tiny_model(), ON).__enter__()


def name_another_implementation(module):
    module.config._experts_implementation_internal = "deepgemm"


def store_as_fp8(module):
    module.down_proj = nn.Parameter(module.down_proj.data.to(torch.float8_e4m3fn), requires_grad=False)


def split_by_expert(module):
    del module.down_proj
    module.down_proj = nn.ParameterList(torch.zeros(32, 24) for _ in range(4))


def learn_the_gate(module):
    module.act_fn.slope = nn.Parameter(torch.ones(()))


CHANGES = [
    (name_another_implementation, "'deepgemm' is kept"),
    (store_as_fp8, "float8_e4m3fn"),
    (split_by_expert, "not one weight"),
    (learn_the_gate, "act_fn.slope"),
]


@pytest.mark.parametrize(("change", "reason"), CHANGES)
def test_what_cannot_be_served_declines_with_the_reason(change, reason, looks_like_a_gpu, caplog):
    tiny = tiny_causal_lm()
    for module in experts_of(tiny):
        change(module)
    before = snapshot(tiny)
    with apply(tiny, {"packing": "off"}) as run:
        assert snapshot(tiny) == before
    assert reason in run.report.features["moe"].reason
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    with pytest.raises(FastFTError, match=reason):
        apply(tiny, ON).__enter__()


@pytest.mark.parametrize("wrapped", [False, True])
def test_data_parallel_declines(tmp_path, wrapped):
    """Its copies of a module would find the functions, and with them the weights, of the first GPU's."""
    target = nn.DataParallel(tiny_causal_lm()) if wrapped else make_trainer(tmp_path, tiny_causal_lm())
    if not wrapped:
        target.args._n_gpu = 2
    with pytest.raises(FastFTError, match="one process per GPU"):
        apply(target, ON).__enter__()


@pytest.mark.parametrize(("change", "reason"), CHANGES[1:])
def test_one_layer_that_cannot_be_served_stays_stock_alone(change, reason):
    tiny = tiny_causal_lm()
    served, kept = experts_of(tiny)
    change(kept)
    with apply(tiny, ON) as run:
        assert kept.config is tiny.config and served.config is not tiny.config
    assert any("1 layers" in one and reason in one for one in run.report.features["moe"].changes)


# ---------------------------------------------------------------------------------------------------- LoRA


def lora_model(family="Qwen3Moe", targets=("gate_up_proj", "down_proj"), dtype=torch.float32, adapters=1, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_parameters=[f"mlp.experts.{name}" for name in targets], r=3, lora_alpha=5, target_modules=[], **options
    )
    adapted = peft.get_peft_model(tiny_causal_lm(family, dtype), config)
    if adapters > 1:
        adapted.add_adapter("second", config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:  # lora_B is zero at first, which would hide a wrong gradient of lora_A
            nn.init.normal_(parameter, std=0.3)
    return adapted.train()


def compare_lora(adapted, monkeypatch, merges):
    """Hold a run to PEFT's own result, and see whether PEFT made the sum of a weight and its update."""
    ids, made = torch.randint(97, (2, 7)), []
    stock = loss_and_gradients(adapted, ids)
    register = nn.utils.parametrize.register_parametrization
    monkeypatch.setattr(
        nn.utils.parametrize,
        "register_parametrization",
        lambda *args, **kwargs: made.append(1) or register(*args, **kwargs),
    )
    with apply(adapted, ON):
        ours = loss_and_gradients(adapted, ids)
    assert ours.keys() == stock.keys()
    assert_close(ours, stock, rtol=1e-5, atol=1e-7)
    assert bool(made) == merges
    return ours


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", [["gate_up_proj"], ["down_proj"], ["gate_up_proj", "down_proj"]], ids="+".join)
@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_lora_on_the_experts_is_pefts(family, targets, rslora, monkeypatch):
    grads = compare_lora(lora_model(family, targets, torch.float64, use_rslora=rslora), monkeypatch, merges=False)
    assert sum("lora_" in name for name in grads) == 2 * 2 * len(targets)


def test_lora_beside_trained_experts(monkeypatch):
    adapted = lora_model("GptOss", dtype=torch.float64)
    for module in experts_of(adapted):
        module.requires_grad_(True)
    assert any("down_proj_bias" in name for name in compare_lora(adapted, monkeypatch, merges=False))


def two_active(adapted):
    adapted.base_model.set_adapter(["default", "second"])


def the_second_active(adapted):
    adapted.set_adapter("second")


def merged(adapted):
    adapted.merge_adapter()


def disabled(adapted):
    adapted.base_model.disable_adapter_layers()


def hooked(adapted):
    for module in experts_of(adapted):
        module.register_forward_hook(lambda module, args, out: 2 * out)


def hooked_backward(adapted):
    last = experts_of(adapted)[-1]  # the first one's input wants no gradient
    last.register_full_backward_hook(lambda module, grads, douts: (2 * grads[0], *grads[1:]))


@pytest.mark.parametrize(
    ("change", "merges"),
    [
        (two_active, True),
        (the_second_active, False),
        (merged, False),
        (disabled, False),
        (hooked, True),
        (hooked_backward, True),
    ],
)
def test_lora_in_its_other_states_is_pefts(change, merges, monkeypatch):
    adapted = lora_model(dtype=torch.float64, adapters=2)
    change(adapted)
    for parameter in adapted.base_model.model.lm_head.parameters():
        parameter.requires_grad_(True)  # something to train where no adapter is
    compare_lora(adapted, monkeypatch, merges)


def test_adapters_may_be_disabled_for_a_while_during_a_run():
    adapted, ids = lora_model(), torch.randint(97, (2, 7))
    with adapted.disable_adapter():
        reference = adapted(input_ids=ids).logits
    with apply(adapted, ON):
        with adapted.disable_adapter():
            assert_close(adapted(input_ids=ids).logits, reference, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(adapted(input_ids=ids).logits, reference)


def test_lora_training_is_stock_training(tmp_path):
    adapted, runs = lora_model(), []
    for callbacks in ([], [FastFTCallback(ON)]):
        trainer = make_trainer(tmp_path, adapted, callbacks=callbacks)
        trainer.train()
        runs.append((losses(trainer), dict(trainer.model.state_dict())))
    assert_close(runs[1], runs[0], rtol=1e-5, atol=5e-6)
