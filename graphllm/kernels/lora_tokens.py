"""Which adapter each token of a step has.

    out_t = slot_adapters[row_slots[r]],  t a token of row r;  out_t = -1 for tokens of no row

Row r's tokens are those from query_starts[r] on, query_lens[r] of them, as `step_inputs` has found. In a
decode step token r is row r's where that has one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.triton_support import (
    launch_options,
    release_successor,
    runs_triton,
    wait_for_predecessor,
)

_DECODE_TILE = 128
_TOKEN_TILE = 512
_NUM_WARPS = 4
# As in `step_inputs.py`: a long prompt is shared among programs, unless rows are many.
_MAX_ROW_PROGRAMS = 2048


def lora_tokens_ref(
    *,
    row_slots: Tensor,
    query_lens: Tensor,
    query_starts: Tensor,
    slot_adapters: Tensor,
    is_decode: bool,
    out: Tensor,
) -> Tensor:
    """The specification; arguments as those of `lora_tokens`."""
    of_rows = slot_adapters[row_slots]  # [num_rows] int32
    out.fill_(-1)
    if is_decode:
        return out.copy_(of_rows.masked_fill(query_lens <= 0, -1))
    num_real = int(query_starts[-1])
    out[:num_real] = torch.repeat_interleave(of_rows, query_lens)
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _decode_tokens_kernel(
    row_slots,
    query_lens,
    slot_adapters,
    out,
    num_rows,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    release_successor(PDL)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    in_rows = row < num_rows
    slot = tl.load(row_slots + row, mask=in_rows, other=0)
    is_real = tl.load(query_lens + row, mask=in_rows, other=0) > 0
    adapter = tl.load(slot_adapters + slot, mask=is_real, other=-1)
    tl.store(out + row, adapter, mask=in_rows)


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "num_shares"])
def _mixed_tokens_kernel(
    row_slots,
    query_starts,
    slot_adapters,
    out,
    num_rows,
    num_tokens,
    num_shares,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """num_shares programs a row, which take turns at its tiles; then as many for padding."""
    wait_for_predecessor(PDL)
    release_successor(PDL)
    row = tl.program_id(0) // num_shares
    share = tl.program_id(0) % num_shares
    start = tl.load(query_starts + row).to(tl.int32)
    if row < num_rows:
        end = tl.load(query_starts + row + 1).to(tl.int32)
        adapter = tl.load(slot_adapters + tl.load(row_slots + row))
    else:
        end = num_tokens.to(tl.int32)
        adapter = tl.full((), -1, tl.int32)
    for first in range(start + share * TILE, end, num_shares * TILE):
        at = first + tl.arange(0, TILE)
        tl.store(out + at, tl.zeros([TILE], dtype=tl.int32) + adapter, mask=at < end)


def lora_tokens(
    *,
    row_slots: Tensor,
    query_lens: Tensor,
    query_starts: Tensor,
    slot_adapters: Tensor,
    is_decode: bool,
    out: Tensor,
) -> Tensor:
    """Write each token's adapter into `out`, in one launch, and return it; all tensors are contiguous.

    row_slots, query_lens: [num_rows] int64; query_starts: [num_rows + 1] int64; slot_adapters: [num_slots]
    int32, the adapter of each slot's sequence or -1; out: [num_tokens] int32. is_decode: row i has token i
    and no other, so that there are as many tokens as rows.
    """
    if not runs_triton(row_slots):
        return lora_tokens_ref(
            row_slots=row_slots,
            query_lens=query_lens,
            query_starts=query_starts,
            slot_adapters=slot_adapters,
            is_decode=is_decode,
            out=out,
        )
    num_rows, num_tokens = len(row_slots), len(out)
    assert query_starts.shape == (num_rows + 1,) and slot_adapters.dtype == out.dtype == torch.int32
    options = {"num_warps": _NUM_WARPS, **launch_options(row_slots.device)}
    if is_decode:
        assert num_tokens == num_rows
        grid = (triton.cdiv(num_rows, _DECODE_TILE),)
        _decode_tokens_kernel[grid](
            row_slots, query_lens, slot_adapters, out, num_rows, TILE=_DECODE_TILE, **options
        )
        return out
    num_shares = max(1, min(triton.cdiv(num_tokens, _TOKEN_TILE), _MAX_ROW_PROGRAMS // (num_rows + 1)))
    _mixed_tokens_kernel[((num_rows + 1) * num_shares,)](
        row_slots,
        query_starts,
        slot_adapters,
        out,
        num_rows,
        num_tokens,
        num_shares,
        TILE=_TOKEN_TILE,
        **options,
    )
    return out
