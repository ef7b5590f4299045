"""A stable counting sort of expert ids on the GPU: three small kernels, no atomics, nothing the host waits for.

Each block of `_BLOCK` ids counts its experts; the counts are summed down the blocks; then every id's place is the start
of its expert, plus the ids of that expert in earlier blocks, plus those before it in its own block.
Ids outside [0, E), the sentinels of expert parallelism, share one more bucket, which comes last.

Shape suffixes: S routed rows, E experts, B blocks, P the power of two above E.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft_plugins.kernels.triton.launch import launch
from fastft_plugins.kernels.triton_support import cdiv, next_power_of_2

_CHUNK = 128  # ids that one program compares pairwise
_BLOCK = 512  # ids that one row of the table of counts covers


def counting_sort(ids_S: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `fastft_plugins.kernels.counting_sort.counting_sort`."""
    size, device = ids_S.numel(), ids_S.device
    order_S, inverse_S = (torch.empty(size, dtype=torch.int32, device=device) for _ in range(2))
    blocks, width = cdiv(size, _BLOCK), next_power_of_2(num_experts + 1)
    table_BP = torch.empty((blocks, width), dtype=torch.int32, device=device)
    counts_P = torch.empty(width, dtype=torch.int32, device=device)
    if size:
        launch(_count, (blocks, 1, 1), ids_S, table_BP, size, num_experts, P=width, BLOCK=_BLOCK)
    columns = min(width, 32)
    launch(_scan_blocks, (width // columns, 1, 1), table_BP, counts_P, blocks, P=width, ROWS=64, COLUMNS=columns)
    offsets_E = torch.empty(num_experts, dtype=torch.int32, device=device)
    launch(
        _place, (max(1, cdiv(size, _CHUNK)), 1, 1),
        ids_S, table_BP, counts_P, offsets_E, order_S, inverse_S, size, num_experts,
        P=width, PIECE=min(width, 64), CHUNK=_CHUNK, BLOCK=_BLOCK,
    )  # fmt: skip
    return order_S, inverse_S, counts_P[:num_experts], offsets_E


@triton.jit
def _load_ids(ids_ptr, places, size, E):
    """Ids as buckets: sentinels and places beyond the end go to bucket E. Compared before the cast, which may wrap."""
    inside = places < size
    ids = tl.load(ids_ptr + places, mask=inside, other=0)
    return tl.where(inside & (ids >= 0) & (ids < E), ids.to(tl.int32), E)


@triton.jit(do_not_specialize=["size"])
def _count(ids_ptr, table_ptr, size, E, P: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    ids = _load_ids(ids_ptr, block * BLOCK + tl.arange(0, BLOCK), size, E)
    tl.store(table_ptr + block.to(tl.int64) * P + tl.arange(0, P), tl.histogram(ids, P))


@triton.jit(do_not_specialize=["blocks"])
def _scan_blocks(table_ptr, counts_ptr, blocks, P: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Replace each count by the sum of the counts above it in its column, and keep the column's total."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.int32)
    for first in range(0, blocks, ROWS):
        rows = first + tl.arange(0, ROWS)
        pointers = table_ptr + rows[:, None].to(tl.int64) * P + columns[None, :]
        inside = rows[:, None] < blocks
        counts = tl.load(pointers, mask=inside, other=0)
        tl.store(pointers, total[None, :] + tl.cumsum(counts, 0) - counts, mask=inside)
        total += tl.sum(counts, 0)
    tl.store(counts_ptr + columns, total)


@triton.jit(do_not_specialize=["size"])
def _place(
    ids_ptr, table_ptr, counts_ptr, offsets_ptr, order_ptr, inverse_ptr, size, E,
    P: tl.constexpr, PIECE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every id's place and its inverse. Counts are summed a PIECE of the experts at a time, for the registers."""
    chunk = tl.program_id(0)
    if chunk == 0:  # one program is enough for the offsets
        experts = tl.arange(0, P)
        tl.store(offsets_ptr + experts, tl.cumsum(tl.load(counts_ptr + experts), 0), mask=experts < E)
    lane = tl.arange(0, CHUNK)
    places = chunk * CHUNK + lane
    inside = places < size
    ids = _load_ids(ids_ptr, places, size, E)
    block = chunk * CHUNK // BLOCK
    start = tl.load(table_ptr + block.to(tl.int64) * P + ids, mask=inside, other=0)
    for first in range(0, P, PIECE):
        experts = first + tl.arange(0, PIECE)
        counts = tl.load(counts_ptr + experts)
        start += tl.sum(tl.where(experts[None, :] < ids[:, None], counts[None, :], 0), 1)
    earlier_here = (ids[None, :] == ids[:, None]) & (lane[None, :] < lane[:, None])
    start += tl.sum(earlier_here.to(tl.int32), 1)
    for before in range(block * BLOCK, chunk * CHUNK, CHUNK):
        others = _load_ids(ids_ptr, before + lane, size, E)
        start += tl.sum((others[None, :] == ids[:, None]).to(tl.int32), 1)
    tl.store(inverse_ptr + places, start, mask=inside)
    tl.store(order_ptr + start, places, mask=inside)
