"""The products of a mixture of experts for a token or a few, where hardly two tokens share an expert.

    a_p = f(W_gate,e x_t + b_gate,e, W_up,e x_t + b_up,e),  p = (t, i) a pair, e its expert
    z_t = sum_i w_{t,i} * (W_down,e a_{t,i} + b_down,e) + the shared part of `moe_sum.py`

Here a step is all about streaming weights, so no tiles are built: a program looks up its pair's expert and
runs along a few of its rows, on CUDA cores. The second product goes through a token's experts in the order
of its choices, so the sum needs no kernel of its own and no rounding in between.

Owns the two products in this form, and when it is the better one. The form for more tokens is
`grouped_linear.py`, whose references are these products' too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.expert_activation import (
    ExpertActivation,
    activate_pair,
    activation_constants,
)
from graphllm.kernels.grouped_linear import grouped_gated_linear_ref, grouped_linear_ref
from graphllm.kernels.linear import LinearProduct, linear_ref
from graphllm.kernels.moe_sum import SharedPart, load_shared, moe_sum_ref, shared_arguments
from graphllm.kernels.skinny_linear import load_tile, multiply_on_cores
from graphllm.kernels.triton_support import (
    launch_options,
    release_successor,
    runs_triton,
    wait_for_predecessor,
    widen,
)

MAX_GEMV_TOKENS = 4

# Rows of weights of a program, input features of a step of its loop, and how many such tiles are under way.
_BLOCK_N = 4
_BLOCK_K = 512
_NUM_WARPS = 4
_NUM_STAGES = 3
# Products that a thread adds up before they join the running sums, as in `skinny_linear.py`.
_ADJACENT: tl.constexpr = tl.constexpr(8)


def takes_gemv(num_tokens: int, *, top_k: int, num_experts: int) -> bool:
    """Whether so few tokens seldom share an expert, so that nothing is lost by reading weights pair by pair.

    With pairs for a quarter of the experts, random choices read an eighth of them twice.
    """
    return num_tokens == 1 or (num_tokens <= MAX_GEMV_TOKENS and 4 * num_tokens * top_k <= num_experts)


def grouped_linear_sum_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    experts: Tensor,
    weights: Tensor,
    shared: SharedPart | None,
    *,
    out: Tensor,
    product: LinearProduct = linear_ref,
) -> Tensor:
    """`grouped_linear_ref` and `moe_sum_ref` in one: x: [num_tokens * top_k, intermediate]; writes out:
    [num_tokens, hidden], and returns it."""
    results = x.new_zeros(len(x), weight.shape[1])
    grouped_linear_ref(x, weight, bias, experts, weights, out=results, product=product)
    return moe_sum_ref(results, experts, shared, out=out)


@triton.jit
def _stream_row_tiles(
    x,
    weight,
    weight_rows,
    IN_FEATURES: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """The products of one row x with the weights' rows `weight_rows` [NUM_ROWS] int64: [NUM_ROWS] float32."""
    columns = tl.arange(0, BLOCK_K)[None, None, :]
    values_at = x + columns
    weights_at = weight + weight_rows[None, :, None] * IN_FEATURES + columns
    IS_WHOLE: tl.constexpr = IN_FEATURES % BLOCK_K == 0
    sums = tl.zeros((1, NUM_ROWS, BLOCK_K // _ADJACENT), tl.float32)
    for first in tl.range(0, IN_FEATURES, BLOCK_K, num_stages=NUM_STAGES):
        tile = load_tile(weights_at + first, columns + first, IN_FEATURES, IS_WHOLE, "evict_first")
        values = load_tile(values_at + first, columns + first, IN_FEATURES, IS_WHOLE, "")
        sums = multiply_on_cores(values, tile, sums, 1, NUM_ROWS, BLOCK_K)
    return tl.reshape(tl.sum(sums, 2), (NUM_ROWS,))


@triton.jit
def _grouped_gated_gemv_kernel(
    x,  # [num_tokens, IN_FEATURES]
    weight,  # [num_experts, 2 * INTERMEDIATE, IN_FEATURES]
    bias,  # [num_experts, 2 * INTERMEDIATE] where HAS_BIAS
    experts,  # [num_tokens, TOP_K] int32
    out,  # [num_tokens * TOP_K, INTERMEDIATE]
    INTERMEDIATE: tl.constexpr,
    IN_FEATURES: tl.constexpr,
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
        values = x + (pair // TOP_K).to(tl.int64) * IN_FEATURES
        sums = _stream_row_tiles(values, weight, weight_rows, IN_FEATURES, 2 * BLOCK_N, BLOCK_K, NUM_STAGES)
        if HAS_BIAS:
            sums += widen(tl.load(bias + weight_rows))
        gate, up = tl.split(tl.reshape(sums, (BLOCK_N, 2)))
        activated = activate_pair(gate, up, ACTIVATION, ALPHA, LIMIT, out.dtype.element_ty)
        stored = first_feature + tl.arange(0, BLOCK_N)
        tl.store(out + pair.to(tl.int64) * INTERMEDIATE + stored, activated, mask=stored < INTERMEDIATE)


@triton.jit(do_not_specialize=["num_logits"])
def _grouped_sum_gemv_kernel(
    x,  # [num_tokens * TOP_K, IN_FEATURES]
    weight,  # [num_experts, OUT_FEATURES, IN_FEATURES]
    bias,  # [num_experts, OUT_FEATURES] where HAS_BIAS
    experts,  # [num_tokens, TOP_K] int32
    weights,  # [num_tokens, TOP_K] float32
    shared,  # [num_tokens, OUT_FEATURES] where HAS_SHARED
    gate_logits,  # [num_tokens, num_logits] float32 where HAS_GATE
    out,  # [num_tokens, OUT_FEATURES]
    num_logits,
    OUT_FEATURES: tl.constexpr,
    IN_FEATURES: tl.constexpr,
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
            values = x + pair * IN_FEATURES
            result = _stream_row_tiles(values, weight, weight_rows, IN_FEATURES, BLOCK_N, BLOCK_K, NUM_STAGES)
            if HAS_BIAS:
                result += widen(tl.load(bias + weight_rows))
            sums += result * tl.load(weights + pair)
    if HAS_SHARED:
        sums += load_shared(
            shared, gate_logits, token, features, is_feature, num_logits, OUT_FEATURES, HAS_GATE
        )
    tl.store(out + token * OUT_FEATURES + features, sums.to(out.dtype.element_ty), mask=is_feature)


def grouped_gated_gemv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    experts: Tensor,
    activation: ExpertActivation,
    *,
    out: Tensor,
) -> Tensor:
    """See `grouped_gated_linear_ref`. The kernel needs all tensors contiguous."""
    if not runs_triton(x):
        return grouped_gated_linear_ref(x, weight, bias, experts, activation, out=out)
    (_, rows, in_features), intermediate = weight.shape, out.shape[1]
    assert rows == 2 * intermediate and x.shape[1] == in_features and len(out) == experts.numel()
    assert x.dtype == weight.dtype == out.dtype
    assert all(tensor.is_contiguous() for tensor in (x, weight, experts, out))
    _grouped_gated_gemv_kernel[(triton.cdiv(intermediate, _BLOCK_N), experts.numel())](
        x,
        weight,
        x if bias is None else bias,
        experts,
        out,
        INTERMEDIATE=intermediate,
        IN_FEATURES=in_features,
        TOP_K=experts.shape[1],
        HAS_BIAS=bias is not None,
        **activation_constants(activation),
        BLOCK_N=_BLOCK_N,
        BLOCK_K=_BLOCK_K,
        NUM_STAGES=_NUM_STAGES,
        num_warps=_NUM_WARPS,
        num_stages=_NUM_STAGES,
        **launch_options(x.device),
    )
    return out


def grouped_linear_sum_gemv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    experts: Tensor,
    weights: Tensor,
    shared: SharedPart | None,
    *,
    out: Tensor,
) -> Tensor:
    """See `grouped_linear_sum_ref`; out may be the shared output. All tensors are contiguous."""
    if not runs_triton(x):
        return grouped_linear_sum_ref(x, weight, bias, experts, weights, shared, out=out)
    _, out_features, in_features = weight.shape
    assert x.shape == (experts.numel(), in_features) and out.shape == (len(experts), out_features)
    assert x.dtype == weight.dtype == out.dtype and weights.dtype == torch.float32
    assert all(tensor.is_contiguous() for tensor in (x, weight, experts, weights, out))
    output, gate_logits, num_logits = shared_arguments(shared, out)
    _grouped_sum_gemv_kernel[(triton.cdiv(out_features, _BLOCK_N), len(experts))](
        x,
        weight,
        x if bias is None else bias,
        experts,
        weights,
        output,
        gate_logits,
        out,
        num_logits,
        OUT_FEATURES=out_features,
        IN_FEATURES=in_features,
        TOP_K=experts.shape[1],
        HAS_BIAS=bias is not None,
        HAS_SHARED=shared is not None,
        HAS_GATE=shared is not None and shared.gate_logits is not None,
        BLOCK_N=_BLOCK_N,
        BLOCK_K=_BLOCK_K,
        NUM_STAGES=_NUM_STAGES,
        num_warps=_NUM_WARPS,
        num_stages=_NUM_STAGES,
        **launch_options(x.device),
    )
    return out
