"""Attention of decode rows over a paged cache, with split contexts, and the step that joins the splits.

For each entry of a decode work list (see attention_work_list.py), each KV head and its query heads h:

    m_h = max_i s_{h,i},  l_h = sum_i e^(s_{h,i} - m_h),  a_h = sum_i e^(s_{h,i} - m_h) v_i

over the entry's positions i, with the scores s of paged_attention.py, log2(e) taken into s and m. A row's
only entry is divided and stored, y_h = a_h / (l_h + e^(sink_h - m_h)). Entries of cut rows leave (a, m, l) as
partial results, and the combination joins them in the order of positions, with m* = max_e m_e:

    y_h = sum_e e^(m_e - m*) a_e / (sum_e e^(m_e - m*) l_e + e^(sink_h - m*))

The query heads of a KV head stand side by side in one tile, so that keys and values are read once, and
num_programs programs a KV head, whose work lists are alike and lie together in the launch, read neighbouring
memory at the same time. The order of all sums is fixed by the list: the same step gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.attention_tiles import (
    LOG2_E,
    NO_MAXIMUM,
    attend_tile,
    cache_rows,
    capability_of,
    padded_side,
)
from graphllm.kernels.attention_work_list import CUT_FIELDS, ENTRY_FIELDS, DecodeWorkList
from graphllm.kernels.triton_support import (
    launch_options,
    release_successor,
    runs_triton,
    wait_for_predecessor,
)

PROGRAMS_PER_MULTIPROCESSOR = 3
"""All programs must be on the card at once, or equal shares are not equal times."""

_LOG2_E: tl.constexpr = tl.constexpr(LOG2_E)
_NO_MAXIMUM: tl.constexpr = tl.constexpr(NO_MAXIMUM)
_PARTIALS_A_STEP_BYTES = 16384
_NUM_WARPS = 4
# Of the 65536 of a multiprocessor, for PROGRAMS_PER_MULTIPROCESSOR programs of four warps, in eights.
_REGISTERS_A_THREAD = 168
# Major compute capabilities with 228 KiB a multiprocessor; 8.0 has 164, others 100.
_LARGE_SHARED_MEMORY = (9, 10)


@dataclass(frozen=True, slots=True)
class DecodePartials:
    """Results of entries of cut rows. Scratch: nothing is kept from one layer to the next.

    accumulators: [num_entries, num_heads, head_dim] float32; statistics: [num_entries, num_heads, 2] float32,
    maximum (in units of log2) and sum. Contiguous; num_entries as in the work list.
    """

    accumulators: Tensor
    statistics: Tensor


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How the decode kernel is compiled. tile: keys a step; max_registers: of a thread, None for no limit."""

    tile: int
    num_stages: int
    max_registers: int | None


def decode_config(
    head_dim: int, query_itemsize: int, cache_itemsize: int, *, capability: tuple[int, int]
) -> DecodeConfig:
    """Tiles of at most 16 KiB of keys and as many of values, PROGRAMS_PER_MULTIPROCESSOR times.

    Numbers of blocks are loaded a step before what they point to, so of five stages two are tiles in flight,
    and of three one: enough, in three programs, for all cards but those with the memory for more.
    """
    if query_itemsize > 2:  # float32 has no matrix units here and is not meant to be fast
        return DecodeConfig(tile=32, num_stages=3, max_registers=None)
    tile = 64 if padded_side(head_dim) <= 128 else 32
    if capability[0] in _LARGE_SHARED_MEMORY:
        if cache_itemsize == 1 and padded_side(head_dim) == 128:
            tile = 32  # the conversion of 64 keys of 128 dimensions does not fit the registers
        return DecodeConfig(tile=tile, num_stages=5, max_registers=_REGISTERS_A_THREAD)
    # Elsewhere either shared memory is short, or registers for the conversion of 8 bits.
    is_ample = capability == (8, 0) and cache_itemsize == 2
    return DecodeConfig(tile=tile if is_ample else 32, num_stages=3, max_registers=_REGISTERS_A_THREAD)


