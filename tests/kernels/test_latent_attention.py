"""Attention over latents: the specification against spelled-out heads, and what is held to it on a CPU."""

from __future__ import annotations

import pytest
import torch

from graphllm.kernels import paged_latent_attention as file_under_test
from graphllm.kernels.gather_kv import gather_scratch_bytes
from graphllm.kernels.paged_attention import paged_attention_ref
from graphllm.kernels.paged_latent_attention import gathered_latent_attention
from tests.kernels.attention_batch import SCALE, assert_attended
from tests.kernels.latent_batch import LatentBatch, attend, latent_batch

MIXED = [(1, 150), (1, 1), (0, 0), (5, 37), (2, 2)]
KV_DTYPES = [None, torch.int8, torch.float8_e5m2, torch.float8_e4m3fn]


@pytest.mark.parametrize("cache_dtype", KV_DTYPES)
def test_it_is_attention_with_one_key_head_whose_values_are_the_keys_first_dimensions(
    cache_dtype: torch.dtype | None,
) -> None:
    batch = latent_batch(MIXED, cache_dtype=cache_dtype)
    cache = batch.cache[:, :, None]
    scale = None if batch.cache_scale is None else batch.cache_scale[:, :, None]
    whole = paged_attention_ref(
        batch.query,
        cache,
        cache,
        block_tables=batch.block_tables,
        row_slots=batch.row_slots,
        query_lens=batch.query_lens,
        context_lens=batch.context_lens,
        scale=SCALE,
        key_scale=scale,
        value_scale=scale,
    )
    assert_attended(batch.expected(), whole[..., : batch.rank])


@pytest.mark.parametrize("cache_dtype", KV_DTYPES)
def test_references_of_the_launchers_equal_the_specification(cache_dtype: torch.dtype | None) -> None:
    batch = latent_batch(MIXED, num_heads=20, cache_dtype=cache_dtype)
    assert_attended(attend(batch), batch.expected())


def gathered(batch: LatentBatch, rows: list[int], *, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The batch's rows, all of one query length, in one call."""
    block_size, query_len = batch.cache.shape[1], int(batch.query_lens[rows[0]])
    longest = int(batch.context_lens[rows].max())
    positions = torch.arange(longest)
    positions = positions.where(positions < batch.context_lens[rows][:, None], 0)
    blocks = batch.block_tables[batch.row_slots[rows]].gather(1, positions // block_size)
    slots = (blocks * block_size + positions % block_size).view(-1)
    width, num_heads = batch.cache.shape[2], batch.query.shape[1]
    tokens = torch.cat([batch.query_starts[row] + torch.arange(query_len) for row in rows])
    is_scaled = batch.cache_scale is not None
    return gathered_latent_attention(
        batch.query[tokens].view(len(rows), query_len, num_heads, width),
        batch.cache,
        slots=slots,
        mask=mask,
        scale=SCALE,
        scratch=torch.empty(len(slots), width),
        cache_scale=batch.cache_scale,
        gather_scratch=torch.empty(gather_scratch_bytes(len(slots), 1, width), dtype=torch.uint8)
        if is_scaled
        else None,
        out=torch.empty(len(rows), query_len, num_heads, batch.rank),
    ).flatten(0, 1)


@pytest.mark.parametrize("cache_dtype", KV_DTYPES)
def test_decode_rows_of_one_call_equal_the_specification(cache_dtype: torch.dtype | None) -> None:
    batch = latent_batch([(1, 40), (1, 33), (1, 40)], cache_dtype=cache_dtype)
    hidden = torch.arange(40) >= batch.context_lens[:, None]
    mask = torch.zeros(3, 1, 1, 40).masked_fill_(hidden[:, None, None], -torch.inf)
    assert_attended(gathered(batch, [0, 1, 2], mask=mask), batch.expected())
    assert_attended(gathered(batch, [0, 2]), batch.expected()[[0, 2]])


@pytest.mark.parametrize("max_scores", [1, 500, 10**6])
@pytest.mark.parametrize("row", [(7, 7), (5, 37)])
def test_prompts_equal_the_specification_however_they_are_cut(
    row: tuple[int, int], max_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_under_test, "_MAX_SCORES", max_scores)
    batch = latent_batch([row])
    assert_attended(gathered(batch, [0]), batch.expected())
