"""What happens between the products of latent attention and attention itself, in one kernel.

For each token t with slot = slot_mapping[t], its latent l, the key k that all heads share, and each query
head q = (plain dimensions, turned dimensions):

    cache[slot]            <- (norm(l), turn(k, t))
    absorbed[t, h, rank:]  <- turn(q_h's turned dimensions, t)

norm is the RMS norm of `rms_norm.py` and turn is `rotary.py`'s. A cache in 8 bits stores the vector with one
scale, as `kv_quantization.py` says of a head. The plain dimensions of a query reach `absorbed[t, h, :rank]`
by way of a product (`layers/head_projection.py`), before this kernel or after it.
"""

from __future__ import annotations

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

_NUM_WARPS = 4
_PAIRS_PER_PROGRAM = 512  # 4 a thread
"""Pairs of dimensions of query heads that a program turns."""


def latent_cache_write_ref(
    query: Tensor,
    latents: Tensor,
    tables: Tensor,
    *,
    norm_weight: Tensor,
    norm_eps: float,
    slot_mapping: Tensor,
    cache: Tensor,
    cache_scale: Tensor | None = None,
    is_interleaved: bool,
    absorbed: Tensor,
) -> None:
    """Store a step's latents, and turn its queries.

    query: [num_tokens, num_heads, plain + turned], plain dimensions first. latents: [num_tokens, rank +
    turned], any stride between tokens; what is left there is not specified. tables: [2, num_tokens, turned]
    of their dtype, from `rotary_tables`. norm_weight: [rank]. slot_mapping: [num_tokens] int64, no slot
    twice; -1 stores nothing. cache: [num_blocks, block_size, rank + turned], contiguous; in an 8-bit format
    it comes with cache_scale, [num_blocks, block_size] float32. absorbed: [num_tokens, num_heads, rank +
    turned], of which the turned dimensions are written. On the CPU a slot outside the cache raises
    IndexError.
    """
    num_turned, rank = tables.shape[-1], len(norm_weight)
    latent = latents[:, :rank]
    rms_norm_ref(latent, norm_weight, eps=norm_eps, out=latent)
    rotary_ref(latents[:, None, rank:], tables, is_interleaved=is_interleaved)
    turned = absorbed[..., rank:]
    turned.copy_(query[..., query.shape[2] - num_turned :])
    rotary_ref(turned, tables, is_interleaved=is_interleaved)
    # Outside of tests the CPU has no padding, and a mask would copy everything.
    if slot_mapping.min().item() < 0:
        is_stored = slot_mapping >= 0
        latents, slot_mapping = latents[is_stored], slot_mapping[is_stored]
    # view, not flatten: a cache that is not contiguous must fail, or the write would go to a copy.
    places = cache.view(-1, cache.shape[2])
    if cache_scale is None:
        places.index_copy_(0, slot_mapping, latents.to(cache.dtype))
        return
    stored, scale = quantize_kv_ref(latents, cache.dtype)
    # As bytes, which torch can scatter whatever they mean.
    places.view(torch.uint8).index_copy_(0, slot_mapping, stored.view(torch.uint8))
    cache_scale.view(-1).index_copy_(0, slot_mapping, scale)


@triton.jit
def _halves(pair, HALF: tl.constexpr, IS_INTERLEAVED: tl.constexpr):
    """The two dimensions of each pair."""
    if IS_INTERLEAVED:
        return 2 * pair, 2 * pair + 1
    return pair, pair + HALF


@triton.jit
def _load_pairs(at, lower_dim, upper_dim, mask, cos, sin):
    """The turned pairs of dimensions from `at` on, as two halves in float32."""
    lower = widen(tl.load(at + lower_dim, mask=mask, other=0.0))
    upper = widen(tl.load(at + upper_dim, mask=mask, other=0.0))
    return lower * cos - upper * sin, upper * cos + lower * sin


@triton.jit
def _store_latent(
    at,
    slot,
    weight,
    cache,
    cache_scale,
    dims,
    is_dim,
    lower_dim,
    upper_dim,
    is_pair,
    cos,
    sin,
    RANK: tl.constexpr,
    TURNED: tl.constexpr,
    NORM_EPS: tl.constexpr,
):
    """A token's latent normalized and its shared key turned, into its slot. slot: [1, 1] int64."""
    DTYPE: tl.constexpr = at.dtype.element_ty
    STORED: tl.constexpr = cache.dtype.element_ty
    values = widen(tl.load(at + dims, mask=is_dim, other=0.0))
    mean_square = tl.sum(values * values, axis=1, keep_dims=True) * (1.0 / RANK)
    latent = widen((values * tl.rsqrt(mean_square + NORM_EPS)).to(DTYPE)) * weight
    latent = widen(latent.to(DTYPE))
    lower, upper = _load_pairs(at + RANK, lower_dim, upper_dim, is_pair, cos, sin)
    if cache_scale is not None:
        of_pairs = tl.maximum(tl.abs(lower), tl.abs(upper))
        largest = tl.maximum(
            tl.max(tl.abs(latent), axis=1, keep_dims=True), tl.max(of_pairs, axis=1, keep_dims=True)
        )
        scale, factor = kv_scale(largest, STORED)
        tl.store(cache_scale + slot, scale, mask=slot >= 0)
        latent = quantize(latent * factor, STORED)
        lower = quantize(lower * factor, STORED)
        upper = quantize(upper * factor, STORED)
    to = cache + slot * (RANK + TURNED)
    tl.store(to + dims, latent.to(STORED), mask=is_dim & (slot >= 0))
    is_stored = is_pair & (slot >= 0)
    tl.store(to + RANK + lower_dim, lower.to(STORED), mask=is_stored)
    tl.store(to + RANK + upper_dim, upper.to(STORED), mask=is_stored)


