"""The KV pools: their sizes, their zeros, copies of whole blocks."""

from __future__ import annotations

import pytest
import torch

from graphllm.cache.kv_cache import KVCache, KVCacheShape


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
