"""The launches of products in 8 bits (e4m3 and int8), and of what rounds their activations."""

from __future__ import annotations

import torch

from graphllm.kernels.linear import LinearWorkspace
from graphllm.kernels.moe_routing import RoutingRule
from graphllm.kernels.quantize_rows import num_groups_of, quantize_rows
from graphllm.kernels.scaled_grouped import scaled_grouped_gated, scaled_grouped_linear
from graphllm.kernels.scaled_grouped_gemv import scaled_grouped_gated_gemv, scaled_grouped_sum
from graphllm.kernels.scaled_linear import (
    ScaledRows,
    ScaledWeight,
    scaled_linear,
    scaled_workspace_size,
)
from tests.aot.moe_cases import tiles_of
from tests.aot.recording import Card

BF16 = torch.bfloat16
E4M3, INT8 = torch.float8_e4m3fn, torch.int8
HIDDEN, QKV, INTERMEDIATE = 4096, 6144, 14336
BLOCK = 128


def formats(card: Card) -> list[tuple[torch.dtype, int | None]]:
    """(format, group size): what the card multiplies."""
    return [(INT8, None), *([(E4M3, None), (E4M3, BLOCK)] if card.has_e4m3 else [])]


def scaled_rows(
    card: Card, num_rows: int, in_features: int, *, dtype: torch.dtype, group_size: int | None
) -> ScaledRows:
    num_groups = num_groups_of(in_features, group_size)
    return ScaledRows(
        card.tensor(num_rows, in_features, dtype=dtype),
        card.tensor(num_rows, num_groups, dtype=torch.float32),
    )


def rounded_rows(card: Card) -> None:
    forms = formats(card) if card.has_e4m3 else [(INT8, None), (INT8, BLOCK)]
    for dtype, group_size in forms:
        x = card.tensor(64, HIDDEN, dtype=BF16)
        rows = scaled_rows(card, 64, HIDDEN, dtype=dtype, group_size=group_size)
        quantize_rows(x, group_size, given=None, out=rows.values, scales=rows.scales)
        if group_size is None:
            given = card.tensor(1, dtype=torch.float32)
            quantize_rows(x, None, given=given, out=rows.values, scales=rows.scales)


def scaled_products(card: Card) -> None:
    """One row, 64 rows, and many."""
    for dtype, group_size in formats(card):
        partials, counters = scaled_workspace_size(QKV, HIDDEN, group_size=group_size)
        workspace = LinearWorkspace(
            card.tensor(partials, dtype=torch.float32), card.tensor(counters, dtype=torch.int32)
        )
        weight = ScaledWeight(
            card.tensor(QKV, HIDDEN, dtype=dtype),
            card.tensor(num_groups_of(HIDDEN, group_size), QKV, dtype=torch.float32),
            group_size,
        )
        for num_rows in (1, 64, 2048):
            rows = scaled_rows(card, num_rows, HIDDEN, dtype=dtype, group_size=group_size)
            scaled_linear(rows, weight, None, card.tensor(num_rows, QKV, dtype=BF16), workspace=workspace)


def scaled_experts(card: Card) -> None:
    """Qwen3-30B-A3B's: a decode step's tiles, a prefill's, and a token alone. int8 where there is no e4m3."""
    rule = RoutingRule(num_experts=128, top_k=8, scoring="softmax", normalizes=True)
    hidden, inner, num_experts, top_k = 2048, 768, rule.num_experts, rule.top_k
    for dtype, group_size in formats(card)[1 if card.has_e4m3 else 0 :]:
        gate_up, down = (
            ScaledWeight(
                card.tensor(num_rows, in_features, dtype=dtype),
                card.tensor(num_groups_of(in_features, group_size), num_rows, dtype=torch.float32),
                group_size,
            )
            for num_rows, in_features in (
                (num_experts * 2 * inner, hidden),
                (num_experts * hidden, inner),
            )
        )
        for num_tokens in (1, 64) if dtype == INT8 else (1, 64, 2048):
            num_pairs = num_tokens * top_k
            experts = card.tensor(num_tokens, top_k, dtype=torch.int32)
            weights = card.tensor(num_tokens, top_k, dtype=torch.float32)
            tokens = scaled_rows(card, num_tokens, hidden, dtype=dtype, group_size=group_size)
            pairs = scaled_rows(card, num_pairs, inner, dtype=dtype, group_size=group_size)
            activated = card.tensor(num_pairs, inner, dtype=BF16)
            if num_tokens == 1:
                out = card.tensor(num_tokens, hidden, dtype=BF16)
                scaled_grouped_gated_gemv(
                    tokens, gate_up, None, experts, "silu", num_experts=num_experts, out=activated
                )
                scaled_grouped_sum(
                    pairs, down, None, experts, weights, None, num_experts=num_experts, out=out
                )
                continue
            tiles = tiles_of(card, rule, num_tokens)
            out = card.tensor(num_pairs, hidden, dtype=BF16)
            scaled_grouped_gated(
                tokens, gate_up, None, experts, "silu", num_experts=num_experts, tiles=tiles, out=activated
            )
            scaled_grouped_linear(
                pairs, down, None, experts, weights, num_experts=num_experts, tiles=tiles, out=out
            )


CASES = (rounded_rows, scaled_products, scaled_experts)
