"""The specification of the fused write, and what runs on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphllm.kernels.kv_quantization import quantize_kv_ref
from graphllm.kernels.rotary import rotary_ref, rotary_tables_ref
from graphllm.kernels.rotary_cache_write import rotary_cache_write

NUM_BLOCKS, BLOCK_SIZE, HEADS, KV_HEADS, HEAD_DIM = 5, 4, 6, 3, 6
SLOTS = torch.tensor([19, 4, 5, 0, 12, 7, 11])


def empty_caches(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    size = (NUM_BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    return {name: torch.full(size, torch.nan).to(dtype) for name in ("key_cache", "value_cache")}


def random_qkv(num_tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(num_tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM).to(dtype)


def random_tables(num_tokens: int) -> torch.Tensor:
    out = torch.empty(2, num_tokens, HEAD_DIM)
    return rotary_tables_ref(torch.arange(num_tokens) + 3, torch.rand(HEAD_DIM // 2), scale=1.0, out=out)


def write(qkv: torch.Tensor, tables: torch.Tensor | None, slots: torch.Tensor, **options: Any) -> None:
    rotary_cache_write(qkv, tables, num_heads=HEADS, num_kv_heads=KV_HEADS, slot_mapping=slots, **options)


def parts(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Query, key and value heads, [num_tokens, n, head_dim] each."""
    return qkv.clone().view(len(qkv), -1, HEAD_DIM).split((HEADS, KV_HEADS, KV_HEADS), dim=1)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_land_in_their_slots_and_nowhere_else(cache_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    qkv = random_qkv(7)
    query, key, value = parts(qkv)
    caches = empty_caches(cache_dtype)
    write(qkv, None, SLOTS, **caches)
    for token, slot in enumerate(SLOTS.tolist()):
        block, offset = divmod(slot, BLOCK_SIZE)
        assert torch.equal(caches["key_cache"][block, offset], key[token].to(cache_dtype))
        assert torch.equal(caches["value_cache"][block, offset], value[token].to(cache_dtype))
    untouched = torch.ones(NUM_BLOCKS * BLOCK_SIZE, dtype=torch.bool)
    untouched[SLOTS] = False
    assert caches["key_cache"].flatten(0, 1)[untouched].isnan().all()
    assert caches["value_cache"].flatten(0, 1)[untouched].isnan().all()
    assert torch.equal(parts(qkv)[0], query)  # no tables and no norm: queries stay


def test_queries_and_keys_are_turned_and_values_are_not() -> None:
    torch.manual_seed(0)
    qkv, tables = random_qkv(7), random_tables(7)
    query, key, value = parts(qkv)
    caches = empty_caches()
    write(qkv, tables, SLOTS, **caches)
    rotary_ref(query, tables)
    rotary_ref(key, tables)
    assert torch.equal(parts(qkv)[0], query)
    assert torch.equal(caches["key_cache"].flatten(0, 1)[SLOTS], key)
    assert torch.equal(caches["value_cache"].flatten(0, 1)[SLOTS], value)


@pytest.mark.parametrize("unit_offset", [False, True])
def test_query_and_key_heads_are_normalized_by_their_own_weights_before_the_turn(unit_offset: bool) -> None:
    torch.manual_seed(0)
    qkv, tables = random_qkv(7), random_tables(7)
    query, key, value = parts(qkv)
    weights = {"query_norm": torch.rand(HEAD_DIM), "key_norm": torch.rand(HEAD_DIM)}
    caches = empty_caches()
    write(qkv, tables, SLOTS, **caches, **weights, norm_eps=0.5, norm_unit_offset=unit_offset)
    for heads, name in ((query, "query_norm"), (key, "key_norm")):
        root_mean_square = (heads.double().square().mean(dim=-1, keepdim=True) + 0.5).sqrt()
        heads.copy_(heads / root_mean_square * (weights[name] + (1.0 if unit_offset else 0.0)))
        rotary_ref(heads, tables)
    torch.testing.assert_close(parts(qkv)[0], query)
    torch.testing.assert_close(caches["key_cache"].flatten(0, 1)[SLOTS], key)
    assert torch.equal(caches["value_cache"].flatten(0, 1)[SLOTS], value)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_an_8_bit_cache_holds_quantized_heads_and_their_scales(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    qkv, tables = random_qkv(7), random_tables(7)
    _, key, value = parts(qkv)
    caches = empty_caches(dtype)
    scales = {
        name: torch.full(caches["key_cache"].shape[:3], torch.nan) for name in ("key_scale", "value_scale")
    }
    write(qkv, tables, SLOTS, **caches, **scales)
    rotary_ref(key, tables)
    for name, heads in (("key", key), ("value", value)):
        stored, scale = quantize_kv_ref(heads, dtype)
        assert torch.equal(caches[f"{name}_cache"].flatten(0, 1)[SLOTS].float(), stored.float())
        assert torch.equal(scales[f"{name}_scale"].flatten(0, 1)[SLOTS], scale)
        assert scales[f"{name}_scale"].isnan().sum() == (NUM_BLOCKS * BLOCK_SIZE - 7) * KV_HEADS


def test_padding_tokens_store_nothing() -> None:
    torch.manual_seed(0)
    qkv = random_qkv(4)
    value = parts(qkv)[2]
    caches = empty_caches()
    write(qkv, random_tables(4), torch.tensor([-1, 9, -1, -1]), **caches)
    assert torch.equal(caches["value_cache"].flatten(0, 1)[9], value[1])
    for cache in caches.values():
        assert cache.isnan().sum() == cache.numel() - KV_HEADS * HEAD_DIM


def test_no_tokens_are_no_work() -> None:
    caches = empty_caches()
    write(random_qkv(0), None, SLOTS[:0], **caches)
    assert caches["key_cache"].isnan().all()


def test_a_slot_outside_the_cache_is_an_error() -> None:
    with pytest.raises(IndexError):
        write(random_qkv(1), None, torch.tensor([NUM_BLOCKS * BLOCK_SIZE]), **empty_caches())


def test_a_cache_that_would_be_copied_is_an_error() -> None:
    caches = {name: cache.transpose(0, 1) for name, cache in empty_caches().items()}
    with pytest.raises(RuntimeError):
        write(random_qkv(1), None, torch.tensor([0]), **caches)


def test_an_8_bit_cache_without_scales_is_refused() -> None:
    with pytest.raises(AssertionError, match="scales"):
        write(random_qkv(1), None, torch.tensor([0]), **empty_caches(torch.float8_e4m3fn))
