"""Rows of a table added to hidden states: learned positions.

out_t <- out_t + table[rows_t]
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.triton_support import (
    launch_options,
    release_successor,
    runs_triton,
    wait_for_predecessor,
    widen,
)

_MAX_TILE = 1024
_VALUES_PER_WARP = 256  # one 16-byte load of bfloat16 for each of 32 threads


def add_rows_ref(table: Tensor, rows: Tensor, *, out: Tensor) -> Tensor:
    """table: [num_rows, hidden]; rows: [num_tokens] int64; out: [num_tokens, hidden] of table's dtype,
    changed and returned. Raises IndexError for a row outside the table (the kernel has no way to).
    """
    return out.add_(table.index_select(0, rows))


@triton.jit
def _add_rows_kernel(
    table,  # [num_rows, HIDDEN]
    rows,  # [num_tokens] int64
    out,  # [num_tokens, HIDDEN]
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + token)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    in_row = columns < HIDDEN
    added = widen(tl.load(table + row * HIDDEN + columns, mask=in_row, other=0.0))
    at = out + token * HIDDEN + columns
    summed = added + widen(tl.load(at, mask=in_row, other=0.0))
    release_successor(PDL)
    tl.store(at, summed.to(out.dtype.element_ty), mask=in_row)


def add_rows(table: Tensor, rows: Tensor, *, out: Tensor) -> Tensor:
    """See `add_rows_ref`. The kernel needs all tensors contiguous, and every row in the table."""
    if not runs_triton(out):
        return add_rows_ref(table, rows, out=out)
    num_tokens, hidden = out.shape
    assert rows.shape == (num_tokens,) and table.shape[1] == hidden and table.dtype == out.dtype
    assert table.is_contiguous() and rows.is_contiguous() and out.is_contiguous()
    tile = min(triton.next_power_of_2(hidden), _MAX_TILE)
    _add_rows_kernel[(num_tokens, triton.cdiv(hidden, tile))](
        table,
        rows,
        out,
        HIDDEN=hidden,
        TILE=tile,
        num_warps=max(tile // _VALUES_PER_WARP, 1),
        **launch_options(out.device),
    )
    return out
