"""The products of a mixture of experts whose weights are packed in 4 or 8 bits (`packed_weight.py`).

The formulas are those of `grouped_linear.py` and `grouped_gemv.py`. A stack of experts is one packed matrix
with the rows of expert 0, then those of expert 1, ...

Owns the references.
"""

from __future__ import annotations

from torch import Tensor

from graphllm.kernels.expert_activation import ExpertActivation, expert_activation_ref
from graphllm.kernels.grouped_linear import pairs_by_expert
from graphllm.kernels.moe_sum import SharedPart, moe_sum_ref
from graphllm.kernels.packed_cpu import PackedProduct
from graphllm.kernels.packed_linear import packed_linear_ref
from graphllm.kernels.packed_weight import PackedWeight


def packed_grouped_gated_ref(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    experts: Tensor,
    activation: ExpertActivation,
    *,
    num_experts: int,
    out: Tensor,
    product: PackedProduct = packed_linear_ref,
) -> Tensor:
    """Gates, factors and activation of every pair.

    x: [num_tokens, hidden]; weight: num_experts times 2 * intermediate rows, gates first; bias:
    [num_experts, 2 * intermediate] or None; experts: [num_tokens, top_k] int32, -1 for padding. Writes out:
    [num_tokens * top_k, intermediate] of x's dtype, but for the rows of padding, and returns it.
    """
    rows_per_expert = weight.out_features // num_experts
    for expert, pairs in pairs_by_expert(experts):
        rows = x.index_select(0, pairs // experts.shape[1])
        gate_up = x.new_empty(len(pairs), rows_per_expert)
        own = weight.rows(expert * rows_per_expert, rows_per_expert)
        product(rows, own, None if bias is None else bias[expert], gate_up)
        activated = x.new_empty(len(pairs), out.shape[1])
        out[pairs] = expert_activation_ref(gate_up, activation, out=activated)
    return out


def packed_grouped_linear_ref(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    experts: Tensor,
    weights: Tensor,
    *,
    num_experts: int,
    out: Tensor,
    product: PackedProduct = packed_linear_ref,
) -> Tensor:
    """Each pair's row by its expert's weights, times the pair's own weight.

    x: [num_pairs, intermediate]; weight: num_experts times hidden rows; bias: [num_experts, hidden] or None;
    experts: [num_tokens, top_k] int32 and weights: the same in float32. Writes out: [num_pairs, hidden] of
    x's dtype, but for the rows of padding, and returns it.
    """
    rows_per_expert = weight.out_features // num_experts
    for expert, pairs in pairs_by_expert(experts):
        products = x.new_empty(len(pairs), rows_per_expert)
        own = weight.rows(expert * rows_per_expert, rows_per_expert)
        product(x.index_select(0, pairs), own, None if bias is None else bias[expert], products)
        out[pairs] = products.mul_(weights.flatten()[pairs, None])
    return out


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
