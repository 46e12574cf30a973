"""From token ids and positions to hidden states, and back to logits where one matrix does both."""

from __future__ import annotations

import torch
from torch import nn

from graphllm.kernels.add_rows import add_rows
from graphllm.kernels.embedding import embedding
from graphllm.layers.loadable import LoadableModule, WeightSlot
from graphllm.quant.scheme import LinearScheme


class TokenEmbedding(LoadableModule):
    """One row of `weight` [vocab_size, hidden_size] for each token, times `scale` where there is one."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        scale: float | None = None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        weight = torch.empty(vocab_size, hidden_size, device=device, dtype=dtype)
        self.scale = scale
        self.weight = nn.Parameter(weight, requires_grad=False)

    def weight_slots(self) -> dict[str, WeightSlot]:
        return {"weight": WeightSlot(tuple(self.weight.shape), self._load)}

    def _load(self, tensor: torch.Tensor) -> None:
        self.weight.copy_(tensor)

    def forward(self, token_ids: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        """token_ids: [num_tokens] int64; returns out, [num_tokens, hidden_size]."""
        return embedding(token_ids, self.weight, out=out, scale=self.scale)


class LearnedPositions(LoadableModule):
    """One row of `weight` [num_positions, hidden_size] for each position, counted from row `offset`."""

    def __init__(
        self, num_positions: int, hidden_size: int, *, offset: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        weight = torch.empty(num_positions, hidden_size, device=device, dtype=dtype)
        self.offset = offset
        self.weight = nn.Parameter(weight, requires_grad=False)

    def weight_slots(self) -> dict[str, WeightSlot]:
        return {"weight": WeightSlot(tuple(self.weight.shape), self._load)}

    def _load(self, tensor: torch.Tensor) -> None:
        self.weight.copy_(tensor)

    def add(self, positions: torch.Tensor, hidden: torch.Tensor) -> None:
        """Add each token's row to `hidden` [num_tokens, hidden_size]; positions: [num_tokens] int64."""
        add_rows(self.weight[self.offset :], positions, out=hidden)


class TiedHead(nn.Module):
    """Logits by the embedding's own matrix: it has no weights of its own to load.

    `scheme` must multiply plain weights: an embedding is looked up by rows, so it is stored as such.
    """

    def __init__(self, embedding: TokenEmbedding, *, scheme: LinearScheme) -> None:
        super().__init__()
        self.weight = embedding.weight
        self.bias = None
        self.scheme = scheme

    def project(self, hidden: torch.Tensor, *, out: torch.Tensor) -> None:
        """hidden: [num_rows, hidden_size]; out: [num_rows, vocab_size], float32 whatever hidden is."""
        self.scheme.apply(self, hidden, out=out)
