"""The second product of LoRA (Hu et al., 2021, arXiv:2106.09685), added to what the base layer gives.

    out_{t,n} += sum_r up_{a,n,r} * shrunk_{t,p,r},  a = adapters_t, p the part that feature n belongs to

in float32 sums. `shrunk` is what `lora_shrink.py` writes, with the adapter's scale in it. Tokens without an
adapter (a < 0), and features of parts that a token's adapter does not change (their scale is 0), are left as
they are.

Few tokens go one by one, more in tiles, as in `lora_shrink.py`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.lora_shrink import MAX_SINGLE_TOKENS, NO_ADAPTER, adapters_among, tokens_per_tile
from graphllm.kernels.triton_support import (
    dot,
    launch_options,
    release_successor,
    runs_triton,
    wait_for_predecessor,
    widen,
)

TILE_FEATURES = 64
_MAX_TILE_RANKS = 32  # with 64, tiles of 64 tokens spill on compute capability 9.0


def feature_tiles(part_sizes: Iterable[int], *, device: torch.device) -> Tensor:
    """A layer's features in tiles of at most TILE_FEATURES, none of which lies in two parts.

    Returns [num_tiles, 3] int32: the part, its first feature in the tile, and where the part ends.
    """
    tiles, start = [], 0
    for part, size in enumerate(part_sizes):
        end = start + size
        tiles += [(part, first, end) for first in range(start, end, TILE_FEATURES)]
        start = end
    return torch.tensor(tiles, dtype=torch.int32, device=device)


def lora_expand_ref(
    shrunk: Tensor,
    up: Tensor,
    scales: Tensor,
    token_adapters: Tensor,
    tiles: Tensor,
    *,
    out: Tensor,
) -> Tensor:
    """The specification; arguments as those of `lora_expand`."""
    ends = {part: end for part, _, end in tiles.tolist()}
    for adapter in adapters_among(token_adapters):
        tokens = (token_adapters == adapter).nonzero()[:, 0]
        start = 0
        for part, end in ends.items():
            if scales[adapter, part] != 0:
                # In the matrix's format, as the kernels' matrix units want it.
                vectors = shrunk[tokens, part].to(up.dtype).float()
                delta = torch.mm(vectors, up[adapter, start:end].float().t())
                out[tokens, start:end] = (out[tokens, start:end].float() + delta).to(out.dtype)
            start = end
    return out


@triton.jit
def _expand_singles_kernel(
    shrunk,  # [num_tokens, NUM_PARTS, MAX_RANK] float32
    up,  # [num_adapters, OUT_FEATURES, MAX_RANK]
    scales,  # [num_adapters, NUM_PARTS] float32
    token_adapters,  # [num_tokens] int32
    tiles,  # [num_tiles, 3] int32
    out,  # [num_tokens, OUT_FEATURES]
    OUT_FEATURES: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    UP_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program for one tile of features of one token."""
    wait_for_predecessor(PDL)
    release_successor(PDL)
    token = tl.program_id(0).to(tl.int64)
    adapter = tl.load(token_adapters + token).to(tl.int64)
    if adapter >= 0:
        tile = tiles + 3 * tl.program_id(1)
        part = tl.load(tile)
        if tl.load(scales + adapter * SCALE_STRIDE + part) != 0:
            features = tl.load(tile + 1) + tl.arange(0, BLOCK_N)
            is_feature = features < tl.load(tile + 2)
            sums = tl.zeros((BLOCK_N,), tl.float32)
            for first in range(0, MAX_RANK, BLOCK_R):
                ranks = first + tl.arange(0, BLOCK_R)
                in_matrix = ranks < MAX_RANK
                vector = tl.load(
                    shrunk + (token * NUM_PARTS + part) * MAX_RANK + ranks, mask=in_matrix, other=0
                )
                rows = tl.load(
                    up + adapter * UP_STRIDE + features[:, None] * MAX_RANK + ranks[None, :],
                    mask=is_feature[:, None] & in_matrix[None, :],
                    other=0,
                )
                vector = widen(vector.to(up.dtype.element_ty))
                sums += tl.sum(widen(rows) * vector[None, :], 1)
            at = out + token * OUT_FEATURES + features
            before = widen(tl.load(at, mask=is_feature, other=0))
            tl.store(at, (before + sums).to(out.dtype.element_ty), mask=is_feature)


