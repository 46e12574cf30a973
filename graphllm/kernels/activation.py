"""The activation of a feed-forward layer without a gate.

    y = f(x),  with f of `gated_activation.py`

f runs in float32 and is rounded to the dtype of its input. Only where it is computed differs from there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.gated_activation import Activation, activate, activate_ref
from graphllm.kernels.triton_support import (
    launch_options,
    release_successor,
    runs_triton,
    wait_for_predecessor,
    widen,
)

# Two 16-byte loads of bfloat16 for each of 128 threads.
_TILE = 1024
_NUM_WARPS = 4


def activation_ref(x: Tensor, activation: Activation, *, out: Tensor) -> Tensor:
    """x: [num_tokens, intermediate] of any floating dtype; out: of the same shape and dtype, returned, and
    may be x itself.
    """
    return activate_ref(x, activation, out=out)


@triton.jit
def _activation_kernel(
    x,  # [num_tokens, INTERMEDIATE]
    out,  # [num_tokens, INTERMEDIATE]
    INTERMEDIATE: tl.constexpr,
    TILE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    in_row = columns < INTERMEDIATE
    at = tl.program_id(0).to(tl.int64) * INTERMEDIATE + columns
    values = tl.load(x + at, mask=in_row, other=0.0)
    release_successor(PDL)
    tl.store(out + at, activate(widen(values), ACTIVATION).to(out.dtype.element_ty), mask=in_row)


def activation(x: Tensor, activation: Activation, *, out: Tensor) -> Tensor:
    """See `activation_ref`. The kernel needs both tensors contiguous."""
    if not runs_triton(x):
        return activation_ref(x, activation, out=out)
    num_tokens, intermediate = out.shape
    assert x.shape == out.shape and x.dtype == out.dtype
    assert x.is_contiguous() and out.is_contiguous()
    _activation_kernel[(num_tokens, triton.cdiv(intermediate, _TILE))](
        x,
        out,
        INTERMEDIATE=intermediate,
        TILE=_TILE,
        ACTIVATION=activation,
        num_warps=_NUM_WARPS,
        **launch_options(x.device),
    )
    return out
