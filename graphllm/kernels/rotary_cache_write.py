"""All that happens between the QKV product and attention: head norms, rotary, and the KV-cache write.

For each token t with slot = slot_mapping[t], each query head q, key head k and value head v:

    q <- turn(norm(q), t)                               in place
    key_cache[slot]   <- turn(norm(k), t)
    value_cache[slot] <- v

norm is the RMS norm over head_dim that Qwen3 and Gemma 3 have (`rms_norm.py`), turn is `rotary.py`'s, of a
whole head or of its first dimensions, and an 8-bit cache stores a head and its scale as `kv_quantization.py`
says. One kernel instead of four: a node of a graph costs about a microsecond, and there is one a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.kv_quantization import LARGEST_STORED, kv_scale, quantize, quantize_kv_ref
from graphllm.kernels.rms_norm import rms_norm_ref
from graphllm.kernels.rotary import rotary_ref
from graphllm.kernels.triton_support import (
    launch_options,
    release_successor,
    runs_triton,
    wait_for_predecessor,
    widen,
)

_MAX_HEADS_PER_PROGRAM = 8
# From here on there are programs enough to fill the card with larger ones.
_MIN_TOKENS_FOR_LARGE_PROGRAMS = 257
_PAIRS_PER_LARGE_PROGRAM = 2048
_PAIRS_PER_WARP = 256  # 8 pairs a thread: a 128-bit load of 16-bit numbers for each half of a head
_MAX_WARPS = 4


def rotary_cache_write_ref(
    qkv: Tensor,
    tables: Tensor | None,
    *,
    num_heads: int,
    num_kv_heads: int,
    slot_mapping: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    is_interleaved: bool = False,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_unit_offset: bool = False,
) -> None:
    """Norm and turn query and key heads, and store keys and values in their slots.

    qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], contiguous: a token's query heads, key
    heads, value heads. Queries are changed in place; what is left where the keys were is not specified.
    tables: [2, num_tokens, rotary_dim] of qkv's dtype, from `rotary_tables`; None leaves heads unturned. With
    [4, num_tokens, head_dim] the last two are the queries' and the first two the keys'.
    slot_mapping: [num_tokens] int64, no slot twice; -1 stores nothing.
    key_cache, value_cache: [num_blocks, block_size, num_kv_heads, head_dim], contiguous. In an 8-bit
    format they come with key_scale, value_scale, [num_blocks, block_size, num_kv_heads] float32.
    query_norm, key_norm: [head_dim], both or neither; norm_unit_offset multiplies by 1 + weight.
    On the CPU a slot outside the cache raises IndexError.
    """
    heads = qkv.view(qkv.shape[0], -1, key_cache.shape[-1])
    query, key, value = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if query_norm is not None and key_norm is not None:
        for part, weight in ((query, query_norm), (key, key_norm)):
            rms_norm_ref(part, weight, eps=norm_eps, unit_offset=norm_unit_offset, out=part)
    if tables is not None:
        if len(tables) == 2:  # one call for both
            rotary_ref(heads.narrow(1, 0, num_heads + num_kv_heads), tables, is_interleaved=is_interleaved)
        else:
            rotary_ref(query, tables[2:], is_interleaved=is_interleaved)
            rotary_ref(key, tables[:2], is_interleaved=is_interleaved)
    # Outside of tests the CPU has no padding, and a mask would copy everything.
    if slot_mapping.min().item() < 0:
        is_stored = slot_mapping >= 0
        key, value, slot_mapping = key[is_stored], value[is_stored], slot_mapping[is_stored]
    _store(key, slot_mapping, cache=key_cache, scales=key_scale)
    _store(value, slot_mapping, cache=value_cache, scales=value_scale)


def _store(x: Tensor, slots: Tensor, *, cache: Tensor, scales: Tensor | None) -> None:
    """x: [num_stored, num_kv_heads, head_dim] into slots, [num_stored] int64."""
    # view, not flatten: a cache that is not contiguous must fail, or the write would go to a copy.
    places = cache.view(-1, *cache.shape[2:])
    if scales is None:
        places.index_copy_(0, slots, x if x.dtype == cache.dtype else x.to(cache.dtype))
        return
    stored, scale = quantize_kv_ref(x, cache.dtype)
    # As bytes, which torch can scatter whatever they mean.
    places.view(torch.uint8).index_copy_(0, slots, stored.view(torch.uint8))
    scales.view(-1, x.shape[1]).index_copy_(0, slots, scale)


@triton.jit
def _halves_of_pairs(pair, ROTARY_HALF: tl.constexpr, HALF: tl.constexpr, IS_INTERLEAVED: tl.constexpr):
    """The two dimensions of each pair. Pairs from ROTARY_HALF on, which do not turn, share out the rest."""
    if IS_INTERLEAVED:
        return 2 * pair, 2 * pair + 1
    if ROTARY_HALF == HALF:
        return pair, pair + HALF
    # With r = ROTARY_HALF: 0, 1, .. r - 1 beside r, .. 2r - 1; then 2r, .. r + HALF - 1 beside the last.
    lower = tl.where(pair < ROTARY_HALF, pair, pair + ROTARY_HALF)
    return lower, lower + tl.where(pair < ROTARY_HALF, ROTARY_HALF, HALF - ROTARY_HALF)


@triton.jit
def _norm(
    lower,
    upper,
    lower_weight,
    upper_weight,
    HEAD_DIM: tl.constexpr,
    EPS: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The RMS norm of heads given as two halves of pairs; all are [ROWS, HALF_PADDED] float32."""
    mean_square = tl.sum(lower * lower + upper * upper, axis=1, keep_dims=True) * (1.0 / HEAD_DIM)
    factor = tl.rsqrt(mean_square + EPS)
    lower *= factor
    upper *= factor
    if UNIT_OFFSET:
        lower *= 1.0 + lower_weight
        upper *= 1.0 + upper_weight
    else:
        lower = widen(lower.to(DTYPE)) * lower_weight
        upper = widen(upper.to(DTYPE)) * upper_weight
    return widen(lower.to(DTYPE)), widen(upper.to(DTYPE))


