"""The first product of LoRA (Hu et al., 2021, arXiv:2106.09685), each token by its own adapter's matrix.

    out_{t,p,r} = scale_{a,p} * sum_k down_{a,p,r,k} * x_{t,k},  a = adapters_t, in float32 sums

p counts the layers that are merged into one product (query, key and value), each of which has a part of an
adapter. Adapters of smaller rank than there is room for end in rows of zeros. For tokens without an adapter
(a < 0) nothing is read or written, nor for parts that an adapter does not change: their scale is 0, and what
their matrices hold means nothing.

Few tokens go one by one: a program takes a few rows of a token's matrix. More go in tiles on matrix units:
a program goes through the adapters that occur in its tile, which are one or two, because the tokens of a
prompt lie side by side, and multiplies the whole tile by each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.triton_support import (
    dot,
    launch_options,
    release_successor,
    runs_triton,
    wait_for_predecessor,
    widen,
)

MAX_SINGLE_TOKENS = 8
"""Up to so many tokens go one by one, here and in `lora_expand.py`."""

NO_ADAPTER: tl.constexpr = tl.constexpr(1 << 30)
"""Larger than every adapter's number: the end of a walk through those of a tile."""

_SINGLE_ROWS = 2
_SINGLE_K = 512
_TILE_K = 128
_MAX_TILE_RANKS = 64
_NUM_STAGES = 3


def adapters_among(token_adapters: Tensor) -> list[int]:
    """Those that occur, on a CPU."""
    return [adapter for adapter in torch.unique(token_adapters).tolist() if adapter >= 0]


def tokens_per_tile(num_tokens: int) -> int:
    """Small tiles for decode buckets, so that there are more of them."""
    return 16 if num_tokens <= 128 else 64


def lora_shrink_ref(
    x: Tensor, down: Tensor, scales: Tensor, token_adapters: Tensor, *, out: Tensor
) -> Tensor:
    """The specification; arguments as those of `lora_shrink`."""
    for adapter in adapters_among(token_adapters):
        tokens = (token_adapters == adapter).nonzero()[:, 0]
        rows = x[tokens].float()
        for part, scale in enumerate(scales[adapter].tolist()):
            if scale:
                out[tokens, part] = torch.mm(rows, down[adapter, part].float().t()) * scale
    return out


