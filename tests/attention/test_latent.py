"""Both backends over a cache of latents: the CPU's here, our kernels in a process that runs them."""

from __future__ import annotations

import pytest
import torch

from graphllm.arena import Arena
from graphllm.attention.backend import (
    AttentionBackend,
    AttentionBucket,
    AttentionInputs,
    GroupInputs,
    LatentAttentionSpec,
)
from graphllm.attention.paged import PagedAttention
from graphllm.attention.triton_paged import TritonPagedAttention
from graphllm.cache.kv_cache import LayerLatents
from tests.kernels.attention_batch import SCALE, assert_attended, nans
from tests.kernels.device import DEVICE
from tests.kernels.latent_batch import LatentBatch, latent_batch

MIXED = [(1, 230), (1, 9), (33, 100), (4, 4)]
DECODES = [(1, 230), (1, 9), (1, 100)]


def make_triton(arena: Arena) -> TritonPagedAttention:
    return TritonPagedAttention(
        block_size=16, arena=arena, max_num_rows=8, max_model_len=256, num_multiprocessors=2
    )


def attend(backend: AttentionBackend, batch: LatentBatch, *, num_decode_rows: int) -> torch.Tensor:
    nothing = torch.zeros(len(batch.query), dtype=torch.int64, device=DEVICE)
    inputs = AttentionInputs(
        row_slots=batch.row_slots,
        query_lens=batch.query_lens,
        context_lens=batch.context_lens,
        query_starts=batch.query_starts,
        positions=nothing,
        groups=(
            GroupInputs(
                slot_mapping=nothing,
                block_tables=batch.block_tables,
            ),
        ),
    )
    bucket = AttentionBucket(len(batch.query), len(batch.query_lens), num_decode_rows)
    metadata = backend.plan(inputs, bucket)
    backend.begin_step(metadata)
    num_tokens, num_heads, width = batch.query.shape
    out = nans(num_tokens, num_heads, batch.rank, dtype=batch.query.dtype)
    spec = LatentAttentionSpec(
        num_heads=num_heads, rank=batch.rank, turned_dim=width - batch.rank, scale=SCALE
    )
    cache = LayerLatents(batch.cache, batch.cache_scale)
    backend.forward_latent(batch.query, layer_cache=cache, spec=spec, metadata=metadata, out=out)
    return out


@pytest.mark.parametrize("cache_dtype", [None, torch.int8, torch.float8_e4m3fn])
def test_rows_of_all_kinds_equal_the_specification_on_a_cpu(cache_dtype: torch.dtype | None) -> None:
    # Contexts too different for one call, in an order that is not theirs: several groups of rows.
    batch = latent_batch([(1, 9), (1, 600), (1, 30), (1, 580), (5, 37), (3, 3)], cache_dtype=cache_dtype)
    out = attend(PagedAttention(block_size=16), batch, num_decode_rows=4)
    assert_attended(out, batch.expected())


def test_decode_rows_alone_equal_the_specification_on_a_cpu() -> None:
    batch = latent_batch(DECODES, num_heads=16)
    out = attend(PagedAttention(block_size=16), batch, num_decode_rows=3)
    assert_attended(out, batch.expected())


@pytest.mark.triton
@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
def test_a_mixed_step_equals_the_specification(cache_dtype: torch.dtype | None) -> None:
    rows = [*MIXED, (0, 0)]
    batch = latent_batch(rows, num_heads=20, dtype=torch.bfloat16, cache_dtype=cache_dtype)
    assert_attended(attend(make_triton(Arena(DEVICE)), batch, num_decode_rows=0), batch.expected())


@pytest.mark.triton
def test_a_decode_bucket_launches_no_prefill() -> None:
    """Shown by a row that only the prefill kernel would take."""
    batch = latent_batch([(1, 20), (2, 9)])
    is_written = ~attend(make_triton(Arena(DEVICE)), batch, num_decode_rows=2).isnan()
    assert is_written[0].all() and not is_written[1:].any()


@pytest.mark.triton
def test_smaller_steps_need_no_memory_but_that_of_the_largest() -> None:
    arena = Arena(DEVICE)
    backend = make_triton(arena)
    attend(backend, latent_batch([(1, 230), (1, 9), (60, 100), *[(0, 0)] * 5]), num_decode_rows=0)
    arena.seal()
    for rows, num_decode_rows in ((MIXED, 0), (DECODES, 3), ([(1, 256)], 1), ([(3, 70)], 0)):
        batch = latent_batch(rows)
        assert_attended(attend(backend, batch, num_decode_rows=num_decode_rows), batch.expected())


@pytest.mark.triton
def test_a_cache_of_another_block_size_is_refused() -> None:
    with pytest.raises(AssertionError, match="block size"):
        attend(make_triton(Arena(DEVICE)), latent_batch(DECODES, block_size=64), num_decode_rows=3)
