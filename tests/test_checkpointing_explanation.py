"""What a report says of a run that ended without a plan: what is known, and no more."""

from __future__ import annotations

import pytest
import test_checkpointing_hf
import torch
from test_checkpointing_hf import AUTO, checkpointed_model, step
from transformers.modeling_layers import GradientCheckpointingLayer

from fastft_plugins import apply

lazy, room = test_checkpointing_hf.lazy, test_checkpointing_hf.room  # fixtures


def nothing(model):
    pass


def without_gradients(model):
    with torch.no_grad():
        model(input_ids=torch.ones(1, 5, dtype=torch.long))


def compiled(model):
    for layer in model.model.layers:
        layer.compile(backend="eager")
    for _ in range(4):
        step(model)


def without_a_backward(model):
    step(model)
    model(input_ids=torch.ones(2, 9, dtype=torch.long))


def two_steps(model):
    step(model)
    step(model)


def off_after_one_step(model):
    step(model)
    model.gradient_checkpointing_disable()
    for _ in range(3):
        step(model)


def longer_each_time(model):
    for length in (9, 12, 16, 21):
        ids = torch.ones(2, length, dtype=torch.long)
        model(input_ids=ids, labels=ids).loss.backward()


checkpoints_inside = pytest.mark.skipif(
    "__call__" in vars(GradientCheckpointingLayer),
    reason="transformers before 5.23 checkpoints around what is compiled",
)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("train", "words"),
    [
        (nothing, "no call of a layer was one to plan for"),
        (without_gradients, "no call of a layer was one to plan for"),
        pytest.param(compiled, "no call of a layer was one to plan for", marks=checkpoints_inside),
        (without_a_backward, "has not come through all layers"),
        (two_steps, "too few forwards came"),
        (off_after_one_step, "too few forwards came"),
        (longer_each_time, "each had much longer rows"),
    ],
)
def test_a_report_without_a_plan_says_what_is_known(train, words, lazy):
    model = checkpointed_model()
    with apply(model, AUTO) as run:
        train(model)
    assert words in run.report.features["checkpointing"].changes[1], run.report
