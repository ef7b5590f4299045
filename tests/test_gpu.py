"""What only a GPU can show: the kernel's accuracy, and that the host is never waited for."""

from __future__ import annotations

import pytest
import torch
from gpu_helpers import host_syncs_are_errors, relative_error

from fastft_plugins import apply
from fastft_plugins.kernels.attention_reference import reference_attention
from fastft_plugins.kernels.dispatch import choices, forget
from fastft_plugins.packing import METADATA_KEY, PackedMetadata, PaddingFreeCollator, packed_attention

pytestmark = pytest.mark.gpu
transformers = pytest.importorskip("transformers")

LENGTHS = [1, 517, 64, 1153, 3]
TOTAL = sum(LENGTHS)
HEADS, KEY_HEADS, WIDTH = 16, 4, 64


def attention_inputs(dtype, seed=0, value_width=WIDTH, total=TOTAL):
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = [
        (total, HEADS, WIDTH),
        (total, KEY_HEADS, WIDTH),
        (total, KEY_HEADS, value_width),
        (HEADS,),
        (total, HEADS, value_width),
    ]
    return [torch.randn(shape, device="cuda", generator=generator).to(dtype) for shape in shapes]


def output_and_gradients(function, inputs, dtype=None):
    q, k, v, sinks, dout = (tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in inputs)
    out = function(q, k, v, sinks)
    out.backward(dout)
    return {"out": out, "dQ": q.grad, "dK": k.grad, "dV": v.grad} | (
        {} if sinks.grad is None else {"dSinks": sinks.grad}
    )


