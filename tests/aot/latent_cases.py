"""The launches of models with latent attention that the ahead-of-time test compiles.

Like `cases.py`, which lists these among its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphllm.arena import Arena
from graphllm.attention.backend import AttentionBucket, AttentionInputs, GroupInputs, LatentAttentionSpec
from graphllm.attention.triton_paged import TritonPagedAttention
from graphllm.kernels.latent_cache_write import latent_cache_write
from tests.aot.recording import Card

BF16 = torch.bfloat16
MIXED_TOKENS = 2048
MAX_ROWS = 256
MAX_MODEL_LEN = 131072
# The sizes that DeepSeek-V2, V2-Lite and V3 have in common; V2-Lite has 16 heads, the others 128.
RANK, TURNED, PLAIN = 512, 64, 128


@dataclass(frozen=True, slots=True)
class Pool:
    """One layer's cache, as the attention contract has it."""

    latent: torch.Tensor
    scale: torch.Tensor | None
    group: int = 0


def pool_of(card: Card, *, is_scaled: bool) -> Pool:
    size = (4096, 16)
    if not is_scaled:
        return Pool(card.tensor(*size, RANK + TURNED, dtype=BF16), None)
    stored = torch.float8_e4m3fn if card.has_e4m3 else torch.int8
    return Pool(card.tensor(*size, RANK + TURNED, dtype=stored), card.tensor(*size, dtype=torch.float32))


def latent_cache_writes(card: Card) -> None:
    for num_heads, is_scaled in ((16, False), (128, False), (128, True)):
        pool = pool_of(card, is_scaled=is_scaled)
        # V3's: the queries' latent of 1536 dimensions stands before them.
        latents = card.tensor(MIXED_TOKENS, 1536 + RANK + TURNED, dtype=BF16)
        latent_cache_write(
            card.tensor(MIXED_TOKENS, num_heads, PLAIN + TURNED, dtype=BF16),
            latents[:, 1536:],
            card.tensor(2, MIXED_TOKENS, TURNED, dtype=BF16),
            norm_weight=card.tensor(RANK, dtype=BF16),
            norm_eps=1e-6,
            slot_mapping=card.tensor(MIXED_TOKENS, dtype=torch.int64),
            cache=pool.latent,
            cache_scale=pool.scale,
            is_interleaved=True,
            absorbed=card.tensor(MIXED_TOKENS, num_heads, RANK + TURNED, dtype=BF16),
        )


def latent_attention(card: Card) -> None:
    """A mixed step, which launches the decode kernels as well."""
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
    for num_heads, is_scaled in ((16, False), (128, False), (16, True), (128, True)):
        metadata = backend.plan(inputs, bucket)
        backend.begin_step(metadata)
        spec = LatentAttentionSpec(
            num_heads=num_heads, rank=RANK, turned_dim=TURNED, scale=(PLAIN + TURNED) ** -0.5
        )
        backend.forward_latent(
            card.tensor(MIXED_TOKENS, num_heads, spec.width, dtype=BF16),
            layer_cache=pool_of(card, is_scaled=is_scaled),
            spec=spec,
            metadata=metadata,
            out=arena.take("out", MIXED_TOKENS, num_heads, RANK, dtype=BF16),
        )


CASES = (latent_attention, latent_cache_writes)
