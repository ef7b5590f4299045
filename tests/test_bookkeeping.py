"""What a Trainer does with the whole model between two steps: the same results as torch's walks, and nothing left."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from hf_helpers import losses, make_trainer, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import TrainerCallback

from fastft_hf.bookkeeping import modules_of, parameters_of
from fastft_plugins import FastFTCallback, FastFTError, apply

ONLY = {"packing": "off", "checkpointing": "off", "moe": "off", "bookkeeping": "on"}
METHODS = ("train", "parameters", "num_parameters")


class Each(TrainerCallback):
    """Calls a function with the model at the begin of each step."""

    def __init__(self, look: Any) -> None:
        self.look = look
        self.calls = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.look(model)
        self.calls += 1


@given(st.data())
def test_walks_are_torchs(data: st.DataObject) -> None:
    """Of any modules, where some are shared, some are None, and parameters are tied."""
    modules = [nn.Module() for _ in range(data.draw(st.integers(1, 8)))]
    tied = nn.Parameter(torch.zeros(1))
    for index, module in enumerate(modules):
        for name in data.draw(st.lists(st.sampled_from("abc"), unique=True)):
            later = st.sampled_from([None, *modules[index + 1 :]])  # no circles
            module.add_module(name, data.draw(later))
        for name in data.draw(st.lists(st.sampled_from("pq"), unique=True)):
            module.register_parameter(name, data.draw(st.sampled_from([None, tied, nn.Parameter(torch.zeros(2))])))
    assert modules_of(modules[0]) == list(modules[0].modules())
    found, stock = parameters_of(modules_of(modules[0])), list(modules[0].parameters())
    assert list(map(id, found)) == list(map(id, stock))


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.0}], ids=str)
def test_a_training_is_stock_and_nothing_stays(tmp_path: Any, options: dict[str, Any]) -> None:
    def compare(model: Any) -> None:
        assert all(name in vars(model) for name in METHODS)
        kind = type(model)
        assert [*map(id, model.parameters())] == [*map(id, kind.parameters(model))]
        assert [*map(id, model.parameters(False))] == [*map(id, kind.parameters(model, False))]
        for trainable in (False, True):
            for embeddings in (False, True):
                assert model.num_parameters(trainable, embeddings) == kind.num_parameters(model, trainable, embeddings)

    model = tiny_model(tie_word_embeddings=True)
    stock = make_trainer(tmp_path, model, **options)
    stock.train()
    looks, callback = Each(compare), FastFTCallback(ONLY)
    ours = make_trainer(tmp_path, model, callbacks=[callback, looks], **options)
    ours.train()
    assert looks.calls and callback.report.features["bookkeeping"].enabled
    assert losses(ours) == losses(stock) and ours.state.total_flos == stock.state.total_flos > 0
    for (name, mine), theirs in zip(ours.model.named_parameters(), stock.model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert not vars(ours.model).keys() & set(METHODS) and not callback.report.notes


class Stubborn(nn.Dropout):
    """Keeps the mode that it has, as frozen parts of a model do, and counts how often it was asked for another."""

    asked = 0

    def train(self, mode: bool = True) -> Stubborn:
        self.asked += 1
        return self


def by_method(part: nn.Module) -> nn.Module:
    """The same for one object of a class that does not."""
    part.train = functools.partial(Stubborn.train, part)
    part.asked = 0
    return part


@pytest.mark.parametrize("make", [Stubborn, lambda: by_method(nn.Dropout())], ids=["class", "method"])
@pytest.mark.parametrize("mode", [True, False])
def test_a_part_with_its_own_train_is_asked(tmp_path: Any, make: Any, mode: bool) -> None:
    trainer = make_trainer(tmp_path, tiny_model())
    part = trainer.model.model.layers[0].mlp.extra = make()
    vars(part)["training"] = mode
    with apply(trainer, ONLY):
        for count in (1, 2):
            trainer.model.train()
            assert part.asked == count and part.training == mode
            assert all(module.training for module in trainer.model.modules() if module is not part)


def test_the_mode_reaches_modules_that_are_not_in_it(tmp_path: Any) -> None:
    trainer = make_trainer(tmp_path, tiny_model())
    with apply(trainer, ONLY):
        for mode in (True, False, True):
            assert trainer.model.train(mode) is trainer.model
            assert {module.training for module in trainer.model.modules()} == {mode}
        trainer.model.model.layers[1].self_attn.eval()
        trainer.model.train()
        assert all(module.training for module in trainer.model.modules())
        with pytest.raises(ValueError, match="boolean"):
            trainer.model.train(1)


def test_what_is_put_in_and_taken_out_is_seen(tmp_path: Any) -> None:
    trainer = make_trainer(tmp_path, tiny_model())
    model = trainer.model
    with apply(trainer, ONLY):
        before = model.num_parameters()
        model.model.extra = nn.Linear(3, 5)
        assert model.num_parameters() == before + 20
        assert any(each is model.model.extra.bias for each in model.parameters())
        model.model.extra.bias = None
        assert model.num_parameters() == before + 15
        model.model.extra.weight.grad = torch.ones(5, 3)
        model.zero_grad()
        assert model.model.extra.weight.grad is None


def test_a_class_with_its_own_walk_is_asked(tmp_path: Any) -> None:
    class Hidden(nn.Linear):
        def named_modules(self, *args: Any, **kwargs: Any) -> Any:
            return iter(())

    trainer = make_trainer(tmp_path, tiny_model())
    with apply(trainer, ONLY):
        trainer.model.extra = Hidden(2, 2)
        stock = list(type(trainer.model).parameters(trainer.model))
        assert list(map(id, trainer.model.parameters())) == list(map(id, stock))
        assert not any(each is trainer.model.extra.weight for each in stock)
    with apply(trainer, {"bookkeeping": "auto"}) as run:
        entry = run.report.features["bookkeeping"]
        assert not entry.enabled and "its own way" in entry.reason


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_stock_and_on_its_own(tmp_path: Any, copied: Any) -> None:
    trainer = make_trainer(tmp_path, tiny_model())
    with apply(trainer, ONLY):
        trainer.model.train()
        other = copied(trainer.model)
        other.eval()
        assert trainer.model.training and not any(module.training for module in other.modules())
        mine = set(map(id, trainer.model.parameters()))
        assert not mine & set(map(id, other.parameters()))
        assert other.num_parameters() == trainer.model.num_parameters()
    assert other.train().training and not trainer.model.eval().training


def test_without_a_trainer_there_is_nothing_to_win(caplog: Any) -> None:
    with apply(tiny_model(), {"packing": "off"}) as run:
        entry = run.report.features["bookkeeping"]
        assert not entry.enabled and "this run has none" in entry.reason
    assert not caplog.records
    with pytest.raises(FastFTError, match="this run has none"), apply(tiny_model(), ONLY):
        pass
