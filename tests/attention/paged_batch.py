"""A random batch of rows over a paged cache in which every slot that no row owns holds NaN."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphllm.attention.backend import AttentionBucket, AttentionInputs, GroupInputs
from graphllm.cache.kv_cache import LayerKV


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """`query`, `key`, `value` are the step's own tokens; the cache holds the earlier ones."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cache: LayerKV
    inputs: AttentionInputs
    bucket: AttentionBucket
    contexts: list[tuple[torch.Tensor, torch.Tensor]]  # each row's keys and values, in order

    def write(self) -> None:
        """Put the step's keys and values into the cache, as the specification expects them."""
        for token, slot in enumerate(self.inputs.groups[0].slot_mapping.tolist()):
            block, offset = divmod(slot, self.cache.key.shape[1])
            self.cache.key[block, offset] = self.key[token]
            self.cache.value[block, offset] = self.value[token]


def paged_batch(
    rows: list[tuple[int, int]],
    *,
    num_heads: int = 6,
    num_kv_heads: int = 2,
    head_dim: int = 10,
    block_size: int = 4,
    num_decode_rows: int = 0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PagedBatch:
    """rows: (query_len, context_len) each."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    max_blocks = max(-(-context // block_size) for _, context in rows)
    num_blocks = 1 + 2 * len(rows) * max_blocks
    order = 1 + torch.randperm(num_blocks - 1, generator=generator)
    num_slots = len(rows) + 3
    row_slots = torch.randperm(num_slots, generator=generator)[: len(rows)]
    block_tables = torch.zeros(num_slots, max_blocks, dtype=torch.int32)
    block_tables[row_slots] = order[: len(rows) * max_blocks].view(len(rows), max_blocks).int()
    size = (num_blocks, block_size, num_kv_heads, head_dim)
    cache = LayerKV(torch.full(size, torch.nan, dtype=dtype), torch.full(size, torch.nan, dtype=dtype))
    contexts, keys, values, positions, slots = [], [], [], [], []
    for row, (query_len, context_len) in enumerate(rows):
        key, value = draw(context_len, num_kv_heads, head_dim), draw(context_len, num_kv_heads, head_dim)
        contexts.append((key, value))
        table = block_tables[row_slots[row]]
        for position in range(context_len):
            block, offset = int(table[position // block_size]), position % block_size
            if position < context_len - query_len:
                cache.key[block, offset], cache.value[block, offset] = key[position], value[position]
            else:
                positions.append(position)
                slots.append(block * block_size + offset)
        keys.append(key[context_len - query_len :])
        values.append(value[context_len - query_len :])
    query_lens = torch.tensor([query_len for query_len, _ in rows])
    inputs = AttentionInputs(
        row_slots=row_slots,
        query_lens=query_lens,
        context_lens=torch.tensor([context_len for _, context_len in rows]),
        query_starts=torch.cat((torch.zeros(1, dtype=torch.int64), query_lens.cumsum(0))),
        positions=torch.tensor(positions),
        groups=(GroupInputs(slot_mapping=torch.tensor(slots), block_tables=block_tables),),
    )
    return PagedBatch(
        query=draw(len(positions), num_heads, head_dim),
        key=torch.cat(keys),
        value=torch.cat(values),
        cache=cache,
        inputs=inputs,
        bucket=AttentionBucket(len(positions), len(rows), num_decode_rows),
        contexts=contexts,
    )
