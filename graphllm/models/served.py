"""What the runner needs of a model, whoever computes it.

Owns the protocol that `Decoder` and the fallback to transformers' modules implement.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from graphllm.arena import Arena
from graphllm.attention.backend import AttentionBackend, AttentionMetadata, LatentCache, LayerCache
from graphllm.models.config import ModelConfig


class ServedModel(Protocol):
    """A decoder-only model over flat token batches; `Decoder` says what each method does."""

    config: ModelConfig
    backend: AttentionBackend
    dtype: torch.dtype

    def forward_in_slices(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        *,
        layer_caches: Sequence[LayerCache | LatentCache],
        metadata: AttentionMetadata,
        arena: Arena,
        sampled_tokens: torch.Tensor,
        logits: torch.Tensor,
    ) -> Iterator[None]: ...

    def final_hidden(self, tokens: torch.Tensor, *, num_tokens: int, arena: Arena) -> torch.Tensor: ...

    def project(self, hidden: torch.Tensor, *, arena: Arena, out: torch.Tensor) -> None: ...
