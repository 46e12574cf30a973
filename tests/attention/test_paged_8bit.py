"""Attention on the CPU over a cache in 8 bits: what the specification says, at the speed of the plain way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from graphllm.attention import paged
from graphllm.attention.backend import AttentionSpec
from graphllm.attention.paged import PagedAttention
from graphllm.cache.kv_cache import LayerKV
from graphllm.kernels.kv_quantization import LARGEST_STORED, quantize_kv_ref
from graphllm.kernels.paged_attention import paged_attention_ref
from tests.attention.paged_batch import PagedBatch, paged_batch

DECODES = [(1, 1), (1, 3), (1, 17), (1, 5)]
PREFILLS = [(3, 3), (2, 9), (5, 21)]


def quantized(batch: PagedBatch, dtype: torch.dtype) -> PagedBatch:
    """The batch with its step written and its cache in 8 bits; slots that no row owns have scales of NaN."""
    batch.write()
    pools = {}
    for name in ("key", "value"):
        wide = getattr(batch.cache, name)
        is_owned = ~wide.isnan().any(dim=-1)
        stored, scale = quantize_kv_ref(wide.nan_to_num(1.0), dtype)
        pools |= {name: stored, f"{name}_scale": scale.where(is_owned, torch.nan)}
    return replace(batch, cache=LayerKV(**pools))


def attended(batch: PagedBatch, *, sliding_window: int | None = None) -> torch.Tensor:
    backend = PagedAttention(block_size=batch.cache.key.shape[1])
    _, num_heads, head_dim = batch.query.shape
    spec = AttentionSpec(num_heads, batch.key.shape[1], head_dim, scale=0.4, sliding_window=sliding_window)
    metadata = backend.plan(batch.inputs, batch.bucket)
    backend.begin_step(metadata)
    out = torch.full_like(batch.query, torch.nan)
    backend.forward(batch.query, layer_cache=batch.cache, spec=spec, metadata=metadata, out=out)
    return out


def specified(batch: PagedBatch, *, sliding_window: int | None = None) -> torch.Tensor:
    return paged_attention_ref(
        batch.query,
        batch.cache.key,
        batch.cache.value,
        block_tables=batch.inputs.groups[0].block_tables,
        row_slots=batch.inputs.row_slots,
        query_lens=batch.inputs.query_lens,
        context_lens=batch.inputs.context_lens,
        scale=0.4,
        sliding_window=sliding_window,
        key_scale=batch.cache.key_scale,
        value_scale=batch.cache.value_scale,
    )


@pytest.mark.parametrize("sliding_window", [None, 4])
@pytest.mark.parametrize("dtype", LARGEST_STORED)
@pytest.mark.parametrize("rows", [DECODES, PREFILLS, DECODES + PREFILLS, [(7, 7)]])
def test_every_kind_of_batch_equals_the_specification(
    rows: list[tuple[int, int]], dtype: torch.dtype, sliding_window: int | None
) -> None:
    num_decode_rows = sum(query_len == 1 for query_len, _ in rows)
    batch = quantized(paged_batch(rows, num_decode_rows=num_decode_rows), dtype)
    expected = specified(batch, sliding_window=sliding_window)
    torch.testing.assert_close(attended(batch, sliding_window=sliding_window), expected, rtol=1e-5, atol=1e-5)


def test_each_token_and_head_is_read_with_its_own_scale() -> None:
    batch = quantized(paged_batch(DECODES, num_decode_rows=len(DECODES)), torch.int8)
    plain = attended(batch)
    scale = batch.cache.value_scale
    assert scale is not None
    # Slot 0 of the first row's first block: its only token.
    block = int(batch.inputs.groups[0].block_tables[batch.inputs.row_slots[0], 0])
    scale[block, 0, 1] *= 3
    changed = attended(batch)
    heads_of_group = slice(3, 6)
    assert torch.allclose(changed[0, heads_of_group], 3 * plain[0, heads_of_group])
    assert torch.equal(changed[0, :3], plain[0, :3])
    assert torch.equal(changed[1:], plain[1:])


def test_bfloat16_queries_read_a_cache_in_8_bits() -> None:
    batch = quantized(paged_batch(DECODES, num_decode_rows=len(DECODES), dtype=torch.bfloat16), torch.int8)
    output, expected = attended(batch), specified(batch)
    assert output.dtype == torch.bfloat16
    assert (output - expected).abs().max() <= 2e-2 * expected.abs().max()


def test_8_bits_are_not_attended_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the reference is for what torch's attention cannot express")

    monkeypatch.setattr(paged, "paged_attention_ref", refuse)
    attended(quantized(paged_batch(DECODES, num_decode_rows=len(DECODES)), torch.float8_e4m3fn))
