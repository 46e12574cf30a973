"""The launches that the ahead-of-time test compiles: each launcher, at the shapes of real models.

One function for each file of kernels. A case calls launchers only, as a captured step would, so what is
compiled is what they choose. The cases are few on purpose: a kernel whose code does not depend on a size
is compiled at one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import get_args

import torch

from graphllm.arena import Arena
from graphllm.attention.backend import AttentionBucket, AttentionInputs, AttentionSpec, GroupInputs
from graphllm.attention.triton_paged import TritonPagedAttention
from graphllm.kernels.activation import activation
from graphllm.kernels.add_rows import add_rows
from graphllm.kernels.block_copy import BlockPools, CopyKind, block_copy
from graphllm.kernels.embedding import embedding
from graphllm.kernels.gated_activation import Activation, gated_activation
from graphllm.kernels.gated_linear import gated_linear
from graphllm.kernels.layer_norm import add_layer_norm, layer_norm
from graphllm.kernels.linear_choice import SkinnyConfig, default_table
from graphllm.kernels.logit_adjustment import adjust_logits
from graphllm.kernels.residual_add import residual_add
from graphllm.kernels.rms_norm import add_rms_norm, rms_norm
from graphllm.kernels.rotary import QueryGrowth, rotary_tables
from graphllm.kernels.rotary_cache_write import rotary_cache_write
from graphllm.kernels.skinny_linear import skinny_linear, skinny_num_counters, skinny_scratch_bytes
from graphllm.kernels.step_inputs import StepInputs, step_inputs
from graphllm.kernels.token_ranks import token_ranks
from graphllm.runner.device_sampler import SampleResults, sample_on_device
from graphllm.runner.sampler import SamplerKind, SamplingTables
from tests.aot import latent_cases, lora_cases, moe_cases, packed_cases, scaled_cases
from tests.aot.recording import Card

BF16 = torch.bfloat16
BLOCK_SIZE = 16
MAX_MODEL_LEN = 131072
MAX_ROWS = 256
NUM_SLOTS = MAX_ROWS + 1
NUM_GROUPS = 2  # of layers with block tables of their own
# A decode bucket and a mixed one, in tokens.
DECODE_TOKENS = 64
MIXED_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a model that kernels are compiled for."""

    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    has_qk_norm: bool = False


LLAMA_1B = Shape(2048, 32, 8, 64, 8192, 128256)
QWEN_600M = Shape(1024, 16, 8, 128, 3072, 151936, has_qk_norm=True)
LLAMA_8B = Shape(4096, 32, 8, 128, 14336, 128256)
GEMMA_LIKE = Shape(2304, 8, 4, 256, 9216, 256000)


def norms(card: Card) -> None:
    rows = card.tensor(DECODE_TOKENS, dtype=torch.int64)
    for shape in (LLAMA_1B, QWEN_600M, LLAMA_8B):
        x, residual, out = (card.tensor(MIXED_TOKENS, shape.hidden, dtype=BF16) for _ in range(3))
        add_rms_norm(x, residual, card.tensor(shape.hidden, dtype=BF16), eps=1e-5, out=out)
    x, residual, out = (card.tensor(MIXED_TOKENS, GEMMA_LIKE.hidden, dtype=BF16) for _ in range(3))
    weight = card.tensor(GEMMA_LIKE.hidden, dtype=BF16)
    rms_norm(x, weight, eps=1e-6, unit_offset=True, out=out)
    add_rms_norm(x, residual, weight, eps=1e-6, unit_offset=True, rows=rows, out=out[:DECODE_TOKENS])
    layer_norm(x, weight, weight, eps=1e-5, out=out)
    add_layer_norm(x, residual, weight, weight, eps=1e-5, out=out)
    add_rms_norm(x, residual, weight, eps=1e-6, scale=0.22, out=out)
    residual_add(x, residual)
    residual_add(x, residual, scale=0.22)


def norms_of_heads(card: Card) -> None:
    """Of a merged projection's query heads: all together, and each by its own factors."""
    shape = LLAMA_8B
    query = queries(card, shape, DECODE_TOKENS)
    flat = query.flatten(1)
    rms_norm(flat, card.tensor(shape.num_heads * shape.head_dim, dtype=BF16), eps=1e-6, out=flat)
    weight = card.tensor(shape.num_heads, shape.head_dim, dtype=BF16)
    layer_norm(query, weight, None, eps=1e-5, out=query)


def gated_activations(card: Card) -> None:
    shape = LLAMA_8B
    gate_up = card.tensor(DECODE_TOKENS, 2 * shape.intermediate, dtype=BF16)
    for kind in get_args(Activation):
        out = card.tensor(DECODE_TOKENS, shape.intermediate, dtype=BF16)
        gated_activation(gate_up, kind, out=out)
        activation(out, kind, out=out)


