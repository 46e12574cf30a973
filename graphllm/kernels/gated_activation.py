"""The gated activation of a feed-forward layer (Shazeer, 2020, arXiv:2002.05202).

y = f(gate) * up,  with f one of
silu:       f(x) = x * sigmoid(x)
gelu:       f(x) = x * Phi(x), Phi the normal distribution function
gelu_tanh:  f(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))
relu:       f(x) = max(x, 0)

f runs in float32 and is rounded to the dtype of its input before it is multiplied, as the models were
trained.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
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

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]

# Two 16-byte loads of bfloat16 for each of 128 threads.
_TILE = 1024
_NUM_WARPS = 4

_SQRT_HALF: tl.constexpr = tl.constexpr(math.sqrt(0.5))
_TWICE_SQRT_2_OVER_PI: tl.constexpr = tl.constexpr(2 * math.sqrt(2 / math.pi))


# torch.nn.functional's have no `out`, and a temporary as large as `out` costs a fifth of the time.
_SILU_OUT = torch.ops.aten.silu.out
_GELU_OUT = torch.ops.aten.gelu.out


def activate_ref(x: Tensor, activation: Activation, *, out: Tensor) -> Tensor:
    """f of x, of any floating dtype, into out of the same shape, which may be x itself. Returns out."""
    if activation == "silu":
        return _SILU_OUT(x, out=out)
    if activation == "relu":
        return torch.clamp_min(x, 0.0, out=out)
    return _GELU_OUT(x, approximate="tanh" if activation == "gelu_tanh" else "none", out=out)


def gated_activation_ref(gate_up: Tensor, activation: Activation, *, out: Tensor) -> Tensor:
    """gate_up: [num_tokens, 2 * intermediate], gates first; out: [num_tokens, intermediate], returned."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activate_ref(gate, activation, out=out).mul_(up)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """f of float32 values."""
    if ACTIVATION == "relu":
        return tl.maximum(x, 0.0)
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))
    # (1 + tanh(u)) / 2 = sigmoid(2 u): one exponential, and no cancellation for negative x.
    z = x if ACTIVATION == "silu" else _TWICE_SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-z))


@triton.jit
def _gated_activation_kernel(
    gate_up,  # [num_tokens, 2 * INTERMEDIATE]
    out,  # [num_tokens, INTERMEDIATE]
    INTERMEDIATE: tl.constexpr,
    TILE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    in_row = columns < INTERMEDIATE
    gates = gate_up + token * (2 * INTERMEDIATE) + columns
    gate = tl.load(gates, mask=in_row, other=0.0)
    up = tl.load(gates + INTERMEDIATE, mask=in_row, other=0.0)
    release_successor(PDL)
    dtype: tl.constexpr = out.dtype.element_ty
    activated = activate(widen(gate), ACTIVATION).to(dtype)
    tl.store(out + token * INTERMEDIATE + columns, (widen(activated) * widen(up)).to(dtype), mask=in_row)


def gated_activation(gate_up: Tensor, activation: Activation, *, out: Tensor) -> Tensor:
    """See `gated_activation_ref`. The kernel needs both tensors contiguous."""
    if not runs_triton(gate_up):
        return gated_activation_ref(gate_up, activation, out=out)
    num_tokens, intermediate = out.shape
    assert gate_up.shape == (num_tokens, 2 * intermediate) and gate_up.dtype == out.dtype
    assert gate_up.is_contiguous() and out.is_contiguous()
    _gated_activation_kernel[(num_tokens, triton.cdiv(intermediate, _TILE))](
        gate_up,
        out,
        INTERMEDIATE=intermediate,
        TILE=_TILE,
        ACTIVATION=activation,
        num_warps=_NUM_WARPS,
        **launch_options(gate_up.device),
    )
    return out
