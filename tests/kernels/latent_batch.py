"""Random rows over a paged cache of latents, and how the kernels attend them.

Every cache slot that no row owns holds NaN (in 8 bits: in its scale), and outputs begin as NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphllm.kernels.attention_work_list import (
    ITEM_FIELDS,
    DecodeWorkList,
    PrefillWorkList,
    decode_work_list,
    max_prefill_items,
    prefill_work_list,
)
from graphllm.kernels.paged_decode_attention import DecodePartials, combine_decode_partials
from graphllm.kernels.paged_latent_attention import paged_latent_attention_ref
from graphllm.kernels.paged_latent_decode import paged_latent_decode
from graphllm.kernels.paged_latent_prefill import latent_prefill_config, paged_latent_prefill
from tests.kernels.attention_batch import MAX_NUM_ROWS, SCALE, attention_batch, integers, nans
from tests.kernels.device import DEVICE


@dataclass(slots=True)
class LatentBatch:
    """A step's tensors, named as in the kernels."""

    query: torch.Tensor
    cache: torch.Tensor
    cache_scale: torch.Tensor | None
    rank: int
    block_tables: torch.Tensor
    row_slots: torch.Tensor
    query_lens: torch.Tensor
    context_lens: torch.Tensor
    query_starts: torch.Tensor

    def expected(self) -> torch.Tensor:
        return paged_latent_attention_ref(
            self.query,
            self.cache,
            block_tables=self.block_tables,
            row_slots=self.row_slots,
            query_lens=self.query_lens,
            context_lens=self.context_lens,
            scale=SCALE,
            rank=self.rank,
            cache_scale=self.cache_scale,
        )


def latent_batch(
    rows: Sequence[tuple[int, int]],
    *,
    num_heads: int = 4,
    rank: int = 32,
    turned: int = 16,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    num_padding_tokens: int = 0,
) -> LatentBatch:
    """rows: (query_len, context_len) each, (0, 0) for padding; cache_dtype None: that of the queries."""
    batch = attention_batch(
        rows,
        group=num_heads,
        num_kv_heads=1,
        head_dim=rank + turned,
        block_size=block_size,
        dtype=dtype,
        cache_dtype=cache_dtype,
        num_padding_tokens=num_padding_tokens,
    )
    return LatentBatch(
        query=batch.query.contiguous(),
        cache=batch.key_cache[:, :, 0].contiguous(),
        cache_scale=None if batch.key_scale is None else batch.key_scale[:, :, 0].contiguous(),
        rank=rank,
        block_tables=batch.block_tables,
        row_slots=batch.row_slots,
        query_lens=batch.query_lens,
        context_lens=batch.context_lens,
        query_starts=batch.query_starts,
    )


def attend(
    batch: LatentBatch, *, num_programs: int = 3, decode: bool = True, prefill: bool = True
) -> torch.Tensor:
    """What the kernels write: [num_tokens, num_heads, rank]; NaN where none does."""
    num_tokens, num_heads, _ = batch.query.shape
    num_rows = len(batch.query_lens)
    out = nans(num_tokens, num_heads, batch.rank, dtype=batch.query.dtype)
    lens = (batch.query_lens, batch.context_lens)
    rows: dict[str, Any] = {"query_starts": batch.query_starts, "row_slots": batch.row_slots}
    common: dict[str, Any] = {
        "block_tables": batch.block_tables,
        "scale": SCALE,
        "cache_scale": batch.cache_scale,
        "out": out,
    }
    if decode:
        num_entries = num_programs + num_rows
        work = decode_work_list(
            *lens,
            **rows,
            sliding_window=None,
            max_num_rows=MAX_NUM_ROWS,
            out=DecodeWorkList(
                entries=integers(num_entries, 8),
                cuts=integers(min(num_rows, num_programs - 1), 4),
                num_programs=num_programs,
            ),
        )
        partials = DecodePartials(nans(num_entries, num_heads, batch.rank), nans(num_entries, num_heads, 2))
        paged_latent_decode(batch.query, batch.cache, work=work, partials=partials, **common)
        combine_decode_partials(partials, work, out=out)
    if prefill:
        config = latent_prefill_config(batch.query.element_size(), batch.cache.element_size())
        query_tile = config.queries_per_item(num_heads)
        max_items = max_prefill_items(num_tokens, num_rows, query_tile)
        items = PrefillWorkList(integers(max_items, ITEM_FIELDS), integers(1), query_tile)
        prefill_items = prefill_work_list(*lens, **rows, max_num_rows=MAX_NUM_ROWS, out=items)
        paged_latent_prefill(batch.query, batch.cache, work=prefill_items, num_multiprocessors=2, **common)
    assert out.device.type == DEVICE.type
    return out
