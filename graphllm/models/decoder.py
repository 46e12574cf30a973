"""The decoder: embedding, layers, final norm, logits.

One text for all dense families: what differs between them is a field of `ModelConfig`. Owns how the
parts are put together; knows no checkpoint names and no schedule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from graphllm.arena import Arena
from graphllm.attention.backend import AttentionBackend, AttentionMetadata, AttentionSpec, LayerCache
from graphllm.layers.attention import Attention
from graphllm.layers.embedding import TiedHead, TokenEmbedding
from graphllm.layers.linear import Linear
from graphllm.layers.mlp import GatedMLP
from graphllm.layers.norm import RMSNorm
from graphllm.layers.rotary import RotaryEmbedding
from graphllm.models.config import ModelConfig
from graphllm.quant.scheme import LinearScheme


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each on a normalized copy of the residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        backend: AttentionBackend,
        scheme: LinearScheme,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        spec = AttentionSpec(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            scale=config.attention_scale,
        )
        eps = config.rms_norm_eps
        self.attention_norm = RMSNorm(config.hidden_size, eps=eps, device=device, dtype=dtype)
        self.attention = Attention(
            config.hidden_size,
            spec,
            bias=config.attention_bias,
            output_bias=config.attention_output_bias,
            qk_norm_eps=eps if config.qk_norm else None,
            backend=backend,
            scheme=scheme,
            device=device,
            dtype=dtype,
        )
        self.mlp_norm = RMSNorm(config.hidden_size, eps=eps, device=device, dtype=dtype)
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            activation=config.activation,
            bias=config.mlp_bias,
            scheme=scheme,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        delta: torch.Tensor | None,
        residual: torch.Tensor,
        rotary_tables: torch.Tensor,
        *,
        layer_cache: LayerCache,
        metadata: AttentionMetadata,
        arena: Arena,
    ) -> torch.Tensor:
        """Add `delta`, the output of the layer before (None for the first), to `residual`, then this
        layer's attention; return what its feed-forward adds. All are [num_tokens, hidden_size].

        Each addition waits for the norm behind it, because one kernel does both.
        """
        normed = arena.take("normed", *residual.shape, dtype=residual.dtype)
        if delta is None:
            self.attention_norm(residual, out=normed)
        else:
            self.attention_norm.add(delta, residual, out=normed)
        delta = self.attention(normed, rotary_tables, layer_cache=layer_cache, metadata=metadata, arena=arena)
        self.mlp_norm.add(delta, residual, out=normed)
        output: torch.Tensor = self.mlp(normed, arena=arena)
        return output


class Decoder(nn.Module):
    """A decoder-only transformer over flat token batches. Parameters are uninitialized until loaded."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        backend: AttentionBackend,
        scheme: LinearScheme,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        self.embedding = TokenEmbedding(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        self.rotary = RotaryEmbedding(
            config.head_dim, config.rope_theta, scaling=config.rope_scaling, device=device, dtype=dtype
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, backend=backend, scheme=scheme, device=device, dtype=dtype)
            for _ in range(config.num_layers)
        )
        self.final_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, device=device, dtype=dtype)
        if config.tie_word_embeddings:
            self.head: Linear | TiedHead = TiedHead(self.embedding, scheme=scheme)
        else:
            parts = {"": config.vocab_size}
            self.head = Linear(
                config.hidden_size, parts, bias=False, scheme=scheme, device=device, dtype=dtype
            )
        self.dtype = dtype

    def forward_in_slices(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        *,
        layer_caches: Sequence[LayerCache],
        metadata: AttentionMetadata,
        arena: Arena,
        sampled_tokens: torch.Tensor,
        logits: torch.Tensor,
    ) -> Iterator[None]:
        """One step, from token ids to logits; yields after each layer.

        Who captures a step between others stops at the yields; everybody else calls `forward`.
        input_ids, positions: [num_tokens] int64; layer_caches: one a layer, written to; `metadata` has
        gone through the backend's `plan` and `begin_step`. sampled_tokens: [num_rows] int64, the tokens
        whose logits are wanted; logits: [num_rows, vocab_size] float32, written to.
        """
        size = (len(input_ids), self.config.hidden_size)
        residual = self.embedding(input_ids, out=arena.take("residual", *size, dtype=self.dtype))
        rotary_tables = self.rotary(positions, arena=arena)
        delta = None
        for layer, layer_cache in zip(self.layers, layer_caches, strict=True):
            delta = layer(
                delta, residual, rotary_tables, layer_cache=layer_cache, metadata=metadata, arena=arena
            )
            yield
        if len(sampled_tokens) == 0:  # in the middle of a prompt
            return
        hidden = arena.take("normed", len(sampled_tokens), self.config.hidden_size, dtype=self.dtype)
        assert delta is not None, "a decoder has layers"
        self.final_norm.add(delta, residual, rows=sampled_tokens, out=hidden)
        self.head.project(hidden, out=logits)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        *,
        layer_caches: Sequence[LayerCache],
        metadata: AttentionMetadata,
        arena: Arena,
        sampled_tokens: torch.Tensor,
        logits: torch.Tensor,
    ) -> None:
        """See `forward_in_slices`."""
        for _ in self.forward_in_slices(
            input_ids,
            positions,
            layer_caches=layer_caches,
            metadata=metadata,
            arena=arena,
            sampled_tokens=sampled_tokens,
            logits=logits,
        ):
            pass
