"""Attention over our own paged KV cache, on a card.

Owns the step's work lists, the scratch memory of split contexts and the order of the launches. The
mathematics is in `kernels/paged_decode_attention.py` and `kernels/paged_prefill_attention.py`, that over
latents in `kernels/paged_latent_*.py`, the sharing out of work in `kernels/attention_work_list.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from graphllm.arena import Arena
from graphllm.attention.backend import (
    AttentionBucket,
    AttentionInputs,
    AttentionMetadata,
    AttentionSpec,
    CaptureSupport,
    LatentAttentionSpec,
    LatentCache,
    LayerCache,
)
from graphllm.kernels.attention_tiles import capability_of
from graphllm.kernels.attention_work_list import (
    CUT_FIELDS,
    ENTRY_FIELDS,
    GRANULE,
    ITEM_FIELDS,
    DecodeWorkList,
    PrefillWorkList,
    decode_work_list,
    max_prefill_items,
    prefill_work_list,
)
from graphllm.kernels.paged_decode_attention import (
    DecodePartials,
    combine_decode_partials,
    num_decode_programs,
    paged_decode_attention,
)
from graphllm.kernels.paged_latent_decode import (
    latent_decode_config,
    num_latent_decode_programs,
    paged_latent_decode,
)
from graphllm.kernels.paged_latent_prefill import latent_prefill_config, paged_latent_prefill
from graphllm.kernels.paged_prefill_attention import (
    paged_prefill_attention,
    prefill_config,
    queries_per_item,
)

# Where there is no card, the number of multiprocessors only says how often contexts are split.
_MULTIPROCESSORS_WITHOUT_A_CARD = 4


@dataclass(slots=True)
class _StepWork:
    """The lists that the step's layers have needed so far."""

    decode: dict[tuple[int | None, int], DecodeWorkList] = field(default_factory=dict)
    prefill: dict[int, PrefillWorkList] = field(default_factory=dict)


