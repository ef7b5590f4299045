"""The experts on a GPU: accuracy against fp64, no host sync, graph capture, determinism, very large inputs."""

from __future__ import annotations

import inspect

import pytest
import torch
from gpu_helpers import host_syncs_are_errors, relative_error

from fastft_plugins import apply
from fastft_plugins.kernels import dispatch, grouped_matmul
from fastft_plugins.moe import experts_forward

pytestmark = pytest.mark.gpu
transformers = pytest.importorskip("transformers")

SHAPES = {
    "qwen3": dict(hidden_size=512, moe_intermediate_size=384, num_experts=16),
    "gpt-oss": dict(hidden_size=576, intermediate_size=640, num_local_experts=8),
}


def make_experts(family, dtype=torch.bfloat16, seed=0, **overrides):
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config_class, experts_class = {
        "qwen3": (transformers.Qwen3MoeConfig, Qwen3MoeExperts),
        "gpt-oss": (transformers.GptOssConfig, GptOssExperts),
    }[family]
    config = config_class(**(SHAPES[family] | overrides))
    config._experts_implementation_internal = "grouped_mm"
    generator = torch.Generator("cuda").manual_seed(seed)
    module = experts_class(config).cuda()
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.05, generator=generator)
    return module.to(dtype)


def make_inputs(module, tokens=4096, top_k=4, dtype=torch.bfloat16, seed=1):
    generator = torch.Generator("cuda").manual_seed(seed)
    width = module.gate_up_proj.shape[1 if module.is_transposed else 2]
    x = torch.randn(tokens, width, device="cuda", generator=generator).to(dtype).requires_grad_()
    ids = torch.rand(tokens, module.num_experts, device="cuda", generator=generator).topk(top_k).indices
    weights = torch.rand(tokens, top_k, device="cuda", generator=generator).to(dtype).requires_grad_()
    dout = torch.randn(tokens, width, device="cuda", generator=generator).to(dtype)
    return x, ids, weights, dout


def run(function, module, x, ids, weights, dout):
    """The output and every gradient, by name."""
    module.zero_grad()
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    out = function(module, x, ids, weights)
    out.backward(dout)
    grads = {f"d({name})": parameter.grad for name, parameter in module.named_parameters() if parameter.requires_grad}
    return {"out": out.detach(), "dX": x.grad, "d(routing weights)": weights.grad, **grads}


def stock(module, x, ids, weights):
    return module(x, ids, weights)


def eager(module, x, ids, weights):
    original = inspect.getclosurevars(type(module).forward).nonlocals["original_forward"]
    return original(module, x, ids, weights)


def truth_of(module, x, ids, weights, dout):
    """fp64, from the same bf16 numbers."""
    import copy

    exact = copy.deepcopy(module).double()
    return run(eager, exact, x.double(), ids, weights.double(), dout.double())


@pytest.fixture(autouse=True)
def fresh_choices():
    dispatch.forget()
    yield
    dispatch.forget()


@pytest.fixture
def only(monkeypatch):
    """Leave one kernel for the products, and the loop behind it."""

    def choose(name):
        for table in ("GROUPED_MATMUL_KERNELS", "GROUPED_WEIGHT_GRAD_KERNELS", "GROUPED_WEIGHT_BIAS_GRAD_KERNELS"):
            kernels = getattr(grouped_matmul, table)
            others = ("loop over experts", "weight gradient, then sums")
            kept = tuple(kernel for kernel in kernels if kernel.name in (name, *others))
            monkeypatch.setattr(grouped_matmul, table, kept)
        dispatch.forget()

    return choose


@pytest.mark.parametrize("kernel", [None, "CUDA for Hopper", "Triton with TMA", "Triton", "torch grouped_mm"])
@pytest.mark.parametrize("family", SHAPES)
def test_as_accurate_as_stock(family, kernel, only):
    if kernel is not None:
        only(kernel)
    module = make_experts(family)
    inputs = make_inputs(module)
    truth, ours, theirs = truth_of(module, *inputs), run(experts_forward, module, *inputs), run(stock, module, *inputs)
    for name, true in truth.items():
        our_error, stock_error = relative_error(ours[name], true), relative_error(theirs[name], true)
        print(f"{family} {kernel or 'best'} {name}: ours {our_error:.5f}, stock {stock_error:.5f}")
        assert our_error <= 1.05 * stock_error, name
    names = {"gate_forward", "grouped_matmul", "counting_sort", "combine_rows"}
    assert all(
        any(maker in choice for choice in dispatch.choices(name) for maker in ("CUDA", "Triton", "torch"))
        for name in names
    )


