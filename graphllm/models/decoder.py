"""The decoder: embedding, layers, final norm, logits.

One text for all families: what differs between them is a field of `ModelConfig`. Owns how the parts are
put together; knows no checkpoint names and no schedule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import nn

from graphllm.arena import Arena
from graphllm.attention.backend import (
    AttentionBackend,
    AttentionMetadata,
    AttentionSpec,
    LatentCache,
    LayerCache,
)
from graphllm.kernels.embedding import embedding
from graphllm.kernels.logit_adjustment import adjust_logits
from graphllm.kernels.residual_add import residual_add
from graphllm.layers.attention import Attention
from graphllm.layers.embedding import LearnedPositions, TiedHead, TokenEmbedding
from graphllm.layers.latent_attention import LatentAttention
from graphllm.layers.linear import Linear
from graphllm.layers.mlp import GatedMLP, PlainMLP
from graphllm.layers.moe import MoE
from graphllm.layers.norm import Norm, make_norm
from graphllm.layers.rotary import RotaryEmbedding
from graphllm.models.config import LayerConfig, ModelConfig
from graphllm.quant.scheme_source import SchemeSource


class DecoderLayer(nn.Module):
    """Attention and feed-forward on the residual stream, with norms where the configuration puts them."""

    def __init__(
        self,
        config: ModelConfig,
        layer: LayerConfig,
        *,
        backend: AttentionBackend,
        schemes: SchemeSource,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        norm = partial(make_norm, config.hidden_size, config=config.norm, device=device, dtype=dtype)
        placement = config.norm_placement
        has_input_norms, has_output_norms = placement != "output", placement in ("output", "both")
        has_mlp_norm = has_input_norms and (not config.is_parallel or config.has_parallel_mlp_norm)
        self.norms_sums = placement == "sum"
        self.is_parallel = config.is_parallel
        self.residual_multiplier = config.residual_multiplier
        self.attention_norm = norm() if has_input_norms else None
        if config.latent is not None:
            self.attention: Attention | LatentAttention = LatentAttention(
                config.hidden_size,
                config.num_heads,
                config.head_dim,
                scale=config.attention_scale,
                latent=config.latent,
                rotary=layer.rotary,
                bias=config.attention_bias,
                backend=backend,
                schemes=schemes.within("attention"),
                device=device,
                dtype=dtype,
            )
        else:
            spec = AttentionSpec(
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                scale=config.attention_scale,
                sliding_window=layer.sliding_window,
                softcap=config.attention_softcap,
                is_causal=config.is_causal,
            )
            self.attention = Attention(
                config.hidden_size,
                spec,
                rotary=layer.rotary,
                bias=config.attention_bias,
                output_bias=config.attention_output_bias,
                qk_norm=config.qk_norm,
                has_sinks=config.has_sinks,
                alibi_scale=config.alibi_scale,
                backend=backend,
                schemes=schemes.within("attention"),
                device=device,
                dtype=dtype,
            )
        self.attention_output_norm = norm() if has_output_norms else None
        self.mlp_norm = norm() if has_mlp_norm else None
        self.mlp = self.moe = None
        if layer.moe is not None:
            self.moe = MoE(
                config.hidden_size, layer.moe, schemes=schemes.within("moe"), device=device, dtype=dtype
            )
        else:
            feed_forward = GatedMLP if config.is_gated else PlainMLP
            self.mlp = feed_forward(
                config.hidden_size,
                config.intermediate_size,
                activation=config.activation,
                bias=config.mlp_bias,
                schemes=schemes.within("mlp"),
                device=device,
                dtype=dtype,
            )
        self.mlp_output_norm = norm() if has_output_norms else None

    def forward(
        self,
        delta: torch.Tensor | None,
        residual: torch.Tensor,
        rotary_tables: torch.Tensor | None,
        *,
        layer_cache: LayerCache | LatentCache,
        metadata: AttentionMetadata,
        arena: Arena,
    ) -> torch.Tensor | None:
        """Add `delta`, the output of the layer before, to `residual`, then this layer's attention; return
        what its feed-forward adds. All are [num_tokens, hidden_size]; a delta of None is nothing to add.

        Each addition waits for the norm behind it, because one kernel does both.
        """
        attention = partial(
            self.attention,
            rotary_tables=rotary_tables,
            layer_cache=layer_cache,
            metadata=metadata,
            arena=arena,
        )
        normed = arena.take("normed", *residual.shape, dtype=residual.dtype)
        if self.norms_sums:
            assert delta is None and self.attention_norm is not None and self.mlp_norm is not None
            stream = self.attention_norm.add(attention(residual), residual, out=normed)
            self.mlp_norm.add(self._feed_forward(stream, metadata, arena=arena), stream, out=residual)
            return None
        x = self._add_and_norm(self.attention_norm, delta, residual, out=normed)
        delta = attention(x)
        if self.attention_output_norm is not None:
            self.attention_output_norm(delta, out=delta)
        if self.is_parallel:
            if self.mlp_norm is not None:
                x = self.mlp_norm(residual, out=normed)
            residual_add(delta, residual, scale=self.residual_multiplier)
        else:
            x = self._add_and_norm(self.mlp_norm, delta, residual, out=normed)
        output = self._feed_forward(x, metadata, arena=arena)
        if self.mlp_output_norm is not None:
            self.mlp_output_norm(output, out=output)
        return output

    def _feed_forward(self, x: torch.Tensor, metadata: AttentionMetadata, *, arena: Arena) -> torch.Tensor:
        output: torch.Tensor
        if self.moe is not None:
            output = self.moe(x, slot_mapping=metadata.inputs.groups[0].slot_mapping, arena=arena)
        else:
            assert self.mlp is not None
            output = self.mlp(x, arena=arena)
        return output

    def _add_and_norm(
        self, norm: Norm | None, delta: torch.Tensor | None, residual: torch.Tensor, *, out: torch.Tensor
    ) -> torch.Tensor:
        """residual += delta; returns its norm, in `out`, or itself where there is no norm."""
        scale = self.residual_multiplier
        if norm is not None:
            return (
                norm(residual, out=out) if delta is None else norm.add(delta, residual, scale=scale, out=out)
            )
        if delta is not None:
            residual_add(delta, residual, scale=scale)
        return residual


class Decoder(nn.Module):
    """A decoder-only transformer over flat token batches. Parameters are uninitialized until loaded."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        backend: AttentionBackend,
        schemes: SchemeSource,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        self.dtype = dtype
        linear = partial(Linear, device=device, dtype=dtype)
        embedding_size = config.embedding_size or config.hidden_size
        self.embedding = TokenEmbedding(
            config.vocab_size,
            embedding_size,
            scale=config.embedding_multiplier,
            num_types=config.num_token_types,
            num_used_types=config.num_used_token_types,
            device=device,
            dtype=dtype,
        )
        self.embedding_projection = self.head_projection = None
        if config.embedding_size is not None:
            inner, outer = {"": config.hidden_size}, {"": config.embedding_size}
            self.embedding_projection = linear(
                config.embedding_size, inner, bias=False, scheme=schemes.at("embedding_projection")
            )
            self.head_projection = linear(
                config.hidden_size, outer, bias=False, scheme=schemes.at("head_projection")
            )
        self.positions = None
        if config.num_learned_positions:
            self.positions = LearnedPositions(
                config.num_learned_positions,
                config.hidden_size,
                offset=config.learned_position_offset,
                device=device,
                dtype=dtype,
            )
        norm = partial(make_norm, config.hidden_size, config=config.norm, device=device, dtype=dtype)
        self.embedding_norm = norm() if config.has_embedding_norm else None
        # One for each way of turning that occurs, in the order of the layers that do.
        rotaries = [*dict.fromkeys(layer.rotary for layer in config.layers if layer.rotary is not None)]
        self.rotaries = nn.ModuleList(
            RotaryEmbedding(rotary, max_context=config.max_position_embeddings, device=device, dtype=dtype)
            for rotary in rotaries
        )
        self._rotary_of_layer = [
            None if layer.rotary is None else rotaries.index(layer.rotary) for layer in config.layers
        ]
        self.layers = nn.ModuleList(
            DecoderLayer(
                config,
                layer,
                backend=backend,
                schemes=schemes.within(f"layers.{index}"),
                device=device,
                dtype=dtype,
            )
            for index, layer in enumerate(config.layers)
        )
        self.final_norm = None
        if config.norm_placement != "sum":
            self.final_norm = norm()
        self.head: Linear | TiedHead | None = None
        if config.has_head and config.tie_word_embeddings:
            self.head = TiedHead(self.embedding, scheme=schemes.plain)
        elif config.has_head:
            parts = {"": config.vocab_size}
            scheme = schemes.at("head")
            self.head = linear(embedding_size, parts, bias=config.head_bias, scheme=scheme)

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
    ) -> Iterator[None]:
        """One step, from token ids to logits; yields after each layer.

        Who captures a step between others stops at the yields; everybody else calls `forward`.
        input_ids, positions: [num_tokens] int64; layer_caches: one a layer, written to; `metadata` has
        gone through the backend's `plan` and `begin_step`. sampled_tokens: [num_rows] int64, the tokens
        whose logits are wanted; logits: [num_rows, vocab_size] float32, written to.
        """
        residual = self._embed(input_ids, positions, arena=arena)
        tables = [
            rotary(positions, arena=arena, name=f"rotary.{index}")
            for index, rotary in enumerate(self.rotaries)
        ]
        delta = None
        for layer, rotary, layer_cache in zip(self.layers, self._rotary_of_layer, layer_caches, strict=True):
            delta = layer(
                delta,
                residual,
                None if rotary is None else tables[rotary],
                layer_cache=layer_cache,
                metadata=metadata,
                arena=arena,
            )
            yield
        if len(sampled_tokens) == 0:  # in the middle of a prompt
            return
        hidden = self.final_hidden(sampled_tokens, num_tokens=len(input_ids), arena=arena)
        self.project(hidden, arena=arena, out=logits)

    def _embed(self, input_ids: torch.Tensor, positions: torch.Tensor, *, arena: Arena) -> torch.Tensor:
        """The residual stream's beginning: [num_tokens, hidden_size]."""
        num_tokens = len(input_ids)
        residual = arena.take("residual", num_tokens, self.config.hidden_size, dtype=self.dtype)
        if self.embedding_projection is None:
            self.embedding(input_ids, out=residual)
        else:
            size = (num_tokens, self.embedding_projection.in_features)
            embedded = self.embedding(input_ids, out=arena.take("inner", *size, dtype=self.dtype))
            self.embedding_projection.project(embedded, out=residual)
        if self.positions is not None:
            self.positions.add(positions, residual)
        if self.embedding_norm is not None:
            self.embedding_norm(residual, out=residual)
        return residual

    def final_hidden(self, tokens: torch.Tensor, *, num_tokens: int, arena: Arena) -> torch.Tensor:
        """The normed end of the stream for `tokens` ([num_rows] int64) of a step of `num_tokens`.

        Until the next step's forward the stream lies where this one left it in the arena, so other tokens
        than the sampled ones can be asked for behind a step, a replayed one too. Returns
        [num_rows, hidden_size] in the arena, which is valid until the next call.
        """
        size = (num_tokens, self.config.hidden_size)
        residual = arena.take("residual", *size, dtype=self.dtype)
        out = arena.take("normed", len(tokens), self.config.hidden_size, dtype=self.dtype)
        if self.final_norm is None:
            return embedding(tokens, residual, out=out)  # a row of the stream for each
        # Every layer leaves what is still to be added under this name.
        delta = arena.take("delta", *size, dtype=self.dtype)
        return self.final_norm.add(
            delta, residual, scale=self.config.residual_multiplier, rows=tokens, out=out
        )

    def project(self, hidden: torch.Tensor, *, arena: Arena, out: torch.Tensor) -> None:
        """From `final_hidden`'s rows to their logits: out, [num_rows, vocab_size] float32.

        Zeros where there is no head: what is then sampled is dropped, but must be a token.
        """
        if self.head is None:
            out.zero_()
            return
        if self.head_projection is not None:
            hidden = self.head_projection(hidden, arena=arena, name="wide")
        self.head.project(hidden, out=out)
        adjust_logits(out, multiplier=self.config.logit_multiplier, softcap=self.config.logit_softcap)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        *,
        layer_caches: Sequence[LayerCache | LatentCache],
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
