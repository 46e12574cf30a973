"""Keys and values in 8 bits, with a scale for each token and head.

With m = max_i |x_i| over a head's dimensions and L the format's largest number (e4m3: 448, e5m2: 57344,
int8: 127),

    stored_i = round(x_i * (L / m))      scale = m / L      meant_i = stored_i * scale

rounded to the nearest number of the format, ties to even. A head of zeros has scale 0 and stores zeros.
The formats are those of Micikevicius et al., 2022 (arXiv:2209.05433). Owns the arithmetic, for torch and
for kernels; storing is `rotary_cache_write.py`'s, reading the attention kernels'.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.triton_support import INTERPRETED

LARGEST_STORED = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}
"""The formats, and the largest number of each."""

# Heads below this keep the scale of a head of this size: L / m would leave float32's range. Nothing a
# model computes is so small.
_SMALLEST_BOUND: tl.constexpr = tl.constexpr(2.0**-100)
_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)


def quantize_kv_ref(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x: [..., head_dim], finite, of any floating dtype; dtype: one of `LARGEST_STORED`.

    Returns stored, of x's shape and `dtype`, and scale, [...] float32.
    """
    wide = x.float()
    largest = wide.abs().amax(dim=-1)  # [...]
    bound = largest.clamp(min=_SMALLEST_BOUND.value)
    # A tensor, because torch may multiply by the reciprocal where one operand of a division is a number.
    limit = torch.full_like(bound, LARGEST_STORED[dtype])
    scale = torch.where(largest > 0, bound / limit, 0.0)
    # The product of the largest element exceeds the limit by a rounding error at most and rounds to it.
    scaled = wide * (limit / bound)[..., None]
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


def dequantize_kv_ref(stored: Tensor, scale: Tensor) -> Tensor:
    """stored: [..., head_dim], scale: [...] float32; returns stored's shape in float32."""
    return stored.float() * scale[..., None]


@triton.jit
def kv_scale(largest, STORED: tl.constexpr):
    """largest: float32 maxima of |x|; STORED: the format. Returns scale and the factor for `quantize`."""
    LIMIT: tl.constexpr = 448.0 if STORED.is_fp8e4nv() else (57344.0 if STORED.is_fp8e5() else 127.0)
    bound = tl.maximum(largest, _SMALLEST_BOUND)
    limit = tl.full(bound.shape, LIMIT, tl.float32)
    # Divided as IEEE 754 says, so that every path that stores a head stores the same scale.
    scale = tl.where(largest > 0, tl.div_rn(bound, limit), 0.0)
    return scale, tl.div_rn(limit, bound)


@triton.jit
def quantize(scaled, STORED: tl.constexpr):
    """scaled: float32, already times its head's factor, so within the format's range but for a rounding
    error, which rounds back. Returns STORED, rounded to nearest, ties to even.
    """
    if STORED.is_int8():
        # In [2^23, 2^24) float32 has whole numbers only, and the last bits of this sum are the rounded
        # number's in two's complement.
        return (scaled + 1.5 * 2**23).to(tl.int32, bitcast=True).to(tl.int8)
    # Cards before 8.9 convert to e5m2 by way of float16, which rounds twice, and the interpreter drops a
    # carry out of the mantissa. A number that the format has survives both.
    if STORED.is_fp8e5():
        scaled = _round_to_float8(scaled, MANTISSA_BITS=2, SMALLEST_NORMAL=2.0**-14)
    elif _INTERPRETED:
        scaled = _round_to_float8(scaled, MANTISSA_BITS=3, SMALLEST_NORMAL=2.0**-6)
    return scaled.to(STORED)


@triton.jit
def _round_to_float8(x, MANTISSA_BITS: tl.constexpr, SMALLEST_NORMAL: tl.constexpr):
    """The number nearest to x with so many bits behind its leading one, and as many in subnormals.

    Adding and taking away a number whose last bit is worth the step between neighbours rounds as the
    addition does: to nearest, ties to even.
    """
    bits = x.to(tl.int32, bitcast=True)
    power_of_two = (bits & 0x7F800000).to(tl.float32, bitcast=True)
    step_setter = tl.maximum(power_of_two, SMALLEST_NORMAL) * (1.5 * 2 ** (23 - MANTISSA_BITS))
    rounded = (x + step_setter) - step_setter
    # What rounds to zero keeps its sign, as in a conversion.
    return (rounded.to(tl.int32, bitcast=True) | (bits & -0x80000000)).to(tl.float32, bitcast=True)