def embeddings(card: Card) -> None:
    token_ids = card.tensor(DECODE_TOKENS, dtype=torch.int64)
    for shape in (QWEN_600M, GEMMA_LIKE):
        weight = card.tensor(shape.vocab, shape.hidden, dtype=BF16)
        scale = shape.hidden**0.5 if shape is GEMMA_LIKE else None
        embedding(token_ids, weight, out=card.tensor(DECODE_TOKENS, shape.hidden, dtype=BF16), scale=scale)


def ends_of_the_stream(card: Card) -> None:
    """Learned positions at its beginning, capped and scaled logits at its end."""
    hidden = card.tensor(DECODE_TOKENS, LLAMA_1B.hidden, dtype=BF16)
    table = card.tensor(2050, LLAMA_1B.hidden, dtype=BF16)
    add_rows(table[2:], card.tensor(DECODE_TOKENS, dtype=torch.int64), out=hidden)
    logits = card.tensor(DECODE_TOKENS, GEMMA_LIKE.vocab, dtype=torch.float32)
    adjust_logits(logits, softcap=30.0)
    adjust_logits(logits, multiplier=0.0625)


def inputs_of_steps(card: Card) -> None:
    for num_rows, num_tokens in ((DECODE_TOKENS, DECODE_TOKENS), (MAX_ROWS, MIXED_TOKENS)):
        out = StepInputs(
            context_lens=card.tensor(num_rows, dtype=torch.int64),
            query_starts=card.tensor(num_rows + 1, dtype=torch.int64),
            positions=card.tensor(num_tokens, dtype=torch.int64),
            slot_mapping=card.tensor(NUM_GROUPS, num_tokens, dtype=torch.int64),
            token_ids=card.tensor(num_tokens, dtype=torch.int64),
            sampled_tokens=card.tensor(num_rows, dtype=torch.int64),
        )
        step_inputs(
            row_slots=card.tensor(num_rows, dtype=torch.int64),
            query_lens=card.tensor(num_rows, dtype=torch.int64),
            pair_rows=card.tensor(num_rows, dtype=torch.int64),
            num_computed_tokens=card.tensor(NUM_SLOTS, dtype=torch.int64),
            block_tables=card.tensor(NUM_GROUPS, NUM_SLOTS, MAX_MODEL_LEN // BLOCK_SIZE, dtype=torch.int32),
            token_table=card.tensor(NUM_SLOTS, MAX_MODEL_LEN + 1, dtype=torch.int32),
            block_size=BLOCK_SIZE,
            is_decode=num_rows == num_tokens,
            out=out,
        )


def rotary(card: Card) -> None:
    for query_growth in (None, QueryGrowth(growth=0.1, interval=16384)):
        num_tables = 2 if query_growth is None else 4
        rotary_tables(
            card.tensor(DECODE_TOKENS, dtype=torch.int64),
            card.tensor(LLAMA_8B.head_dim // 2, dtype=torch.float32),
            scale=1.0,
            query_growth=query_growth,
            out=card.tensor(num_tables, DECODE_TOKENS, LLAMA_8B.head_dim, dtype=BF16),
        )


def eight_bits(card: Card) -> torch.dtype:
    """What an 8-bit cache is stored in on this card."""
    return torch.float8_e4m3fn if card.has_e4m3 else torch.int8


@dataclass(frozen=True, slots=True)
class Cache:
    """One layer's pool, as the attention contract has it."""

    key: torch.Tensor
    value: torch.Tensor
    key_scale: torch.Tensor | None
    value_scale: torch.Tensor | None
    group: int = 0


def cache_of(card: Card, shape: Shape, dtype: torch.dtype) -> Cache:
    size = (4096, BLOCK_SIZE, shape.num_kv_heads)
    scales = [None if dtype == BF16 else card.tensor(*size, dtype=torch.float32) for _ in range(2)]
    stored = [card.tensor(*size, shape.head_dim, dtype=dtype) for _ in range(2)]
    return Cache(*stored, *scales)


def cache_writes(card: Card) -> None:
    """Whole heads that turn by halves, then parts of heads, neighbours, and queries with their own tables."""
    for shape, dtype, num_tokens, rotary_dim, is_interleaved, num_tables in (
        (LLAMA_1B, BF16, DECODE_TOKENS, 64, False, 2),
        (QWEN_600M, BF16, DECODE_TOKENS, 128, False, 2),
        (GEMMA_LIKE, BF16, DECODE_TOKENS, 256, False, 2),
        (LLAMA_8B, BF16, MIXED_TOKENS, 128, False, 2),
        (QWEN_600M, eight_bits(card), MIXED_TOKENS, 128, False, 2),
        (LLAMA_1B, BF16, DECODE_TOKENS, 16, False, 2),
        (LLAMA_8B, BF16, MIXED_TOKENS, 96, False, 2),
        (LLAMA_8B, BF16, MIXED_TOKENS, 64, True, 2),
        (LLAMA_8B, BF16, DECODE_TOKENS, 128, False, 4),
    ):
        num_heads = shape.num_heads + 2 * shape.num_kv_heads
        norm = card.tensor(shape.head_dim, dtype=BF16) if shape.has_qk_norm else None
        cache = cache_of(card, shape, dtype)
        rotary_cache_write(
            card.tensor(num_tokens, num_heads * shape.head_dim, dtype=BF16),
            card.tensor(num_tables, num_tokens, rotary_dim, dtype=BF16),
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            slot_mapping=card.tensor(num_tokens, dtype=torch.int64),
            key_cache=cache.key,
            value_cache=cache.value,
            key_scale=cache.key_scale,
            value_scale=cache.value_scale,
            is_interleaved=is_interleaved,
            query_norm=norm,
            key_norm=norm,
            norm_eps=1e-6 if shape.has_qk_norm else 0.0,
        )


def queries(card: Card, shape: Shape, num_tokens: int) -> torch.Tensor:
    """The queries as attention gets them: the first heads of the merged product."""
    num_heads = shape.num_heads + 2 * shape.num_kv_heads
    qkv = card.tensor(num_tokens, num_heads, shape.head_dim, dtype=BF16)
    return qkv[:, : shape.num_heads]


def attention(card: Card) -> None:
    """A mixed step, which launches the decode kernels as well."""
    arena = Arena(card.device)
    backend = TritonPagedAttention(
        block_size=BLOCK_SIZE, arena=arena, max_num_rows=MAX_ROWS, max_model_len=MAX_MODEL_LEN
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
                block_tables=card.tensor(NUM_SLOTS, MAX_MODEL_LEN // BLOCK_SIZE, dtype=torch.int32),
            ),
        ),
    )
    bucket = AttentionBucket(num_tokens=MIXED_TOKENS, num_rows=MAX_ROWS, num_decode_rows=0)
    for shape, dtype, window, softcap, has_alibi, is_causal in (
        (LLAMA_1B, BF16, None, None, False, True),
        (LLAMA_8B, BF16, None, None, False, True),
        (LLAMA_8B, eight_bits(card), None, None, False, True),
        (GEMMA_LIKE, BF16, 4096, 50.0, False, True),
        (LLAMA_1B, BF16, None, None, True, True),
        # Of encoders' and embedders' heads, at numbers of heads whose decode kernels are here already.
        (LLAMA_1B, BF16, None, None, False, False),
        (GEMMA_LIKE, BF16, 4096, 50.0, False, False),
    ):
        metadata = backend.plan(inputs, bucket)
        backend.begin_step(metadata)
        backend.forward(
            queries(card, shape, MIXED_TOKENS),
            layer_cache=cache_of(card, shape, dtype),
            spec=AttentionSpec(
                num_heads=shape.num_heads,
                num_kv_heads=shape.num_kv_heads,
                head_dim=shape.head_dim,
                scale=shape.head_dim**-0.5,
                sliding_window=window,
                softcap=softcap,
                is_causal=is_causal,
            ),
            metadata=metadata,
            slopes=card.tensor(shape.num_heads, dtype=torch.float32) if has_alibi else None,
            out=arena.take("out", MIXED_TOKENS, shape.num_heads, shape.head_dim, dtype=BF16),
        )


def chosen_products(card: Card, operation: str) -> list[tuple[SkinnyConfig, int, int, int]]:
    """(configuration, rows, out_features, in_features): what the table lists for this card, each once.

    The configuration is what the code depends on; of the shapes that share one the first is compiled.
    """
    found: dict[tuple[SkinnyConfig, int], tuple[SkinnyConfig, int, int, int]] = {}
    for key, choice in sorted(default_table().choices.items()):
        if key.operation == operation and key.capability == divmod(card.capability, 10) and choice.config:
            rows_held = choice.config.rows_held(key.rows)
            product = (choice.config, key.rows, key.out_features, key.in_features)
            found.setdefault((choice.config, rows_held), product)
    return list(found.values())


def skinny_products(card: Card) -> None:
    shape = LLAMA_1B
    candidates = [
        (SkinnyConfig("gemv", block_n=4, block_k=1024, splits=1, num_warps=4, num_stages=2), 1),
        (SkinnyConfig("gemv", block_n=4, block_k=1024, splits=4, num_warps=4, num_stages=2), 4),
        (SkinnyConfig("dot", block_n=64, block_k=128, splits=4, num_warps=4, num_stages=4), 16),
    ]
    products = [(config, rows, shape.hidden, shape.intermediate) for config, rows in candidates]
    for config, num_rows, out_features, in_features in products + chosen_products(card, "linear"):
        num_partials = skinny_scratch_bytes(num_rows, out_features, config) // 4
        skinny_linear(
            card.tensor(num_rows, in_features, dtype=BF16),
            card.tensor(out_features, in_features, dtype=BF16),
            None,
            card.tensor(num_rows, out_features, dtype=BF16),
            config=config,
            partials=card.tensor(num_partials, dtype=torch.float32),
            counters=card.tensor(skinny_num_counters(out_features, config), dtype=torch.int32),
        )


def gated_products(card: Card) -> None:
    shape = LLAMA_1B
    candidates = [
        (SkinnyConfig("gemv", block_n=2, block_k=1024, splits=1, num_warps=4, num_stages=2), 1),
        (SkinnyConfig("dot", block_n=32, block_k=128, splits=1, num_warps=4, num_stages=4), 16),
    ]
    products = [(config, rows, shape.intermediate, shape.hidden) for config, rows in candidates]
    for config, num_rows, out_features, in_features in products + chosen_products(card, "gated_linear"):
        gated_linear(
            card.tensor(num_rows, in_features, dtype=BF16),
            card.tensor(2 * out_features, in_features, dtype=BF16),
            None,
            "silu",
            out=card.tensor(num_rows, out_features, dtype=BF16),
            config=config,
        )


def samplers(card: Card) -> None:
    num_pairs, vocab = DECODE_TOKENS, LLAMA_8B.vocab
    masks = card.tensor(num_pairs, (vocab + 31) // 32, dtype=torch.int32)
    lines = card.tensor(num_pairs, dtype=torch.int64)
    on_cpu = SamplingTables.allocate(NUM_SLOTS, device=torch.device("cpu"))
    tables = SamplingTables(
        **{field.name: card.like(getattr(on_cpu, field.name)) for field in fields(SamplingTables)}
    )
    for kind, masks_of_step, lines_of_step in (
        (SamplerKind.GREEDY, None, None),
        (SamplerKind.GENERAL, None, None),
        (SamplerKind.LOGPROBS, masks, lines),
    ):
        sample_on_device(
            card.tensor(num_pairs, vocab, dtype=torch.float32),
            slots=card.tensor(num_pairs, dtype=torch.int64),
            tables=tables,
            kind=kind,
            token_table=card.tensor(NUM_SLOTS, MAX_MODEL_LEN + 1, dtype=torch.int32),
            lengths=card.tensor(NUM_SLOTS, dtype=torch.int64),
            results=SampleResults.allocate(MAX_ROWS, device=card.device),
            arena=Arena(card.device),
            masks=masks_of_step,
            lines=lines_of_step,
        )


def ranks_of_tokens(card: Card) -> None:
    num_rows, vocab = DECODE_TOKENS, LLAMA_8B.vocab
    token_ranks(
        card.tensor(num_rows, vocab, dtype=torch.float32),
        card.tensor(num_rows, dtype=torch.int64),
        out=card.tensor(num_rows, dtype=torch.int32),
    )


def block_copies(card: Card) -> None:
    """Within the pools as they are stored in 16 bits, between the tiers with the scales of 8 bits."""
    num_layers, num_blocks = 32, 1024
    for kind in CopyKind:
        cache = cache_of(card, LLAMA_8B, BF16 if kind is CopyKind.WITHIN else eight_bits(card))
        of_a_layer = (cache.key, cache.value, cache.key_scale, cache.value_scale)
        pools = BlockPools(
            pools=tuple(pool for pool in of_a_layer if pool is not None) * num_layers,
            addresses=card.tensor(4 * num_layers, dtype=torch.int64),
            has_scales=cache.key_scale is not None,
        )
        host = card.tensor(num_blocks, pools.bytes_per_block, dtype=torch.uint8)
        pairs = card.tensor(DECODE_TOKENS, 2, dtype=torch.int64)
        block_copy(pools, pairs, kind=kind, host=None if kind is CopyKind.WITHIN else host)


CASES = (
    norms,
    norms_of_heads,
    gated_activations,
    embeddings,
    ends_of_the_stream,
    inputs_of_steps,
    rotary,
    cache_writes,
    attention,
    skinny_products,
    gated_products,
    samplers,
    ranks_of_tokens,
    block_copies,
    *moe_cases.CASES,
    *lora_cases.CASES,
    *latent_cases.CASES,
    *packed_cases.CASES,
    *scaled_cases.CASES,
)
