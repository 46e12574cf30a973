"""Decode rows over a paged cache of latents, with split contexts.

The entries of a decode work list and the partial results of cut rows are those of
paged_decode_attention.py, whose `combine_decode_partials` joins them; scores and sums are those of
paged_latent_attention.py. One tile has up to `heads_per_tile` heads of a row: all of them read the same
latents, so the more stand side by side the fewer times the cache is read. With more heads than that,
programs of the same entry and other heads are neighbours in the launch and find the latents in the L2 cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.attention_tiles import LOG2_E, NO_MAXIMUM, cache_rows, capability_of, padded_side
from graphllm.kernels.attention_work_list import ENTRY_FIELDS, DecodeWorkList
from graphllm.kernels.latent_tiles import attend_latents, load_part
from graphllm.kernels.paged_decode_attention import DecodePartials
from graphllm.kernels.triton_support import (
    launch_options,
    release_successor,
    runs_triton,
    wait_for_predecessor,
)

_NO_MAXIMUM: tl.constexpr = tl.constexpr(NO_MAXIMUM)
# Major compute capabilities with 228 KiB a multiprocessor.
_LARGE_SHARED_MEMORY = (9, 10)


@dataclass(frozen=True, slots=True)
class LatentDecodeConfig:
    """How the kernel is compiled and spread. tile: tokens a step, at most a granule of the work list."""

    heads_per_tile: int
    tile: int
    num_warps: int
    num_stages: int
    programs_per_multiprocessor: int


def latent_decode_config(
    num_heads: int, query_itemsize: int, cache_itemsize: int, *, capability: tuple[int, int]
) -> LatentDecodeConfig:
    """Tiles of 32 latents for 16 heads in two programs a multiprocessor, or for 32 heads in one.

    More heads would read the cache fewer times, and their sums do not fit the registers. Numbers of blocks
    are loaded a step before what they point to, so of five stages two are tiles in flight, and of three one.
    """
    if query_itemsize > 2:  # float32 has no matrix units here and is not meant to be fast
        return LatentDecodeConfig(16, 16, num_warps=4, num_stages=1, programs_per_multiprocessor=1)
    if cache_itemsize == 1:  # the conversion takes registers
        return LatentDecodeConfig(16, 32, num_warps=8, num_stages=3, programs_per_multiprocessor=1)
    num_stages = 5 if capability[0] in _LARGE_SHARED_MEMORY else 3
    if num_heads > 16:
        return LatentDecodeConfig(32, 32, num_warps=8, num_stages=num_stages, programs_per_multiprocessor=1)
    return LatentDecodeConfig(16, 32, num_warps=4, num_stages=num_stages, programs_per_multiprocessor=2)


def num_latent_decode_programs(num_multiprocessors: int, num_heads: int, config: LatentDecodeConfig) -> int:
    """Programs of each tile of heads that fill a card of so many multiprocessors; at least 1."""
    num_tiles = -(-num_heads // config.heads_per_tile)
    return max(1, config.programs_per_multiprocessor * num_multiprocessors // num_tiles)


def paged_latent_decode_ref(
    query: Tensor,
    cache: Tensor,
    *,
    block_tables: Tensor,
    work: DecodeWorkList,
    partials: DecodePartials,
    scale: float,
    cache_scale: Tensor | None = None,
    out: Tensor,
) -> Tensor:
    """Entry by entry; arguments as in `paged_latent_decode`."""
    block_size, rank = cache.shape[1], out.shape[2]
    for entry, (token, slot, first, last, _, _, is_whole, _) in enumerate(work.entries.tolist()):
        if first == last:
            continue
        positions = torch.arange(first, last, device=query.device)
        slots = block_tables[slot][positions // block_size].long(), positions % block_size
        latents = cache[slots].float()
        if cache_scale is not None:
            latents = latents * cache_scale[slots][:, None]
        scores = query[token].float() @ latents.T * (scale * LOG2_E)  # [num_heads, num_positions]
        maxima = scores.amax(-1)
        weights = torch.exp2(scores - maxima[:, None])
        attended, sums = weights @ latents[:, :rank], weights.sum(-1)
        if is_whole:
            out[token] = (attended / sums[:, None]).to(out.dtype)
        else:
            partials.accumulators[entry] = attended
            partials.statistics[entry] = torch.stack((maxima, sums), dim=-1)
    return out


@triton.jit(do_not_specialize=["table_stride"])
def _paged_latent_decode_kernel(
    query,
    cache,
    cache_scale,
    block_tables,
    entries,
    accumulators,
    statistics,
    out,
    table_stride,
    SCALE: tl.constexpr,
    IS_SCALED: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    RANK: tl.constexpr,
    TURNED: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    TURNED_PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ENTRY_FIELDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (p, tile of heads) works off entry p and those that follow it."""
    wait_for_predecessor(PDL)
    release_successor(PDL)
    HEAD_TILES: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    heads = tl.program_id(0) % HEAD_TILES * HEADS + tl.arange(0, HEADS)
    entry = tl.program_id(0) // HEAD_TILES
    is_head = heads < NUM_HEADS
    dims = tl.arange(0, RANK_PADDED)
    is_element = is_head[:, None] & (dims < RANK)[None, :]

    record = entries + entry * ENTRY_FIELDS
    num_following = tl.load(record + 4)
    following = tl.load(record + 5)
    for index in range(0, num_following + 1):
        record = entries + entry * ENTRY_FIELDS
        token = tl.load(record).to(tl.int64)
        slot = tl.load(record + 1)
        first = tl.load(record + 2)
        last = tl.load(record + 3)
        is_whole = tl.load(record + 6)
        if first < last:
            of_heads = query + (token * NUM_HEADS + heads) * (RANK + TURNED)
            query_latent = load_part(of_heads, is_head, RANK, RANK_PADDED)
            query_turned = load_part(of_heads + RANK, is_head, TURNED, TURNED_PADDED)
            table = block_tables + slot.to(tl.int64) * table_stride
            accumulator = tl.zeros([HEADS, RANK_PADDED], dtype=tl.float32)
            total = tl.zeros([HEADS], dtype=tl.float32)
            maximum = tl.full([HEADS], _NO_MAXIMUM, dtype=tl.float32)
            for start in range(first, last, TILE):
                positions = start + tl.arange(0, TILE)
                is_inside = positions < last
                accumulator, total, maximum = attend_latents(
                    query_latent,
                    query_turned,
                    accumulator,
                    total,
                    maximum,
                    cache,
                    cache_scale,
                    cache_rows(table, positions, is_inside, BLOCK_SIZE),
                    is_inside,
                    is_inside[None, :],
                    SCALE,
                    RANK,
                    TURNED,
                    RANK_PADDED,
                    TURNED_PADDED,
                    IS_SCALED,
                    True,
                )
            if is_whole != 0:
                attended = (accumulator / total[:, None]).to(out.dtype.element_ty)
                of_heads = out + (token * NUM_HEADS + heads) * RANK
                tl.store(of_heads[:, None] + dims[None, :], attended, mask=is_element)
            else:
                partial = accumulators + (entry.to(tl.int64) * NUM_HEADS + heads) * RANK
                tl.store(partial[:, None] + dims[None, :], accumulator, mask=is_element)
                pair = statistics + (entry * NUM_HEADS + heads) * 2
                tl.store(pair, maximum, mask=is_head)
                tl.store(pair + 1, total, mask=is_head)
        entry = following + index