@triton.jit
def _store_heads(
    lower,
    upper,
    slot,
    head,
    lower_dim,
    upper_dim,
    mask,
    cache,
    scales,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Heads given as two halves of pairs into their slots.

    slot, head: [ROWS, 1]; dims: where in a head each value belongs, and mask: [ROWS, HALF_PADDED].
    """
    STORED: tl.constexpr = cache.dtype.element_ty
    place = slot * NUM_KV_HEADS + head  # int64
    if scales is not None:
        largest = tl.max(tl.maximum(tl.abs(lower), tl.abs(upper)), axis=1, keep_dims=True)
        scale, factor = kv_scale(largest, STORED)
        tl.store(scales + place, scale, (slot >= 0) & (head < NUM_KV_HEADS))
        lower = quantize(lower * factor, STORED)
        upper = quantize(upper * factor, STORED)
    else:
        lower = lower.to(STORED)
        upper = upper.to(STORED)
    at = cache + place * (2 * HALF)
    mask = mask & (slot >= 0)
    tl.store(at + lower_dim, lower, mask)
    tl.store(at + upper_dim, upper, mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _rotary_cache_write_kernel(
    qkv,
    tables,
    slot_mapping,
    key_cache,
    value_cache,
    key_scale,
    value_scale,
    query_norm,
    key_norm,
    num_tokens,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROTARY_HALF: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    HAS_QUERY_TABLES: tl.constexpr,
    NORM_EPS: tl.constexpr,
    NORM_UNIT_OFFSET: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program has TOKENS tokens and HEADS heads of one kind: queries, keys or values."""
    HEAD_DIM: tl.constexpr = 2 * HALF
    QUERY_GROUPS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    KV_GROUPS: tl.constexpr = (NUM_KV_HEADS + HEADS - 1) // HEADS
    DTYPE: tl.constexpr = qkv.dtype.element_ty
    # Full tiles, whose repeated loads are cached: a row would be spread through shared memory.
    pair = tl.broadcast_to(tl.arange(0, HALF_PADDED)[None, :], (TOKENS * HEADS, HALF_PADDED))
    is_pair = pair < HALF
    lower_dim, upper_dim = _halves_of_pairs(pair, ROTARY_HALF, HALF, IS_INTERLEAVED)
    group = tl.program_id(0)
    is_query = group < QUERY_GROUPS
    is_value = group >= QUERY_GROUPS + KV_GROUPS
    if query_norm is not None:
        # Weights, so before the wait; after a step's other weights have gone by they are in no cache.
        norm = query_norm
        if not is_query:
            norm = key_norm
        lower_weight = widen(tl.load(norm + lower_dim, is_pair, other=0.0))
        upper_weight = widen(tl.load(norm + upper_dim, is_pair, other=0.0))
    wait_for_predecessor(PDL)
    release_successor(PDL)

    row = tl.arange(0, TOKENS * HEADS)[:, None]
    token = tl.program_id(1) * TOKENS + row // HEADS  # [ROWS, 1]
    is_token = token < num_tokens
    # The program's heads, counted within their kind, and the kind's first head in a token's row.
    first_group = tl.where(is_query, 0, tl.where(is_value, QUERY_GROUPS + KV_GROUPS, QUERY_GROUPS))
    first_head = tl.where(is_query, 0, tl.where(is_value, NUM_HEADS + NUM_KV_HEADS, NUM_HEADS))
    head = (group - first_group) * HEADS + row % HEADS
    is_head = is_token & (head < tl.where(is_query, NUM_HEADS, NUM_KV_HEADS))
    mask = is_head & is_pair
    place = token.to(tl.int64) * (NUM_HEADS + 2 * NUM_KV_HEADS) + first_head + head
    at = qkv + place * HEAD_DIM
    lower = widen(tl.load(at + lower_dim, mask, other=0.0))
    upper = widen(tl.load(at + upper_dim, mask, other=0.0))
    slot = tl.load(slot_mapping + token, is_token, other=-1)
    if not is_value:
        if tables is not None:
            # One half of each table says what the other does. Pairs that do not turn have an angle of 0.
            angles = token.to(tl.int64) * (2 * ROTARY_HALF) + pair
            if HAS_QUERY_TABLES:
                angles += tl.where(is_query, 2 * num_tokens.to(tl.int64) * (2 * ROTARY_HALF), 0)
            turns = mask
            if ROTARY_HALF < HALF:
                turns = mask & (pair < ROTARY_HALF)
            cos = widen(tl.load(tables + angles, turns, other=1.0))
            sines = tables + num_tokens.to(tl.int64) * (2 * ROTARY_HALF) + ROTARY_HALF
            sin = widen(tl.load(sines + angles, turns, other=0.0))
        if query_norm is not None:
            lower, upper = _norm(
                lower, upper, lower_weight, upper_weight, HEAD_DIM, NORM_EPS, NORM_UNIT_OFFSET, DTYPE
            )
        if tables is not None:
            lower, upper = lower * cos - upper * sin, upper * cos + lower * sin

    if is_query:
        if query_norm is not None or tables is not None:
            tl.store(at + lower_dim, lower.to(DTYPE), mask)
            tl.store(at + upper_dim, upper.to(DTYPE), mask)
    elif is_value:
        _store_heads(
            lower, upper, slot, head, lower_dim, upper_dim, mask, value_cache, value_scale, NUM_KV_HEADS, HALF
        )
    else:
        _store_heads(
            lower, upper, slot, head, lower_dim, upper_dim, mask, key_cache, key_scale, NUM_KV_HEADS, HALF
        )


@dataclass(frozen=True, slots=True)
class _ProgramShare:
    """How much of the work a program takes."""

    tokens: int
    heads: int
    half_padded: int
    num_warps: int


def _program_share(num_tokens: int, num_kv_heads: int, head_dim: int) -> _ProgramShare:
    """Small programs, one load a thread, where the kernel should end soon; large ones for bandwidth."""
    heads = min(triton.next_power_of_2(num_kv_heads), _MAX_HEADS_PER_PROGRAM)
    half_padded = triton.next_power_of_2(head_dim // 2)
    pairs = heads * half_padded  # of one token
    tokens = 1
    if num_tokens >= _MIN_TOKENS_FOR_LARGE_PROGRAMS:
        tokens = max(_PAIRS_PER_LARGE_PROGRAM // pairs, 1)
    num_warps = min(max(tokens * pairs // _PAIRS_PER_WARP, 1), _MAX_WARPS)
    return _ProgramShare(tokens, heads, half_padded, num_warps)


def rotary_cache_write(
    qkv: Tensor,
    tables: Tensor | None,
    *,
    num_heads: int,
    num_kv_heads: int,
    slot_mapping: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    is_interleaved: bool = False,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_unit_offset: bool = False,
) -> None:
    """See `rotary_cache_write_ref`. On a device a turn is rounded once, at its end, and an 8-bit cache
    stores the turned key before that rounding.
    """
    num_tokens, head_dim = qkv.shape[0], key_cache.shape[-1]
    assert qkv.shape == (num_tokens, (num_heads + 2 * num_kv_heads) * head_dim) and qkv.is_contiguous()
    rotary_dim = head_dim if tables is None else tables.shape[-1]
    has_query_tables = tables is not None and len(tables) == 4
    assert tables is None or tables.shape[:2] == (4 if has_query_tables else 2, num_tokens), (
        "tables of another step"
    )
    assert not has_query_tables or rotary_dim == head_dim, "what does not turn would not be scaled"
    assert rotary_dim <= head_dim and rotary_dim % 2 == 0
    assert (query_norm is None) == (key_norm is None), "query and key heads are both normalized, or neither"
    is_scaled = key_cache.dtype in LARGEST_STORED
    assert is_scaled == (key_scale is not None) == (value_scale is not None), "8-bit caches have scales"
    if num_tokens == 0:
        return
    if not runs_triton(qkv):
        rotary_cache_write_ref(
            qkv,
            tables,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            slot_mapping=slot_mapping,
            key_cache=key_cache,
            value_cache=value_cache,
            key_scale=key_scale,
            value_scale=value_scale,
            is_interleaved=is_interleaved,
            query_norm=query_norm,
            key_norm=key_norm,
            norm_eps=norm_eps,
            norm_unit_offset=norm_unit_offset,
        )
        return
    assert key_cache.is_contiguous() and value_cache.is_contiguous()
    share = _program_share(num_tokens, num_kv_heads, head_dim)
    num_groups = triton.cdiv(num_heads, share.heads) + 2 * triton.cdiv(num_kv_heads, share.heads)
    _rotary_cache_write_kernel[(num_groups, triton.cdiv(num_tokens, share.tokens))](
        qkv,
        tables,
        slot_mapping,
        key_cache,
        value_cache,
        key_scale,
        value_scale,
        query_norm,
        key_norm,
        num_tokens,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=head_dim // 2,
        ROTARY_HALF=rotary_dim // 2,
        IS_INTERLEAVED=is_interleaved,
        HAS_QUERY_TABLES=has_query_tables,
        NORM_EPS=norm_eps,
        NORM_UNIT_OFFSET=norm_unit_offset,
        TOKENS=share.tokens,
        HEADS=share.heads,
        HALF_PADDED=share.half_padded,
        num_warps=share.num_warps,
        # A fused product would reach the rounding to 8 bits unrounded, and near ties differ.
        enable_fp_fusion=False,
        **launch_options(qkv.device),
    )
