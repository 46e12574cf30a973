"""The products between a latent and the heads that read it, one matrix a head.

Multi-head latent attention (DeepSeek-AI, 2024, arXiv:2405.04434) makes keys and values of a latent c by a
matrix for each head, k_h = K_h c and v_h = V_h c. Since q_h . (K_h c) = (K_h^T q_h) . c, and a weighted sum
of V_h c_i is V_h times that sum, attention can read the latents themselves: `to_latent` takes queries to the
latent before it, `to_values` what comes out of it to values behind it.

Owns both matrices and their place in a checkpoint, which stores them as one projection out of the latent.
They are in the activations' format, whatever the checkpoint's.
"""

from __future__ import annotations

import torch
from torch import nn

from graphllm.layers.loadable import LoadableModule, WeightSlot


class HeadProjection(LoadableModule):
    """key: [num_heads, key_dim, rank]; value: [num_heads, value_dim, rank].

    The checkpoint's tensor is [num_heads * (key_dim + value_dim), rank], a head's rows those of its key,
    then those of its value.
    """

    def __init__(
        self,
        rank: int,
        num_heads: int,
        *,
        key_dim: int,
        value_dim: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.rank, self.num_heads, self.key_dim, self.value_dim = rank, num_heads, key_dim, value_dim

        def parameter(rows: int) -> nn.Parameter:
            weight = torch.empty(num_heads, rows, rank, device=device, dtype=dtype)
            return nn.Parameter(weight, requires_grad=False)

        self.key, self.value = parameter(key_dim), parameter(value_dim)

    def weight_slots(self) -> dict[str, WeightSlot]:
        shape = (self.num_heads * (self.key_dim + self.value_dim), self.rank)
        return {"weight": WeightSlot(shape, self._load)}

    def whole_slots(self) -> dict[str, WeightSlot]:
        return self.weight_slots()

    def _load(self, tensor: torch.Tensor) -> None:
        of_heads = tensor.view(self.num_heads, -1, self.rank)
        self.key.copy_(of_heads[:, : self.key_dim])
        self.value.copy_(of_heads[:, self.key_dim :])

    def to_latent(self, query: torch.Tensor, *, out: torch.Tensor) -> None:
        """query: [num_tokens, num_heads, key_dim]; writes out, [num_tokens, num_heads, rank].

        Both with any strides between tokens and heads.
        """
        torch.bmm(query.transpose(0, 1), self.key, out=out.transpose(0, 1))

    def to_values(self, attended: torch.Tensor, *, out: torch.Tensor) -> None:
        """attended: [num_tokens, num_heads, rank]; writes out, [num_tokens, num_heads, value_dim]."""
        torch.bmm(attended.transpose(0, 1), self.value.transpose(1, 2), out=out.transpose(0, 1))
