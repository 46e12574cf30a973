"""The attention layer: projections, rotary with the cache write, and the backend in between.

Owns the order of heads in the merged projection. Attention itself is the backend's.
"""

from __future__ import annotations

import torch
from torch import nn

from graphllm.arena import Arena
from graphllm.attention.backend import AttentionBackend, AttentionMetadata, AttentionSpec, LayerCache
from graphllm.kernels.rotary_cache_write import rotary_cache_write
from graphllm.layers.linear import Linear
from graphllm.layers.norm import RMSNorm
from graphllm.quant.scheme import LinearScheme


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; query, key and value are one product.

    qk_norm_eps: query and key heads are normalized over head_dim before they are turned; None for models
    that do not.
    """

    def __init__(
        self,
        hidden_size: int,
        spec: AttentionSpec,
        *,
        bias: bool,
        output_bias: bool,
        qk_norm_eps: float | None,
        backend: AttentionBackend,
        scheme: LinearScheme,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.backend = backend
        self.query_size = spec.num_heads * spec.head_dim
        kv_size = spec.num_kv_heads * spec.head_dim
        self.qkv = Linear(
            hidden_size,
            {"q": self.query_size, "k": kv_size, "v": kv_size},
            bias=bias,
            scheme=scheme,
            device=device,
            dtype=dtype,
        )
        self.query_norm = self.key_norm = None
        if qk_norm_eps is not None:
            self.query_norm = RMSNorm(spec.head_dim, eps=qk_norm_eps, device=device, dtype=dtype)
            self.key_norm = RMSNorm(spec.head_dim, eps=qk_norm_eps, device=device, dtype=dtype)
        self.output = Linear(
            self.query_size, {"": hidden_size}, bias=output_bias, scheme=scheme, device=device, dtype=dtype
        )

    def forward(
        self,
        x: torch.Tensor,
        rotary_tables: torch.Tensor,
        *,
        layer_cache: LayerCache,
        metadata: AttentionMetadata,
        arena: Arena,
    ) -> torch.Tensor:
        """x: [num_tokens, hidden_size]; returns the same shape, without the residual."""
        num_tokens, spec = x.shape[0], self.spec
        # Queries, then keys, then values: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim].
        qkv: torch.Tensor = self.qkv(x, arena=arena, name="wide")
        rotary_cache_write(
            qkv,
            rotary_tables,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            slot_mapping=metadata.inputs.slot_mapping,
            key_cache=layer_cache.key,
            value_cache=layer_cache.value,
            key_scale=layer_cache.key_scale,
            value_scale=layer_cache.value_scale,
            query_norm=None if self.query_norm is None else self.query_norm.weight,
            key_norm=None if self.key_norm is None else self.key_norm.weight,
            norm_eps=0.0 if self.query_norm is None else self.query_norm.eps,
        )
        attended = arena.take("inner", num_tokens, spec.num_heads, spec.head_dim, dtype=x.dtype)
        self.backend.forward(
            qkv[:, : self.query_size].view(num_tokens, spec.num_heads, spec.head_dim),
            layer_cache=layer_cache,
            spec=spec,
            metadata=metadata,
            out=attended,
        )
        output: torch.Tensor = self.output(
            attended.view(num_tokens, self.query_size), arena=arena, name="delta"
        )
        return output
