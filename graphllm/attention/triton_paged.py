"""Attention over our own paged KV cache, on a card.

Owns the step's work lists, the scratch memory of split contexts and the order of the launches. The
mathematics is in `kernels/paged_decode_attention.py` and `kernels/paged_prefill_attention.py`, the sharing
out of work in `kernels/attention_work_list.py`.
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
    LayerCache,
)
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
        block_tables = metadata.inputs.block_tables
        work = self._decode_work(metadata, spec)
        partials = self._take_partials(len(work.entries), spec)
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
        paged_prefill_attention(
            query,
            layer_cache.key,
            layer_cache.value,
            block_tables=block_tables,
            work=self._prefill_work(
                metadata,
                spec,
                query_itemsize=query.element_size(),
                cache_itemsize=layer_cache.key.element_size(),
            ),
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

    def _decode_work(self, metadata: AttentionMetadata, spec: AttentionSpec) -> DecodeWorkList:
        """The step's list for the spec's window, built where this layer is the first to need it."""
        work: _StepWork = metadata.work
        key = (spec.sliding_window, spec.num_kv_heads)
        if key not in work.decode:
            inputs, num_rows = metadata.inputs, metadata.bucket.num_rows
            num_programs = self._num_decode_programs(num_rows, spec)
            num_cuts = min(num_rows, num_programs - 1)
            name = f"attention.window_{spec.sliding_window}.kv_heads_{spec.num_kv_heads}"
            work.decode[key] = decode_work_list(
                inputs.query_lens,
                inputs.context_lens,
                query_starts=inputs.query_starts,
                row_slots=inputs.row_slots,
                sliding_window=spec.sliding_window,
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

    def _num_decode_programs(self, num_rows: int, spec: AttentionSpec) -> int:
        """As many as the card holds, but no more than the bucket can ever have granules."""
        longest = min(self._max_model_len, spec.sliding_window or self._max_model_len)
        most_granules = num_rows * -(-longest // GRANULE)
        return min(num_decode_programs(self._num_multiprocessors, spec.num_kv_heads), most_granules)

    def _prefill_work(
        self, metadata: AttentionMetadata, spec: AttentionSpec, *, query_itemsize: int, cache_itemsize: int
    ) -> PrefillWorkList:
        """The step's list for the spec's query tile, built where this layer is the first to need it."""
        work: _StepWork = metadata.work
        config = prefill_config(spec.head_dim, query_itemsize, cache_itemsize)
        query_tile = queries_per_item(spec.num_heads, spec.num_kv_heads, config)
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

    def _take_partials(self, num_entries: int, spec: AttentionSpec) -> DecodePartials:
        """Scratch that all layers share: a layer's combination is done before the next layer begins."""
        size = (num_entries, spec.num_heads)
        return DecodePartials(
            accumulators=self._arena.take(
                "attention.accumulators", *size, spec.head_dim, dtype=torch.float32
            ),
            statistics=self._arena.take("attention.statistics", *size, 2, dtype=torch.float32),
        )


def _count_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _MULTIPROCESSORS_WITHOUT_A_CARD
    return torch.cuda.get_device_properties(device).multi_processor_count
