"""Everything that a step's rows imply, gathered on the device from the slot tables.

Row r runs `query_lens[r]` = n tokens of the sequence in slot `row_slots[r]`, of which c =
num_computed_tokens[slot] positions are computed already. With s_r = sum_{q < r} query_lens[q], token
s_r + i of the step (0 <= i < n) is the sequence's token at position p = c + i:

    positions = p    token_ids = token_table[slot, p]
    slot_mapping[g] = block_tables[g, slot, p // block_size] * block_size + p % block_size
    context_lens[r] = c + n    query_starts[r] = s_r

A captured step may be larger than what runs: rows without tokens (n = 0, whatever their slot) have
context_lens 0, and the tokens that belong to no row have position 0, slot_mapping -1 and token 0. Each group
g of layers has block tables of its own, and so a slot mapping.

In a decode step token i is row i's and nobody else's: every n is 1 or 0, query_starts[r] = r, and the token
of a row without one is padding. No sums are needed then.

Reads lengths and never writes them: what a step has computed is recorded when it has computed it.
"""

from __future__ import annotations

from dataclasses import dataclass

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

_DECODE_TILE = 128  # rows of a program, one for each of its threads
_ROW_TILE = 1024  # query_lens summed at once
_TOKEN_TILE = 512
_NUM_WARPS = 4
# Programs are shared among rows so that a single long prompt is not one program's work, and many rows
# are not many times as many programs.
_MAX_ROW_PROGRAMS = 2048


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Where `step_inputs` writes; int64 and contiguous, of the bucket's sizes; slot_mapping, in each group.

    sampled_tokens[p] is the last token of pair p's row: the one whose hidden state gives p's logits.
    """

    context_lens: Tensor  # [num_rows]
    query_starts: Tensor  # [num_rows + 1]
    positions: Tensor  # [num_tokens]
    slot_mapping: Tensor  # [num_groups, num_tokens]
    token_ids: Tensor  # [num_tokens]
    sampled_tokens: Tensor  # [num_pairs]


def step_inputs_ref(
    *,
    row_slots: Tensor,
    query_lens: Tensor,
    pair_rows: Tensor,
    num_computed_tokens: Tensor,
    block_tables: Tensor,
    token_table: Tensor,
    block_size: int,
    is_decode: bool,
    out: StepInputs,
) -> None:
    """The specification; arguments as those of `step_inputs`."""
    num_rows, num_tokens = row_slots.shape[0], out.positions.shape[0]
    num_computed = num_computed_tokens[row_slots]  # [num_rows] int64
    torch.mul(num_computed + query_lens, query_lens > 0, out=out.context_lens)
    tokens = torch.arange(num_tokens, device=row_slots.device)
    if is_decode:
        torch.arange(num_rows + 1, out=out.query_starts)
        token_rows, is_real = tokens, query_lens > 0
    else:
        out.query_starts[0] = 0
        ends = torch.cumsum(query_lens, 0, out=out.query_starts[1:])
        # The first row that ends beyond the token; rows without tokens end where the row before does.
        token_rows = torch.searchsorted(ends, tokens, right=True)
        is_real = token_rows < num_rows
        token_rows = token_rows.clamp_(max=num_rows - 1)
    offsets = tokens - out.query_starts[token_rows]
    torch.mul(num_computed[token_rows] + offsets, is_real, out=out.positions)
    token_slots = row_slots[token_rows]  # [num_tokens] int64
    blocks = block_tables[:, token_slots, out.positions // block_size].long()  # [num_groups, num_tokens]
    out.slot_mapping.copy_(blocks.mul_(block_size).add_(out.positions % block_size))
    out.slot_mapping.masked_fill_(~is_real, -1)
    torch.mul(token_table[token_slots, out.positions].long(), is_real, out=out.token_ids)
    if is_decode:
        out.sampled_tokens.copy_(pair_rows)
    else:
        torch.index_select(out.query_starts, 0, pair_rows + 1, out=out.sampled_tokens)
        out.sampled_tokens.sub_(1).clamp_(min=0)


@triton.jit
def _gather_tokens(
    slot,
    position,
    at,
    is_real,
    in_step,
    block_tables,
    token_table,
    positions,
    slot_mapping,
    token_ids,
    GROUP_STRIDE: tl.constexpr,
    MAPPING_STRIDE: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    TABLE_WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Write what slots (int64) and positions (int32) say of the tokens `at`, where in_step, for the program's
    group of layers; what is the same in all groups is the first one's to write.

    Nothing is looked up for a token that is not real: it is padding, and its position is 0 already.
    """
    group = tl.program_id(1)
    table = block_tables + group.to(tl.int64) * GROUP_STRIDE
    is_first = tl.zeros_like(position) + group == 0
    block = tl.load(table + slot * MAX_BLOCKS + position // BLOCK_SIZE, mask=is_real, other=0)
    token = tl.load(token_table + slot * TABLE_WIDTH + position, mask=is_real & is_first, other=0)
    cache_slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    mapping = slot_mapping + group * MAPPING_STRIDE
    tl.store(positions + at, position.to(tl.int64), mask=in_step & is_first)
    tl.store(mapping + at, tl.where(is_real, cache_slot, -1), mask=in_step)
    tl.store(token_ids + at, token.to(tl.int64), mask=in_step & is_first)


@triton.jit(do_not_specialize=["num_rows", "num_pairs"])
def _decode_inputs_kernel(
    row_slots,
    query_lens,
    pair_rows,
    num_computed_tokens,
    block_tables,
    token_table,
    context_lens,
    query_starts,
    positions,
    slot_mapping,
    token_ids,
    sampled_tokens,
    num_rows,
    num_pairs,
    GROUP_STRIDE: tl.constexpr,
    MAPPING_STRIDE: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    TABLE_WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program for TILE rows, which are the tokens too, and as many pairs, in each group of layers."""
    wait_for_predecessor(PDL)
    release_successor(PDL)
    line = tl.program_id(0) * TILE + tl.arange(0, TILE)
    in_rows = line < num_rows
    slot = tl.load(row_slots + line, mask=in_rows, other=0)
    is_real = tl.load(query_lens + line, mask=in_rows, other=0) > 0
    pair_row = tl.load(pair_rows + line, mask=line < num_pairs, other=0)
    tl.store(sampled_tokens + line, pair_row, mask=line < num_pairs)
    tl.store(query_starts + line, line.to(tl.int64), mask=line <= num_rows)
    position = tl.load(num_computed_tokens + slot, mask=is_real, other=0).to(tl.int32)
    tl.store(context_lens + line, tl.where(is_real, position + 1, 0).to(tl.int64), mask=in_rows)
    _gather_tokens(
        slot,
        position,
        line,
        is_real,
        in_rows,
        block_tables,
        token_table,
        positions,
        slot_mapping,
        token_ids,
        GROUP_STRIDE,
        MAPPING_STRIDE,
        MAX_BLOCKS,
        TABLE_WIDTH,
        BLOCK_SIZE,
    )


@triton.jit
def _count_tokens(query_lens, end_row, ROW_TILE: tl.constexpr):
    """How many tokens the rows before `end_row` have."""
    count = tl.zeros([ROW_TILE], dtype=tl.int32)
    for first in range(0, end_row, ROW_TILE):
        rows = first + tl.arange(0, ROW_TILE)
        count += tl.load(query_lens + rows, mask=rows < end_row, other=0).to(tl.int32)
    return tl.sum(count, axis=0)


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "num_shares"])
def _mixed_inputs_kernel(
    row_slots,
    query_lens,
    pair_rows,
    num_computed_tokens,
    block_tables,
    token_table,
    context_lens,
    query_starts,
    positions,
    slot_mapping,
    token_ids,
    sampled_tokens,
    num_rows,
    num_tokens,
    num_shares,
    GROUP_STRIDE: tl.constexpr,
    MAPPING_STRIDE: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    TABLE_WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    TOKEN_TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """num_shares programs a row, which take turns at its tiles; then as many for padding; then one a pair.
    All of them for each group of layers.

    Each sums the lengths of the rows before its own, which is cheaper than a launch that does it for all.
    """
    wait_for_predecessor(PDL)
    release_successor(PDL)
    row = tl.program_id(0) // num_shares
    share = tl.program_id(0) % num_shares
    pair = tl.program_id(0) - (num_rows + 1) * num_shares
    if pair >= 0:
        pair_end = _count_tokens(query_lens, tl.load(pair_rows + pair) + 1, ROW_TILE)
        tl.store(sampled_tokens + pair, tl.maximum(pair_end - 1, 0).to(tl.int64))
    else:
        start = _count_tokens(query_lens, row, ROW_TILE)
        if share == 0:
            tl.store(query_starts + row, start.to(tl.int64))
        if row < num_rows:
            slot = tl.load(row_slots + row)
            length = tl.load(query_lens + row).to(tl.int32)
            num_computed = tl.load(num_computed_tokens + slot).to(tl.int32)
            if share == 0:
                context_len = tl.where(length > 0, num_computed + length, 0)
                tl.store(context_lens + row, context_len.to(tl.int64))
            for first in range(share * TOKEN_TILE, length, num_shares * TOKEN_TILE):
                offsets = first + tl.arange(0, TOKEN_TILE)
                _gather_tokens(
                    slot,
                    num_computed + offsets,
                    start + offsets,
                    offsets < length,
                    offsets < length,
                    block_tables,
                    token_table,
                    positions,
                    slot_mapping,
                    token_ids,
                    GROUP_STRIDE,
                    MAPPING_STRIDE,
                    MAX_BLOCKS,
                    TABLE_WIDTH,
                    BLOCK_SIZE,
                )
        else:
            for first in range(start + share * TOKEN_TILE, num_tokens, num_shares * TOKEN_TILE):
                at = first + tl.arange(0, TOKEN_TILE)
                zeros = tl.zeros([TOKEN_TILE], dtype=tl.int64)
                tl.store(positions + at, zeros, mask=at < num_tokens)
                mapping = slot_mapping + tl.program_id(1) * MAPPING_STRIDE
                tl.store(mapping + at, zeros - 1, mask=at < num_tokens)
                tl.store(token_ids + at, zeros, mask=at < num_tokens)


def step_inputs(
    *,
    row_slots: Tensor,
    query_lens: Tensor,
    pair_rows: Tensor,
    num_computed_tokens: Tensor,
    block_tables: Tensor,
    token_table: Tensor,
    block_size: int,
    is_decode: bool,
    out: StepInputs,
) -> None:
    """Fill `out` from the step's rows and the slot tables, in one launch; all tensors contiguous, but for
    out.slot_mapping, whose groups may lie apart.

    row_slots, query_lens: [num_rows] int64, query_lens no more than out's tokens in all; pair_rows:
    [num_pairs] int64, rows; num_computed_tokens: [num_slots] int64; block_tables: [num_groups, num_slots,
    max_blocks] int32; token_table: [num_slots, width] int32. is_decode: row i has token i and no other, so
    that there are as many tokens as rows.
    """
    if not runs_triton(row_slots):
        step_inputs_ref(
            row_slots=row_slots,
            query_lens=query_lens,
            pair_rows=pair_rows,
            num_computed_tokens=num_computed_tokens,
            block_tables=block_tables,
            token_table=token_table,
            block_size=block_size,
            is_decode=is_decode,
            out=out,
        )
        return
    num_rows, num_tokens, num_pairs = row_slots.shape[0], out.positions.shape[0], pair_rows.shape[0]
    assert out.query_starts.shape == (num_rows + 1,) and out.sampled_tokens.shape == (num_pairs,)
    assert block_tables.is_contiguous() and token_table.is_contiguous() and out.slot_mapping.stride(1) == 1
    num_groups = len(block_tables)
    tensors = (
        *(row_slots, query_lens, pair_rows, num_computed_tokens, block_tables, token_table),
        *(out.context_lens, out.query_starts, out.positions, out.slot_mapping, out.token_ids),
        out.sampled_tokens,
    )
    options = {
        "GROUP_STRIDE": block_tables.stride(0),
        "MAPPING_STRIDE": out.slot_mapping.stride(0),
        "MAX_BLOCKS": block_tables.shape[2],
        "TABLE_WIDTH": token_table.shape[1],
        "BLOCK_SIZE": block_size,
        "num_warps": _NUM_WARPS,
        **launch_options(row_slots.device),
    }
    if is_decode:
        assert num_tokens == num_rows
        grid = (triton.cdiv(max(num_rows + 1, num_pairs), _DECODE_TILE), num_groups)
        _decode_inputs_kernel[grid](*tensors, num_rows, num_pairs, TILE=_DECODE_TILE, **options)
        return
    num_shares = max(1, min(triton.cdiv(num_tokens, _TOKEN_TILE), _MAX_ROW_PROGRAMS // (num_rows + 1)))
    _mixed_inputs_kernel[((num_rows + 1) * num_shares + num_pairs, num_groups)](
        *tensors,
        num_rows,
        num_tokens,
        num_shares,
        ROW_TILE=_ROW_TILE,
        TOKEN_TILE=_TOKEN_TILE,
        **options,
    )