def num_decode_programs(num_multiprocessors: int, num_kv_heads: int) -> int:
    """Programs of each KV head that fill a card of so many multiprocessors; at least 1."""
    return max(1, PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors // num_kv_heads)


def paged_decode_attention_ref(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    block_tables: Tensor,
    work: DecodeWorkList,
    partials: DecodePartials,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    out: Tensor,
) -> Tensor:
    """Entry by entry; arguments as in `paged_decode_attention`."""
    num_heads, num_kv_heads, block_size = query.shape[1], key_cache.shape[2], key_cache.shape[1]
    for entry, (token, slot, first, last, _, _, is_whole, _) in enumerate(work.entries.tolist()):
        if first == last:
            continue
        positions = torch.arange(first, last, device=query.device)
        slots = block_tables[slot][positions // block_size].long(), positions % block_size
        keys, values = key_cache[slots].float(), value_cache[slots].float()
        if key_scale is not None and value_scale is not None:
            keys, values = keys * key_scale[slots][..., None], values * value_scale[slots][..., None]
        queries = query[token].float().unflatten(0, (num_kv_heads, -1))
        scores = torch.einsum("grd,kgd->grk", queries, keys).flatten(0, 1) * scale  # [num_heads, num_keys]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if slopes is not None:
            scores = scores + slopes[:, None] * positions
        scores = scores * LOG2_E
        maxima = scores.amax(-1)
        weights = torch.exp2(scores - maxima[:, None])
        attended = torch.einsum("grk,kgd->grd", weights.unflatten(0, (num_kv_heads, -1)), values)
        attended, sums = attended.reshape(num_heads, -1), weights.sum(-1)
        if is_whole:
            if sinks is not None:
                sums = sums + torch.exp2(sinks * LOG2_E - maxima)
            out[token] = (attended / sums[:, None]).to(out.dtype)
        else:
            partials.accumulators[entry] = attended
            partials.statistics[entry] = torch.stack((maxima, sums), dim=-1)
    return out


@triton.jit(do_not_specialize=["table_stride"])
def _paged_decode_attention_kernel(
    query,
    key_cache,
    value_cache,
    key_scale,
    value_scale,
    block_tables,
    entries,
    sinks,
    slopes,
    accumulators,
    statistics,
    out,
    table_stride,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    IS_SCALED: tl.constexpr,
    QUERY_STRIDE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ENTRY_FIELDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (p, KV head) works off entry p and those that follow it."""
    wait_for_predecessor(PDL)
    release_successor(PDL)
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    entry = tl.program_id(0) // NUM_KV_HEADS
    head_in_group = tl.arange(0, HEADS)
    heads = kv_head * GROUP + head_in_group
    dims = tl.arange(0, DIMS)
    is_head = head_in_group < GROUP
    is_element = is_head[:, None] & (dims < HEAD_DIM)[None, :]

    head_slopes = heads  # anything, where there are none
    if HAS_SLOPES:
        head_slopes = tl.load(slopes + heads, mask=is_head, other=0.0)
    record = entries + entry * ENTRY_FIELDS
    token = tl.load(record)
    slot = tl.load(record + 1)
    first = tl.load(record + 2)
    last = tl.load(record + 3)
    num_following = tl.load(record + 4)
    following = tl.load(record + 5)
    is_whole = tl.load(record + 6)
    for index in range(0, num_following + 1):
        # The next record is on its way while this one is attended.
        is_more = index < num_following
        next_entry = following + index
        record = entries + next_entry * ENTRY_FIELDS
        next_token = tl.load(record, mask=is_more, other=0)
        next_slot = tl.load(record + 1, mask=is_more, other=0)
        next_first = tl.load(record + 2, mask=is_more, other=0)
        next_last = tl.load(record + 3, mask=is_more, other=0)
        next_is_whole = tl.load(record + 6, mask=is_more, other=0)
        if first < last:
            elements = heads[:, None] * HEAD_DIM + dims[None, :]
            queries = tl.load(
                query + token.to(tl.int64) * QUERY_STRIDE + elements, mask=is_element, other=0.0
            )
            table = block_tables + slot.to(tl.int64) * table_stride
            accumulator = tl.zeros([HEADS, DIMS], dtype=tl.float32)
            total = tl.zeros([HEADS], dtype=tl.float32)
            maximum = tl.full([HEADS], _NO_MAXIMUM, dtype=tl.float32)
            for start in range(first, last, TILE):
                positions = start + tl.arange(0, TILE)
                is_inside = positions < last
                accumulator, total, maximum = attend_tile(
                    queries,
                    accumulator,
                    total,
                    maximum,
                    key_cache,
                    value_cache,
                    key_scale,
                    value_scale,
                    cache_rows(table, positions, is_inside, BLOCK_SIZE),
                    positions,
                    is_inside,
                    is_inside[None, :],
                    kv_head,
                    head_slopes,
                    SCALE,
                    SOFTCAP,
                    NUM_KV_HEADS,
                    HEAD_DIM,
                    DIMS,
                    HAS_SLOPES,
                    IS_SCALED,
                    True,
                )
            if is_whole != 0:
                if HAS_SINKS:
                    sink = tl.load(sinks + heads, mask=is_head, other=0.0)
                    total += tl.exp2(sink * _LOG2_E - maximum)
                attended = accumulator / total[:, None]
                row_of_out = out + token.to(tl.int64) * (NUM_HEADS * HEAD_DIM)
                tl.store(row_of_out + elements, attended.to(out.dtype.element_ty), mask=is_element)
            else:
                partial = accumulators + entry.to(tl.int64) * (NUM_HEADS * HEAD_DIM)
                tl.store(partial + elements, accumulator, mask=is_element)
                pair = statistics + (entry * NUM_HEADS + heads) * 2
                tl.store(pair, maximum, mask=is_head)
                tl.store(pair + 1, total, mask=is_head)
        entry = next_entry
        token = next_token
        slot = next_slot
        first = next_first
        last = next_last
        is_whole = next_is_whole


def paged_decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    block_tables: Tensor,
    work: DecodeWorkList,
    partials: DecodePartials,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    out: Tensor,
) -> Tensor:
    """Attend the decode rows of `work`: whole rows into `out`, cut rows into `partials`.

    query: [num_tokens, num_heads, head_dim], heads and their dimensions contiguous, num_heads a multiple of
    num_kv_heads; caches: [num_blocks, block_size, num_kv_heads, head_dim], contiguous; block_tables:
    [num_slots, max_blocks] int32; scale: positive; sinks, slopes: [num_heads] float32, not both; key_scale,
    value_scale: [num_blocks, block_size, num_kv_heads] float32 for caches in 8 bits; out: [num_tokens,
    num_heads, head_dim], contiguous. The window is the work list's. `combine_decode_partials` must follow.
    """
    if not runs_triton(query):
        return paged_decode_attention_ref(
            query,
            key_cache,
            value_cache,
            block_tables=block_tables,
            work=work,
            partials=partials,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            slopes=slopes,
            key_scale=key_scale,
            value_scale=value_scale,
            out=out,
        )
    _, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, _ = key_cache.shape
    assert (
        scale > 0
        and (sinks is None or slopes is None)
        and query.stride()[1:] == (head_dim, 1)
        and out.is_contiguous()
        and block_tables.stride(1) == 1
    )
    config = decode_config(
        head_dim, query.element_size(), key_cache.element_size(), capability=capability_of(query.device)
    )
    _paged_decode_attention_kernel[(work.num_programs * num_kv_heads,)](
        query,
        key_cache,
        value_cache,
        key_scale,
        value_scale,
        block_tables,
        work.entries,
        sinks,
        slopes,
        partials.accumulators,
        partials.statistics,
        out,
        block_tables.stride(0),
        SCALE=scale,
        SOFTCAP=softcap or 0.0,
        HAS_SINKS=sinks is not None,
        HAS_SLOPES=slopes is not None,
        IS_SCALED=key_scale is not None,
        QUERY_STRIDE=query.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        DIMS=padded_side(head_dim),
        HEADS=padded_side(num_heads // num_kv_heads),
        BLOCK_SIZE=block_size,
        TILE=config.tile,
        ENTRY_FIELDS=ENTRY_FIELDS,
        num_warps=_NUM_WARPS,
        num_stages=config.num_stages,
        maxnreg=config.max_registers,
        **launch_options(query.device),
    )
    return out


def combine_decode_partials_ref(
    partials: DecodePartials, work: DecodeWorkList, *, sinks: Tensor | None = None, out: Tensor
) -> Tensor:
    """Row by row; arguments as in `combine_decode_partials`."""
    for token, first, rest, num_pieces in work.cuts.tolist():
        if num_pieces == 0:
            continue
        entries = [first, *range(rest + 1, rest + num_pieces)]
        maxima, sums = partials.statistics[entries].unbind(-1)  # [num_pieces, num_heads] each
        weights = torch.exp2(maxima - maxima.amax(0))
        total = (weights * sums).sum(0)
        if sinks is not None:
            total = total + torch.exp2(sinks * LOG2_E - maxima.amax(0))
        attended = (weights[..., None] * partials.accumulators[entries]).sum(0)
        out[token] = (attended / total[:, None]).to(out.dtype)
    return out


@triton.jit
def _combine_decode_partials_kernel(
    accumulators,
    statistics,
    cuts,
    sinks,
    out,
    HAS_SINKS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    PIECES: tl.constexpr,
    CUT_FIELDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (cut, head). PIECES partial results are read at once: one after the other would be latency."""
    wait_for_predecessor(PDL)
    release_successor(PDL)
    head = tl.program_id(1)
    cut = cuts + tl.program_id(0) * CUT_FIELDS
    token = tl.load(cut)
    first = tl.load(cut + 1)
    rest = tl.load(cut + 2)
    num_pieces = tl.load(cut + 3)
    if num_pieces > 0:
        dims = tl.arange(0, DIMS)
        is_dim = dims < HEAD_DIM
        attended = tl.zeros([DIMS], dtype=tl.float32)
        total = 0.0
        maximum = _NO_MAXIMUM
        for start in range(0, num_pieces, PIECES):
            pieces = start + tl.arange(0, PIECES)
            is_piece = pieces < num_pieces
            rows = tl.where(pieces == 0, first, rest + pieces) * NUM_HEADS + head
            maxima = tl.load(statistics + rows * 2, mask=is_piece, other=_NO_MAXIMUM)
            sums = tl.load(statistics + rows * 2 + 1, mask=is_piece, other=0.0)
            tile = tl.load(
                accumulators + rows.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :],
                mask=is_piece[:, None] & is_dim[None, :],
                other=0.0,
            )
            new_maximum = tl.maximum(maximum, tl.max(maxima, 0))
            decay = tl.exp2(maximum - new_maximum)
            weights = tl.exp2(maxima - new_maximum)
            attended = attended * decay + tl.sum(weights[:, None] * tile, 0)
            total = total * decay + tl.sum(weights * sums, 0)
            maximum = new_maximum
        if HAS_SINKS:
            total += tl.exp2(tl.load(sinks + head) * _LOG2_E - maximum)
        to = out + (token.to(tl.int64) * NUM_HEADS + head) * HEAD_DIM + dims
        tl.store(to, (attended / total).to(out.dtype.element_ty), mask=is_dim)


def combine_decode_partials(
    partials: DecodePartials, work: DecodeWorkList, *, sinks: Tensor | None = None, out: Tensor
) -> Tensor:
    """Join the partial results of the rows that `work` cut, into their rows of `out`.

    sinks: [num_heads] float32; out: [num_tokens, num_heads, head_dim], contiguous.
    """
    if not runs_triton(out):
        return combine_decode_partials_ref(partials, work, sinks=sinks, out=out)
    if len(work.cuts) == 0:  # one program a KV head cuts nothing
        return out
    _, num_heads, head_dim = out.shape
    dims = padded_side(head_dim)
    _combine_decode_partials_kernel[(len(work.cuts), num_heads)](
        partials.accumulators,
        partials.statistics,
        work.cuts,
        sinks,
        out,
        HAS_SINKS=sinks is not None,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        DIMS=dims,
        PIECES=_PARTIALS_A_STEP_BYTES // (4 * dims),
        CUT_FIELDS=CUT_FIELDS,
        num_warps=_NUM_WARPS,
        **launch_options(out.device),
    )
    return out
