"""The products of a mixture of experts in 8 bits for a token or a few, pair by pair, on CUDA cores.

The mathematics is `scaled_grouped.py`'s, the form that of `grouped_gemv.py`: a program looks up its pair's
expert and runs along a few of its rows, and the second product goes through a token's experts in the order
of its choices, so that the sum needs no kernel of its own. Products of two 8-bit numbers and their sums are
float32.

Owns the two products in this form.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.expert_activation import ExpertActivation, activate_pair, activation_constants
from graphllm.kernels.linear import LinearProduct, linear_ref
from graphllm.kernels.moe_sum import SharedPart, load_shared, moe_sum_ref, shared_arguments
from graphllm.kernels.scaled_grouped import (
    check_scaled_operands,
    scaled_grouped_gated_ref,
    scaled_grouped_linear_ref,
)
from graphllm.kernels.scaled_linear import ScaledRows, ScaledWeight
from graphllm.kernels.skinny_linear import load_tile
from graphllm.kernels.triton_support import (
    launch_options,
    release_successor,
    runs_triton,
    wait_for_predecessor,
    widen,
)

# Rows of weights of a program, input features of a step of its loop, and how many such tiles are under way.
_BLOCK_N = 4
_BLOCK_K = 1024
_NUM_WARPS = 4
_NUM_STAGES = 3
# Products that a thread adds up before they join the running sums: a 128-bit load of 8-bit weights.
_ADJACENT: tl.constexpr = tl.constexpr(16)


def scaled_grouped_sum_ref(
    x: ScaledRows,
    weight: ScaledWeight,
    bias: Tensor | None,
    experts: Tensor,
    weights: Tensor,
    shared: SharedPart | None,
    *,
    num_experts: int,
    out: Tensor,
    product: LinearProduct = linear_ref,
) -> Tensor:
    """`scaled_grouped_linear_ref` and `moe_sum_ref` in one; writes out: [num_tokens, hidden]; returns it."""
    results = out.new_zeros(experts.numel(), out.shape[1])
    scaled_grouped_linear_ref(
        x, weight, bias, experts, weights, num_experts=num_experts, out=results, product=product
    )
    return moe_sum_ref(results, experts, shared, out=out)


@triton.jit
def _stream_scaled_rows(
    x,
    x_scales,
    weight,
    weight_scales,
    weight_rows,
    IN_FEATURES: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """The products of one row x with the weights' rows `weight_rows` [NUM_ROWS] int64: [NUM_ROWS] float32,
    scales included."""
    columns = tl.arange(0, BLOCK_K)[None, :]
    weights_at = weight + weight_rows[:, None] * IN_FEATURES + columns
    IS_WHOLE: tl.constexpr = IN_FEATURES % BLOCK_K == 0
    SUMS: tl.constexpr = BLOCK_K // _ADJACENT
    sums = tl.zeros((NUM_ROWS, SUMS), tl.float32)
    for first in tl.range(0, IN_FEATURES, BLOCK_K, num_stages=NUM_STAGES):
        tile = load_tile(weights_at + first, columns + first, IN_FEATURES, IS_WHOLE, "evict_first")
        values = load_tile(x + columns + first, columns + first, IN_FEATURES, IS_WHOLE, "")
        products = tl.sum(tl.reshape(widen(tile) * widen(values), (NUM_ROWS, SUMS, _ADJACENT)), 2)
        if GROUP > 0:
            LAST_GROUP: tl.constexpr = (IN_FEATURES - 1) // GROUP
            groups = tl.minimum((first + tl.arange(0, SUMS) * _ADJACENT) // GROUP, LAST_GROUP)
            factors = tl.load(weight_scales + groups[None, :] * SCALE_STRIDE + weight_rows[:, None])
            products *= factors * tl.load(x_scales + groups)[None, :]
        sums += products
    result = tl.sum(sums, 1)
    if GROUP == 0:
        result *= tl.load(x_scales) * tl.load(weight_scales + weight_rows)
    return result


@triton.jit
def _scaled_grouped_gated_gemv_kernel(
    x,  # [num_tokens, IN_FEATURES]
    x_scales,  # [num_tokens, num_groups] float32
    weight,  # [NUM_ROWS, IN_FEATURES], 2 * INTERMEDIATE rows an expert
    weight_scales,  # [num_groups, NUM_ROWS] float32
    bias,  # [NUM_ROWS] where HAS_BIAS
    experts,  # [num_tokens, TOP_K] int32
    out,  # [num_tokens * TOP_K, INTERMEDIATE]
    NUM_ROWS: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    GROUP: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    release_successor(PDL)
    pair = tl.program_id(1)
    expert = tl.load(experts + pair)
    if expert >= 0:
        first_feature = tl.program_id(0) * BLOCK_N
        # Gate and up rows alternate, so the last step is a split of neighbours.
        rows = tl.arange(0, 2 * BLOCK_N)
        features = tl.minimum(first_feature + rows // 2, INTERMEDIATE - 1)
        weight_rows = expert.to(tl.int64) * (2 * INTERMEDIATE) + (rows % 2) * INTERMEDIATE + features
        token = (pair // TOP_K).to(tl.int64)
        NUM_GROUPS: tl.constexpr = (IN_FEATURES + GROUP - 1) // GROUP if GROUP > 0 else 1
        sums = _stream_scaled_rows(
            x + token * IN_FEATURES,
            x_scales + token * NUM_GROUPS,
            weight,
            weight_scales,
            weight_rows,
            IN_FEATURES,
            GROUP,
            NUM_ROWS,
            2 * BLOCK_N,
            BLOCK_K,
            NUM_STAGES,
        )
        if HAS_BIAS:
            sums += widen(tl.load(bias + weight_rows))
        gate, up = tl.split(tl.reshape(sums, (BLOCK_N, 2)))
        activated = activate_pair(gate, up, ACTIVATION, ALPHA, LIMIT, out.dtype.element_ty)
        stored = first_feature + tl.arange(0, BLOCK_N)
        tl.store(out + pair.to(tl.int64) * INTERMEDIATE + stored, activated, mask=stored < INTERMEDIATE)


@triton.jit(do_not_specialize=["num_logits"])
def _scaled_grouped_sum_kernel(
    x,  # [num_tokens * TOP_K, IN_FEATURES]
    x_scales,  # [num_tokens * TOP_K, num_groups] float32
    weight,  # [NUM_ROWS, IN_FEATURES], OUT_FEATURES rows an expert
    weight_scales,  # [num_groups, NUM_ROWS] float32
    bias,  # [NUM_ROWS] where HAS_BIAS
    experts,  # [num_tokens, TOP_K] int32
    weights,  # [num_tokens, TOP_K] float32
    shared,  # [num_tokens, OUT_FEATURES] where HAS_SHARED
    gate_logits,  # [num_tokens, num_logits] float32 where HAS_GATE
    out,  # [num_tokens, OUT_FEATURES]
    num_logits,
    NUM_ROWS: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    GROUP: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    HAS_GATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    release_successor(PDL)
    token = tl.program_id(1).to(tl.int64)
    features = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_feature = features < OUT_FEATURES
    clamped = tl.minimum(features, OUT_FEATURES - 1)
    NUM_GROUPS: tl.constexpr = (IN_FEATURES + GROUP - 1) // GROUP if GROUP > 0 else 1
    sums = tl.zeros((BLOCK_N,), tl.float32)
    for rank in range(TOP_K):
        pair = token * TOP_K + rank
        expert = tl.load(experts + pair)
        if expert >= 0:
            weight_rows = expert.to(tl.int64) * OUT_FEATURES + clamped
            result = _stream_scaled_rows(
                x + pair * IN_FEATURES,
                x_scales + pair * NUM_GROUPS,
                weight,
                weight_scales,
                weight_rows,
                IN_FEATURES,
                GROUP,
                NUM_ROWS,
                BLOCK_N,
                BLOCK_K,
                NUM_STAGES,
            )
            if HAS_BIAS:
                result += widen(tl.load(bias + weight_rows))
            sums += result * tl.load(weights + pair)
    if HAS_SHARED:
        sums += load_shared(
            shared, gate_logits, token, features, is_feature, num_logits, OUT_FEATURES, HAS_GATE
        )
    tl.store(out + token * OUT_FEATURES + features, sums.to(out.dtype.element_ty), mask=is_feature)


def scaled_grouped_gated_gemv(
    x: ScaledRows,
    weight: ScaledWeight,
    bias: Tensor | None,
    experts: Tensor,
    activation: ExpertActivation,
    *,
    num_experts: int,
    out: Tensor,
) -> Tensor:
    """See `scaled_grouped_gated_ref`. The kernel needs all tensors contiguous."""
    if not runs_triton(out):
        return scaled_grouped_gated_ref(
            x, weight, bias, experts, activation, num_experts=num_experts, out=out
        )
    (num_rows, in_features), intermediate = weight.values.shape, out.shape[1]
    assert num_rows == num_experts * 2 * intermediate and len(out) == experts.numel()
    check_scaled_operands(x, weight, out)
    _scaled_grouped_gated_gemv_kernel[(triton.cdiv(intermediate, _BLOCK_N), experts.numel())](
        x.values,
        x.scales,
        weight.values,
        weight.scales,
        x.scales if bias is None else bias,
        experts,
        out,
        NUM_ROWS=num_rows,
        INTERMEDIATE=intermediate,
        IN_FEATURES=in_features,
        GROUP=weight.group_size or 0,
        TOP_K=experts.shape[1],
        HAS_BIAS=bias is not None,
        **activation_constants(activation),
        BLOCK_N=_BLOCK_N,
        BLOCK_K=_BLOCK_K,
        NUM_STAGES=_NUM_STAGES,
        num_warps=_NUM_WARPS,
        num_stages=_NUM_STAGES,
        **launch_options(out.device),
    )
    return out


def scaled_grouped_sum(
    x: ScaledRows,
    weight: ScaledWeight,
    bias: Tensor | None,
    experts: Tensor,
    weights: Tensor,
    shared: SharedPart | None,
    *,
    num_experts: int,
    out: Tensor,
) -> Tensor:
    """See `scaled_grouped_sum_ref`; out may be the shared output. All tensors are contiguous."""
    if not runs_triton(out):
        return scaled_grouped_sum_ref(
            x, weight, bias, experts, weights, shared, num_experts=num_experts, out=out
        )
    num_rows, in_features = weight.values.shape
    out_features = num_rows // num_experts
    assert len(x.values) == experts.numel() and out.shape == (len(experts), out_features)
    assert weights.dtype == torch.float32 and weights.is_contiguous() and experts.is_contiguous()
    check_scaled_operands(x, weight, out)
    output, gate_logits, num_logits = shared_arguments(shared, out)
    _scaled_grouped_sum_kernel[(triton.cdiv(out_features, _BLOCK_N), len(experts))](
        x.values,
        x.scales,
        weight.values,
        weight.scales,
        x.scales if bias is None else bias,
        experts,
        weights,
        output,
        gate_logits,
        out,
        num_logits,
        NUM_ROWS=num_rows,
        OUT_FEATURES=out_features,
        IN_FEATURES=in_features,
        GROUP=weight.group_size or 0,
        TOP_K=experts.shape[1],
        HAS_BIAS=bias is not None,
        HAS_SHARED=shared is not None,
        HAS_GATE=shared is not None and shared.gate_logits is not None,
        BLOCK_N=_BLOCK_N,
        BLOCK_K=_BLOCK_K,
        NUM_STAGES=_NUM_STAGES,
        num_warps=_NUM_WARPS,
        num_stages=_NUM_STAGES,
        **launch_options(out.device),
    )
    return out