@triton.jit(do_not_specialize=["num_tokens", "latents_stride"])
def _latent_cache_write_kernel(
    query,
    latents,
    tables,
    norm_weight,
    slot_mapping,
    cache,
    cache_scale,
    absorbed,
    num_tokens,
    latents_stride,
    NUM_HEADS: tl.constexpr,
    PLAIN: tl.constexpr,
    RANK: tl.constexpr,
    HALF: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    NORM_EPS: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (0, token) stores the token's latent, the others turn HEADS query heads each."""
    TURNED: tl.constexpr = 2 * HALF
    dims = tl.arange(0, RANK_PADDED)[None, :]
    is_dim = dims < RANK
    # A weight: may be read ahead of the wait.
    weight = widen(tl.load(norm_weight + dims, mask=is_dim, other=0.0))
    wait_for_predecessor(PDL)
    release_successor(PDL)
    token = tl.program_id(1).to(tl.int64)
    pair = tl.arange(0, HALF_PADDED)[None, :]
    is_pair = pair < HALF
    lower_dim, upper_dim = _halves(pair, HALF, IS_INTERLEAVED)
    # One half of each table says what the other does.
    angles = tables + token * TURNED + pair
    cos = widen(tl.load(angles, mask=is_pair, other=1.0))
    sin = widen(tl.load(angles + num_tokens.to(tl.int64) * TURNED + HALF, mask=is_pair, other=0.0))
    if tl.program_id(0) > 0:
        head = (tl.program_id(0) - 1) * HEADS + tl.arange(0, HEADS)[:, None]
        place = token * NUM_HEADS + head
        from_query = query + place * (PLAIN + TURNED) + PLAIN
        of_head = (head < NUM_HEADS) & is_pair
        lower, upper = _load_pairs(from_query, lower_dim, upper_dim, of_head, cos, sin)
        to = absorbed + place * (RANK + TURNED) + RANK
        tl.store(to + lower_dim, lower.to(absorbed.dtype.element_ty), mask=of_head)
        tl.store(to + upper_dim, upper.to(absorbed.dtype.element_ty), mask=of_head)
    else:
        _store_latent(
            latents + token * latents_stride,
            tl.load(slot_mapping + token + tl.arange(0, 1)[:, None]),
            weight,
            cache,
            cache_scale,
            dims,
            is_dim,
            lower_dim,
            upper_dim,
            is_pair,
            cos,
            sin,
            RANK,
            TURNED,
            NORM_EPS,
        )


def latent_cache_write(
    query: Tensor,
    latents: Tensor,
    tables: Tensor,
    *,
    norm_weight: Tensor,
    norm_eps: float,
    slot_mapping: Tensor,
    cache: Tensor,
    cache_scale: Tensor | None = None,
    is_interleaved: bool,
    absorbed: Tensor,
) -> None:
    """See `latent_cache_write_ref`. The kernel needs query and absorbed contiguous; a turn is rounded once,
    at its end, and an 8-bit cache stores the turned key before that rounding.
    """
    num_tokens, num_heads, head_dim = query.shape
    rank, num_turned = len(norm_weight), tables.shape[-1]
    assert tables.shape[:2] == (2, num_tokens), "tables of another step"
    assert latents.shape == (num_tokens, rank + num_turned) and num_turned % 2 == 0
    assert cache.shape[2] == rank + num_turned and absorbed.shape == (num_tokens, num_heads, cache.shape[2])
    assert (cache.dtype in LARGEST_STORED) == (cache_scale is not None), "8-bit caches have scales"
    if num_tokens == 0:
        return
    if not runs_triton(query):
        latent_cache_write_ref(
            query,
            latents,
            tables,
            norm_weight=norm_weight,
            norm_eps=norm_eps,
            slot_mapping=slot_mapping,
            cache=cache,
            cache_scale=cache_scale,
            is_interleaved=is_interleaved,
            absorbed=absorbed,
        )
        return
    assert query.is_contiguous() and absorbed.is_contiguous() and cache.is_contiguous()
    assert latents.stride(1) == 1 and tables.is_contiguous()
    half_padded = triton.next_power_of_2(num_turned // 2)
    heads = max(1, min(triton.next_power_of_2(num_heads), _PAIRS_PER_PROGRAM // half_padded))
    _latent_cache_write_kernel[(1 + triton.cdiv(num_heads, heads), num_tokens)](
        query,
        latents,
        tables,
        norm_weight,
        slot_mapping,
        cache,
        cache_scale,
        absorbed,
        num_tokens,
        latents.stride(0),
        NUM_HEADS=num_heads,
        PLAIN=head_dim - num_turned,
        RANK=rank,
        HALF=num_turned // 2,
        RANK_PADDED=triton.next_power_of_2(rank),
        HALF_PADDED=half_padded,
        HEADS=heads,
        NORM_EPS=norm_eps,
        IS_INTERLEAVED=is_interleaved,
        num_warps=_NUM_WARPS,
        # A fused product would reach the rounding to 8 bits unrounded, and near ties differ.
        enable_fp_fusion=False,
        **launch_options(query.device),
    )
