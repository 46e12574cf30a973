from __future__ import annotations

import pytest
import torch

from graphllm.attention.backend import AttentionSpec, CaptureSupport
from graphllm.attention.paged import PagedAttention
from graphllm.kernels.paged_attention import paged_attention_ref
from tests.attention.paged_batch import PagedBatch, paged_batch

SCALE = 0.4
DECODES = [(1, 1), (1, 3), (1, 4), (1, 5), (1, 17)]
PREFILLS = [(1, 1), (3, 3), (4, 4), (5, 5), (1, 6), (2, 9), (4, 8), (5, 21)]


def run_backend(
    batch: PagedBatch, *, sliding_window: int | None = None, backend: PagedAttention | None = None
) -> torch.Tensor:
    backend = backend or PagedAttention(block_size=batch.cache.key.shape[1])
    spec = AttentionSpec(
        num_heads=batch.query.shape[1],
        num_kv_heads=batch.key.shape[1],
        head_dim=batch.query.shape[2],
        scale=SCALE,
        sliding_window=sliding_window,
    )
    metadata = backend.plan(batch.inputs, batch.bucket)
    backend.begin_step(metadata)
    batch.write()
    out = torch.full_like(batch.query, torch.nan)
    backend.forward(batch.query, layer_cache=batch.cache, spec=spec, metadata=metadata, out=out)
    return out


def run_reference(batch: PagedBatch, *, sliding_window: int | None = None) -> torch.Tensor:
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
    )


@pytest.mark.parametrize("sliding_window", [None, 1, 4, 500])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize(
    ("decodes", "prefills"), [(DECODES, []), ([], PREFILLS), (DECODES, PREFILLS), (DECODES[-1:], [])]
)
def test_every_kind_of_batch_equals_the_reference(
    decodes: list[tuple[int, int]],
    prefills: list[tuple[int, int]],
    num_heads: int,
    num_kv_heads: int,
    sliding_window: int | None,
) -> None:
    batch = paged_batch(
        decodes + prefills,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        num_decode_rows=len(decodes),
    )
    output = run_backend(batch, sliding_window=sliding_window)
    assert output.shape == batch.query.shape
    assert torch.allclose(output, run_reference(batch, sliding_window=sliding_window), atol=1e-5)


def test_very_ragged_decode_rows_in_any_order_equal_the_reference() -> None:
    lengths = [900, 3, 901, 50, 1, 899, 400, 2, 410, 5]
    batch = paged_batch([(1, length) for length in lengths], num_decode_rows=10, block_size=16)
    assert torch.allclose(run_backend(batch), run_reference(batch), atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_low_precision_is_close_to_the_reference(dtype: torch.dtype, tolerance: float) -> None:
    batch = paged_batch(DECODES + PREFILLS, num_decode_rows=len(DECODES), dtype=dtype)
    output, expected = run_backend(batch), run_reference(batch)
    assert output.dtype == dtype
    assert (output - expected).abs().max() <= tolerance * expected.abs().max()


def test_a_cache_may_be_coarser_than_the_queries() -> None:
    batch = paged_batch(DECODES, num_decode_rows=len(DECODES), dtype=torch.bfloat16)
    wide = PagedBatch(
        query=batch.query.float(),
        key=batch.key.float(),
        value=batch.value.float(),
        cache=batch.cache,
        inputs=batch.inputs,
        bucket=batch.bucket,
        contexts=batch.contexts,
    )
    output = run_backend(wide)
    assert output.dtype == torch.float32
    assert torch.allclose(output, run_reference(wide), atol=1e-5)


def test_scratch_memory_is_safe_to_use_again_by_smaller_and_larger_steps() -> None:
    backend = PagedAttention(block_size=4)
    for seed, rows in enumerate((DECODES, [(1, 90)] * 3, DECODES[:2], DECODES)):
        batch = paged_batch(rows, num_decode_rows=len(rows), seed=seed)
        assert torch.allclose(run_backend(batch, backend=backend), run_reference(batch), atol=1e-5)


def test_the_prefix_that_an_earlier_step_wrote_is_attended() -> None:
    batch = paged_batch([(2, 9)])
    full = run_backend(batch)
    batch.cache.value[batch.inputs.groups[0].block_tables[batch.inputs.row_slots[0], 0].item()] += 10.0
    assert (run_backend(batch) - full).abs().max() > 0.5


def test_nothing_can_be_captured_on_a_cpu() -> None:
    assert PagedAttention(block_size=16).capture_support is CaptureSupport.NONE
