"""What the decode and the prefill kernel of latent attention do alike with a tile of cached latents.

    s       = scale (q . c), of which the first `rank` dimensions and the turned ones are products of their
              own, because neither number needs to be a power of two and their sum (512 + 64) seldom is
    m', l'  = max(m, max_i s_i),  2^(m - m') l + sum_i 2^(s_i - m')
    acc'    = 2^(m - m') acc + sum_i 2^(s_i - m') c_i[:rank]          (online softmax, arXiv:1805.02867)

with log2(e) taken into s. The latent is loaded once and is key and value. Owns the arithmetic of a tile. Owns
no loop and no launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphllm.kernels.attention_tiles import LOG2_E, as_operand
from graphllm.kernels.triton_support import dot

_LOG2_E: tl.constexpr = tl.constexpr(LOG2_E)


@triton.jit
def load_part(pointers, is_row, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """[rows, PADDED] numbers, SIZE of them from each pointer on; zeros behind, and for rows that are not.

    Zeros and not what lies there: a probability of zero does not cancel a NaN.
    """
    dims = tl.arange(0, PADDED)
    mask = is_row[:, None]
    if SIZE < PADDED:
        mask = mask & (dims < SIZE)[None, :]
    return tl.load(pointers[:, None] + dims[None, :], mask=mask, other=0.0)


@triton.jit
def attend_latents(
    query_latent,
    query_turned,
    accumulator,
    total,
    maximum,
    cache,
    cache_scale,
    rows,
    is_inside,
    is_visible,
    SCALE: tl.constexpr,
    RANK: tl.constexpr,
    TURNED: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    TURNED_PADDED: tl.constexpr,
    IS_SCALED: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """One tile of the cache into the running softmax.

    query_latent: [M, RANK_PADDED], query_turned: [M, TURNED_PADDED]; rows, is_inside: [tile], slots of the
    cache as int64; is_visible: [M or 1, tile]. Returns accumulator [M, RANK_PADDED], total [M], maximum [M],
    all float32. A token's scale multiplies its scores, and once more its probabilities, so that 8-bit
    operands become the query's format exactly.
    """
    at = cache + rows * (RANK + TURNED)
    latents = as_operand(load_part(at, is_inside, RANK, RANK_PADDED), query_latent)
    turned = as_operand(load_part(at + RANK, is_inside, TURNED, TURNED_PADDED), query_latent)
    scores = tl.zeros([query_latent.shape[0], rows.shape[0]], dtype=tl.float32)
    scores = dot(query_latent, tl.trans(latents), scores)
    scores = dot(query_turned, tl.trans(turned), scores)
    if IS_SCALED:
        scales = tl.load(cache_scale + rows, mask=is_inside, other=0.0)
        scores *= scales[None, :]
    if IS_MASKED:
        scores = tl.where(is_visible, scores, float("-inf"))
    UNIT: tl.constexpr = SCALE * _LOG2_E
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * UNIT)
    weights = tl.exp2(scores * UNIT - new_maximum[:, None])
    decay = tl.exp2(maximum - new_maximum)
    total = total * decay + tl.sum(weights, 1)
    if IS_SCALED:
        weights *= scales[None, :]
    accumulator = dot(as_operand(weights, query_latent), latents, accumulator * decay[:, None])
    return accumulator, total, new_maximum
