"""Attention over our own paged KV cache, on the CPU.

Owns the step's work list and the scratch memory behind it. The mathematics is in
`kernels/paged_attention.py` and `kernels/paged_latent_attention.py`.
"""

from __future__ import annotations

import torch

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
from graphllm.attention.row_groups import RowGroup, group_rows
from graphllm.kernels.gather_kv import gather_scratch_bytes
from graphllm.kernels.paged_attention import gathered_attention, paged_attention_ref
from graphllm.kernels.paged_latent_attention import gathered_latent_attention


class PagedAttention:
    """An AttentionBackend for tensors on the CPU. One per model: its scratch memory is not shared."""

    capture_support = CaptureSupport.NONE

    def __init__(self, *, block_size: int) -> None:
        self.block_size = block_size
        self._scratch: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def plan(self, inputs: AttentionInputs, bucket: AttentionBucket) -> AttentionMetadata:
        """Remember the addresses; what depends on their values waits for `begin_step`."""
        return AttentionMetadata(inputs, bucket)

    def begin_step(self, metadata: AttentionMetadata) -> None:
        """Group the rows by length."""
        metadata.work = group_rows(metadata.inputs, num_decode_rows=metadata.bucket.num_decode_rows)

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
        if sinks is not None or slopes is not None or spec.softcap is not None:
            self._attend_by_reference(
                query,
                layer_cache=layer_cache,
                spec=spec,
                metadata=metadata,
                sinks=sinks,
                slopes=slopes,
                out=out,
            )
            return
        groups: list[RowGroup] = metadata.work
        inputs = metadata.inputs
        if len(groups) == 1:
            out.copy_(self._attend(query, groups[0], layer_cache=layer_cache, spec=spec, inputs=inputs))
            return
        for group in groups:
            out[group.tokens] = self._attend(
                query[group.tokens], group, layer_cache=layer_cache, spec=spec, inputs=inputs
            )

    def _attend_by_reference(
        self,
        query: torch.Tensor,
        *,
        layer_cache: LayerCache,
        spec: AttentionSpec,
        metadata: AttentionMetadata,
        sinks: torch.Tensor | None,
        slopes: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """What torch's attention cannot express is computed row by row, as it is specified."""
        inputs = metadata.inputs
        out.copy_(
            paged_attention_ref(
                query,
                layer_cache.key,
                layer_cache.value,
                block_tables=inputs.groups[layer_cache.group].block_tables,
                row_slots=inputs.row_slots,
                query_lens=inputs.query_lens,
                context_lens=inputs.context_lens,
                scale=spec.scale,
                sliding_window=spec.sliding_window,
                softcap=spec.softcap,
                is_causal=spec.is_causal,
                sinks=sinks,
                slopes=slopes,
                key_scale=layer_cache.key_scale,
                value_scale=layer_cache.value_scale,
            )
        )

    def _attend(
        self,
        query: torch.Tensor,
        group: RowGroup,
        *,
        layer_cache: LayerCache,
        spec: AttentionSpec,
        inputs: AttentionInputs,
    ) -> torch.Tensor:
        """One group's rows. query: [num_rows * query_len, num_heads, head_dim]; returns the same shape."""
        if spec.is_causal:
            group = group.within(spec.sliding_window)
            mask = group.mask(spec.sliding_window, query.dtype)
            is_causal = group.is_causal(spec.sliding_window)
        else:
            mask, is_causal = group.band(spec.sliding_window, query.dtype), False
        slots = group.slots(inputs, layer_cache.group, block_size=self.block_size)
        num_tokens, width = len(slots), spec.num_kv_heads * spec.head_dim
        is_scaled = layer_cache.key_scale is not None
        scratch_dtype = query.dtype if is_scaled else layer_cache.key.dtype
        attended = gathered_attention(
            query.view(group.num_rows, group.query_len, spec.num_heads, spec.head_dim),
            layer_cache.key,
            layer_cache.value,
            slots=slots,
            mask=mask,
            is_causal=is_causal,
            scale=spec.scale,
            scratch=(
                self._take_scratch("keys", num_tokens * width, dtype=scratch_dtype),
                self._take_scratch("values", num_tokens * width, dtype=scratch_dtype),
            ),
            key_scale=layer_cache.key_scale,
            value_scale=layer_cache.value_scale,
            gather_scratch=self._take_scratch(
                "stored",
                gather_scratch_bytes(num_tokens, spec.num_kv_heads, spec.head_dim),
                dtype=torch.uint8,
            )
            if is_scaled
            else None,
        )
        return attended.flatten(0, 1)

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
        assert layer_cache.latent.shape[1] == self.block_size, "the KV cache has another block size"
        groups: list[RowGroup] = metadata.work
        for group in groups:
            of_group = query if len(groups) == 1 else query[group.tokens]
            # Only rows in one run can be written where they belong.
            is_run = isinstance(group.tokens, slice)
            to = out[group.tokens] if is_run else out.new_empty(*of_group.shape[:2], spec.rank)
            slots = group.slots(metadata.inputs, layer_cache.group, block_size=self.block_size)
            self._attend_latent(of_group, group, slots=slots, layer_cache=layer_cache, spec=spec, out=to)
            if not is_run:
                out[group.tokens] = to

    def _attend_latent(
        self,
        query: torch.Tensor,
        group: RowGroup,
        *,
        slots: torch.Tensor,
        layer_cache: LatentCache,
        spec: LatentAttentionSpec,
        out: torch.Tensor,
    ) -> None:
        """One group's rows. query: [num_rows * query_len, num_heads, width]; out: as many of rank."""
        num_slots, is_scaled = len(slots), layer_cache.scale is not None
        scratch_dtype = query.dtype if is_scaled else layer_cache.latent.dtype
        gather_scratch = None
        if is_scaled:
            num_bytes = gather_scratch_bytes(num_slots, 1, spec.width)
            gather_scratch = self._take_scratch("stored", num_bytes, dtype=torch.uint8)
        gathered_latent_attention(
            query.view(group.num_rows, group.query_len, spec.num_heads, spec.width),
            layer_cache.latent,
            slots=slots,
            mask=group.mask(None, query.dtype) if group.query_len == 1 else None,
            scale=spec.scale,
            scratch=self._take_scratch("keys", num_slots * spec.width, dtype=scratch_dtype),
            cache_scale=layer_cache.scale,
            gather_scratch=gather_scratch,
            out=out.view(group.num_rows, group.query_len, spec.num_heads, spec.rank),
        )

    def _take_scratch(self, name: str, num_elements: int, *, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialized flat tensor, the same memory in every layer and step."""
        memory = self._scratch.get((name, dtype))
        if memory is None or memory.numel() < num_elements:
            # Room for a growing context, so that decoding does not reallocate at every token.
            memory = self._scratch[name, dtype] = torch.empty(2 * num_elements, dtype=dtype)
        return memory[:num_elements]
