"""Our attention with the one difference that `varlen-rebuilt` measures: metadata made anew in every layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from fastft_plugins.packing import PackedMetadata, packed_attention

NAME = "varlen_rebuilt"


@contextlib.contextmanager
def rebuilt_attention(model: torch.nn.Module) -> Iterator[None]:
    """Switch the model to it. It has no mask function, so masking ends early and waits for nothing, as in ours."""
    AttentionInterface.register(NAME, _rebuilt_attention)
    stock = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    before = stock.config._attn_implementation
    stock.set_attn_implementation(NAME)
    yield
    stock.set_attn_implementation(before)


def _rebuilt_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    position_ids: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    # transformers' own function, then what its FlashAttention path goes on to do: hand the kernel two ints.
    # Finding the restarts and reading each maximum make the host wait for the GPU.
    (cu_seqlens, _), (max_q, max_k) = prepare_fa_kwargs_from_position_ids(position_ids)
    max_seqlen = max(int(max_q), int(max_k))
    row = position_ids[0]
    # On a GPU the lengths only guard against rows too long for the kernel; reading them would be a wait of our making.
    lengths = (row.shape[0],) if query.is_cuda else tuple(cu_seqlens.diff().tolist())
    metadata = PackedMetadata(lengths, cu_seqlens, max_seqlen, position_ids=row, seq_idx=row)
    q_THD, k_TGD, v_TGD = (states[0].transpose(0, 1) for states in (query, key, value))
    return packed_attention(q_THD, k_TGD, v_TGD, metadata, scale=scaling).unsqueeze(0), None
