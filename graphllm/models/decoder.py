"""The decoder: embedding, layers, final norm, logits.

One text for all dense families: what differs between them is a field of `ModelConfig`. Owns how the
parts are put together; knows no checkpoint names and no schedule.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

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
        residual: torch.Tensor,
        rotary_tables: tuple[torch.Tensor, torch.Tensor],
        *,
        layer_cache: LayerCache,
        metadata: AttentionMetadata,
    ) -> None:
        """Add this layer's two outputs to `residual` [num_tokens, hidden_size], in place."""
        normed = self.attention_norm(residual)
        residual.add_(self.attention(normed, rotary_tables, layer_cache=layer_cache, metadata=metadata))
        residual.add_(self.mlp(self.mlp_norm(residual)))


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
            self.head: nn.Module = TiedHead(self.embedding, scheme=scheme)
        else:
            parts = {"": config.vocab_size}
            self.head = Linear(
                config.hidden_size, parts, bias=False, scheme=scheme, device=device, dtype=dtype
            )

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        *,
        layer_caches: Sequence[LayerCache],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """One step. input_ids, positions: [num_tokens] int64; layer_caches: one a layer, written to.

        `metadata` has gone through the backend's `plan` and `begin_step`. Returns the hidden states
        after the final norm, [num_tokens, hidden_size].
        """
        residual: torch.Tensor = self.embedding(input_ids)  # [num_tokens, hidden_size]
        rotary_tables = self.rotary(positions)
        for layer, layer_cache in zip(self.layers, layer_caches, strict=True):
            layer(residual, rotary_tables, layer_cache=layer_cache, metadata=metadata)
        hidden: torch.Tensor = self.final_norm(residual)
        return hidden

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [num_rows, hidden_size] from `forward`; returns [num_rows, vocab_size] float32."""
        logits: torch.Tensor = self.head(hidden)
        return logits.float()
