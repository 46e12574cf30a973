"""Multi-head latent attention (DeepSeek-AI, 2024, arXiv:2405.04434), over a cache of ordinary heads.

Queries, and keys with values, come out of narrow latents, which are normalized; a part of each head's
dimensions turns, and all heads share the turned part of their keys. The mathematics is the paper's, the
memory is not: keys and values are spelled out before they are cached, so a token takes as much as with as
many ordinary heads, and not its latent alone.

Owns the projections and their order. Attention itself is the backend's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from graphllm.arena import Arena
from graphllm.attention.backend import AttentionBackend, AttentionMetadata, AttentionSpec, LayerCache
from graphllm.kernels.latent_heads import latent_heads, leading_dimensions
from graphllm.kernels.rotary_cache_write import rotary_cache_write
from graphllm.layers.linear import Linear
from graphllm.layers.norm import NormConfig, make_norm
from graphllm.layers.rotary import RotaryConfig
from graphllm.quant.scheme import LinearScheme


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentConfig:
    """The sizes of latent attention.

    query_rank: the width of the queries' latent, None where queries come straight from the hidden state.
    key_value_rank: that of keys and values. Of a head's dimensions `turned_dim` turn; value_dim is that of
    its values, at most a head's. norm: of both latents.
    """

    query_rank: int | None
    key_value_rank: int
    turned_dim: int
    value_dim: int
    norm: NormConfig


class LatentAttention(nn.Module):
    """Latent attention with as many key and value heads as query heads.

    rotary: of the turned dimensions. bias: of the projections from and to the hidden size, but for that of
    queries without a latent.
    """

    def __init__(
        self,
        hidden_size: int,
        spec: AttentionSpec,
        *,
        latent: LatentConfig,
        rotary: RotaryConfig | None,
        bias: bool,
        backend: AttentionBackend,
        scheme: LinearScheme,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        assert rotary is not None and rotary.rotary_dim == latent.turned_dim
        assert spec.num_kv_heads == spec.num_heads and latent.value_dim <= spec.head_dim
        self.spec, self.latent, self.backend = spec, latent, backend
        self.is_interleaved = rotary.is_interleaved
        num_heads, rank = spec.num_heads, latent.query_rank
        plain_dim = spec.head_dim - latent.turned_dim

        projection = partial(Linear, scheme=scheme, device=device, dtype=dtype)
        # One product for both latents; behind that of keys and values stands the shared key.
        parts = {} if rank is None else {"query": rank}
        parts["key_value"] = latent.key_value_rank + latent.turned_dim
        self.down = projection(hidden_size, parts, bias=bias)
        self.query = self.query_norm = self.query_up = None
        if rank is None:
            self.query = projection(hidden_size, {"": num_heads * spec.head_dim}, bias=False)
        else:
            self.query_norm = make_norm(rank, config=latent.norm, device=device, dtype=dtype)
            self.query_up = projection(rank, {"": num_heads * spec.head_dim}, bias=False)
        self.key_value_norm = make_norm(latent.key_value_rank, config=latent.norm, device=device, dtype=dtype)
        key_value_parts = {"": num_heads * (plain_dim + latent.value_dim)}
        self.key_value = projection(latent.key_value_rank, key_value_parts, bias=False)
        self.output = projection(num_heads * latent.value_dim, {"": hidden_size}, bias=bias)

    def forward(
        self,
        x: torch.Tensor,
        rotary_tables: torch.Tensor | None,
        *,
        layer_cache: LayerCache,
        metadata: AttentionMetadata,
        arena: Arena,
    ) -> torch.Tensor:
        """x: [num_tokens, hidden_size]; returns the same shape, without the residual."""
        num_tokens, spec = len(x), self.spec
        qkv = self._heads(x, arena=arena)  # [num_tokens, 3 * num_heads, head_dim]
        rotary_cache_write(
            qkv.view(num_tokens, -1),
            rotary_tables,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_heads,
            slot_mapping=metadata.inputs.slot_mapping,
            key_cache=layer_cache.key,
            value_cache=layer_cache.value,
            key_scale=layer_cache.key_scale,
            value_scale=layer_cache.value_scale,
            is_interleaved=self.is_interleaved,
        )
        attended = arena.take("inner", num_tokens, spec.num_heads, spec.head_dim, dtype=x.dtype)
        self.backend.forward(
            qkv[:, : spec.num_heads],
            layer_cache=layer_cache,
            spec=spec,
            metadata=metadata,
            out=attended,
        )
        # The heads are not needed any more.
        values = arena.take("wide", num_tokens, spec.num_heads, self.latent.value_dim, dtype=x.dtype)
        leading_dimensions(attended, out=values)
        output: torch.Tensor = self.output(values.view(num_tokens, -1), arena=arena, name="delta")
        return output

    def _heads(self, x: torch.Tensor, *, arena: Arena) -> torch.Tensor:
        """Queries, keys and values, not turned yet: the arena's "wide"."""
        num_tokens, spec, latent = len(x), self.spec, self.latent
        latents: torch.Tensor = self.down(x, arena=arena, name="latents")
        query_rank = latent.query_rank or 0
        # Both of the whole's stride: [num_tokens, rank] and [num_tokens, rank + turned_dim].
        query_latent, key_value_latent = latents[:, :query_rank], latents[:, query_rank:]
        query: torch.Tensor
        if self.query is not None:
            query = self.query(x, arena=arena, name="inner")
        else:
            assert self.query_norm is not None and self.query_up is not None
            narrow = arena.take("query_latent", num_tokens, query_rank, dtype=x.dtype)
            self.query_norm(query_latent, out=narrow)
            query = self.query_up(narrow, arena=arena, name="inner")
        narrow = arena.take("key_value_latent", num_tokens, latent.key_value_rank, dtype=x.dtype)
        self.key_value_norm(key_value_latent[:, : latent.key_value_rank], out=narrow)
        key_value: torch.Tensor = self.key_value(narrow, arena=arena, name="key_value")
        return latent_heads(
            query.view(num_tokens, spec.num_heads, spec.head_dim),
            key_value.view(num_tokens, spec.num_heads, -1),
            key_value_latent[:, latent.key_value_rank :],
            out=arena.take("wide", num_tokens, 3 * spec.num_heads, spec.head_dim, dtype=x.dtype),
        )
