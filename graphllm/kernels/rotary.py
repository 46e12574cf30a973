"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864).

With d = rotary_dim and i < d / 2, dimensions i and i + d / 2 of a head are a point of the plane, turned by
the angle a_i = position * inverse_frequency_i:

    y_i         = x_i         * cos(a_i) - x_{i + d/2} * sin(a_i)
    y_{i + d/2} = x_{i + d/2} * cos(a_i) + x_i         * sin(a_i)

Interleaved, the two are dimensions 2i and 2i + 1. Dimensions of a head from rotary_dim on stay as they are.

Some models sharpen attention with the distance from the text's beginning (Llama 4's code, after Nakanishi,
2025, arXiv:2501.19399): a whole query head at a position is multiplied by

    1 + growth * ln(1 + floor(position / interval))

which costs nothing where queries turn by cosines and sines of their own, scaled by it.

Owns the tables of one step's angles, which all layers share, and what a turn is. On a device the turn
happens in `rotary_cache_write.py`; which frequencies a model has is `layers/rotary.py`'s.
"""

from __future__ import annotations

import math
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

_QUARTER_TURN: tl.constexpr = tl.constexpr(math.pi / 2)
_QUARTER_TURNS_PER_RADIAN: tl.constexpr = tl.constexpr(2 / math.pi)
_ANGLES_PER_PROGRAM = 128  # one a thread: when a step is short it matters how soon its first kernels end


def rotary_ref(heads: Tensor, tables: Tensor, *, is_interleaved: bool = False) -> None:
    """Turn heads by their tokens' angles, in place.

    heads: [num_tokens, num_heads, head_dim], query and key heads alike, any strides; tables: [2,
    num_tokens, rotary_dim] of heads' dtype, two of `rotary_tables`', rotary_dim <= head_dim.
    """
    rotary_dim = tables.shape[-1]
    turned = heads[..., :rotary_dim]
    cos, signed_sin = tables.unsqueeze(2).unbind()  # [num_tokens, 1, rotary_dim]
    if not is_interleaved:
        swapped = torch.roll(turned, rotary_dim // 2, dims=-1)  # [num_tokens, num_heads, rotary_dim]
        turned.mul_(cos).addcmul_(swapped, signed_sin)
        return
    cos, sin = cos[..., : rotary_dim // 2], signed_sin[..., rotary_dim // 2 :]
    even, odd = turned[..., 0::2], turned[..., 1::2]  # [num_tokens, num_heads, rotary_dim / 2]
    before = even.clone()
    even.mul_(cos).addcmul_(odd, sin, value=-1)
    odd.mul_(cos).addcmul_(before, sin)


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryGrowth:
    """How queries grow with their position; see above. interval: in tokens."""

    growth: float
    interval: int

    def __post_init__(self) -> None:
        assert self.interval > 0

    def factors(self, positions: Tensor) -> Tensor:
        """[num_tokens] float32 for positions [num_tokens] int64."""
        return 1.0 + self.growth * (1.0 + positions.div(self.interval, rounding_mode="floor")).log()


def rotary_tables_ref(
    positions: Tensor,
    inverse_frequencies: Tensor,
    *,
    scale: float,
    query_growth: QueryGrowth | None = None,
    out: Tensor,
) -> Tensor:
    """Cosines and signed sines for one step, to be shared by all layers.

    positions: [num_tokens] int64; inverse_frequencies: [rotary_dim / 2] float32; scale multiplies both
    (YaRN's attention factor). out: [2, num_tokens, rotary_dim], of any floating dtype: out[0] has the
    cosines, the same in both halves, and out[1] the sines, negated in the first half, so that a turn is
    x * cos + swapped(x) * signed_sin. With query_growth it is [4, num_tokens, rotary_dim]: the last two are
    for queries, the first two for keys. Angles, cosines and sines are float32, as the models were trained,
    and rounded at the end. Returns out.
    """
    half = inverse_frequencies.shape[0]
    angles = positions.float()[:, None] * inverse_frequencies  # [num_tokens, rotary_dim / 2]
    cos, sin = angles.cos().mul_(scale), angles.sin_().mul_(scale)
    for first in range(0, len(out), 2):
        if first and query_growth is not None:
            factors = query_growth.factors(positions)[:, None]
            cos, sin = cos * factors, sin * factors
        out[first].view(-1, 2, half).copy_(cos[:, None])
        out[first + 1, :, half:].copy_(sin)
        out[first + 1, :, :half].copy_(-sin)
    return out


@triton.jit
def _sine_and_cosine(angle):
    """sin and cos of a float32 angle of up to 1e6 radians, to about one unit in the last place of 1.

    The angle loses whole quarter turns in float64, where the remainder of 1e6 keeps an error under 1e-9,
    and Taylor's series does the rest: on [-pi/4, pi/4] the first terms left out are below 3e-8. The
    library's functions would do as well, but reduce large angles with a table on the stack.
    """
    wide = angle.to(tl.float64)
    quarters = tl.floor(wide * _QUARTER_TURNS_PER_RADIAN + 0.5)
    x = (wide - quarters * _QUARTER_TURN).to(tl.float32)
    x2 = x * x
    near_sin = x + x * x2 * (-1 / 6 + x2 * (1 / 120 + x2 * (-1 / 5040 + x2 * (1 / 362880))))
    near_cos = 1.0 + x2 * (-1 / 2 + x2 * (1 / 24 + x2 * (-1 / 720 + x2 * (1 / 40320))))
    quadrant = quarters.to(tl.int32) & 3
    is_odd = (quadrant & 1) == 1
    sin = tl.where(is_odd, near_cos, near_sin)
    cos = tl.where(is_odd, near_sin, near_cos)
    sin = tl.where(quadrant >= 2, -sin, sin)
    cos = tl.where((quadrant == 1) | (quadrant == 2), -cos, cos)
    return sin, cos


@triton.jit(do_not_specialize=["num_tokens"])
def _rotary_tables_kernel(
    positions,
    inverse_frequencies,
    out,
    num_tokens,
    SCALE: tl.constexpr,
    GROWTH: tl.constexpr,
    INTERVAL: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    ANGLES: tl.constexpr,
    PDL: tl.constexpr,
):
    """INTERVAL None: queries turn by the same tables as keys."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    angle = tl.program_id(0) * ANGLES + tl.arange(0, ANGLES)
    token, pair = angle // HALF_PADDED, angle % HALF_PADDED
    frequency = tl.load(inverse_frequencies + pair, pair < HALF, other=0.0)
    wait_for_predecessor(PDL)
    release_successor(PDL)
    position = tl.load(positions + token, token < num_tokens, other=0)

    sin, cos = _sine_and_cosine(position.to(tl.float32) * frequency)
    sin, cos = sin * SCALE, cos * SCALE
    cos_row = out + token.to(tl.int64) * (2 * HALF)
    table = num_tokens.to(tl.int64) * (2 * HALF)
    mask = (token < num_tokens) & (pair < HALF)
    _store_turn(cos, sin, cos_row, pair, mask, table, HALF, DTYPE)
    if INTERVAL is not None:
        factor = 1.0 + GROWTH * tl.log(1.0 + (position // INTERVAL).to(tl.float32))
        _store_turn(cos * factor, sin * factor, cos_row + 2 * table, pair, mask, table, HALF, DTYPE)


@triton.jit
def _store_turn(cos, sin, cos_row, pair, mask, table, HALF: tl.constexpr, DTYPE: tl.constexpr):
    """A table of cosines at cos_row, and one of signed sines `table` numbers behind it."""
    sin_row = cos_row + table
    tl.store(cos_row + pair, cos.to(DTYPE), mask)
    tl.store(cos_row + HALF + pair, cos.to(DTYPE), mask)
    tl.store(sin_row + pair, (-sin).to(DTYPE), mask)
    tl.store(sin_row + HALF + pair, sin.to(DTYPE), mask)


def rotary_tables(
    positions: Tensor,
    inverse_frequencies: Tensor,
    *,
    scale: float,
    query_growth: QueryGrowth | None = None,
    out: Tensor,
) -> Tensor:
    """See `rotary_tables_ref`; out contiguous. Exact to 2e-6 at positions of up to 131,072 times a
    frequency of at most 1, to 1e-5 at a million.
    """
    num_tokens, half = positions.shape[0], inverse_frequencies.shape[0]
    num_tables = 2 if query_growth is None else 4
    assert out.shape == (num_tables, num_tokens, 2 * half) and out.is_contiguous()
    if not runs_triton(out):
        return rotary_tables_ref(
            positions, inverse_frequencies, scale=scale, query_growth=query_growth, out=out
        )
    if num_tokens == 0:
        return out
    half_padded = triton.next_power_of_2(half)
    num_programs = triton.cdiv(num_tokens * half_padded, _ANGLES_PER_PROGRAM)
    _rotary_tables_kernel[(num_programs,)](
        positions,
        inverse_frequencies,
        out,
        num_tokens,
        SCALE=scale,
        GROWTH=None if query_growth is None else query_growth.growth,
        INTERVAL=None if query_growth is None else query_growth.interval,
        HALF=half,
        HALF_PADDED=half_padded,
        ANGLES=_ANGLES_PER_PROGRAM,
        num_warps=4,
        enable_fp_fusion=False,  # so that what the interpreter proves is what a card computes
        **launch_options(out.device),
    )
    return out
