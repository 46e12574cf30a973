"""From token ids and positions to hidden states, and back to logits where one matrix does both."""

from __future__ import annotations

import torch
from torch import nn

from graphllm.kernels.add_rows import add_rows
from graphllm.kernels.embedding import embedding
from graphllm.layers.loadable import LoadableModule, WeightSlot
from graphllm.quant.scheme import LinearScheme


class TokenEmbedding(LoadableModule):
    """One row of `weight` [num_rows, hidden_size] for each token, times `scale` where there is one.

    num_types: rows of a table of token types, of which the first `num_used_types` are added to all tokens'
    rows while they are loaded: `weight` then has the vocabulary once for each, and no scale. So a token's
    type is part of its id, and costs nothing when it is looked up.
    """

    def __init__(
        self,
        num_rows: int,
        hidden_size: int,
        *,
        scale: float | None = None,
        num_types: int = 0,
        num_used_types: int = 1,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        assert num_rows % num_used_types == 0 and (num_types == 0 or scale is None)
        weight = torch.empty(num_rows, hidden_size, device=device, dtype=dtype)
        self.scale = scale
        self.num_types = num_types
        self.num_used_types = num_used_types
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._has_words = False
        self._types: torch.Tensor | None = None

    def weight_slots(self) -> dict[str, WeightSlot]:
        num_rows, hidden_size = self.weight.shape
        slots = {"weight": WeightSlot((num_rows // self.num_used_types, hidden_size), self._load)}
        if self.num_types:
            slots["types.weight"] = WeightSlot((self.num_types, hidden_size), self._load_types)
        return slots

    def _load(self, tensor: torch.Tensor) -> None:
        self.weight.view(self.num_used_types, *tensor.shape).copy_(tensor)
        self._has_words = True
        self._add_types()

    def _load_types(self, tensor: torch.Tensor) -> None:
        self._types = tensor[: self.num_used_types].clone()
        self._add_types()

    def _add_types(self) -> None:
        """Once both tables are there, in whichever order."""
        if self._has_words and self._types is not None:
            by_type = self.weight.view(self.num_used_types, -1, self.weight.shape[1])
            by_type += self._types[:, None].to(self.weight)

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