def test_bias_gradients_stay_accurate_with_many_rows_an_expert():
    module = make_experts("gpt-oss", hidden_size=256, intermediate_size=256)
    inputs = make_inputs(module, tokens=32768)  # 16,384 rows an expert
    truth, ours, theirs = truth_of(module, *inputs), run(experts_forward, module, *inputs), run(stock, module, *inputs)
    for name in ("d(gate_up_proj_bias)", "d(down_proj_bias)"):
        our_error, stock_error = relative_error(ours[name], truth[name]), relative_error(theirs[name], truth[name])
        print(f"{name}: ours {our_error:.5f}, stock {stock_error:.5f}")
        assert our_error < 0.005


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", [None, "Triton"])
def test_half_precision_against_a_loop_in_fp64(dtype, kernel, only):
    """fp16 has no grouped matmul in torch; widths here are no multiples of a tile."""
    if kernel is not None:
        only(kernel)
    module = make_experts("qwen3", dtype, hidden_size=200, moe_intermediate_size=120)
    inputs = make_inputs(module, tokens=777, dtype=dtype)
    truth, ours = truth_of(module, *inputs), run(experts_forward, module, *inputs)
    for name, true in truth.items():
        assert relative_error(ours[name], true) < (2e-3 if dtype == torch.float16 else 1e-2), name


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("family", SHAPES)
def test_the_host_is_never_waited_for(family, trained):
    module = make_experts(family).requires_grad_(trained)
    inputs = make_inputs(module)
    run(experts_forward, module, *inputs)  # warm-up
    with host_syncs_are_errors():
        run(experts_forward, module, *inputs)
    with pytest.raises(RuntimeError, match="synchroniz"), host_syncs_are_errors():
        run(eager, module, *inputs)  # the control


