"""The launches of models with experts that the ahead-of-time test compiles, at the shapes of real models.

Like `cases.py`, which lists these among its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphllm.arena import Arena
from graphllm.attention.backend import AttentionBucket, AttentionInputs, AttentionSpec, GroupInputs
from graphllm.attention.triton_paged import TritonPagedAttention
from graphllm.kernels.expert_activation import ClampedSwiGLU, ExpertActivation
from graphllm.kernels.grouped_gemv import grouped_gated_gemv, grouped_linear_sum_gemv
from graphllm.kernels.grouped_linear import grouped_gated_linear, grouped_linear
from graphllm.kernels.moe_routing import RoutingRule, moe_routing
from graphllm.kernels.moe_sum import SharedPart, moe_sum
from graphllm.kernels.moe_tiles import ExpertTiles, expert_tiles, max_expert_tiles, rows_per_tile_for
from tests.aot.recording import Card

BF16 = torch.bfloat16
# A decode bucket and a mixed one, in tokens.
DECODE_TOKENS = 64
MIXED_TOKENS = 2048
MAX_ROWS = 256
MAX_MODEL_LEN = 131072


@dataclass(frozen=True, slots=True)
class ExpertsShape:
    """The sizes of a model's experts that kernels are compiled for."""

    hidden: int
    intermediate: int
    rule: RoutingRule
    activation: ExpertActivation = "silu"
    has_bias: bool = False
    has_shared_gate: bool = False

    def weight(self, card: Card, rows: int, columns: int) -> torch.Tensor:
        return card.tensor(self.rule.num_experts, rows, columns, dtype=BF16)

    def bias(self, card: Card, rows: int) -> torch.Tensor | None:
        return card.tensor(self.rule.num_experts, rows, dtype=BF16) if self.has_bias else None


def softmax_rule(num_experts: int, top_k: int) -> RoutingRule:
    return RoutingRule(num_experts=num_experts, top_k=top_k, scoring="softmax", normalizes=True)


MIXTRAL_8X7B = ExpertsShape(4096, 14336, softmax_rule(8, 2))
QWEN_30B_A3B = ExpertsShape(2048, 768, softmax_rule(128, 8))
GPT_OSS_20B = ExpertsShape(2880, 2880, softmax_rule(32, 4), ClampedSwiGLU(1.702, 7.0), has_bias=True)
QWEN_MOE_A2B = ExpertsShape(
    2048,
    1408,
    RoutingRule(num_experts=60, top_k=4, scoring="softmax", normalizes=False),
    has_shared_gate=True,
)
DEEPSEEK_V3 = RoutingRule(
    num_experts=256,
    top_k=8,
    scoring="sigmoid",
    normalizes=True,
    scale=2.5,
    num_groups=8,
    num_chosen_groups=4,
)


def routings(card: Card) -> None:
    for rule in (QWEN_30B_A3B.rule, QWEN_MOE_A2B.rule, DEEPSEEK_V3):
        moe_routing(
            card.tensor(DECODE_TOKENS, rule.num_experts, dtype=torch.float32),
            card.tensor(rule.num_experts, dtype=torch.float32) if rule is DEEPSEEK_V3 else None,
            card.tensor(DECODE_TOKENS, dtype=torch.int64),
            rule=rule,
            experts=card.tensor(DECODE_TOKENS, rule.top_k, dtype=torch.int32),
            weights=card.tensor(DECODE_TOKENS, rule.top_k, dtype=torch.float32),
        )


def tiles_of(card: Card, rule: RoutingRule, num_tokens: int) -> ExpertTiles:
    num_pairs = num_tokens * rule.top_k
    rows = rows_per_tile_for(num_pairs, rule.num_experts)
    num_tiles = max_expert_tiles(num_pairs, rule.num_experts, rows)
    pairs = card.tensor(num_tiles, rows, dtype=torch.int32)
    return ExpertTiles(card.tensor(num_tiles, dtype=torch.int32), pairs)


def tiles_of_experts(card: Card) -> None:
    rule = QWEN_30B_A3B.rule
    for num_tokens in (DECODE_TOKENS, MIXED_TOKENS):
        experts = card.tensor(num_tokens, rule.top_k, dtype=torch.int32)
        expert_tiles(experts, num_experts=rule.num_experts, out=tiles_of(card, rule, num_tokens))