def paged_latent_decode(
    query: Tensor,
    cache: Tensor,
    *,
    block_tables: Tensor,
    work: DecodeWorkList,
    partials: DecodePartials,
    scale: float,
    cache_scale: Tensor | None = None,
    out: Tensor,
) -> Tensor:
    """Attend the decode rows of `work`: whole rows into `out`, cut rows into `partials`.

    query: [num_tokens, num_heads, width], contiguous; cache: [num_blocks, block_size, width], contiguous;
    block_tables: [num_slots, max_blocks] int32; scale: positive; cache_scale: [num_blocks, block_size]
    float32 for a cache in 8 bits; out: [num_tokens, num_heads, rank], contiguous, as partials'
    accumulators have it. `combine_decode_partials` must follow.
    """
    if not runs_triton(query):
        return paged_latent_decode_ref(
            query,
            cache,
            block_tables=block_tables,
            work=work,
            partials=partials,
            scale=scale,
            cache_scale=cache_scale,
            out=out,
        )
    (_, num_heads, width), rank = query.shape, out.shape[2]
    assert scale > 0 and query.is_contiguous() and cache.is_contiguous() and out.is_contiguous()
    assert cache.shape[2] == width > rank and block_tables.stride(1) == 1
    config = latent_decode_config(
        num_heads, query.element_size(), cache.element_size(), capability=capability_of(query.device)
    )
    _paged_latent_decode_kernel[(work.num_programs * triton.cdiv(num_heads, config.heads_per_tile),)](
        query,
        cache,
        cache_scale,
        block_tables,
        work.entries,
        partials.accumulators,
        partials.statistics,
        out,
        block_tables.stride(0),
        SCALE=scale,
        IS_SCALED=cache_scale is not None,
        NUM_HEADS=num_heads,
        RANK=rank,
        TURNED=width - rank,
        RANK_PADDED=padded_side(rank),
        TURNED_PADDED=padded_side(width - rank),
        HEADS=config.heads_per_tile,
        BLOCK_SIZE=cache.shape[1],
        TILE=config.tile,
        ENTRY_FIELDS=ENTRY_FIELDS,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(query.device),
    )
    return out