@triton.jit
def _shrink_singles_kernel(
    x,  # [num_tokens, IN_FEATURES]
    down,  # [num_adapters, NUM_PARTS, MAX_RANK, IN_FEATURES]
    scales,  # [num_adapters, NUM_PARTS] float32
    token_adapters,  # [num_tokens] int32
    out,  # [num_tokens, NUM_PARTS, MAX_RANK] float32
    IN_FEATURES: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    DOWN_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program for BLOCK_R ranks of one part of one token."""
    wait_for_predecessor(PDL)
    release_successor(PDL)
    token, part = tl.program_id(0), tl.program_id(1)
    adapter = tl.load(token_adapters + token).to(tl.int64)
    if adapter >= 0:
        scale = tl.load(scales + adapter * SCALE_STRIDE + part)
        if scale != 0:
            ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
            columns = tl.arange(0, BLOCK_K)
            matrix = down + adapter * DOWN_STRIDE + (part * MAX_RANK + ranks)[:, None] * IN_FEATURES
            values = x + token.to(tl.int64) * IN_FEATURES
            sums = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
            for first in tl.range(0, IN_FEATURES, BLOCK_K, num_stages=NUM_STAGES):
                in_row = first + columns < IN_FEATURES
                tile = tl.load(matrix + (first + columns)[None, :], mask=in_row[None, :], other=0)
                value = tl.load(values + first + columns, mask=in_row, other=0)
                sums += widen(tile) * widen(value)[None, :]
            at = out + (token.to(tl.int64) * NUM_PARTS + part) * MAX_RANK + ranks
            tl.store(at, tl.sum(sums, 1) * scale)


@triton.jit(do_not_specialize=["num_tokens"])
def _shrink_tiles_kernel(
    x,  # [num_tokens, IN_FEATURES]
    down,  # [num_adapters, NUM_PARTS, MAX_RANK, IN_FEATURES]
    scales,  # [num_adapters, NUM_PARTS] float32
    token_adapters,  # [num_tokens] int32
    out,  # [num_tokens, NUM_PARTS, MAX_RANK] float32
    num_tokens,
    IN_FEATURES: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    DOWN_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program for BLOCK_T tokens and BLOCK_R ranks of one part."""
    wait_for_predecessor(PDL)
    release_successor(PDL)
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    part = tl.program_id(1)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_step, in_matrix = tokens < num_tokens, ranks < MAX_RANK
    adapters = tl.load(token_adapters + tokens, mask=in_step, other=-1)
    values = x + tokens.to(tl.int64)[:, None] * IN_FEATURES
    columns = tl.arange(0, BLOCK_K)
    found = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    adapter = tl.min(tl.where(adapters >= 0, adapters, NO_ADAPTER), 0)
    while adapter < NO_ADAPTER:
        scale = tl.load(scales + adapter.to(tl.int64) * SCALE_STRIDE + part)
        if scale != 0:
            matrix = down + adapter.to(tl.int64) * DOWN_STRIDE
            matrix += (part * MAX_RANK + ranks)[None, :] * IN_FEATURES
            sums = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
            for first in tl.range(0, IN_FEATURES, BLOCK_K, num_stages=NUM_STAGES):
                in_row = first + columns < IN_FEATURES
                value = tl.load(
                    values + (first + columns)[None, :], mask=in_step[:, None] & in_row[None, :], other=0
                )
                tile = tl.load(
                    matrix + (first + columns)[:, None], mask=in_row[:, None] & in_matrix[None, :], other=0
                )
                sums = dot(value, tile, sums)
            # Chosen, not multiplied by zero: an adapter's overflow must not reach its neighbours.
            found = tl.where((adapters == adapter)[:, None], sums * scale, found)
        adapter = tl.min(tl.where(adapters > adapter, adapters, NO_ADAPTER), 0)
    at = out + (tokens.to(tl.int64) * NUM_PARTS + part)[:, None] * MAX_RANK + ranks[None, :]
    tl.store(at, found, mask=(adapters >= 0)[:, None] & in_matrix[None, :])


def lora_shrink(x: Tensor, down: Tensor, scales: Tensor, token_adapters: Tensor, *, out: Tensor) -> Tensor:
    """Write every token's small vectors into `out`, and return it.

    x: [num_tokens, in_features]; down: [num_adapters, num_parts, max_rank, in_features] of x's dtype, each
    adapter's contiguous; scales: [num_adapters, num_parts] float32, each adapter's contiguous;
    token_adapters: [num_tokens] int32; out: [num_tokens, num_parts, max_rank] float32. x and out are
    contiguous; max_rank is a multiple of 8.
    """
    if not runs_triton(x):
        return lora_shrink_ref(x, down, scales, token_adapters, out=out)
    num_tokens, in_features = x.shape
    _, num_parts, max_rank, _ = down.shape
    assert out.shape == (num_tokens, num_parts, max_rank) and max_rank % 8 == 0
    assert x.is_contiguous() and out.is_contiguous() and down[0].is_contiguous()
    assert x.dtype == down.dtype and len(token_adapters) == num_tokens
    sizes = {
        "IN_FEATURES": in_features,
        "NUM_PARTS": num_parts,
        "MAX_RANK": max_rank,
        "DOWN_STRIDE": down.stride(0),
        "SCALE_STRIDE": scales.stride(0),
    }
    options = {"NUM_STAGES": _NUM_STAGES, "num_warps": 4, **launch_options(x.device)}
    tensors = (x, down, scales, token_adapters, out)
    if num_tokens <= MAX_SINGLE_TOKENS:
        grid = (num_tokens, num_parts, max_rank // _SINGLE_ROWS)
        _shrink_singles_kernel[grid](*tensors, **sizes, BLOCK_R=_SINGLE_ROWS, BLOCK_K=_SINGLE_K, **options)
        return out
    block_t = tokens_per_tile(num_tokens)
    block_r = max(16, min(_MAX_TILE_RANKS, triton.next_power_of_2(max_rank)))
    grid = (triton.cdiv(num_tokens, block_t), num_parts, triton.cdiv(max_rank, block_r))
    _shrink_tiles_kernel[grid](
        *tensors, num_tokens, **sizes, BLOCK_T=block_t, BLOCK_R=block_r, BLOCK_K=_TILE_K, **options
    )
    return out
