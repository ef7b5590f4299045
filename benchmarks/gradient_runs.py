"""The runs that `benchmarks.gradient_accuracy` compares: the truth in fp64, ours and stock's, on one model."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.documents import Document
from benchmarks.fixed_routing import FixedRouting, padded_layout, row_layout
from benchmarks.measure import features_of
from benchmarks.settings import Settings
from benchmarks.shapes import build_model, enable_checkpointing
from benchmarks.tokenizer import padding_collator
from fastft_plugins import apply
from fastft_plugins.run import Run

STOCKS = ("grouped_mm", "eager")  # of the experts; the first is transformers' default, and what ours takes the place of
# Values of the config that make it small enough for a CPU.
SHAPES: dict[str, dict[str, Any]] = {
    "gpt-oss-20b": {},
    "tiny": {
        "hidden_size": 64, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 8,
    },
}  # fmt: skip

Gradients = dict[str, Tensor]


def make_model(options: Any) -> Any:
    """Random weights. What is zero or one in a fresh model is spread, so that its place in the gradients shows."""
    settings = Settings(
        shape="gpt-oss-20b", layers=options.layers, device=options.device, dtype=options.dtype, trainable="full",
        seed=options.seed,
    )  # fmt: skip
    model = build_model(settings, vocab_size=options.vocab, pad_token_id=0, **SHAPES[options.shape])
    enable_checkpointing(model)
    spreads = {"sinks": 1.0, "gate_up_proj_bias": 3.0, "bias": 0.1, "norm.weight": 0.1}  # the first that fits
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = next((value for ending, value in spreads.items() if name.endswith(ending)), None)
            if spread is not None:
                parameter.copy_(name.endswith("norm.weight") + spread * torch.randn_like(parameter))
    # bf16 values in any dtype: another dtype is then another precision, not another model.
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().to(parameter.dtype)
    return model


def exact_gradients(model: Any, documents: list[Document], routing: FixedRouting) -> tuple[float, Gradients]:
    """The loss and its gradients in fp64, each document by itself; the routers' choices are recorded."""
    labels, total = sum(len(document) - 1 for document in documents), 0.0
    routing.forget()
    with exact(model):
        for number, document in enumerate(documents):
            routing.record(number)
            ids = torch.tensor([document], device=model.device)
            logits_TV = model(input_ids=ids).logits[0, :-1]
            if logits_TV.dtype != torch.float64:
                raise RuntimeError(f"the truth is of {logits_TV.dtype}")
            loss = nn.functional.cross_entropy(logits_TV, ids[0, 1:], reduction="sum") / labels
            loss.backward()
            total += loss.item()
        return total, take_gradients(model)


@contextlib.contextmanager
def exact(model: Any) -> Iterator[None]:
    """The model in fp64 and with stock's eager experts. Its weights come back as they were: fp64 holds them exactly."""
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    model.set_experts_implementation("eager")
    for parameter in model.parameters():  # not model.to(): the angles of rotary positions are fp32 in every run
        parameter.data = parameter.data.double()
    for norm in norms:
        norm.forward = functools.partial(_exact_norm, norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward
        for name, parameter in model.named_parameters():
            parameter.grad = None
            parameter.data = parameter.data.to(dtypes[name])


def _exact_norm(norm: Any, hidden: Tensor) -> Tensor:
    scale: Tensor = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    normed: Tensor = norm.weight * (hidden * scale)
    return normed


def our_gradients(
    model: Any, documents: list[Document], routing: FixedRouting
) -> tuple[float, Gradients, dict[str, Any]]:
    model.set_experts_implementation(STOCKS[0])
    routing.give(row_layout)
    with apply(model, {"packing": "on", "moe": "on", "checkpointing": "off"}) as run:
        loss = model(**packed_row(run, documents, model.device)).loss
        loss.backward()
    return loss.item(), take_gradients(model), run.report.to_dict()


def packed_row(run: Run, documents: list[Document], device: torch.device) -> dict[str, Any]:
    row = run.collator(padding_collator())(features_of(documents))
    return {name: value.to(device) if hasattr(value, "to") else value for name, value in row.items()}


def stock_gradients(
    model: Any, documents: list[Document], routing: FixedRouting, experts: str
) -> tuple[float, Gradients]:
    model.set_experts_implementation(experts)
    routing.give(padded_layout)
    batch = {name: value.to(model.device) for name, value in padding_collator()(features_of(documents)).items()}
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), take_gradients(model)


def take_gradients(model: nn.Module) -> Gradients:
    """The gradients of all parameters, which then have none."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            raise RuntimeError(f"{name} has no gradient")
        found[name], parameter.grad = parameter.grad, None
    return found