class TritonPagedAttention:
    """An AttentionBackend for steps of any mixture, inside a captured graph or not. One per model.

    Which lists a step needs is known from its layers' specs: one for each sliding window (and number of KV
    heads), which the first such layer builds, and one for each size of query tile.
    """

    capture_support = CaptureSupport.MIXED

    def __init__(
        self,
        *,
        block_size: int,
        arena: Arena,
        max_num_rows: int,
        max_model_len: int,
        num_multiprocessors: int | None = None,
    ) -> None:
        """arena: on the device of the step. num_multiprocessors: the device's, unless told otherwise."""
        self.block_size = block_size
        self._arena = arena
        self._max_num_rows = max_num_rows
        self._max_model_len = max_model_len
        self._num_multiprocessors = num_multiprocessors or _count_multiprocessors(arena.device)

    def plan(self, inputs: AttentionInputs, bucket: AttentionBucket) -> AttentionMetadata:
        """Remember the addresses and the sizes, which are all that launches depend on."""
        return AttentionMetadata(inputs, bucket)

    def begin_step(self, metadata: AttentionMetadata) -> None:
        """Forget the last step's lists: the rows have other lengths now."""
        metadata.work = _StepWork()

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
        """See `AttentionBackend.forward`."""
        assert layer_cache.key.shape[1] == self.block_size, "the KV cache has another block size"
        block_tables = metadata.inputs.groups[layer_cache.group].block_tables
        work = self._decode_work(
            metadata,
            sliding_window=spec.sliding_window,
            num_parts=spec.num_kv_heads,
            num_programs=num_decode_programs(self._num_multiprocessors, spec.num_kv_heads),
        )
        partials = self._take_partials(len(work.entries), num_heads=spec.num_heads, head_dim=spec.head_dim)
        paged_decode_attention(
            query,
            layer_cache.key,
            layer_cache.value,
            block_tables=block_tables,
            work=work,
            partials=partials,
            scale=spec.scale,
            softcap=spec.softcap,
            sinks=sinks,
            slopes=slopes,
            key_scale=layer_cache.key_scale,
            value_scale=layer_cache.value_scale,
            out=out,
        )
        combine_decode_partials(partials, work, sinks=sinks, out=out)
        if metadata.bucket.is_decode:
            return
        config = prefill_config(spec.head_dim, query.element_size(), layer_cache.key.element_size())
        query_tile = queries_per_item(spec.num_heads, spec.num_kv_heads, config)
        paged_prefill_attention(
            query,
            layer_cache.key,
            layer_cache.value,
            block_tables=block_tables,
            work=self._prefill_work(metadata, query_tile),
            scale=spec.scale,
            num_multiprocessors=self._num_multiprocessors,
            sliding_window=spec.sliding_window,
            softcap=spec.softcap,
            is_causal=spec.is_causal,
            sinks=sinks,
            slopes=slopes,
            key_scale=layer_cache.key_scale,
            value_scale=layer_cache.value_scale,
            out=out,
        )

    def forward_latent(
        self,
        query: torch.Tensor,
        *,
        layer_cache: LatentCache,
        spec: LatentAttentionSpec,
        metadata: AttentionMetadata,
        out: torch.Tensor,
    ) -> None:
        """See `AttentionBackend.forward_latent`."""
        cache = layer_cache.latent
        assert cache.shape[1] == self.block_size, "the KV cache has another block size"
        itemsizes = (query.element_size(), cache.element_size())
        decode = latent_decode_config(spec.num_heads, *itemsizes, capability=capability_of(query.device))
        work = self._decode_work(
            metadata,
            sliding_window=None,
            num_parts=-(-spec.num_heads // decode.heads_per_tile),
            num_programs=num_latent_decode_programs(self._num_multiprocessors, spec.num_heads, decode),
        )
        partials = self._take_partials(len(work.entries), num_heads=spec.num_heads, head_dim=spec.rank)
        block_tables = metadata.inputs.groups[layer_cache.group].block_tables
        paged_latent_decode(
            query,
            cache,
            block_tables=block_tables,
            work=work,
            partials=partials,
            scale=spec.scale,
            cache_scale=layer_cache.scale,
            out=out,
        )
        combine_decode_partials(partials, work, out=out)
        if metadata.bucket.is_decode:
            return
        query_tile = latent_prefill_config(*itemsizes).queries_per_item(spec.num_heads)
        paged_latent_prefill(
            query,
            cache,
            block_tables=block_tables,
            work=self._prefill_work(metadata, query_tile),
            scale=spec.scale,
            num_multiprocessors=self._num_multiprocessors,
            cache_scale=layer_cache.scale,
            out=out,
        )

    def _decode_work(
        self,
        metadata: AttentionMetadata,
        *,
        sliding_window: int | None,
        num_parts: int,
        num_programs: int,
    ) -> DecodeWorkList:
        """The step's list for the window, built where this layer is the first to need it.

        num_parts: into how many the heads are divided, each with programs of its own. num_programs: of a
        part, as the card holds; there are no more than the bucket can ever have granules.
        """
        work: _StepWork = metadata.work
        key = (sliding_window, num_parts)
        if key not in work.decode:
            inputs, num_rows = metadata.inputs, metadata.bucket.num_rows
            longest = min(self._max_model_len, sliding_window or self._max_model_len)
            num_programs = min(num_programs, num_rows * -(-longest // GRANULE))
            num_cuts = min(num_rows, num_programs - 1)
            name = f"attention.window_{sliding_window}.kv_heads_{num_parts}"
            work.decode[key] = decode_work_list(
                inputs.query_lens,
                inputs.context_lens,
                query_starts=inputs.query_starts,
                row_slots=inputs.row_slots,
                sliding_window=sliding_window,
                max_num_rows=self._max_num_rows,
                out=DecodeWorkList(
                    entries=self._arena.take(
                        f"{name}.entries", num_programs + num_rows, ENTRY_FIELDS, dtype=torch.int32
                    ),
                    cuts=self._arena.take(f"{name}.cuts", num_cuts, CUT_FIELDS, dtype=torch.int32),
                    num_programs=num_programs,
                ),
            )
        return work.decode[key]

    def _prefill_work(self, metadata: AttentionMetadata, query_tile: int) -> PrefillWorkList:
        """The step's list for the query tile, built where this layer is the first to need it."""
        work: _StepWork = metadata.work
        if query_tile not in work.prefill:
            inputs, bucket = metadata.inputs, metadata.bucket
            max_items = max_prefill_items(bucket.num_tokens, bucket.num_rows, query_tile)
            name = f"attention.queries_{query_tile}"
            work.prefill[query_tile] = prefill_work_list(
                inputs.query_lens,
                inputs.context_lens,
                query_starts=inputs.query_starts,
                row_slots=inputs.row_slots,
                max_num_rows=self._max_num_rows,
                out=PrefillWorkList(
                    items=self._arena.take(f"{name}.items", max_items, ITEM_FIELDS, dtype=torch.int32),
                    num_items=self._arena.take(f"{name}.num_items", 1, dtype=torch.int32),
                    query_tile=query_tile,
                ),
            )
        return work.prefill[query_tile]

    def _take_partials(self, num_entries: int, *, num_heads: int, head_dim: int) -> DecodePartials:
        """Scratch that all layers share: a layer's combination is done before the next layer begins."""
        size = (num_entries, num_heads)
        return DecodePartials(
            accumulators=self._arena.take("attention.accumulators", *size, head_dim, dtype=torch.float32),
            statistics=self._arena.take("attention.statistics", *size, 2, dtype=torch.float32),
        )


def _count_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _MULTIPROCESSORS_WITHOUT_A_CARD
    return torch.cuda.get_device_properties(device).multi_processor_count
