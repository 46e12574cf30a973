"""Random rows over a paged cache, in the formats that the attention kernels know, and how to attend them.

Every cache slot that no row owns holds NaN (in 8 bits: in its scale), the queries are the first heads of a
wider tensor, as a merged product leaves them, and outputs begin as NaN.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
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
from graphllm.kernels.paged_attention import paged_attention_ref
from graphllm.kernels.paged_decode_attention import (
    DecodePartials,
    combine_decode_partials,
    paged_decode_attention,
)
from graphllm.kernels.paged_prefill_attention import (
    paged_prefill_attention,
    prefill_config,
    queries_per_item,
)
from tests.kernels.device import DEVICE

MAX_NUM_ROWS = 16
SCALE = 0.2
LARGEST_STORED = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}
# Two units in the last place, of the largest value that there is.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


@dataclass(slots=True)
class AttentionBatch:
    """A step's tensors, named as in the kernels."""

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    key_scale: torch.Tensor | None
    value_scale: torch.Tensor | None
    block_tables: torch.Tensor
    row_slots: torch.Tensor
    query_lens: torch.Tensor
    context_lens: torch.Tensor
    query_starts: torch.Tensor


def attention_batch(
    rows: Sequence[tuple[int, int]],
    *,
    group: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    num_padding_tokens: int = 0,
    seed: int = 0,
) -> AttentionBatch:
    """rows: (query_len, context_len) each, (0, 0) for padding; cache_dtype None: that of the queries."""
    generator = torch.Generator().manual_seed(seed)
    max_blocks = max(1, *(-(-context_len // block_size) for _, context_len in rows))
    num_blocks = 1 + (len(rows) + 2) * max_blocks
    blocks = 1 + torch.randperm(num_blocks - 1, generator=generator)
    row_slots = torch.randperm(len(rows) + 3, generator=generator)[: len(rows)]
    block_tables = torch.zeros(len(rows) + 3, max_blocks, dtype=torch.int32)
    caches = []
    for _ in range(2):
        cache = torch.full((num_blocks, block_size, num_kv_heads, head_dim), torch.nan)
        for row, (_, context_len) in enumerate(rows):
            table = blocks[row * max_blocks : (row + 1) * max_blocks]
            block_tables[row_slots[row]] = table.int()
            positions = torch.arange(context_len)
            drawn = torch.randn(context_len, num_kv_heads, head_dim, generator=generator)
            cache[table[positions // block_size], positions % block_size] = drawn
        caches.append(_stored(cache, cache_dtype or dtype))
    (key_cache, key_scale), (value_cache, value_scale) = caches
    query_lens = torch.tensor([query_len for query_len, _ in rows])
    num_tokens = int(query_lens.sum()) + num_padding_tokens
    num_heads = group * num_kv_heads
    merged = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, generator=generator)
    return AttentionBatch(
        query=merged.to(dtype).to(DEVICE)[:, :num_heads],
        key_cache=key_cache.to(DEVICE),
        value_cache=value_cache.to(DEVICE),
        key_scale=None if key_scale is None else key_scale.to(DEVICE),
        value_scale=None if value_scale is None else value_scale.to(DEVICE),
        block_tables=block_tables.to(DEVICE),
        row_slots=row_slots.to(DEVICE),
        query_lens=query_lens.to(DEVICE),
        context_lens=torch.tensor([context_len for _, context_len in rows]).to(DEVICE),
        query_starts=torch.cat((torch.zeros(1, dtype=torch.int64), query_lens.cumsum(0))).to(DEVICE),
    )


def _stored(meant: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A cache as it is stored, and its scales where it is stored in 8 bits."""
    if dtype not in LARGEST_STORED:
        return meant.to(dtype), None
    scale = meant.abs().amax(-1) / LARGEST_STORED[dtype]
    stored = meant / scale[..., None]
    return (stored.round().nan_to_num(99) if dtype == torch.int8 else stored).to(dtype), scale


@dataclass
class Attention:
    """The kernels over one batch's tensors, with all that they write; `run` may be called again and again."""

    batch: AttentionBatch
    num_programs: int = 3
    sliding_window: int | None = None
    softcap: float | None = None
    is_causal: bool = True
    sinks: torch.Tensor | None = None
    slopes: torch.Tensor | None = None

    def __post_init__(self) -> None:
        batch = self.batch
        num_tokens, num_heads, head_dim = batch.query.shape
        num_rows, num_kv_heads = len(batch.query_lens), batch.key_cache.shape[2]
        self.num_entries = self.num_programs + num_rows
        self.decode_work = DecodeWorkList(
            entries=integers(self.num_entries, 8),
            cuts=integers(min(num_rows, self.num_programs - 1), 4),
            num_programs=self.num_programs,
        )
        config = prefill_config(head_dim, batch.query.element_size(), batch.key_cache.element_size())
        query_tile = queries_per_item(num_heads, num_kv_heads, config)
        max_items = max_prefill_items(num_tokens, num_rows, query_tile)
        self.prefill_work = PrefillWorkList(integers(max_items, ITEM_FIELDS), integers(1), query_tile)
        self.partials = DecodePartials(
            nans(self.num_entries, num_heads, head_dim), nans(self.num_entries, num_heads, 2)
        )
        self.out = nans(*batch.query.shape, dtype=batch.query.dtype)

    def run(self, *, decode: bool = True, prefill: bool = True) -> torch.Tensor:
        """out: [num_tokens, num_heads, head_dim]; NaN where no kernel wrote."""
        batch, out = self.batch, self.out
        rows: dict[str, Any] = {"query_starts": batch.query_starts, "row_slots": batch.row_slots}
        common: dict[str, Any] = {
            "block_tables": batch.block_tables,
            "scale": SCALE,
            "softcap": self.softcap,
            "sinks": self.sinks,
            "slopes": self.slopes,
            "key_scale": batch.key_scale,
            "value_scale": batch.value_scale,
            "out": out,
        }
        lens, caches = (batch.query_lens, batch.context_lens), (batch.key_cache, batch.value_cache)
        out.fill_(torch.nan)
        if decode:
            work = decode_work_list(
                *lens,
                **rows,
                sliding_window=self.sliding_window,
                max_num_rows=MAX_NUM_ROWS,
                out=self.decode_work,
            )
            paged_decode_attention(batch.query, *caches, work=work, partials=self.partials, **common)
            combine_decode_partials(self.partials, work, sinks=self.sinks, out=out)
        if prefill:
            paged_prefill_attention(
                batch.query,
                *caches,
                work=prefill_work_list(*lens, **rows, max_num_rows=MAX_NUM_ROWS, out=self.prefill_work),
                num_multiprocessors=2,
                sliding_window=self.sliding_window,
                is_causal=self.is_causal,
                **common,
            )
        return out

    def expected(self) -> torch.Tensor:
        batch = self.batch
        return paged_attention_ref(
            batch.query,
            batch.key_cache,
            batch.value_cache,
            block_tables=batch.block_tables,
            row_slots=batch.row_slots,
            query_lens=batch.query_lens,
            context_lens=batch.context_lens,
            scale=SCALE,
            sliding_window=self.sliding_window,
            softcap=self.softcap,
            is_causal=self.is_causal,
            sinks=self.sinks,
            slopes=self.slopes,
            key_scale=batch.key_scale,
            value_scale=batch.value_scale,
        )


def integers(*size: int) -> torch.Tensor:
    """Memory for a list that no kernel has written yet."""
    return torch.full(size, -7, dtype=torch.int32, device=DEVICE)


def nans(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(size, torch.nan, dtype=dtype, device=DEVICE)


def draw_sinks(num_heads: int) -> torch.Tensor:
    """Around the largest scores, so that they weigh."""
    return (2 * torch.randn(num_heads, generator=torch.Generator().manual_seed(1)) + 2).to(DEVICE)


def beside(kind: str | None, num_heads: int) -> dict[str, torch.Tensor]:
    """What may take part in the scores beside queries and keys: ALiBi's slopes, or sinks, or nothing."""
    if kind is None:
        return {}
    slopes = torch.exp2(-8.0 * torch.arange(1, num_heads + 1) / num_heads).to(DEVICE)
    return {kind: slopes if kind == "slopes" else draw_sinks(num_heads)}


def assert_attended(actual: torch.Tensor, expected: torch.Tensor) -> None:
    difference = (actual.float() - expected.float()).abs().max()
    assert difference <= TOLERANCE[expected.dtype] * expected.float().abs().max(), difference


def pairwise(axes: Mapping[str, Sequence[Any]], *, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Few cases in which any two values of any two axes occur together at least once.

    Greedy: each case begins with a pair that is still missing, and of some completions at random the one
    that has most of the missing pairs is taken.
    """
    chance = random.Random(seed)
    missing = {
        frozenset(((first, one), (second, other)))
        for first, second in combinations(axes, 2)
        for one, other in product(range(len(axes[first])), range(len(axes[second])))
    }
    while missing:
        wanted = dict(sorted(min(missing, key=sorted)))
        best: dict[str, int] = {}
        found: set[frozenset[tuple[str, int]]] = set()
        for _ in range(60):
            case = {name: chance.randrange(len(values)) for name, values in axes.items()} | wanted
            pairs = {frozenset(pair) for pair in combinations(case.items(), 2)} & missing
            if len(pairs) > len(found):
                best, found = case, pairs
        missing -= found
        yield {name: axes[name][index] for name, index in best.items()}
