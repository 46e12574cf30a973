"""The first half of a gated feed-forward layer with few rows: two products and their activation in one.

    y_{t,n} = f(sum_k x_{t,k} * gate_{n,k} + gate_bias_n) * (sum_k x_{t,k} * up_{n,k} + up_bias_n)

with f of `gated_activation.py`. Beside a product and an activation it saves a kernel and the traffic of the
wide intermediate. The loop over weights is `skinny_linear`'s: gate and up rows alternate, so that one tile
has both rows of an output, and the last step is a split of neighbours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.gated_activation import Activation, activate, gated_activation_ref
from graphllm.kernels.linear_choice import (
    LinearTable,
    SkinnyConfig,
    capability_of,
    choose_gated_linear,
)
from graphllm.kernels.skinny_linear import prefetches_weights, skinny_linear_ref, stream_weights
from graphllm.kernels.triton_support import launch_options, runs_triton, widen


def gated_linear_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation, *, out: Tensor
) -> Tensor:
    """x: [num_rows, in_features], weight: [2 * intermediate, in_features] and bias: [2 * intermediate] or
    None, gates first. Writes [num_rows, intermediate] into `out`, of x's dtype, and returns it.

    Sums are in float32; they, and f's values, are rounded to x's dtype, as two kernels would.
    """
    gate_up = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    return gated_activation_ref(skinny_linear_ref(x, weight, bias, gate_up), activation, out=out)


@triton.jit(do_not_specialize=["num_rows"])
def _gated_linear_kernel(
    x,
    weight,
    bias,
    out,
    num_rows,
    INTERMEDIATE: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USES_DOT: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PREFETCHES: tl.constexpr,
    PDL: tl.constexpr,
):
    first_feature = tl.program_id(0) * BLOCK_N
    pairs = tl.arange(0, 2 * BLOCK_N)
    pair_features = tl.minimum(first_feature + pairs // 2, INTERMEDIATE - 1)
    weight_rows = (pairs % 2) * INTERMEDIATE + pair_features
    sums = stream_weights(
        x,
        weight,
        weight_rows.to(tl.int64),
        num_rows,
        0,
        IN_FEATURES,
        (IN_FEATURES + BLOCK_K - 1) // BLOCK_K,
        IN_FEATURES % BLOCK_K == 0,
        ROWS,
        2 * BLOCK_N,
        BLOCK_K,
        USES_DOT,
        NUM_STAGES,
        PREFETCHES,
        PDL,
    )
    if HAS_BIAS:
        sums += widen(tl.load(bias + weight_rows))[None, :]
    dtype: tl.constexpr = out.dtype.element_ty
    gate, up = tl.split(tl.reshape(sums.to(dtype), (ROWS, BLOCK_N, 2)))
    activated = activate(widen(gate), ACTIVATION).to(dtype)
    rows = tl.arange(0, ROWS)[:, None]
    features = first_feature + tl.arange(0, BLOCK_N)[None, :]
    mask = (rows < num_rows) & (features < INTERMEDIATE)
    tl.store(out + rows * INTERMEDIATE + features, (widen(activated) * widen(up)).to(dtype), mask)


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation,
    *,
    out: Tensor,
    config: SkinnyConfig,
) -> Tensor:
    """See `gated_linear_ref`; x, weight and out are contiguous, num_rows is at most config.max_rows.

    config.splits is 1: what a program has are both factors of its outputs, whole.
    """
    if not runs_triton(x):
        return gated_linear_ref(x, weight, bias, activation, out=out)
    num_rows, in_features = x.shape
    if num_rows == 0:
        return out
    intermediate = weight.shape[0] // 2
    assert num_rows <= config.max_rows and config.splits == 1
    assert x.is_contiguous() and weight.is_contiguous() and out.is_contiguous()
    assert out.shape == (num_rows, intermediate) and weight.shape == (2 * intermediate, in_features)
    _gated_linear_kernel[(triton.cdiv(intermediate, config.block_n),)](
        x,
        weight,
        x if bias is None else bias,
        out,
        num_rows,
        INTERMEDIATE=intermediate,
        IN_FEATURES=in_features,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        ROWS=config.rows_held(num_rows),
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        USES_DOT=config.form == "dot",
        NUM_STAGES=config.num_stages,
        PREFETCHES=prefetches_weights(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(x.device),
    )
    return out


def gated_config_for(x: Tensor, weight: Tensor, *, table: LinearTable | None = None) -> SkinnyConfig | None:
    """The configuration of `gated_linear` for these sizes on this device, or None where a product and an
    activation, as two kernels, are as fast or nothing was measured."""
    return choose_gated_linear(
        x.shape[0],
        weight.shape[0] // 2,
        weight.shape[1],
        dtype=weight.dtype,
        capability=capability_of(x.device),
        table=table,
    )
