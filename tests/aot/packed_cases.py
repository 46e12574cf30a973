"""The launches of products with packed weights, at the shapes of real models."""

from __future__ import annotations

import torch

from graphllm.kernels.linear import LinearWorkspace
from graphllm.kernels.packed_dense import packed_dense
from graphllm.kernels.packed_grouped import packed_grouped_gated, packed_grouped_linear
from graphllm.kernels.packed_grouped_sum import packed_grouped_sum
from graphllm.kernels.packed_linear import packed_gated_linear, packed_linear, packed_workspace_size
from graphllm.kernels.packed_tiles import E2M1
from graphllm.kernels.packed_weight import PackedFormat, PackedWeight
from tests.aot.moe_cases import DECODE_TOKENS, GPT_OSS_20B, tiles_of
from tests.aot.recording import Card

BF16 = torch.bfloat16
# Llama-3.1-8B.
HIDDEN = 4096
QKV = 6144
INTERMEDIATE = 14336

INT4 = PackedFormat(bits=4, group_size=32, zeros="offset")
INT8 = PackedFormat(bits=8, group_size=None, scale_dtype=torch.float32)
GPTQ = PackedFormat(bits=4, group_size=128, zeros="integer", num_orders=1)
NF4 = PackedFormat(bits=4, group_size=64, codebook=(0.5,) * 16, scale_dtype=torch.float32)
MXFP4 = PackedFormat(bits=4, group_size=32, codebook=E2M1, scale_dtype=torch.uint8)


def weight(card: Card, form: PackedFormat, out_features: int, in_features: int) -> PackedWeight:
    tensors = {
        name: card.tensor(*shape, dtype=dtype)
        for name, (shape, dtype) in form.shapes(out_features, in_features).items()
    }
    return PackedWeight(form, in_features, **tensors)


def packed_products(card: Card) -> None:
    """Every form at one size; our own with as many rows as make a difference."""
    for form, num_rows in ((INT4, (1, 64, 256)), (INT8, (1, 16)), (GPTQ, (16,)), (NF4, (16,))):
        partials, counters = packed_workspace_size(QKV, HIDDEN, form, card.device)
        workspace = LinearWorkspace(
            card.tensor(partials, dtype=torch.float32), card.tensor(counters, dtype=torch.int32)
        )
        packed = weight(card, form, QKV, HIDDEN)
        for rows in num_rows:
            x, out = card.tensor(rows, HIDDEN, dtype=BF16), card.tensor(rows, QKV, dtype=BF16)
            packed_linear(x, packed, None, out, workspace=workspace)


def packed_gated_product(card: Card) -> None:
    x, out = (card.tensor(32, size, dtype=BF16) for size in (HIDDEN, INTERMEDIATE))
    packed_gated_linear(x, weight(card, INT4, 2 * INTERMEDIATE, HIDDEN), None, "silu", out=out)


def plain_numbers(card: Card) -> None:
    packed_dense(weight(card, INT4, QKV, HIDDEN), out=card.tensor(QKV, HIDDEN, dtype=BF16))


def packed_experts(card: Card) -> None:
    """gpt-oss as it is published: a token, and a decode step's tiles."""
    shape = GPT_OSS_20B
    num_experts, top_k = shape.rule.num_experts, shape.rule.top_k
    hidden, inner = shape.hidden, shape.intermediate
    gate_up = weight(card, MXFP4, num_experts * 2 * inner, hidden)
    down = weight(card, MXFP4, num_experts * hidden, inner)
    for num_tokens in (1, DECODE_TOKENS):
        experts = card.tensor(num_tokens, top_k, dtype=torch.int32)
        weights = card.tensor(num_tokens, top_k, dtype=torch.float32)
        tiles = tiles_of(card, shape.rule, num_tokens) if num_tokens > 1 else None
        activated = card.tensor(num_tokens * top_k, inner, dtype=BF16)
        packed_grouped_gated(
            card.tensor(num_tokens, hidden, dtype=BF16),
            gate_up,
            shape.bias(card, 2 * inner),
            experts,
            shape.activation,
            num_experts=num_experts,
            tiles=tiles,
            out=activated,
        )
        second = (activated, down, shape.bias(card, hidden), experts, weights)
        if tiles is None:
            out = card.tensor(num_tokens, hidden, dtype=BF16)
            packed_grouped_sum(*second, None, num_experts=num_experts, out=out)
        else:
            results = card.tensor(num_tokens * top_k, hidden, dtype=BF16)
            packed_grouped_linear(*second, num_experts=num_experts, tiles=tiles, out=results)


CASES = (packed_products, packed_gated_product, plain_numbers, packed_experts)
