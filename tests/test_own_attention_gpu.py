"""What only a GPU can show of the user's own attention: compiled flex_attention, its backward, and FlashAttention."""

from __future__ import annotations

import pytest
from gpu_helpers import host_syncs_are_errors, relative_error
from test_gpu import on_gpu, padded_batch, small_model
from transformers.utils import import_utils

from fastft_plugins import apply
from fastft_plugins.packing import PaddingFreeCollator

pytestmark = pytest.mark.gpu

IMPLEMENTATIONS = [
    "flex_attention",
    *(
        pytest.param(
            f"flash_attention_{version}",
            marks=pytest.mark.skipif(
                not getattr(import_utils, f"is_flash_attn_{version}_available", lambda: False)(),
                reason=f"FlashAttention {version} is not installed",
            ),
        )
        for version in (2, 3, 4)
    ),
]


def packed_batch(seed=0):
    return PaddingFreeCollator(lambda batch: batch)(padded_batch(seed)).to("cuda")


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.item(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("family", "options"), [("llama", {}), ("mistral", {"sliding_window": 64})])
def test_packed_training_is_as_accurate_as_stocks(implementation, family, options):
    """Against the same model in fp32 with sdpa: packed is no further away than padded, both with this attention."""
    model = small_model(family, **options)
    model.set_attn_implementation(implementation)
    padded = on_gpu(padded_batch())
    stock_loss, stock = loss_and_gradients(model, padded)
    with apply(model, {"packing": "on"}) as run:
        loss, gradients = loss_and_gradients(model, packed_batch())
    assert any(implementation in change for change in run.report.features["packing"].changes)
    model.set_attn_implementation("sdpa")
    true_loss, truth = loss_and_gradients(model.float(), padded)
    assert abs(loss - true_loss) <= abs(stock_loss - true_loss) + 2e-3 * true_loss
    for mine, theirs, true in zip(gradients, stock, truth, strict=True):
        assert relative_error(mine, true) <= 1.1 * relative_error(theirs, true) + 1e-3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_host_sync_from_the_move_to_the_end_of_backward(implementation):
    model = small_model("mistral", sliding_window=64)
    model.set_attn_implementation(implementation)
    with apply(model, {"packing": "on"}):
        for _ in range(2):  # compilation, page-locked memory
            model(**packed_batch(), use_cache=False).loss.backward()
        with host_syncs_are_errors():
            model(**packed_batch(), use_cache=False).loss.backward()
