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
    """One layer's KV pool. key, value: [num_blocks, block_size, num_kv_heads, head_dim].

    key_scale, value_scale: [num_blocks, block_size, num_kv_heads] float32 where key and value are stored
    in 8 bits, and what is stored times its scale is what is meant; None where they are stored as they are.
    group: which of a step's `groups` say where the layer's tokens lie.
    """

    @property
    def key(self) -> torch.Tensor: ...

    @property
    def value(self) -> torch.Tensor: ...

    @property
    def key_scale(self) -> torch.Tensor | None: ...

    @property
    def value_scale(self) -> torch.Tensor | None: ...

    @property
    def group(self) -> int: ...


class LatentCache(Protocol):
    """The pool of a layer whose heads share one latent: [num_blocks, block_size, width].

    scale: [num_blocks, block_size] float32 where latents are stored in 8 bits, else None. group: as in
    `LayerCache`.
    """

    @property
    def latent(self) -> torch.Tensor: ...

    @property
    def scale(self) -> torch.Tensor | None: ...

    @property
    def group(self) -> int: ...


@dataclass(frozen=True, slots=True)
class AttentionBucket:
    """A step's sizes, known to the host: the shapes of its inputs, never their values.

    A bucket that is captured may be larger than the step: padding rows then have no tokens and padding
    tokens no place in the cache. num_decode_rows equals num_rows where row i has token i and no other;
    elsewhere a captured bucket says 0, and which rows decode is known to the device only.
    """

    num_tokens: int
    num_rows: int
    num_decode_rows: int

    @property
    def is_decode(self) -> bool:
        """Whether every row has one token (or, as padding, none)."""
        return self.num_decode_rows == self.num_rows


@dataclass(frozen=True, slots=True)
class GroupInputs:
    """Where the tokens of one group of layers lie.

    slot_mapping: [num_tokens] int64, block * block_size + offset of the step's tokens; -1 for padding tokens,
    in every group. block_tables: [num_slots, max_blocks] int32, the whole device table, indexed by row_slots.
    What it says of tokens behind the layers' window means nothing: those blocks may be anybody's.
    """

    slot_mapping: torch.Tensor
    block_tables: torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """Device tensors that describe one step's rows; decode rows (one token each) come first.

    row_slots, query_lens, context_lens: [num_rows] int64; a row's query is the last `query_lens` of
    its `context_lens` tokens. query_starts: [num_rows + 1] int64, the rows' first token in the batch.
    positions: [num_tokens] int64. groups: of layers, a layer's cache names its own.

    Padding rows come last: query_lens and context_lens are 0. Padding tokens come last: positions are 0
    and slot_mapping is -1, which stores nothing.
    """

    row_slots: torch.Tensor
    query_lens: torch.Tensor
    context_lens: torch.Tensor
    query_starts: torch.Tensor
    positions: torch.Tensor
    groups: tuple[GroupInputs, ...]


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """The mathematics of one layer's attention.

    scale multiplies q.k; sliding_window None means full. softcap c turns a score s into c tanh(s / c)
    (Gemma 2, arXiv:2408.00118); None leaves it. Without is_causal a query sees the whole context, or what
    lies nearer than sliding_window on either side; every row is then a whole prompt. Learned sinks are a
    layer's weights, not a number, and are passed to `forward`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    is_causal: bool = True


@dataclass(frozen=True, slots=True)
class LatentAttentionSpec:
    """The mathematics of attention over latents (`kernels/paged_latent_attention.py`).

    All heads share a token's one vector of rank + turned_dim dimensions as key, and its first `rank` as
    value. scale multiplies q.k.
    """

    num_heads: int
    rank: int
    turned_dim: int
    scale: float

    @property
    def width(self) -> int:
        """Dimensions of a query and of what is cached of a token."""
        return self.rank + self.turned_dim


@dataclass(slots=True)
class AttentionMetadata:
    """What `plan` returns and every layer's `forward` reads; `work` is the backend's own."""

    inputs: AttentionInputs
    bucket: AttentionBucket
    work: Any = None


class AttentionBackend(Protocol):
    """Computes attention over a paged cache.

    `plan` runs on the host and sees addresses and sizes only. `begin_step` runs on the device once
    a step, before the first layer, and builds what all layers share. `forward`, or for a layer whose cache
    holds latents `forward_latent`, runs on the device, when the layer has written the step's tokens into the
    cache.
    """

    capture_support: CaptureSupport

    def plan(self, inputs: AttentionInputs, bucket: AttentionBucket) -> AttentionMetadata: ...

    def begin_step(self, metadata: AttentionMetadata) -> None: ...

    def forward(
        self,
        query: torch.Tensor,
        *,
        layer_cache: LayerCache,
        spec: AttentionSpec,
        metadata: AttentionMetadata,
        sinks: torch.Tensor | None = None,
        slopes: torch.Tensor | None = None,
        out: torch.Tensor,
    ) -> None:
        """Attend the step's queries into `out`.

        query: [num_tokens, num_heads, head_dim], rotary already applied, heads and their dimensions
        contiguous, any stride between tokens. sinks: [num_heads] float32, a logit each that takes part in
        the softmax and has no value (gpt-oss). slopes: [num_heads] float32, ALiBi's; not with
        sinks. out: [num_tokens, num_heads, head_dim], contiguous; what padding tokens leave there is not
        defined.
        """
        ...

    def forward_latent(
        self,
        query: torch.Tensor,
        *,
        layer_cache: LatentCache,
        spec: LatentAttentionSpec,
        metadata: AttentionMetadata,
        out: torch.Tensor,
    ) -> None:
        """Attend the step's queries, brought to the latent, into `out`.

        query: [num_tokens, num_heads, rank + turned_dim], contiguous; out: [num_tokens, num_heads, rank],
        contiguous, weighted sums of latents; what padding tokens leave there is not defined.
        """
        ...
