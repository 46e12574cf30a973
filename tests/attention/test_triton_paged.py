from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from graphllm.arena import Arena
from graphllm.attention.backend import (
    AttentionBucket,
    AttentionInputs,
    AttentionMetadata,
    AttentionSpec,
    CaptureSupport,
    GroupInputs,
)
from graphllm.attention.triton_paged import TritonPagedAttention
from graphllm.cache.kv_cache import LayerKV
from graphllm.kernels.paged_attention import paged_attention_ref
from tests.kernels.attention_batch import (
    SCALE,
    AttentionBatch,
    assert_attended,
    attention_batch,
    draw_sinks,
    nans,
)
from tests.kernels.device import DEVICE

pytestmark = pytest.mark.triton

FULL = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=64, scale=SCALE)
WINDOWED = AttentionSpec(
    num_heads=8, num_kv_heads=2, head_dim=64, scale=SCALE, sliding_window=70, softcap=4.0
)
MIXED = [(1, 230), (1, 9), (33, 100), (4, 4), (0, 0)]
DECODES = [(1, 230), (1, 9), (1, 100), (0, 0)]


@dataclass(slots=True)
class Step:
    """A backend in the middle of a step over one batch."""

    batch: AttentionBatch
    backend: TritonPagedAttention
    metadata: AttentionMetadata

    def attend(self, spec: AttentionSpec, sinks: torch.Tensor | None = None) -> torch.Tensor:
        batch = self.batch
        cache = LayerKV(batch.key_cache, batch.value_cache, batch.key_scale, batch.value_scale)
        out = nans(*batch.query.shape, dtype=batch.query.dtype)
        self.backend.forward(
            batch.query, layer_cache=cache, spec=spec, metadata=self.metadata, sinks=sinks, out=out
        )
        return out

    def expected(self, spec: AttentionSpec, sinks: torch.Tensor | None = None) -> torch.Tensor:
        batch = self.batch
        return paged_attention_ref(
            batch.query,
            batch.key_cache,
            batch.value_cache,
            block_tables=batch.block_tables,
            row_slots=batch.row_slots,
            query_lens=batch.query_lens,
            context_lens=batch.context_lens,
            scale=spec.scale,
            sliding_window=spec.sliding_window,
            softcap=spec.softcap,
            sinks=sinks,
            key_scale=batch.key_scale,
            value_scale=batch.value_scale,
        )


def make_backend(arena: Arena) -> TritonPagedAttention:
    return TritonPagedAttention(
        block_size=16, arena=arena, max_num_rows=8, max_model_len=256, num_multiprocessors=2
    )


def begin(backend: TritonPagedAttention, batch: AttentionBatch, *, is_decode: bool) -> Step:
    num_rows = len(batch.query_lens)
    nothing = torch.zeros(len(batch.query), dtype=torch.int64, device=DEVICE)
    inputs = AttentionInputs(
        row_slots=batch.row_slots,
        query_lens=batch.query_lens,
        context_lens=batch.context_lens,
        query_starts=batch.query_starts,
        positions=nothing,
        groups=(GroupInputs(slot_mapping=nothing, block_tables=batch.block_tables),),
    )
    bucket = AttentionBucket(len(batch.query), num_rows, num_rows if is_decode else 0)
    metadata = backend.plan(inputs, bucket)
    backend.begin_step(metadata)
    return Step(batch, backend, metadata)


@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
def test_mixed_step_of_layers_that_differ_equals_the_reference(cache_dtype: torch.dtype | None) -> None:
    batch = attention_batch(MIXED, dtype=torch.bfloat16, cache_dtype=cache_dtype, num_padding_tokens=3)
    step = begin(make_backend(Arena(DEVICE)), batch, is_decode=False)
    sinks = draw_sinks(8)
    for spec, sink in ((FULL, None), (WINDOWED, None), (FULL, sinks)):
        num_tokens = int(batch.query_starts[-1])
        assert_attended(step.attend(spec, sink)[:num_tokens], step.expected(spec, sink)[:num_tokens])


def test_decode_step_equals_the_reference() -> None:
    batch = attention_batch(DECODES, num_padding_tokens=1)
    step = begin(make_backend(Arena(DEVICE)), batch, is_decode=True)
    for spec in (FULL, WINDOWED):
        assert_attended(step.attend(spec)[:3], step.expected(spec)[:3])


def test_decode_bucket_launches_no_prefill() -> None:
    """Shown by a row that only the prefill kernel would take."""
    batch = attention_batch([(1, 20), (2, 9)])
    is_written = ~begin(make_backend(Arena(DEVICE)), batch, is_decode=True).attend(FULL).isnan()
    assert is_written[0].all() and not is_written[1:].any()


def test_layers_of_one_window_share_a_list() -> None:
    """Shown by lengths that change under the step: only a window that is new to it would notice."""
    batch = attention_batch(DECODES[:3])
    step = begin(make_backend(Arena(DEVICE)), batch, is_decode=True)
    before, expected = step.attend(FULL), step.expected(WINDOWED)
    batch.context_lens.sub_(1)
    assert torch.equal(step.attend(FULL), before)
    shorter = step.expected(WINDOWED)
    assert_attended(step.attend(WINDOWED), shorter)
    assert not torch.allclose(shorter, expected, atol=1e-3)


def test_next_step_has_lists_of_its_own() -> None:
    batch = attention_batch(DECODES[:3])
    step = begin(make_backend(Arena(DEVICE)), batch, is_decode=True)
    step.attend(FULL)
    batch.context_lens.sub_(1)
    step.backend.begin_step(step.metadata)
    assert_attended(step.attend(FULL), step.expected(FULL))


def test_smaller_steps_need_no_memory_but_that_of_the_largest() -> None:
    arena = Arena(DEVICE)
    backend = make_backend(arena)
    largest = attention_batch([(1, 230), (1, 9), (60, 100), (4, 4), (0, 0), (0, 0), (0, 0), (0, 0)])
    step = begin(backend, largest, is_decode=False)
    for spec in (FULL, WINDOWED):
        step.attend(spec)
    arena.seal()
    num_bytes = arena.num_bytes
    for rows, is_decode in ((MIXED, False), (DECODES, True), ([(1, 256)], True), ([(3, 70)], False)):
        smaller = begin(backend, attention_batch(rows), is_decode=is_decode)
        for spec in (FULL, WINDOWED):
            assert_attended(smaller.attend(spec), smaller.expected(spec))
    assert arena.num_bytes == num_bytes


def test_backend_may_be_captured_in_any_mixture() -> None:
    assert make_backend(Arena(DEVICE)).capture_support is CaptureSupport.MIXED


def test_cache_of_another_block_size_is_refused() -> None:
    step = begin(make_backend(Arena(DEVICE)), attention_batch(DECODES, block_size=64), is_decode=True)
    with pytest.raises(AssertionError, match="block size"):
        step.attend(FULL)
