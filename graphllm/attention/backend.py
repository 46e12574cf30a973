"""The contract between a model's attention layers and whatever computes attention over paged KV.

Owns the step's metadata types and the backend protocol. Computes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Protocol

import torch


class CaptureSupport(Enum):
    """What a backend can run inside a captured graph."""

    NONE = auto()
    DECODE = auto()
    UNIFORM = auto()
    MIXED = auto()


class LayerCache(Protocol):
    """One layer's KV pool. key, value: [num_blocks, block_size, num_kv_heads, head_dim]."""

    @property
    def key(self) -> torch.Tensor: ...

    @property
    def value(self) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class AttentionBucket:
    """A step's sizes, known to the host: the shapes of its inputs, never their values."""

    num_tokens: int
    num_rows: int
    num_decode_rows: int


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """Device tensors that describe one step's rows; decode rows (one token each) come first.

    row_slots, query_lens, context_lens: [num_rows] int64; a row's query is the last `query_lens` of
    its `context_lens` tokens. query_starts: [num_rows + 1] int64, the rows' first token in the batch.
    positions, slot_mapping: [num_tokens] int64; slot_mapping = block * block_size + offset.
    block_tables: [num_slots, max_blocks] int32, the whole device table, indexed by row_slots.
    """

    row_slots: torch.Tensor
    query_lens: torch.Tensor
    context_lens: torch.Tensor
    query_starts: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """The mathematics of one layer's attention. scale multiplies q.k; window None means full."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int | None = None


@dataclass(slots=True)
class AttentionMetadata:
    """What `plan` returns and every layer's `forward` reads; `work` is the backend's own."""

    inputs: AttentionInputs
    bucket: AttentionBucket
    work: Any = None


class AttentionBackend(Protocol):
    """Computes attention over a paged cache.

    `plan` runs on the host and sees addresses and sizes only. `begin_step` runs on the device once
    a step, before the first layer, and builds what all layers share. `forward` runs on the device.
    """

    capture_support: CaptureSupport

    def plan(self, inputs: AttentionInputs, bucket: AttentionBucket) -> AttentionMetadata: ...

    def begin_step(self, metadata: AttentionMetadata) -> None: ...

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        layer_cache: LayerCache,
        spec: AttentionSpec,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Write key and value into the cache, attend, return the result.

        query: [num_tokens, num_heads, head_dim]; key, value: [num_tokens, num_kv_heads, head_dim],
        rotary already applied. Returns [num_tokens, num_heads, head_dim].
        """
        ...
