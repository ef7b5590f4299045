"""Rows between token order and expert order: the gather, the weighted sum that takes them back, and sums by expert.

Shape suffixes: T tokens, K experts of a token, S = T·K routed rows, X rows of a source, E experts, H or N row width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastft_plugins.kernels.dispatch import Kernel, choose
from fastft_plugins.kernels.triton_support import TensorCall, triton_kernel, triton_rejects


class Rows:
    """Rows in expert order. Kernels that can, read them through the index; for the others they are gathered, once.

    Attributes:
        source_XH: the rows.
        slot_S: int32, which slot stands at each place of the order; row x of the source has the slots from x·K on. None
            if the source's rows lie in order already.
        top_k: K.
        inverse_XK: int32, the place of each slot, or None, as for a part of the rows.
    """

    def __init__(
        self, source_XH: Tensor, slot_S: Tensor | None = None, top_k: int = 1, inverse_XK: Tensor | None = None
    ) -> None:
        self.source_XH = source_XH
        self.slot_S = slot_S
        self.top_k = top_k
        self.inverse_XK = inverse_XK
        self._gathered_SH: Tensor | None = None

    @property
    def size(self) -> int:
        """The number of rows in the order, S."""
        return (self.source_XH if self.slot_S is None else self.slot_S).shape[0]

    def part(self, span: slice) -> Rows:
        """Some of the rows, with a gather of their own; itself for all of them."""
        if span == slice(0, self.size):
            return self
        if self.slot_S is None:
            return Rows(self.source_XH[span])
        return Rows(self.source_XH, self.slot_S[span], self.top_k)

    def gathered(self) -> Tensor:
        """The rows ``[S, H]`` in order."""
        if self.slot_S is None:
            return self.source_XH
        if self._gathered_SH is None:
            self._gathered_SH = gather_rows(self)
        return self._gathered_SH

    def release(self) -> None:
        """Free the gathered rows; the next call of `gathered` makes them again."""
        self._gathered_SH = None


def gather_rows(rows: Rows) -> Tensor:
    """The rows in the order of their slots, contiguous ``[S, H]``.

    With ``inverse_XK``, a kernel can read each row of the source once.
    """
    call = TensorCall(rows.source_XH.device, rows.source_XH.dtype)
    out_SH: Tensor = choose("gather_rows", call).kernel.run(rows)
    return out_SH


def combine_rows(
    rows_SH: Tensor,
    inverse_TK: Tensor,
    offsets_E: Tensor,
    weights_TK: Tensor | None = None,
    bias_EH: Tensor | None = None,
    ids_TK: Tensor | None = None,
) -> Tensor:
    """Each token's sum over its rows of weight · (row + its expert's bias), in fp32, in the order of the experts k.

    Rows at or beyond ``offsets_E[-1]`` belong to sentinels and may hold anything: they are not read.

    Returns:
        ``[T, H]`` in the dtype of the rows.
    """
    run = choose("combine_rows", TensorCall(rows_SH.device, rows_SH.dtype)).kernel.run
    out_TH: Tensor = run(rows_SH, inverse_TK, offsets_E, weights_TK, bias_EH, ids_TK)
    return out_TH


def segment_sum(rows: Rows, offsets_E: Tensor, weights_S: Tensor | None = None) -> Tensor:
    """The sum of each expert's rows, times ``weights_S`` if given: fp32 ``[E, N]`` (fp64 for fp64 rows)."""
    run = choose("segment_sum", TensorCall(rows.source_XH.device, rows.source_XH.dtype)).kernel.run
    out_EN: Tensor = run(rows, offsets_E, weights_S)
    return out_EN


def reference_gather_rows(rows: Rows) -> Tensor:
    if rows.slot_S is None:
        return rows.source_XH
    return rows.source_XH.index_select(0, torch.div(rows.slot_S, rows.top_k, rounding_mode="floor"))


def reference_combine_rows(
    rows_SH: Tensor,
    inverse_TK: Tensor,
    offsets_E: Tensor,
    weights_TK: Tensor | None,
    bias_EH: Tensor | None,
    ids_TK: Tensor | None,
) -> Tensor:
    precise = sum_dtype(rows_SH.dtype)
    tokens, top_k = inverse_TK.shape
    out_TH = torch.zeros((tokens, rows_SH.shape[1]), dtype=precise, device=rows_SH.device)
    for k in range(top_k):
        row_T = inverse_TK[:, k]
        used_T1 = (row_T < offsets_E[-1])[:, None]
        value_TH = rows_SH.index_select(0, row_T).to(precise)
        if bias_EH is not None and ids_TK is not None:
            value_TH += bias_EH.index_select(0, ids_TK[:, k].clamp(0, bias_EH.shape[0] - 1)).to(precise)
        if weights_TK is not None:
            value_TH *= weights_TK[:, k, None].to(precise)
        out_TH += torch.where(used_T1, value_TH, 0.0)
    return out_TH.to(rows_SH.dtype)


def reference_segment_sum(rows: Rows, offsets_E: Tensor, weights_S: Tensor | None) -> Tensor:
    rows_SN = rows.gathered().to(sum_dtype(rows.source_XH.dtype))
    if weights_S is not None:
        rows_SN = rows_SN * weights_S[:, None].to(rows_SN.dtype)
    place_S = torch.arange(rows_SN.shape[0], dtype=offsets_E.dtype, device=rows_SN.device)
    segment_S = torch.searchsorted(offsets_E, place_S, right=True)  # the sentinels' rows: one segment too many
    out_EN = rows_SN.new_zeros((offsets_E.numel() + 1, rows_SN.shape[1])).index_add_(0, segment_S, rows_SN)
    return out_EN[:-1]


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of ``dtype`` are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


GATHER_KERNELS = (
    Kernel("Triton", 0, triton_rejects, triton_kernel("rows", "gather_rows")),
    Kernel("reference", 100, lambda call: None, reference_gather_rows),
)
COMBINE_KERNELS = (
    Kernel("Triton", 0, triton_rejects, triton_kernel("rows", "combine_rows")),
    Kernel("reference", 100, lambda call: None, reference_combine_rows),
)
SEGMENT_SUM_KERNELS = (
    Kernel("Triton", 0, triton_rejects, triton_kernel("segment_sum", "segment_sum")),
    Kernel("reference", 100, lambda call: None, reference_segment_sum),
)
