from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from graphllm.cache.kv_cache import LayerKV
from graphllm.kernels.paged_attention import paged_attention_ref
from tests.attention.paged_batch import PagedBatch, paged_batch
from tests.kernels.attention_batch import Attention, assert_attended, attention_batch, draw_sinks

SCALE = 0.7
# (query_len, context_len): one token, around a block of 4, cached prefixes, decode rows first.
MIXED = [(1, 1), (1, 3), (1, 4), (1, 5), (1, 9), (1, 1), (3, 3), (4, 4), (5, 5), (2, 9), (4, 8), (5, 12)]


def naive(
    batch: PagedBatch,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: list[float] | None = None,
) -> torch.Tensor:
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
                if softcap is not None:
                    scores = [softcap * math.tanh(score / softcap) for score in scores]
                weights = [math.exp(score) for score in scores]
                total = sum(weights) + (0.0 if sinks is None else math.exp(sinks[head]))
                for i, weight in enumerate(weights, first):
                    output[token, head] += weight / total * values[i, kv_head].double()
            token += 1
    return output


def run_reference(
    batch: PagedBatch,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: list[float] | None = None,
) -> torch.Tensor:
    batch.write()
    return paged_attention_ref(
        batch.query,
        batch.cache.key,
        batch.cache.value,
        block_tables=batch.inputs.groups[0].block_tables,
        row_slots=batch.inputs.row_slots,
        query_lens=batch.inputs.query_lens,
        context_lens=batch.inputs.context_lens,
        scale=SCALE,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=None if sinks is None else torch.tensor(sinks),
        key_scale=batch.cache.key_scale,
        value_scale=batch.cache.value_scale,
    )


@pytest.mark.parametrize("sliding_window", [None, 1, 3, 100])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (4, 4), (6, 2), (8, 1)])
def test_mixed_batch_equals_attention_in_python_floats(
    num_heads: int, num_kv_heads: int, sliding_window: int | None
) -> None:
    batch = paged_batch(MIXED, num_heads=num_heads, num_kv_heads=num_kv_heads)
    output = run_reference(batch, sliding_window=sliding_window)
    assert torch.allclose(output.double(), naive(batch, sliding_window=sliding_window), atol=1e-5)


@pytest.mark.parametrize("sinks", [None, [-1.0, 0.0, 0.5, 1.0, 3.0, -9.0]])
@pytest.mark.parametrize("softcap", [None, 0.5, 20.0])
def test_soft_cap_and_sinks_equal_attention_in_python_floats(
    softcap: float | None, sinks: list[float] | None
) -> None:
    batch = paged_batch(MIXED)
    output = run_reference(batch, softcap=softcap, sinks=sinks)
    assert torch.allclose(output.double(), naive(batch, softcap=softcap, sinks=sinks), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_cache_of_8_bits_means_what_it_stores_times_its_scale(dtype: torch.dtype) -> None:
    """Small integers and scales that are powers of two: nothing is rounded on the way."""
    batch = paged_batch(MIXED)
    generator = torch.Generator().manual_seed(1)
    scales = []
    for cache in (batch.cache.key, batch.cache.value):
        is_used = cache.isfinite().all(-1)
        cache.copy_(torch.randint(-4, 5, cache.shape, generator=generator))
        scale = 2.0 ** torch.randint(-3, 1, cache.shape[:3], generator=generator)
        scales.append(scale.where(is_used, torch.nan))
    for token, slot in enumerate(batch.inputs.groups[0].slot_mapping.tolist()):
        block, offset = divmod(slot, batch.cache.key.shape[1])
        for own, cache, scale in zip(
            (batch.key, batch.value), (batch.cache.key, batch.cache.value), scales, strict=True
        ):
            scale[block, offset] = 0.5
            own[token] = cache[block, offset]
    stored = dataclasses.replace(
        batch,
        cache=LayerKV(batch.cache.key.to(dtype), batch.cache.value.to(dtype), *scales),
    )
    meant = dataclasses.replace(
        batch,
        key=batch.key * 0.5,
        value=batch.value * 0.5,
        cache=LayerKV(batch.cache.key * scales[0][..., None], batch.cache.value * scales[1][..., None]),
    )
    assert torch.equal(run_reference(stored), run_reference(meant))


def test_rows_and_tokens_of_padding_leave_zeros() -> None:
    batch = paged_batch([(1, 3), (2, 9)])
    inputs = batch.inputs
    nothing = torch.zeros(2, dtype=torch.int64)
    padded = dataclasses.replace(
        batch,
        query=torch.cat((batch.query, torch.ones(3, *batch.query.shape[1:]))),
        inputs=dataclasses.replace(
            inputs,
            row_slots=torch.cat((inputs.row_slots, nothing)),
            query_lens=torch.cat((inputs.query_lens, nothing)),
            context_lens=torch.cat((inputs.context_lens, nothing)),
        ),
    )
    output = run_reference(padded)
    assert torch.equal(output[:3], run_reference(batch))
    assert (output[3:] == 0).all()


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


@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
@pytest.mark.parametrize("sliding_window", [None, 70])
def test_rows_shared_out_among_programs_are_attended_alike(
    sliding_window: int | None, cache_dtype: torch.dtype | None
) -> None:
    """The references of the work lists, of split decoding, of the combination and of prefill, as one."""
    rows = [(1, 400), (1, 1), (40, 150), (1, 90), (5, 5), (0, 0)]
    attention = Attention(
        attention_batch(rows, cache_dtype=cache_dtype),
        num_programs=4,
        sliding_window=sliding_window,
        softcap=3.0,
        sinks=draw_sinks(8),
    )
    assert_attended(attention.run(), attention.expected())
