"""FlashAttention and flex_attention for a machine that has neither: what transformers calls, written out.

Shape suffixes: T tokens, H query heads, G key heads, D head width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import BlockMask
from transformers import masking_utils
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.integrations import flex_attention as flex_integration

from fastft_plugins.kernels.attention_reference import reference_attention


class Flash:
    """Stands where transformers imports FlashAttention's functions; keeps the keyword arguments of each call."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def varlen(
        self,
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        s_aux: Tensor | None = None,
    ) -> Tensor:
        """The signature of ``flash_attn_varlen_func``, sinks as FlashAttention 3 takes them."""
        assert causal and cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
        self.calls.append({"cu_seqlens": cu_seqlens_q, "max_seqlen": (max_seqlen_q, max_seqlen_k)})
        lengths = cu_seqlens_q.diff().tolist()
        assert int(max_seqlen_q) == int(max_seqlen_k) == max(lengths)
        scale = q_THD.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        window = None if window_size[0] < 0 else window_size[0] + 1
        return reference_attention(
            q_THD, k_TGD, v_TGD, cu_seqlens_q, lengths, max(lengths), scale, window, softcap or None, s_aux
        )

    def dense(self, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
        """The signature of ``flash_attn_func``, for batches that have no padding: q ``[B, T, H, D]``."""
        rows, length = q.shape[:2]
        boundaries = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32)
        flat = [tensor.reshape(-1, *tensor.shape[2:]) for tensor in (q, k, v)]
        return self.varlen(*flat, boundaries, boundaries, length, length, **more).view(rows, length, *q.shape[2:])

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        functions = (self.dense, self.varlen, None, flash_utils._pad_input, flash_utils._unpad_input)
        process = flash_utils._lazy_define_process_function(self.varlen)
        is_pair = hasattr(flash_utils, "_process_with_kvcache_kwargs_fn")  # newer versions have one more, for caches

        def lazy_import(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
            assert implementation is not None and "flash" in implementation, implementation
            return functions, (process, process) if is_pair else process

        monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lazy_import)


def dense_of(mask: BlockMask) -> Tensor:
    """What a kernel lets through, ``[T, T]``: whole blocks, and what the mask function says of those seen in part."""
    total, size = mask.shape[-1], mask.BLOCK_SIZE[0]

    def table(number: Tensor, columns: Tensor) -> Tensor:
        seen = torch.zeros(columns.shape[-2:], dtype=torch.bool)
        for row, (count, places) in enumerate(zip(number[0, 0].tolist(), columns[0, 0], strict=True)):
            seen[row, places[:count].long()] = True
        return seen

    some = table(mask.kv_num_blocks, mask.kv_indices)
    whole = table(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert torch.equal(some, table(mask.q_num_blocks, mask.q_indices).t())
    assert torch.equal(whole, table(mask.full_q_num_blocks, mask.full_q_indices).t())
    token = torch.arange(total)
    pairs = mask.mask_mod(torch.tensor(0), torch.tensor(0), token[:, None], token[None, :])
    some, whole = (seen.repeat_interleave(size, 0).repeat_interleave(size, 1)[:total, :total] for seen in (some, whole))
    return (some & pairs) | whole


class Flex:
    """Stands where transformers calls compiled flex_attention, whose backward torch has on GPUs only."""

    def __init__(self) -> None:
        self.masks: list[BlockMask] = []

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        training: bool = False,
        score_mod: Any = None,
        block_mask: BlockMask | None = None,
        scale: float | None = None,
        **more: Any,
    ) -> Tensor:
        """q ``[B, H, T, D]``, k and v ``[B, G, T, D]``, and the mask of transformers → ``[B, H, T, D]``."""
        assert block_mask is not None
        self.masks.append(block_mask)
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
        scores = score_mod(scores, None, None, None, None)
        if len(query) == 1:
            seen = dense_of(block_mask)
        else:  # stock's, of a padded batch
            rows, token = torch.arange(len(query)), torch.arange(query.shape[2])
            seen = torch.stack(
                [block_mask.mask_mod(row, torch.tensor(0), token[:, None], token[None, :]) for row in rows]
            )[:, None]
        weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1)
        return weights.masked_fill(~seen, 0.0) @ value  # padding may see nothing: zeros, as the kernel gives

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def create_block_mask(*args: Any, **kwargs: Any) -> BlockMask:
            return flex_attention.create_block_mask(*args, **(kwargs | {"_compile": False}))  # which takes seconds

        monkeypatch.setattr(flex_integration, "compile_friendly_flex_attention", self.attend)
        monkeypatch.setattr(masking_utils, "create_block_mask", create_block_mask)
