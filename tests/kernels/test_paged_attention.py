from __future__ import annotations

import math

import pytest
import torch

from graphllm.kernels.paged_attention import paged_attention_ref
from tests.attention.paged_batch import PagedBatch, paged_batch

SCALE = 0.7
# (query_len, context_len): one token, around a block of 4, cached prefixes, decode rows first.
MIXED = [(1, 1), (1, 3), (1, 4), (1, 5), (1, 9), (1, 1), (3, 3), (4, 4), (5, 5), (2, 9), (4, 8), (5, 12)]


def naive(batch: PagedBatch, *, sliding_window: int | None = None) -> torch.Tensor:
    """Attention in Python floats over each row's own keys and values, without pages or batches."""
    output, token = torch.zeros(batch.query.shape, dtype=torch.float64), 0
    num_heads, num_kv_heads = batch.query.shape[1], batch.key.shape[1]
    for (keys, values), query_len in zip(batch.contexts, batch.inputs.query_lens.tolist(), strict=True):
        for position in range(len(keys) - query_len, len(keys)):
            first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            for head in range(num_heads):
                kv_head = head // (num_heads // num_kv_heads)
                query = batch.query[token, head].double()
                scores = [
                    SCALE * float(query @ keys[i, kv_head].double()) for i in range(first, position + 1)
                ]
                weights = [math.exp(score - max(scores)) for score in scores]
                for i, weight in enumerate(weights, first):
                    output[token, head] += weight / sum(weights) * values[i, kv_head].double()
            token += 1
    return output


def run_reference(batch: PagedBatch, *, sliding_window: int | None = None) -> torch.Tensor:
    batch.write()
    return paged_attention_ref(
        batch.query,
        batch.cache.key,
        batch.cache.value,
        block_tables=batch.inputs.block_tables,
        row_slots=batch.inputs.row_slots,
        query_lens=batch.inputs.query_lens,
        context_lens=batch.inputs.context_lens,
        scale=SCALE,
        sliding_window=sliding_window,
    )


@pytest.mark.parametrize("sliding_window", [None, 1, 3, 100])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (4, 4), (6, 2), (8, 1)])
def test_mixed_batch_equals_attention_in_python_floats(
    num_heads: int, num_kv_heads: int, sliding_window: int | None
) -> None:
    batch = paged_batch(MIXED, num_heads=num_heads, num_kv_heads=num_kv_heads)
    output = run_reference(batch, sliding_window=sliding_window)
    assert torch.allclose(output.double(), naive(batch, sliding_window=sliding_window), atol=1e-5)


@pytest.mark.parametrize("block_size", [1, 2, 16])
def test_block_size_does_not_matter(block_size: int) -> None:
    batch = paged_batch(MIXED, block_size=block_size)
    assert torch.allclose(run_reference(batch).double(), naive(batch), atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_low_precision_rounds_only_the_result(dtype: torch.dtype, tolerance: float) -> None:
    batch = paged_batch(MIXED, dtype=dtype)
    output = run_reference(batch)
    expected = naive(batch)
    assert output.dtype == dtype
    assert (output.double() - expected).abs().max() <= tolerance * expected.abs().max()
