"""The launches of LoRA adapters that the ahead-of-time test compiles, at the shapes of a real model.

Like `cases.py`, which lists these among its own.
"""

from __future__ import annotations

import torch

from graphllm.kernels.lora_expand import TILE_FEATURES, lora_expand
from graphllm.kernels.lora_shrink import lora_shrink
from graphllm.kernels.lora_tokens import lora_tokens
from tests.aot.recording import Card

BF16 = torch.bfloat16
MAX_ROWS = 256
MAX_LORAS = 4
# Llama-3.1-8B's merged queries, keys and values.
IN_FEATURES = 4096
PART_SIZES = (4096, 1024, 1024)
# One token, a decode bucket and a mixed one.
STEPS = ((1, 16), (64, 16), (2048, 64))  # tokens, and the largest rank


def adapters(card: Card) -> None:
    out_features, num_parts = sum(PART_SIZES), len(PART_SIZES)
    for num_tokens, max_rank in STEPS:
        scales = card.tensor(MAX_LORAS, num_parts, dtype=torch.float32)
        token_adapters = card.tensor(num_tokens, dtype=torch.int32)
        shrunk = card.tensor(num_tokens, num_parts, max_rank, dtype=torch.float32)
        lora_shrink(
            card.tensor(num_tokens, IN_FEATURES, dtype=BF16),
            card.tensor(MAX_LORAS, num_parts, max_rank, IN_FEATURES, dtype=BF16),
            scales,
            token_adapters,
            out=shrunk,
        )
        lora_expand(
            shrunk,
            card.tensor(MAX_LORAS, out_features, max_rank, dtype=BF16),
            scales,
            token_adapters,
            card.tensor(out_features // TILE_FEATURES, 3, dtype=torch.int32),
            out=card.tensor(num_tokens, out_features, dtype=BF16),
        )


def tokens_of_adapters(card: Card) -> None:
    for num_tokens, is_decode in ((MAX_ROWS, True), (STEPS[-1][0], False)):
        lora_tokens(
            row_slots=card.tensor(MAX_ROWS, dtype=torch.int64),
            query_lens=card.tensor(MAX_ROWS, dtype=torch.int64),
            query_starts=card.tensor(MAX_ROWS + 1, dtype=torch.int64),
            slot_adapters=card.tensor(MAX_ROWS + 1, dtype=torch.int32),
            is_decode=is_decode,
            out=card.tensor(num_tokens, dtype=torch.int32),
        )


CASES = (adapters, tokens_of_adapters)
