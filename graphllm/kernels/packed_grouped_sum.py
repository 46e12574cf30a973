"""The second product of a mixture of packed experts for a token or a few, and the sum of a token's experts.

    z_t = sum_i w_{t,i} * (W_down,e a_{t,i} + b_down,e) + the shared part of `moe_sum.py`

As `grouped_gemv.py` has it: a program goes through a token's experts in the order of its choices, so there is
no rounding in between.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.moe_sum import SharedPart, load_shared, moe_sum_ref, shared_arguments
from graphllm.kernels.packed_cpu import PackedProduct
from graphllm.kernels.packed_grouped import launch_shape, packed_grouped_linear_ref
from graphllm.kernels.packed_linear import packed_linear_ref
from graphllm.kernels.packed_streams import stream_packed_gemv
from graphllm.kernels.packed_tiles import packed_arguments
from graphllm.kernels.packed_weight import PackedWeight
from graphllm.kernels.triton_support import (
    launch_options,
    release_successor,
    runs_triton,
    wait_for_predecessor,
    widen,
)


def packed_grouped_sum_ref(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    experts: Tensor,
    weights: Tensor,
    shared: SharedPart | None,
    *,
    num_experts: int,
    out: Tensor,
    product: PackedProduct = packed_linear_ref,
) -> Tensor:
    """`packed_grouped_linear_ref` and `moe_sum_ref` in one: writes out: [num_tokens, hidden]; returns it."""
    results = x.new_zeros(len(x), weight.out_features // num_experts)
    packed_grouped_linear_ref(
        x, weight, bias, experts, weights, num_experts=num_experts, out=results, product=product
    )
    return moe_sum_ref(results, experts, shared, out=out)


@triton.jit(do_not_specialize=["num_logits"])
def _packed_sum_kernel(
    x,  # [num_tokens * TOP_K, IN_FEATURES]
    codes,  # [num_experts * OUT_FEATURES, bytes]
    scales,
    zeros,
    order,  # [num_experts, IN_FEATURES] int32 where HAS_ORDER
    codebook,
    bias,  # [num_experts, OUT_FEATURES] where HAS_BIAS
    experts,  # [num_tokens, TOP_K] int32
    weights,  # [num_tokens, TOP_K] float32
    shared,  # [num_tokens, OUT_FEATURES] where HAS_SHARED
    gate_logits,  # [num_tokens, num_logits] float32 where HAS_GATE
    out,  # [num_tokens, OUT_FEATURES]
    num_logits,
    OUT_FEATURES: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    ZERO: tl.constexpr,
    CODEBOOK: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    SCALES_SUMS: tl.constexpr,
    HAS_WORDS: tl.constexpr,
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
    sums = tl.zeros((BLOCK_N,), tl.float32)
    for rank in range(TOP_K):
        pair = token * TOP_K + rank
        expert = tl.load(experts + pair)
        if expert >= 0:
            weight_rows = expert.to(tl.int64) * OUT_FEATURES + clamped
            row_offsets = tl.zeros((1,), tl.int64) + pair * IN_FEATURES
            own_order = order
            if HAS_ORDER:
                own_order += expert.to(tl.int64) * IN_FEATURES
            result = stream_packed_gemv(
                x,
                row_offsets,
                codes,
                scales,
                zeros,
                own_order,
                codebook,
                weight_rows,
                0,
                IN_FEATURES,
                BITS,
                GROUP,
                ZEROS,
                ZERO,
                CODEBOOK,
                HAS_ORDER,
                SCALES_SUMS,
                HAS_WORDS,
                (IN_FEATURES + BLOCK_K - 1) // BLOCK_K,
                IN_FEATURES % BLOCK_K == 0,
                1,
                BLOCK_N,
                BLOCK_K,
                NUM_STAGES,
                False,
            )
            result = tl.reshape(result, (BLOCK_N,))
            if HAS_BIAS:
                result += widen(tl.load(bias + weight_rows))
            sums += result * tl.load(weights + pair)
    if HAS_SHARED:
        sums += load_shared(
            shared, gate_logits, token, features, is_feature, num_logits, OUT_FEATURES, HAS_GATE
        )
    tl.store(out + token * OUT_FEATURES + features, sums.to(out.dtype.element_ty), mask=is_feature)


def packed_grouped_sum(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    experts: Tensor,
    weights: Tensor,
    shared: SharedPart | None,
    *,
    num_experts: int,
    out: Tensor,
) -> Tensor:
    """See `packed_grouped_sum_ref`, for a token or a few; out may be the shared output. All tensors are
    contiguous."""
    if not runs_triton(x):
        return packed_grouped_sum_ref(
            x, weight, bias, experts, weights, shared, num_experts=num_experts, out=out
        )
    out_features = out.shape[1]
    assert weight.out_features == num_experts * out_features and len(x) == experts.numel()
    assert x.shape[1] == weight.in_features and x.dtype == out.dtype and weights.dtype == torch.float32
    assert all(tensor.is_contiguous() for tensor in (x, experts, weights, out))
    output, gate_logits, num_logits = shared_arguments(shared, out)
    shape = launch_shape(weight, has_tiles=False)
    _packed_sum_kernel[(triton.cdiv(out_features, shape["BLOCK_N"]), len(experts))](
        x,
        bias=x if bias is None else bias,
        experts=experts,
        weights=weights,
        shared=output,
        gate_logits=gate_logits,
        out=out,
        num_logits=num_logits,
        **packed_arguments(weight),
        OUT_FEATURES=out_features,
        TOP_K=experts.shape[1],
        HAS_BIAS=bias is not None,
        HAS_SHARED=shared is not None,
        HAS_GATE=shared is not None and shared.gate_logits is not None,
        **shape,
        **launch_options(x.device),
    )
    return out
