"""The KV pools: their sizes, their zeros, copies of whole blocks."""

from __future__ import annotations

import pytest
import torch

from graphllm.cache.kv_cache import KVCache, KVCacheShape, LayerLatents


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pools_have_the_planned_size_and_are_zero(dtype: torch.dtype) -> None:
    shape = KVCacheShape(num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype=dtype)
    cache = KVCache(shape, 5, device=torch.device("cpu"))
    tensors = [tensor for layer in cache.layers for tensor in (layer.key, layer.value)]
    assert all(tensor.shape == (5, 4, 2, 8) and tensor.dtype == dtype for tensor in tensors)
    assert sum(tensor.nbytes for tensor in tensors) == 5 * shape.bytes_per_block
    assert not any(tensor.any() for tensor in tensors)


def test_copied_block_equals_its_source_in_every_layer() -> None:
    shape = KVCacheShape(num_layers=2, num_kv_heads=2, head_dim=8, block_size=4, dtype=torch.float32)
    cache = KVCache(shape, 6, device=torch.device("cpu"))
    for layer in cache.layers:
        layer.key.normal_()
        layer.value.normal_()
    before = [(layer.key.clone(), layer.value.clone()) for layer in cache.layers]
    cache.copy_blocks(torch.tensor([[1, 4], [2, 5]]))
    for layer, (key, value) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.key[4:], key[1:3])
        assert torch.equal(layer.value[4:], value[1:3])
        assert torch.equal(layer.key[:4], key[:4])
        assert torch.equal(layer.value[:4], value[:4])


def test_a_latent_is_stored_once_for_all_heads() -> None:
    """DeepSeek-V3: a latent of 512 dimensions and a shared key of 64, in 61 layers."""
    shape = KVCacheShape(
        num_layers=61, num_kv_heads=1, head_dim=576, block_size=4, dtype=torch.bfloat16, is_latent=True
    )
    assert shape.bytes_per_token == 61 * 576 * 2
    cache = KVCache(shape, 3, device=torch.device("cpu"))
    assert all(isinstance(layer, LayerLatents) for layer in cache.layers)
    assert {pool.shape for pool in cache.pools.pools} == {(3, 4, 576)}
    assert sum(pool.nbytes for pool in cache.pools.pools) == 3 * shape.bytes_per_block


def test_a_latent_in_8_bits_has_one_scale_a_token() -> None:
    shape = KVCacheShape(
        num_layers=2, num_kv_heads=1, head_dim=24, block_size=4, dtype=torch.int8, is_latent=True
    )
    cache = KVCache(shape, 3, device=torch.device("cpu"))
    assert [pool.shape for pool in cache.pools.pools] == [(3, 4, 24), (3, 4)] * 2
    assert shape.bytes_per_token == 2 * (24 + 4)