@pytest.mark.parametrize("family", SHAPES)
def test_a_graph_captured_once_serves_other_routings(family):
    module = make_experts(family)
    x, ids, weights, dout = make_inputs(module)
    static = [x.detach().clone().requires_grad_(), ids.clone(), weights.detach().clone().requires_grad_()]

    def step():
        out = experts_forward(module, *static)
        grads = torch.autograd.grad(out, [static[0], static[2], *module.parameters()], dout)
        return [out, *grads]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (7, 8):
        x2, ids2, weights2, _ = make_inputs(module, seed=seed)
        if seed == 8:
            ids2 = torch.zeros_like(ids2)  # every row goes to one expert
        with torch.no_grad():
            static[0].copy_(x2), static[1].copy_(ids2), static[2].copy_(weights2)
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        for got, expected in zip(replayed, step(), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("family", SHAPES)
def test_ten_runs_are_equal_bit_for_bit(family):
    module = make_experts(family)
    inputs = make_inputs(module)
    first = {name: tensor.clone() for name, tensor in run(experts_forward, module, *inputs).items()}
    for _ in range(9):
        for name, tensor in run(experts_forward, module, *inputs).items():
            assert torch.equal(tensor, first[name]), name


def test_sentinels_leave_no_trace():
    """Ids of num_experts and above belong to experts elsewhere; the rows behind the last expert hold anything."""
    module = make_experts("gpt-oss")
    x, ids, weights, dout = make_inputs(module)
    away = torch.rand(ids.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(3)) < 0.4
    torch.full((64, 1 << 20), torch.nan, device="cuda")  # so that fresh memory is poisoned
    got = run(experts_forward, module, x, ids.masked_fill(away, module.num_experts), weights, dout)
    # The same by weights of zero: their own gradient aside, nothing else may differ beyond rounding.
    expected = run(experts_forward, module, x, ids, weights.detach().masked_fill(away, 0), dout)
    assert (got["d(routing weights)"][away] == 0).all()
    for name, tensor in got.items():
        assert tensor.isfinite().all(), name
        if name != "d(routing weights)":
            assert relative_error(tensor, expected[name]) < 1e-2, name


def test_more_than_two_to_the_31_elements():
    tokens, last = 1_100_000, 1000
    module = make_experts("qwen3", hidden_size=512, moe_intermediate_size=512).requires_grad_(False)
    x, ids, weights, dout = make_inputs(module, tokens=tokens, top_k=2)
    assert tokens * 2 * module.gate_up_proj.shape[1] > 2**31
    whole = run(experts_forward, module, x, ids, weights, dout)
    part = run(experts_forward, module, x[-last:], ids[-last:], weights[-last:], dout[-last:])
    for name, tensor in part.items():
        assert relative_error(whole[name][-last:], tensor) < 1e-3, name


def causal_mask(length, dtype):
    """4-D, as transformers takes it untouched: making one from 2-D makes the host wait."""
    return torch.full((1, 1, length, length), torch.finfo(dtype).min, dtype=dtype, device="cuda").triu(1)


@pytest.mark.parametrize("family", SHAPES)
def test_lora_on_the_experts_is_as_accurate_as_peft(family):
    from peft import LoraConfig, get_peft_model

    config = {
        "qwen3": transformers.Qwen3MoeConfig(
            vocab_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
            intermediate_size=512, num_experts_per_tok=4, **SHAPES["qwen3"],
        ),
        "gpt-oss": transformers.GptOssConfig(
            vocab_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
            num_experts_per_tok=4, **SHAPES["gpt-oss"],
        ),
    }[family]  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").cuda()
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(model, LoraConfig(r=16, target_modules=[], target_parameters=targets)).train()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(0, 0.1 if "lora_B" in name else 0.05)
    model.bfloat16()
    ids = torch.randint(0, 128, (4, 512), device="cuda")

    def gradients(model):
        model.zero_grad()
        mask = causal_mask(512, next(model.parameters()).dtype)
        model(input_ids=ids, labels=ids, attention_mask=mask, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    theirs = gradients(model)
    with apply(model, {"moe": "on", "packing": "off"}) as active:
        ours = gradients(model)
        with host_syncs_are_errors():
            gradients(model)
    assert "LoRA on the experts of 1 layers" in str(active.report)
    truth = gradients(model.float())
    assert ours.keys() == theirs.keys() and len(ours) == 4
    for name, true in truth.items():
        our_error, peft_error = relative_error(ours[name], true), relative_error(theirs[name], true)
        print(f"{family} {name}: ours {our_error:.5f}, PEFT {peft_error:.5f}")
        # Routing may flip for a token between bf16 and fp32, which is the larger part of both errors.
        assert our_error <= 1.05 * peft_error + 2e-3, name


def whole_model():
    config = transformers.Qwen3MoeConfig(
        vocab_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        intermediate_size=512, num_experts_per_tok=4, **SHAPES["qwen3"],
    )  # fmt: skip
    torch.manual_seed(0)
    config._attn_implementation = "eager"  # SDPA's backward under a mask is not deterministic
    return transformers.Qwen3MoeForCausalLM(config).cuda().bfloat16().train()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_whole_model_under_checkpointing_trains_without_a_host_sync(reentrant):
    model = whole_model()
    ids = torch.randint(0, 128, (2, 512), device="cuda")
    mask = causal_mask(512, torch.bfloat16)

    def gradients():
        model.zero_grad()
        model(input_ids=ids, labels=ids, attention_mask=mask, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    with apply(model, {"moe": "on", "packing": "off"}):
        plain = gradients()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        gradients()  # warm-up
        with host_syncs_are_errors():
            checkpointed = gradients()
    model.gradient_checkpointing_disable()
    for once, again in zip(plain, checkpointed, strict=True):
        assert torch.equal(once, again)


def test_a_compiled_model_is_as_accurate_as_stock():
    model, ids = whole_model(), torch.randint(0, 128, (2, 512), device="cuda")

    def gradients():
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {name: parameter.grad.float() for name, parameter in model.named_parameters()}

    theirs = gradients()
    model.compile()
    with apply(model, {"moe": "on", "packing": "off"}):
        ours = gradients()
    model._compiled_call_impl = None
    model.float()
    truth = gradients()
    for name, true in truth.items():
        # Routing may flip for a token between bf16 and fp32, which is the larger part of both errors.
        assert relative_error(ours[name], true) <= 1.2 * relative_error(theirs[name], true) + 1e-2, name