def stock_sdpa(window):
    """What a stock model runs on packed rows: SDPA under a dense mask of the documents."""
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).cuda()
    position = torch.arange(sum(LENGTHS), device="cuda")
    distance = position[:, None] - position[None, :]
    mask = (document[:, None] == document[None, :]) & (distance >= 0) & (distance < (window or sum(LENGTHS)))

    def run(q, k, v, sinks):
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        k, v = (tensor.repeat_interleave(HEADS // KEY_HEADS, 1) for tensor in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)

    return run


def stock_eager_with_sinks(window):
    """gpt-oss's eager attention in the model's own dtype, as transformers computes it."""
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).cuda()
    position = torch.arange(sum(LENGTHS), device="cuda")
    distance = position[:, None] - position[None, :]
    seen = (document[:, None] == document[None, :]) & (distance >= 0) & (distance < (window or sum(LENGTHS)))

    def run(q, k, v, sinks):
        k, v = (tensor.repeat_interleave(HEADS // KEY_HEADS, 1).transpose(0, 1) for tensor in (k, v))
        weights = (q.transpose(0, 1) @ k.transpose(1, 2)) * WIDTH**-0.5
        weights = weights + torch.where(seen, 0.0, torch.finfo(q.dtype).min).to(q.dtype)
        weights = torch.cat([weights, sinks[:, None, None].expand(-1, q.shape[0], 1)], -1)
        weights = weights - weights.max(-1, keepdim=True).values
        probabilities = weights.softmax(-1, dtype=weights.dtype)[..., :-1]
        return (probabilities @ v).transpose(0, 1)

    return run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention_is_as_accurate_as_stock(dtype, window, with_sinks):
    metadata, inputs = PackedMetadata.from_lengths(LENGTHS).to("cuda"), attention_inputs(dtype)
    stock = stock_eager_with_sinks(window) if with_sinks else stock_sdpa(window)

    def ours(q, k, v, sinks):
        return packed_attention(q, k, v, metadata, window=window, sinks=sinks if with_sinks else None)

    truth = output_and_gradients(
        lambda q, k, v, sinks: reference_attention(
            q, k, v, None, LENGTHS, max(LENGTHS), WIDTH**-0.5, window, None, sinks if with_sinks else None
        ),
        inputs,
        torch.float64,
    )
    got, expected = output_and_gradients(ours, inputs), output_and_gradients(stock, inputs)
    for name, tensor in truth.items():
        ours_error, stock_error = relative_error(got[name], tensor), relative_error(expected[name], tensor)
        print(f"{dtype} window={window} sinks={with_sinks} {name}: ours {ours_error:.5f}, stock {stock_error:.5f}")
        assert ours_error <= 1.1 * stock_error


def test_rows_split_for_32_bit_indices_change_nothing(monkeypatch):
    from fastft_plugins.kernels import attention_flash

    metadata, inputs = PackedMetadata.from_lengths(LENGTHS).to("cuda"), attention_inputs(torch.bfloat16)

    def function(q, k, v, sinks):
        return packed_attention(q, k, v, metadata, sinks=sinks)

    whole = output_and_gradients(function, inputs)
    monkeypatch.setattr(attention_flash, "_INT32_LIMIT", (1153 + 128 + 140) * HEADS * WIDTH)
    assert len(attention_flash.split_documents(LENGTHS, HEADS, WIDTH)) > 1
    split = output_and_gradients(function, inputs)
    for name, tensor in whole.items():
        assert relative_error(split[name], tensor) < 1e-3, name  # dQ is added up by atomics, in no fixed order


def small_model(family, **overrides):
    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[family]
    torch.manual_seed(0)
    config = config_class(
        hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        vocab_size=1000, **({"num_hidden_layers": 3} | overrides),
    )  # fmt: skip
    return model_class(config).cuda().to(torch.bfloat16).train()


def padded_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(16, 200, (8,), generator=generator).tolist()
    ids = torch.randint(1, 1000, (8, max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def on_gpu(batch):
    return {name: value.to("cuda") if hasattr(value, "to") else value for name, value in batch.items()}


def step(model, batch):
    loss = model(**batch, use_cache=False).loss  # as Trainer does; with a cache, stock packed rows leak into each other
    loss.backward()
    return loss


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_host_sync_from_forward_to_backward(family, checkpointing):
    model = small_model(family, **({"sliding_window": 64} if family == "mistral" else {}))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    packed = on_gpu(PaddingFreeCollator(lambda batch: batch)(padded_batch()))
    padded = on_gpu(padded_batch())
    with apply(model):
        step(model, packed)  # warm-up
        with host_syncs_are_errors():
            step(model, packed)
        model.eval()
        with torch.no_grad():
            inside = model(**padded).logits
        model.train()
        with host_syncs_are_errors():
            step(model, packed)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**padded).logits, inside), "an evaluation inside the run differs from stock"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_stock_waits_for_the_host(layout, checkpointing):
    """The control of the test above: the same check fails on the stock model."""
    model = small_model("llama")
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    packed = PaddingFreeCollator(lambda batch: batch)(padded_batch())
    del packed[METADATA_KEY]
    batch = on_gpu(padded_batch() if layout == "padded" else packed)
    step(model, batch)
    with pytest.raises(RuntimeError, match="synchroniz"), host_syncs_are_errors():
        step(model, batch)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_gradients_are_as_accurate_as_the_padded_stock_run(family):
    """Against the same model in fp32: bf16 packed is no further away than bf16 padded."""
    window = {"sliding_window": 64} if family == "mistral" else {}
    model, padded = small_model(family, **window), on_gpu(padded_batch())
    packed = on_gpu(PaddingFreeCollator(lambda batch: batch)(padded_batch()))

    def gradients(model, batch):
        model.zero_grad()
        loss = step(model, batch).item()
        return loss, [parameter.grad.clone() for parameter in model.parameters()]

    stock_loss, stock = gradients(model, padded)
    with apply(model):
        ours_loss, ours = gradients(model, packed)
    true_loss, truth = gradients(model.float(), padded)
    assert abs(ours_loss - true_loss) <= abs(stock_loss - true_loss) + 2e-3 * true_loss
    for mine, theirs, true in zip(ours, stock, truth, strict=True):
        assert relative_error(mine, true) <= 1.1 * relative_error(theirs, true) + 1e-3


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    ("dtype", "value_width", "lengths", "kernel"),
    [
        (torch.float32, WIDTH, LENGTHS, "memory-efficient varlen"),
        (torch.float32, 40, LENGTHS, "memory-efficient varlen"),
        (torch.float32, WIDTH, [1] * 60 + [900], "SDPA per document"),
        (torch.bfloat16, 40, LENGTHS, "flash varlen"),
        (torch.bfloat16, WIDTH + 8, LENGTHS, "memory-efficient varlen"),
    ],
)
def test_every_kernel_is_right_without_a_sync(window, dtype, value_width, lengths, kernel):
    """fp32 has no flash kernel, and a flash kernel's values are as wide as its queries."""
    metadata = PackedMetadata.from_lengths(lengths).to("cuda")
    inputs = attention_inputs(dtype, value_width=value_width, total=sum(lengths))

    def function(q, k, v, sinks):
        return packed_attention(q, k, v, metadata, window=window)

    forget()
    output_and_gradients(function, inputs)  # warm-up
    assert [choice.split(" (")[0] for choice in choices("attention")] == [kernel]
    with host_syncs_are_errors():
        got = output_and_gradients(function, inputs)
    truth = output_and_gradients(
        lambda q, k, v, sinks: reference_attention(
            q, k, v, None, lengths, max(lengths), WIDTH**-0.5, window, None, None
        ),
        inputs,
        torch.float64,
    )
    for name, tensor in truth.items():
        assert relative_error(got[name], tensor) < (1e-5 if dtype == torch.float32 else 5e-3), name


def test_a_loop_that_moves_tensors_alone_trains_packed():
    """``{name: value.to(device) if it is a tensor}`` leaves the metadata on the host; the run moves it."""
    model, batch = small_model("llama"), PaddingFreeCollator(lambda batch: batch)(padded_batch())
    whole = {name: value.to("cuda") if hasattr(value, "to") else value for name, value in batch.items()}
    tensors = {name: value.to("cuda") if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    with apply(model), host_syncs_are_errors():
        expected, got = model(**whole).logits, model(**tensors).logits
    assert torch.equal(expected, got)


def rows_of_documents(count):
    """Rows of three documents each, told apart by their positions alone."""
    ids = torch.arange(1, 6 * count + 1).view(count, 6)
    positions = torch.tensor([0, 1, 0, 0, 1, 2]).repeat(count, 1)
    return {"input_ids": ids, "labels": ids.where(positions > 0, torch.tensor(-100)), "position_ids": positions}


@pytest.mark.parametrize(
    "batch",
    [
        padded_batch(),
        {name: column.flip(1) for name, column in padded_batch().items()},
        rows_of_documents(1),
        rows_of_documents(3),
    ],
    ids=["right", "left", "one row", "several rows"],
)
def test_a_collator_may_make_its_batches_on_the_gpu(batch):
    model = small_model("llama")

    def made_on_the_gpu(batch):
        made = {name: torch.zeros_like(column, device="cuda") for name, column in batch.items()}
        for name, column in batch.items():
            made[name].copy_(column)  # code in place, which counts up a tensor's version
        return made

    on_host = PaddingFreeCollator(lambda batch: batch)(batch)
    on_device = PaddingFreeCollator(made_on_the_gpu)(batch)
    assert on_device[METADATA_KEY].lengths == on_host[METADATA_KEY].lengths
    for name, value in on_gpu(on_host).items():
        assert not isinstance(value, torch.Tensor) or torch.equal(on_device[name], value), name
    with apply(model, {"packing": "on"}):
        assert torch.equal(model(**on_device).loss, model(**on_gpu(on_host)).loss)