@triton.jit(do_not_specialize=["num_tokens"])
def _expand_tiles_kernel(
    shrunk,  # [num_tokens, NUM_PARTS, MAX_RANK] float32
    up,  # [num_adapters, OUT_FEATURES, MAX_RANK]
    scales,  # [num_adapters, NUM_PARTS] float32
    token_adapters,  # [num_tokens] int32
    tiles,  # [num_tiles, 3] int32
    out,  # [num_tokens, OUT_FEATURES]
    num_tokens,
    OUT_FEATURES: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    MAX_RANK: tl.constexpr,
    UP_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program for BLOCK_T tokens and one tile of features."""
    wait_for_predecessor(PDL)
    release_successor(PDL)
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_step = tokens < num_tokens
    adapters = tl.load(token_adapters + tokens, mask=in_step, other=-1)
    tile = tiles + 3 * tl.program_id(1)
    part = tl.load(tile)
    features = tl.load(tile + 1) + tl.arange(0, BLOCK_N)
    is_feature = features < tl.load(tile + 2)
    vectors = shrunk + (tokens.to(tl.int64) * NUM_PARTS + part)[:, None] * MAX_RANK
    found = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    adapter = tl.min(tl.where(adapters >= 0, adapters, NO_ADAPTER), 0)
    while adapter < NO_ADAPTER:
        if tl.load(scales + adapter.to(tl.int64) * SCALE_STRIDE + part) != 0:
            is_own = adapters == adapter
            matrix = up + adapter.to(tl.int64) * UP_STRIDE + features[None, :] * MAX_RANK
            sums = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
            for first in range(0, MAX_RANK, BLOCK_R):
                ranks = first + tl.arange(0, BLOCK_R)
                in_matrix = ranks < MAX_RANK
                vector = tl.load(vectors + ranks[None, :], mask=is_own[:, None] & in_matrix[None, :], other=0)
                rows = tl.load(
                    matrix + ranks[:, None], mask=in_matrix[:, None] & is_feature[None, :], other=0
                )
                sums = dot(vector.to(up.dtype.element_ty), rows, sums)
            found = tl.where(is_own[:, None], sums, found)
        adapter = tl.min(tl.where(adapters > adapter, adapters, NO_ADAPTER), 0)
    at = out + tokens.to(tl.int64)[:, None] * OUT_FEATURES + features[None, :]
    is_changed = (adapters >= 0)[:, None] & is_feature[None, :]
    before = widen(tl.load(at, mask=is_changed, other=0))
    tl.store(at, (before + found).to(out.dtype.element_ty), mask=is_changed)


def lora_expand(
    shrunk: Tensor,
    up: Tensor,
    scales: Tensor,
    token_adapters: Tensor,
    tiles: Tensor,
    *,
    out: Tensor,
) -> Tensor:
    """Add every token's part of its adapter to `out`, and return it.

    shrunk: [num_tokens, num_parts, max_rank] float32; up: [num_adapters, out_features, max_rank], each
    adapter's contiguous; scales: [num_adapters, num_parts] float32, each adapter's contiguous;
    token_adapters: [num_tokens] int32; tiles: what `feature_tiles` makes of the layer's parts; out:
    [num_tokens, out_features]. shrunk and out are contiguous.
    """
    if not runs_triton(out):
        return lora_expand_ref(shrunk, up, scales, token_adapters, tiles, out=out)
    num_tokens, num_parts, max_rank = shrunk.shape
    out_features = out.shape[1]
    assert up.shape[1:] == (out_features, max_rank) and len(out) == len(token_adapters) == num_tokens
    assert shrunk.is_contiguous() and out.is_contiguous() and up[0].is_contiguous()
    sizes = {
        "OUT_FEATURES": out_features,
        "NUM_PARTS": num_parts,
        "MAX_RANK": max_rank,
        "UP_STRIDE": up.stride(0),
        "SCALE_STRIDE": scales.stride(0),
    }
    block_r = max(16, min(_MAX_TILE_RANKS, triton.next_power_of_2(max_rank)))
    options = {"BLOCK_N": TILE_FEATURES, "BLOCK_R": block_r, "num_warps": 4, **launch_options(out.device)}
    tensors = (shrunk, up, scales, token_adapters, tiles, out)
    if num_tokens <= MAX_SINGLE_TOKENS:
        _expand_singles_kernel[(num_tokens, len(tiles))](*tensors, **sizes, **options)
        return out
    block_t = tokens_per_tile(num_tokens)
    grid = (triton.cdiv(num_tokens, block_t), len(tiles))
    _expand_tiles_kernel[grid](*tensors, num_tokens, **sizes, BLOCK_T=block_t, **options)
    return out
