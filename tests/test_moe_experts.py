"""`experts_forward` and `route` at the edges: routing, dtypes, autograd's ways, errors. Stock's loop is the oracle."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_helpers import KINDS, gradients, make_experts, make_inputs, stock_forward
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from fastft_plugins.kernels.rows import Rows
from fastft_plugins.moe import experts_forward, function, projection, route
from fastft_plugins.moe.gates import gate_of

FP32_INSIDE = {"normed", "unknown"}  # stock computes their norm or gate in fp32


def tolerance(kind):
    return {"rtol": 1e-4, "atol": 1e-5} if kind in FP32_INSIDE else {"rtol": 1e-9, "atol": 1e-10}


def compare(kind, module, *inputs):
    ours, stock = gradients(experts_forward, module, *inputs), gradients(stock_forward, module, *inputs)
    assert_close(ours, stock, **tolerance(kind))


@pytest.fixture
def poisoned(monkeypatch):
    """Products leave NaN in the rows that belong to no expert, as torch's grouped_mm may."""
    product = projection.grouped_matmul

    def poison(rows, weight, offsets, out=None):
        out = product(rows, weight, offsets, out)
        out[offsets[-1] :] = torch.nan
        return out

    monkeypatch.setattr(projection, "grouped_matmul", poison)


# ------------------------------------------------------------------------------------------------ routing


@st.composite
def routings(draw):
    experts, top_k = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    ids = draw(st.lists(st.lists(st.integers(0, experts + 2), min_size=top_k, max_size=top_k), max_size=12))
    dtype = draw(st.sampled_from([torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8]))
    return torch.tensor(ids, dtype=dtype).reshape(-1, top_k), experts


@settings(deadline=None, max_examples=150)
@given(routings())
def test_route_is_a_stable_argsort_with_sentinels_last_and_uncounted(case):
    ids, experts = case
    routing, buckets = route(ids, experts), ids.flatten().long().clamp(max=experts)
    assert all(part.dtype == torch.int32 for part in routing)
    assert torch.equal(routing.order.long(), buckets.argsort(stable=True))
    assert torch.equal(routing.inverse.long(), routing.order.argsort())
    assert torch.equal(routing.counts.long(), torch.bincount(buckets, minlength=experts + 1)[:experts])
    assert torch.equal(routing.offsets.long(), routing.counts.long().cumsum(0))


def test_route_treats_negative_ids_as_sentinels():
    routing = route(torch.tensor([[-1, 1], [0, -7]]), 2)
    assert routing.order.tolist() == [2, 1, 0, 3] and routing.counts.tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_route_takes_ids_whose_type_cannot_hold_the_number_of_experts(dtype):
    routing = route(torch.tensor([[100, 1]], dtype=dtype), 300)
    assert routing.order.tolist() == [1, 0] and routing.counts[[1, 100]].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("ids", "experts", "message"),
    [
        (torch.zeros(3, dtype=torch.long), 4, "top_k_index_TK"),
        (torch.zeros(3, 2), 4, "top_k_index_TK.*float32"),
        (torch.zeros(3, 2, dtype=torch.complex64), 4, "top_k_index_TK"),
        (torch.zeros(3, 2, dtype=torch.bool), 4, "top_k_index_TK.*bool"),
        (torch.zeros(3, 2, dtype=torch.long), 0, "num_experts"),
        (torch.zeros(1, dtype=torch.long).expand(2**30, 2), 4, "2\\*\\*31"),
    ],
)
def test_route_names_what_is_wrong(ids, experts, message):
    with pytest.raises(ValueError, match=message):
        route(ids, experts)


# ------------------------------------------------------------------------------------- shapes and routings


@st.composite
def cases(draw):
    experts, hidden, inner = draw(st.integers(1, 5)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    tokens, top_k = draw(st.sampled_from([0, 1, 2, 5, 13])), draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 99)))
    module = make_experts(kind := draw(st.sampled_from(list(KINDS))), experts, hidden, inner)
    x, ids, weights = make_inputs(tokens, top_k, experts + draw(st.sampled_from([0, 1, 3])), hidden)
    match draw(st.sampled_from(["any", "one hot expert", "zero weights"])):
        case "one hot expert":
            ids.fill_(draw(st.integers(0, experts - 1)))
        case "zero weights":
            weights[::2] = 0.0
    return kind, module, x, ids, weights


@settings(deadline=None, max_examples=80)
@given(cases())
def test_any_shape_and_routing_gives_stocks_output_and_gradients(case):
    compare(*case)


@pytest.mark.parametrize("kind", KINDS)
def test_sentinels_contribute_nothing_even_where_kernels_leave_nan(kind, poisoned):
    x, ids, weights = make_inputs(experts=6)  # of which the module has 4
    ids[0], ids[1] = torch.tensor([4, 9]), -1  # tokens without any local expert
    module = make_experts(kind)
    compare(kind, module, x, ids, weights)
    ours = gradients(experts_forward, module, x, ids, weights)
    assert not ours["out"][:2].any() and not ours["x"][:2].any() and not ours["weights"][(ids < 0) | (ids > 3)].any()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_sentinels(kind, poisoned):
    x, ids, weights = make_inputs()
    ours = gradients(experts_forward, make_experts(kind), x, ids + 4, weights)
    assert not any(value.any() for value in ours.values())


