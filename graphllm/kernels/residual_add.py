"""A layer's output added to the residual stream, where no norm follows at once.

    residual_t <- residual_t + scale * x_t

The scaled x is rounded before it is added, and the sum once more, as if the two were done apart. Where a norm
follows, `rms_norm.py` and `layer_norm.py` add as well.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.triton_support import (
    launch_options,
    release_successor,
    runs_triton,
    wait_for_predecessor,
    widen,
)

_MAX_TILE = 1024
_VALUES_PER_WARP = 256  # one 16-byte load of bfloat16 for each of 32 threads


def scaled_ref(x: Tensor, scale: float) -> Tensor:
    """x, or scale * x in x's dtype."""
    return x if scale == 1.0 else x * scale


def residual_add_ref(x: Tensor, residual: Tensor, *, scale: float = 1.0) -> Tensor:
    """x, residual: [num_tokens, hidden] of one floating dtype. Changes residual, and returns it."""
    return residual.add_(scaled_ref(x, scale))


@triton.jit
def scaled(x, SCALE: tl.constexpr, dtype: tl.constexpr):
    """scale * x for float32 values that were loaded from `dtype`, rounded to it; float32."""
    if SCALE == 1.0:
        return x
    return widen((x * SCALE).to(dtype))


@triton.jit
def _residual_add_kernel(
    x,  # [num_tokens, HIDDEN]
    residual,  # [num_tokens, HIDDEN]
    SCALE: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    in_row = columns < HIDDEN
    at = tl.program_id(0).to(tl.int64) * HIDDEN + columns
    dtype: tl.constexpr = residual.dtype.element_ty
    added = scaled(widen(tl.load(x + at, mask=in_row, other=0.0)), SCALE, dtype)
    summed = added + widen(tl.load(residual + at, mask=in_row, other=0.0))
    release_successor(PDL)
    tl.store(residual + at, summed.to(dtype), mask=in_row)


def residual_add(x: Tensor, residual: Tensor, *, scale: float = 1.0) -> Tensor:
    """See `residual_add_ref`. The kernel needs both tensors contiguous."""
    if not runs_triton(x):
        return residual_add_ref(x, residual, scale=scale)
    num_tokens, hidden = x.shape
    assert x.shape == residual.shape and x.dtype == residual.dtype
    assert x.is_contiguous() and residual.is_contiguous()
    tile = min(triton.next_power_of_2(hidden), _MAX_TILE)
    _residual_add_kernel[(num_tokens, triton.cdiv(hidden, tile))](
        x,
        residual,
        SCALE=scale,
        HIDDEN=hidden,
        TILE=tile,
        num_warps=max(tile // _VALUES_PER_WARP, 1),
        **launch_options(x.device),
    )
    return residual
