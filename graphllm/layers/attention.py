"""The attention layer: projections, head norms, rotary with the cache write, and the backend in between.

Owns the order of heads in the merged projection. Attention itself is the backend's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from graphllm.arena import Arena
from graphllm.attention.backend import AttentionBackend, AttentionMetadata, AttentionSpec, LayerCache
from graphllm.kernels.rotary_cache_write import rotary_cache_write
from graphllm.layers.linear import Linear
from graphllm.layers.loadable import LoadableModule, WeightSlot
from graphllm.layers.norm import Norm, NormConfig, make_norm
from graphllm.layers.rotary import RotaryConfig
from graphllm.quant.scheme_source import SchemeSource


@dataclass(frozen=True, slots=True, kw_only=True)
class QKNormConfig:
    """Norms of queries and keys before rotary (Henry et al., 2020, arXiv:2010.04245, generalized).

    span: what is normalized together and which factors are learned. "head": each head, all heads by the
    same head_dim factors; "each_head": each head by its own; "all_heads": the heads of a token as one row.
    """

    span: Literal["head", "each_head", "all_heads"] = "head"
    norm: NormConfig

    @property
    def is_fused(self) -> bool:
        """Whether `rotary_cache_write` does it; other norms are kernels of their own."""
        return self.span == "head" and self.norm.kind == "rms"


class AttentionSinks(LoadableModule):
    """A learned logit for each head that takes part in the softmax and has no value: `weight` [num_heads],
    float32 in any model."""

    def __init__(self, num_heads: int, *, device: torch.device) -> None:
        super().__init__()
        values = torch.empty(num_heads, dtype=torch.float32, device=device)
        self.weight = nn.Parameter(values, requires_grad=False)

    def weight_slots(self) -> dict[str, WeightSlot]:
        return {"weight": WeightSlot(tuple(self.weight.shape), self._load)}

    def _load(self, tensor: torch.Tensor) -> None:
        self.weight.copy_(tensor)


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """ALiBi's slopes (Press et al., 2021, arXiv:2108.12409): [num_heads] float32, on the CPU.

    A geometric series from 2^(-8/n) to 2^-8 for n heads, where n is a power of two; else that of the power
    below, and every second one of the power above. (Falcon's, as transformers computes it, is rounded to
    bfloat16, and so is its product with a position; neither is rounded here.)
    """
    whole = 1 << (num_heads.bit_length() - 1)
    exponents = torch.arange(1, whole + 1) * (-8.0 / whole)
    between = torch.arange(1, 2 * (num_heads - whole) + 1, 2) * (-4.0 / whole)
    return torch.exp2(torch.cat((exponents, between)))


class Attention(nn.Module):
    """Grouped-query attention; query, key and value are one product.

    rotary: None leaves heads unturned. qk_norm: None leaves them as they are. has_sinks: each head has a
    learned logit without a value. alibi_scale: what ALiBi's slopes are multiplied by; None: no ALiBi.
    """

    def __init__(
        self,
        hidden_size: int,
        spec: AttentionSpec,
        *,
        rotary: RotaryConfig | None,
        bias: bool,
        output_bias: bool,
        qk_norm: QKNormConfig | None,
        has_sinks: bool = False,
        alibi_scale: float | None = None,
        backend: AttentionBackend,
        schemes: SchemeSource,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.backend = backend
        self.is_interleaved = rotary is not None and rotary.is_interleaved
        self.query_size = spec.num_heads * spec.head_dim
        self.kv_size = spec.num_kv_heads * spec.head_dim
        self.qkv = Linear(
            hidden_size,
            {"q": self.query_size, "k": self.kv_size, "v": self.kv_size},
            bias=bias,
            scheme=schemes.at("qkv"),
            device=device,
            dtype=dtype,
        )
        self.sinks = AttentionSinks(spec.num_heads, device=device) if has_sinks else None
        self.slopes: torch.Tensor | None
        slopes = None if alibi_scale is None else (alibi_slopes(spec.num_heads) * alibi_scale).to(device)
        self.register_buffer("slopes", slopes, persistent=False)
        self.qk_norm = qk_norm
        self.query_norm = self._make_norm(spec.num_heads, device=device, dtype=dtype)
        self.key_norm = self._make_norm(spec.num_kv_heads, device=device, dtype=dtype)
        self.output = Linear(
            self.query_size,
            {"": hidden_size},
            bias=output_bias,
            scheme=schemes.at("output"),
            device=device,
            dtype=dtype,
        )

    def _make_norm(self, num_heads: int, *, device: torch.device, dtype: torch.dtype) -> Norm | None:
        if self.qk_norm is None:
            return None
        sizes = {
            "head": (self.spec.head_dim,),
            "each_head": (num_heads, self.spec.head_dim),
            "all_heads": (num_heads * self.spec.head_dim,),
        }
        return make_norm(*sizes[self.qk_norm.span], config=self.qk_norm.norm, device=device, dtype=dtype)

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
        num_tokens, spec = x.shape[0], self.spec
        # Queries, then keys, then values: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim].
        qkv: torch.Tensor = self.qkv(x, arena=arena, name="wide")
        self._norm_heads(qkv)
        # Those norms that the kernel below does, if any.
        is_fused = self.qk_norm is not None and self.qk_norm.is_fused
        query_norm, key_norm = (self.query_norm, self.key_norm) if is_fused else (None, None)
        rotary_cache_write(
            qkv,
            rotary_tables,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            slot_mapping=metadata.inputs.groups[layer_cache.group].slot_mapping,
            key_cache=layer_cache.key,
            value_cache=layer_cache.value,
            key_scale=layer_cache.key_scale,
            value_scale=layer_cache.value_scale,
            is_interleaved=self.is_interleaved,
            query_norm=None if query_norm is None else query_norm.weight,
            key_norm=None if key_norm is None else key_norm.weight,
            norm_eps=0.0 if query_norm is None else query_norm.eps,
            norm_unit_offset=query_norm is not None and query_norm.unit_offset,
        )
        attended = arena.take("inner", num_tokens, spec.num_heads, spec.head_dim, dtype=x.dtype)
        self.backend.forward(
            qkv[:, : self.query_size].view(num_tokens, spec.num_heads, spec.head_dim),
            layer_cache=layer_cache,
            spec=spec,
            metadata=metadata,
            sinks=None if self.sinks is None else self.sinks.weight,
            slopes=self.slopes,
            out=attended,
        )
        output: torch.Tensor = self.output(
            attended.view(num_tokens, self.query_size), arena=arena, name="delta"
        )
        return output

    def _norm_heads(self, qkv: torch.Tensor) -> None:
        """The norms that are no part of `rotary_cache_write`, in place."""
        if self.qk_norm is None or self.qk_norm.is_fused:
            return
        for norm, first, size in (
            (self.query_norm, 0, self.query_size),
            (self.key_norm, self.query_size, self.kv_size),
        ):
            assert norm is not None
            part = qkv[:, first : first + size]  # [num_tokens, size], of qkv's stride
            if self.qk_norm.span != "all_heads":
                part = part.view(len(qkv), -1, self.spec.head_dim)
            norm(part, out=part)