def grouped_products(card: Card) -> None:
    for shape, num_tokens in (
        (MIXTRAL_8X7B, DECODE_TOKENS),
        (MIXTRAL_8X7B, MIXED_TOKENS),
        (QWEN_30B_A3B, DECODE_TOKENS),
        (QWEN_30B_A3B, MIXED_TOKENS // 2),
        (GPT_OSS_20B, DECODE_TOKENS),
        (GPT_OSS_20B, MIXED_TOKENS),
    ):
        top_k, hidden, inner = shape.rule.top_k, shape.hidden, shape.intermediate
        experts = card.tensor(num_tokens, top_k, dtype=torch.int32)
        tiles = tiles_of(card, shape.rule, num_tokens)
        activated = card.tensor(num_tokens * top_k, inner, dtype=BF16)
        grouped_gated_linear(
            card.tensor(num_tokens, hidden, dtype=BF16),
            shape.weight(card, 2 * inner, hidden),
            shape.bias(card, 2 * inner),
            experts,
            shape.activation,
            tiles=tiles,
            out=activated,
        )
        grouped_linear(
            activated,
            shape.weight(card, hidden, inner),
            shape.bias(card, hidden),
            experts,
            card.tensor(num_tokens, top_k, dtype=torch.float32),
            tiles=tiles,
            out=card.tensor(num_tokens * top_k, hidden, dtype=BF16),
        )


def grouped_gemvs(card: Card) -> None:
    for shape in (QWEN_30B_A3B, GPT_OSS_20B):
        top_k, hidden, inner = shape.rule.top_k, shape.hidden, shape.intermediate
        experts = card.tensor(1, top_k, dtype=torch.int32)
        activated = card.tensor(top_k, inner, dtype=BF16)
        grouped_gated_gemv(
            card.tensor(1, hidden, dtype=BF16),
            shape.weight(card, 2 * inner, hidden),
            shape.bias(card, 2 * inner),
            experts,
            shape.activation,
            out=activated,
        )
        grouped_linear_sum_gemv(
            activated,
            shape.weight(card, hidden, inner),
            shape.bias(card, hidden),
            experts,
            card.tensor(1, top_k, dtype=torch.float32),
            None,
            out=card.tensor(1, hidden, dtype=BF16),
        )


def sums_of_experts(card: Card) -> None:
    for shape in (QWEN_30B_A3B, QWEN_MOE_A2B):
        out = card.tensor(DECODE_TOKENS, shape.hidden, dtype=BF16)
        gate = card.tensor(DECODE_TOKENS, shape.rule.num_experts + 1, dtype=torch.float32)
        moe_sum(
            card.tensor(DECODE_TOKENS * shape.rule.top_k, shape.hidden, dtype=BF16),
            card.tensor(DECODE_TOKENS, shape.rule.top_k, dtype=torch.int32),
            SharedPart(out, gate) if shape.has_shared_gate else None,
            out=out,
        )


@dataclass(frozen=True, slots=True)
class Pool:
    """One layer's cache, as the attention contract has it."""

    key: torch.Tensor
    value: torch.Tensor
    key_scale: None = None
    value_scale: None = None
    group: int = 0


def attention_of_models_with_experts(card: Card) -> None:
    """A mixed step of gpt-oss, with sinks, and of heads of 192 dimensions."""
    arena = Arena(card.device)
    backend = TritonPagedAttention(
        block_size=16, arena=arena, max_num_rows=MAX_ROWS, max_model_len=MAX_MODEL_LEN
    )
    inputs = AttentionInputs(
        row_slots=card.tensor(MAX_ROWS, dtype=torch.int64),
        query_lens=card.tensor(MAX_ROWS, dtype=torch.int64),
        context_lens=card.tensor(MAX_ROWS, dtype=torch.int64),
        query_starts=card.tensor(MAX_ROWS + 1, dtype=torch.int64),
        positions=card.tensor(MIXED_TOKENS, dtype=torch.int64),
        groups=(
            GroupInputs(
                slot_mapping=card.tensor(MIXED_TOKENS, dtype=torch.int64),
                block_tables=card.tensor(MAX_ROWS + 1, MAX_MODEL_LEN // 16, dtype=torch.int32),
            ),
        ),
    )
    bucket = AttentionBucket(num_tokens=MIXED_TOKENS, num_rows=MAX_ROWS, num_decode_rows=0)
    for num_heads, num_kv_heads, head_dim, window in ((64, 8, 64, 128), (16, 16, 192, None)):
        metadata = backend.plan(inputs, bucket)
        backend.begin_step(metadata)
        pool = (card.tensor(4096, 16, num_kv_heads, head_dim, dtype=BF16) for _ in range(2))
        heads = card.tensor(MIXED_TOKENS, num_heads + 2 * num_kv_heads, head_dim, dtype=BF16)
        backend.forward(
            heads[:, :num_heads],
            layer_cache=Pool(*pool),
            spec=AttentionSpec(
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                scale=head_dim**-0.5,
                sliding_window=window,
            ),
            metadata=metadata,
            sinks=None if window is None else card.tensor(num_heads, dtype=torch.float32),
            out=arena.take("out", MIXED_TOKENS, num_heads, head_dim, dtype=BF16),
        )


CASES = (
    attention_of_models_with_experts,
    routings,
    tiles_of_experts,
    grouped_products,
    grouped_gemvs,
    sums_of_experts,
)