@pytest.mark.parametrize("kind", ["silu", "clamped", "normed"])
def test_inputs_and_output_gradients_need_not_be_contiguous(kind):
    x, ids, weights = make_inputs(top_k=3)
    module = make_experts(kind)
    strided = x.t().contiguous().t(), ids.t().contiguous().t(), weights.t().contiguous().t()
    expected = gradients(experts_forward, module, x, ids, weights)
    assert_close(gradients(experts_forward, module, *strided), expected, rtol=0, atol=0)
    x.requires_grad_()
    (expanded,) = torch.autograd.grad(experts_forward(module, x, ids, weights).sum(), x)
    (dense,) = torch.autograd.grad(experts_forward(module, x, ids, weights), x, torch.ones_like(x))
    assert torch.equal(expanded, dense)


@pytest.mark.parametrize("sentinels", [False, True])
def test_a_wide_activation_is_taken_in_halves(sentinels, poisoned):
    """Mixtral's shape: from 4096 rows on, and more than twice as wide inside as outside."""
    module = make_experts("clamped", experts=3, hidden=2, inner=5)
    inputs = make_inputs(tokens=2049, experts=5 if sentinels else 3, hidden=2)
    assert len(function._spans(module.down_proj, torch.tensor([4098]), torch.empty(4098))) == 2
    compare("clamped", module, *inputs)


# ------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("weights_dtype", [None, torch.float32], ids=["weights as x", "weights in fp32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["silu", "clamped", "ungated"])
def test_low_precision_is_no_further_from_the_truth_than_stock(kind, dtype, weights_dtype):
    module = make_experts(kind, hidden=24, inner=20, dtype=dtype)
    x, ids, weights = make_inputs(tokens=40, hidden=24, dtype=dtype)
    weights = weights.to(weights_dtype or dtype)
    truth = gradients(stock_forward, copy.deepcopy(module).double(), x.double(), ids, weights.double())
    ours = gradients(experts_forward, module, x, ids, weights)
    stock = gradients(stock_forward, module, x, ids, weights)
    for name, value in truth.items():
        assert ours[name].dtype == stock[name].dtype, name
        error, stocks = ((one[name].double() - value).norm() / value.norm() for one in (ours, stock))
        assert error <= 1.1 * stocks + torch.finfo(dtype).eps / 4, f"{name}: {error} against stock's {stocks}"


def test_autocast_computes_in_its_dtype_and_leaves_gradients_in_the_weights():
    module, inputs = make_experts("clamped", dtype=torch.float32), make_inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gradients(experts_forward, module, *inputs)
    low = gradients(experts_forward, copy.deepcopy(module).bfloat16(), inputs[0].bfloat16(), *inputs[1:])
    assert all(value.dtype == torch.float32 for value in mixed.values())
    assert_close(mixed, {name: value.float() for name, value in low.items()}, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------ autograd's ways


@pytest.mark.parametrize("kind", ["silu", "clamped", "ungated", "transposed"])
def test_gradcheck(kind):
    module = make_experts(kind, hidden=3, inner=2, experts=3)
    x, ids, weights = make_inputs(tokens=4, hidden=3, experts=4)  # with a sentinel
    parameters = dict(module.named_parameters())

    def forward(x, weights, *values):
        return torch.func.functional_call(Call(module, ids), dict(zip(names, values, strict=True)), (x, weights))

    names = [f"experts.{name}" for name in parameters]
    inputs = (x.requires_grad_(), weights.requires_grad_(), *parameters.values())
    assert torch.autograd.gradcheck(forward, inputs)


class Call(torch.nn.Module):
    """A model that calls the experts function on its experts."""

    def __init__(self, experts, ids):
        super().__init__()
        self.experts, self.ids = experts, ids

    def forward(self, x, weights):
        return experts_forward(self.experts, x, self.ids, weights)


@pytest.mark.parametrize("trained", ["", "gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"])
def test_only_what_wants_a_gradient_gets_one(trained, monkeypatch):
    module, inputs = make_experts("clamped"), make_inputs()
    expected = gradients(stock_forward, module, *inputs)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name == trained)
    made = []
    weight_grad = projection.grouped_weight_grad
    monkeypatch.setattr(projection, "grouped_weight_grad", lambda *args: made.append(1) or weight_grad(*args))
    ours = gradients(experts_forward, module, *inputs)
    assert_close(ours, {name: expected[name] for name in ours}, **tolerance("clamped"))
    assert set(ours) == {"out", "x", "weights", trained} - {""}
    assert len(made) == (trained in ("gate_up_proj", "down_proj")), "a weight's gradient is the dearest product"


