from __future__ import annotations

import pytest
import torch

from graphllm.kernels.kv_cache_write import kv_cache_write

NUM_BLOCKS, BLOCK_SIZE, HEADS, HEAD_DIM = 5, 4, 3, 6


def empty_caches(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    size = (NUM_BLOCKS, BLOCK_SIZE, HEADS, HEAD_DIM)
    return torch.full(size, torch.nan, dtype=dtype), torch.full(size, torch.nan, dtype=dtype)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_land_in_their_slots_and_nowhere_else(cache_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    merged = torch.randn(7, 2 * HEADS, HEAD_DIM)  # key and value as strided views, as the layer has them
    key, value = merged[:, :HEADS], merged[:, HEADS:]
    slots = torch.tensor([19, 4, 5, 0, 12, 7, 11])
    key_cache, value_cache = empty_caches(cache_dtype)
    kv_cache_write(key, value, key_cache=key_cache, value_cache=value_cache, slot_mapping=slots)
    for token, slot in enumerate(slots.tolist()):
        block, offset = divmod(slot, BLOCK_SIZE)
        assert torch.equal(key_cache[block, offset], key[token].to(cache_dtype))
        assert torch.equal(value_cache[block, offset], value[token].to(cache_dtype))
    untouched = torch.ones(NUM_BLOCKS * BLOCK_SIZE, dtype=torch.bool)
    untouched[slots] = False
    assert key_cache.flatten(0, 1)[untouched].isnan().all()
    assert value_cache.flatten(0, 1)[untouched].isnan().all()


def test_a_slot_outside_the_cache_is_an_error() -> None:
    key_cache, value_cache = empty_caches()
    one = torch.zeros(1, HEADS, HEAD_DIM)
    with pytest.raises(IndexError):
        kv_cache_write(
            one,
            one,
            key_cache=key_cache,
            value_cache=value_cache,
            slot_mapping=torch.tensor([NUM_BLOCKS * BLOCK_SIZE]),
        )


def test_a_cache_that_would_be_copied_is_an_error() -> None:
    key_cache, value_cache = (cache.transpose(0, 1) for cache in empty_caches())
    one = torch.zeros(1, HEADS, HEAD_DIM)
    with pytest.raises(RuntimeError):
        kv_cache_write(one, one, key_cache=key_cache, value_cache=value_cache, slot_mapping=torch.tensor([0]))
