"""The attention layer: projections, rotary, and the backend in between.

Owns the order of heads in the merged projection. Attention itself, and the cache, are the backend's.
"""

from __future__ import annotations

import torch
from torch import nn

from graphllm.attention.backend import AttentionBackend, AttentionMetadata, AttentionSpec, LayerCache
from graphllm.kernels.rotary import rotary
from graphllm.layers.linear import Linear
from graphllm.quant.scheme import LinearScheme


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; query, key and value are one product."""

    def __init__(
        self,
        hidden_size: int,
        spec: AttentionSpec,
        *,
        bias: bool,
        output_bias: bool,
        backend: AttentionBackend,
        scheme: LinearScheme,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.backend = backend
        self.num_rotated_heads = spec.num_heads + spec.num_kv_heads
        query_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.qkv = Linear(
            hidden_size,
            {"q": query_size, "k": kv_size, "v": kv_size},
            bias=bias,
            scheme=scheme,
            device=device,
            dtype=dtype,
        )
        self.output = Linear(
            query_size, {"": hidden_size}, bias=output_bias, scheme=scheme, device=device, dtype=dtype
        )

    def forward(
        self,
        x: torch.Tensor,
        rotary_tables: tuple[torch.Tensor, torch.Tensor],
        *,
        layer_cache: LayerCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """x: [num_tokens, hidden_size]; returns the same shape, without the residual."""
        num_tokens, spec = x.shape[0], self.spec
        heads = self.qkv(x).view(num_tokens, -1, spec.head_dim)  # queries, then keys, then values
        # Query and key heads turn by the same angles: one call for both.
        rotated = rotary(heads[:, : self.num_rotated_heads], *rotary_tables)
        attended = self.backend.forward(  # [num_tokens, num_heads, head_dim]
            rotated[:, : spec.num_heads],
            rotated[:, spec.num_heads :],
            heads[:, self.num_rotated_heads :],
            layer_cache=layer_cache,
            spec=spec,
            metadata=metadata,
        )
        output: torch.Tensor = self.output(attended.reshape(num_tokens, -1))
        return output