@pytest.mark.parametrize("wanted", ["x", "weights"])
def test_one_input_alone_may_want_a_gradient(wanted):
    module, (x, ids, weights) = make_experts("clamped").requires_grad_(False), make_inputs()
    expected = gradients(stock_forward, module, x, ids, weights)[wanted]
    tensor = {"x": x, "weights": weights}[wanted].requires_grad_()
    dout = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    (grad,) = torch.autograd.grad(experts_forward(module, x, ids, weights), tensor, dout)
    assert_close(grad, expected, **tolerance("clamped"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_kept_graph_gives_equal_gradients_twice_and_a_freed_one_raises(kind):
    module, (x, ids, weights) = make_experts(kind), make_inputs()
    wanted = [x.requires_grad_(), weights.requires_grad_(), *module.parameters()]
    out = experts_forward(module, x, ids, weights).square().sum()
    first = torch.autograd.grad(out, wanted, retain_graph=True)
    second = torch.autograd.grad(out, wanted)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, wanted)


def test_a_second_derivative_is_refused():
    module, (x, ids, weights) = make_experts(), make_inputs()
    (grad,) = torch.autograd.grad(
        experts_forward(module, x.requires_grad_(), ids, weights).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients(kind, mode):
    module, inputs = make_experts(kind), make_inputs()
    with mode():
        out = experts_forward(module, *inputs)
    assert not out.requires_grad
    assert_close(out, stock_forward(module, *inputs), **tolerance(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_repeats_are_bitwise_equal(kind):
    module, inputs = make_experts(kind, dtype=torch.float32), make_inputs(tokens=50, dtype=torch.float32)
    first = gradients(experts_forward, module, *inputs)
    for _ in range(3):
        assert_close(gradients(experts_forward, module, *inputs), first, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["silu", "clamped", "normed"])
def test_checkpointing_changes_no_bit(kind, reentrant):
    module, inputs = make_experts(kind), make_inputs()

    def checkpointed(*args):
        return checkpoint(experts_forward, *args, use_reentrant=reentrant)

    module_grads = []
    for forward in (experts_forward, checkpointed):
        x, ids, weights = inputs[0].clone().requires_grad_(), inputs[1], inputs[2].clone().requires_grad_()
        module.zero_grad()
        forward(module, x, ids, weights).square().sum().backward()
        module_grads.append([x.grad, weights.grad, *(parameter.grad for parameter in module.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*module_grads, strict=True))


def test_a_compiled_model_runs_the_function_outside_its_graph():
    module, (x, ids, weights) = make_experts(), make_inputs()
    compiled = torch.compile(Call(module, ids), backend="eager")
    assert_close(compiled(x, weights), stock_forward(module, x, ids, weights))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_work_on_their_own_weights(copied):
    module, inputs = make_experts("unknown"), make_inputs()
    experts_forward(module, *inputs)
    other = copied(module)
    with torch.no_grad():
        other.down_proj.mul_(2)
    assert_close(experts_forward(other, *inputs), 2 * experts_forward(module, *inputs))


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"unknown"}))
def test_a_gate_is_recognised_under_other_defaults(kind, monkeypatch):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert gate_of(make_experts(kind)).kind != "other"
    finally:
        torch.set_default_dtype(before)


# ------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(11, 7).double()}, r"hidden_TH.*\[11, 7\].*6"),
        ({"x": torch.zeros(1, 11, 6).double()}, "hidden_TH"),
        ({"x": torch.zeros(11, 6, dtype=torch.long)}, "hidden_TH.*int64"),
        ({"ids": torch.zeros(11, dtype=torch.long)}, "top_k_index_TK"),
        ({"ids": torch.zeros(10, 2, dtype=torch.long)}, r"top_k_index_TK.*\[11, k\]"),
        ({"ids": torch.zeros(11, 2)}, "top_k_index_TK.*float32"),
        ({"weights": torch.zeros(11, 3)}, "top_k_weights_TK"),
        ({"weights": torch.zeros(11, 2, dtype=torch.long)}, "top_k_weights_TK.*int64"),
        ({"ids": torch.zeros(11, 2, dtype=torch.long, device="meta")}, "top_k_index_TK.*meta"),
        ({"weights": torch.zeros(11, 2, device="meta")}, "top_k_weights_TK.*meta"),
    ],
)
def test_errors_name_the_tensor(change, message):
    inputs = dict(zip(("x", "ids", "weights"), make_inputs(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        experts_forward(make_experts(), *inputs.values())


def test_gradients_lie_as_their_parameters_do():
    """A transposed view's gradient need not be copied to be added to the parameter behind it."""
    dense, counts = torch.randn(2, 8, 16), torch.tensor([3, 5], dtype=torch.int32)
    rows, low, douts = (Rows(torch.randn(5, width)) for width in (16, 4, 8))
    parts = projection.Projection(dense.mT, None, torch.randn(2, 4, 16).mT, torch.randn(2, 4, 8))
    need = projection.Projection(True, False, True, True)
    lows = projection.Low(low.source_XH, low.source_XH)
    grads = projection.parameter_grads(rows, douts, parts, need, lows, counts)
    assert [grad.stride() for grad in (grads.weight, grads.lora_a, grads.lora_b)] == [
        part.stride() for part in (parts.weight, parts.lora_a, parts.lora_b)
    ]
