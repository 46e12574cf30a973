"""What the decode and the prefill kernel of paged attention do alike with a tile of keys and values.

    s        = scale q.k, soft-capped, plus ALiBi's slope times the key's position, all of it times log2(e),
               so that the softmax needs exp2 only
    m', l'   = max(m, max_i s_i),  2^(m - m') l + sum_i 2^(s_i - m')
    acc'     = 2^(m - m') acc + sum_i 2^(s_i - m') v_i                 (online softmax, arXiv:1805.02867)

Owns the arithmetic of a tile and how its rows are found in the cache. Owns no loop and no launch.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from graphllm.kernels.triton_support import INTERPRETED, dot

LOG2_E = 1.4426950408889634
NO_MAXIMUM = -1.0e30
"""A maximum before the first key: below all scores, and finite, because -inf - -inf is NaN."""

# Smallest side of a matrix instruction's tile.
_MIN_TILE_SIDE = 16
# The card that a process without one compiles for, which is to say interprets.
_DEFAULT_CAPABILITY = (9, 0)
_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)
_LOG2_E: tl.constexpr = tl.constexpr(LOG2_E)


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """The compute capability that configurations are chosen for."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else _DEFAULT_CAPABILITY


def padded_side(size: int) -> int:
    """The side of a tile that holds `size` heads or dimensions."""
    return max(_MIN_TILE_SIDE, triton.next_power_of_2(size))


@triton.jit
def as_operand(x, like):
    """x in the number format of `like` for a matrix product: exact from 8 bits, rounded from float32.

    The interpreter cannot round to bfloat16, so there all operands are float32.
    """
    return x.to(tl.float32 if _INTERPRETED else like.dtype)


@triton.jit
def capped(products, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """q.k, or with a cap tanh(scale q.k / softcap): the scores but for a factor. SOFTCAP 0 means none."""
    if SOFTCAP != 0:
        # tanh(x) = 1 - 2 / (e^2x + 1): right at both infinities, and it has no branch.
        products = 1 - 2 / (tl.exp2(products * (SCALE / SOFTCAP * 2 * _LOG2_E)) + 1)
    return products


@triton.jit
def cache_rows(table, positions, is_inside, BLOCK_SIZE: tl.constexpr):
    """A row's tokens as numbers of cache slots, int64; those outside are anything, and not to be loaded."""
    blocks = tl.load(table + positions // BLOCK_SIZE, mask=is_inside, other=0)
    return blocks.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE


@triton.jit
def load_tile(
    cache, rows, is_inside, kv_head, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr
):
    """[tile, DIMS] keys or values of one head, zeros outside and behind HEAD_DIM.

    Zeros and not what lies there: a probability of zero does not cancel a NaN.
    """
    dims = tl.arange(0, DIMS)
    pointers = cache + (rows * (NUM_KV_HEADS * HEAD_DIM) + kv_head * HEAD_DIM)[:, None] + dims[None, :]
    is_element = is_inside[:, None]
    if HEAD_DIM < DIMS:
        is_element = is_element & (dims < HEAD_DIM)[None, :]
    return tl.load(pointers, mask=is_element, other=0.0)


@triton.jit
def attend_tile(
    query,
    accumulator,
    total,
    maximum,
    key_cache,
    value_cache,
    key_scale,
    value_scale,
    rows,
    positions,
    is_inside,
    is_visible,
    kv_head,
    slopes,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    IS_SCALED: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """One tile of keys and values into the running softmax. query: [M, DIMS]; rows, positions, is_inside:
    [tile]; is_visible: [M or 1, tile]; slopes: [M] float32 where HAS_SLOPES.

    Returns accumulator [M, DIMS], total [M], maximum [M], all float32. A key's scale multiplies its scores
    and a value's scale its probabilities, so that 8-bit operands become the query's format exactly.
    """
    keys = load_tile(key_cache, rows, is_inside, kv_head, NUM_KV_HEADS, HEAD_DIM, DIMS)
    values = load_tile(value_cache, rows, is_inside, kv_head, NUM_KV_HEADS, HEAD_DIM, DIMS)
    products = tl.zeros([query.shape[0], rows.shape[0]], dtype=tl.float32)
    products = dot(query, tl.trans(as_operand(keys, query)), products)
    if IS_SCALED:
        scales = rows * NUM_KV_HEADS + kv_head
        products *= tl.load(key_scale + scales, mask=is_inside, other=0.0)[None, :]
    scores = capped(products, SCALE, SOFTCAP)
    # The positive factor that makes exp2 the softmax's exp; kept back for one multiply-add a score.
    UNIT: tl.constexpr = (SOFTCAP if SOFTCAP != 0 else SCALE) * _LOG2_E
    if HAS_SLOPES:
        scores += (slopes * (_LOG2_E / UNIT))[:, None] * positions.to(tl.float32)[None, :]
    if IS_MASKED:
        scores = tl.where(is_visible, scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * UNIT)
    weights = tl.exp2(scores * UNIT - new_maximum[:, None])
    decay = tl.exp2(maximum - new_maximum)
    total = total * decay + tl.sum(weights, 1)
    if IS_SCALED:
        weights *= tl.load(value_scale + scales, mask=is_inside, other=0.0)[None, :]
    accumulator = dot(as_operand(weights, query), as_operand(values, query), accumulator * decay[:, None])
    return accumulator, total, new_maximum
