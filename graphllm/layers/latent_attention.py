"""Multi-head latent attention (DeepSeek-AI, 2024, arXiv:2405.04434), over a cache of latents.

Queries, and keys with values, come out of narrow latents, which are normalized; a part of each head's
dimensions turns, and all heads share the turned part of their keys. What is cached of a token is its latent
and its turned shared key, once for all heads (section 2.1 of the paper). The projections out of the latent
are moved to the queries and behind attention (`head_projection.py`), for prompts as for single tokens.

Owns the projections and their order. Attention itself is the backend's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from graphllm.arena import Arena
from graphllm.attention.backend import AttentionBackend, AttentionMetadata, LatentAttentionSpec, LatentCache
from graphllm.kernels.latent_cache_write import latent_cache_write
from graphllm.layers.head_projection import HeadProjection
from graphllm.layers.linear import Linear
from graphllm.layers.norm import NormConfig, RMSNorm, make_norm
from graphllm.layers.rotary import RotaryConfig
from graphllm.quant.scheme_source import SchemeSource


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentConfig:
    """The sizes of latent attention.

    query_rank: the width of the queries' latent, None where queries come straight from the hidden state.
    key_value_rank: that of keys and values. Of a head's dimensions `turned_dim` turn; value_dim is that of
    its values. norm: of both latents.
    """

    query_rank: int | None
    key_value_rank: int
    turned_dim: int
    value_dim: int
    norm: NormConfig

    @property
    def width(self) -> int:
        """Dimensions of what is cached of a token."""
        return self.key_value_rank + self.turned_dim


class LatentAttention(nn.Module):
    """Latent attention of num_heads heads with head_dim dimensions, of which some turn.

    scale multiplies q.k. rotary: of the turned dimensions. bias: of the projections from and to the hidden
    size, but for that of queries without a latent.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        *,
        scale: float,
        latent: LatentConfig,
        rotary: RotaryConfig | None,
        bias: bool,
        backend: AttentionBackend,
        schemes: SchemeSource,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        assert rotary is not None and rotary.rotary_dim == latent.turned_dim < head_dim
        self.latent, self.backend = latent, backend
        self.num_heads, self.head_dim, self.plain_dim = num_heads, head_dim, head_dim - latent.turned_dim
        self.is_interleaved = rotary.is_interleaved
        self.spec = LatentAttentionSpec(
            num_heads=num_heads, rank=latent.key_value_rank, turned_dim=latent.turned_dim, scale=scale
        )
        rank = latent.query_rank

        projection = partial(Linear, device=device, dtype=dtype)
        # One product for both latents; behind that of keys and values stands the shared key.
        parts = {} if rank is None else {"query": rank}
        parts["key_value"] = latent.key_value_rank + latent.turned_dim
        self.down = projection(hidden_size, parts, bias=bias, scheme=schemes.at("down"))
        self.query = self.query_norm = self.query_up = None
        if rank is None:
            query_parts = {"": num_heads * head_dim}
            self.query = projection(hidden_size, query_parts, bias=False, scheme=schemes.at("query"))
        else:
            self.query_norm = make_norm(rank, config=latent.norm, device=device, dtype=dtype)
            query_parts = {"": num_heads * head_dim}
            self.query_up = projection(rank, query_parts, bias=False, scheme=schemes.at("query_up"))
        norm = make_norm(latent.key_value_rank, config=latent.norm, device=device, dtype=dtype)
        assert isinstance(norm, RMSNorm) and not norm.unit_offset, "the cache write has this norm alone"
        self.key_value_norm = norm
        self.key_value = HeadProjection(
            latent.key_value_rank,
            num_heads,
            key_dim=self.plain_dim,
            value_dim=latent.value_dim,
            device=device,
            dtype=dtype,
        )
        value_size = num_heads * latent.value_dim
        self.output = projection(value_size, {"": hidden_size}, bias=bias, scheme=schemes.at("output"))

    def forward(
        self,
        x: torch.Tensor,
        rotary_tables: torch.Tensor | None,
        *,
        layer_cache: LatentCache,
        metadata: AttentionMetadata,
        arena: Arena,
    ) -> torch.Tensor:
        """x: [num_tokens, hidden_size]; returns the same shape, without the residual."""
        assert rotary_tables is not None
        num_tokens, spec = len(x), self.spec
        latents: torch.Tensor = self.down(x, arena=arena, name="latents")
        query_rank = self.latent.query_rank or 0
        query = self._queries(x, latents[:, :query_rank], arena=arena)
        absorbed = arena.take("wide", num_tokens, spec.num_heads, spec.width, dtype=x.dtype)
        self.key_value.to_latent(query[..., : self.plain_dim], out=absorbed[..., : spec.rank])
        latent_cache_write(
            query,
            latents[:, query_rank:],
            rotary_tables,
            norm_weight=self.key_value_norm.weight,
            norm_eps=self.key_value_norm.eps,
            slot_mapping=metadata.inputs.groups[layer_cache.group].slot_mapping,
            cache=layer_cache.latent,
            cache_scale=layer_cache.scale,
            is_interleaved=self.is_interleaved,
            absorbed=absorbed,
        )
        # The queries before they were absorbed are not needed any more, and then those that were.
        attended = arena.take("inner", num_tokens, spec.num_heads, spec.rank, dtype=x.dtype)
        self.backend.forward_latent(
            absorbed, layer_cache=layer_cache, spec=spec, metadata=metadata, out=attended
        )
        values = arena.take("wide", num_tokens, spec.num_heads, self.latent.value_dim, dtype=x.dtype)
        self.key_value.to_values(attended, out=values)
        output: torch.Tensor = self.output(values.view(num_tokens, -1), arena=arena, name="delta")
        return output

    def _queries(self, x: torch.Tensor, latent: torch.Tensor, *, arena: Arena) -> torch.Tensor:
        """[num_tokens, num_heads, head_dim], plain dimensions first, not turned yet: the arena's "inner".

        latent: [num_tokens, query_rank], any stride between tokens; of no width where there is none.
        """
        query: torch.Tensor
        if self.query is not None:
            query = self.query(x, arena=arena, name="inner")
        else:
            assert self.query_norm is not None and self.query_up is not None
            narrow = arena.take("query_latent", *latent.shape, dtype=x.dtype)
            self.query_norm(latent, out=narrow)
            query = self.query_up(narrow, arena=arena, name="inner")
        return query.view(len(x), self.num_heads, self.head_dim)
