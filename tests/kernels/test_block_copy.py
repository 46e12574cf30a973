"""Copies of whole blocks, as they are specified: within the pools, out to the host, back in."""

from __future__ import annotations

import pytest
import torch

from graphllm.kernels.block_copy import CopyKind, block_copy_ref
from tests.kernels.block_pools import KV_DTYPES, bytes_of, random_cache

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_a_copied_block_has_its_sources_bytes_in_every_pool(dtype: torch.dtype) -> None:
    cache = random_cache(dtype, num_blocks=6, device=CPU)
    before = bytes_of(cache)
    block_copy_ref(cache.pools, torch.tensor([[1, 4], [1, 5], [3, 2]]), kind=CopyKind.WITHIN)
    for old, new in zip(before, bytes_of(cache), strict=True):
        assert torch.equal(new, old[[0, 1, 3, 3, 1, 1]])


@pytest.mark.parametrize("is_latent", [False, True])
@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_a_block_is_one_run_on_the_host_and_comes_back_bit_for_bit(
    dtype: torch.dtype, is_latent: bool
) -> None:
    cache = random_cache(dtype, num_blocks=6, is_latent=is_latent, device=CPU)
    before = bytes_of(cache)
    host = torch.full((4, cache.pools.bytes_per_block), 77, dtype=torch.uint8)
    block_copy_ref(cache.pools, torch.tensor([[5, 0], [2, 3]]), kind=CopyKind.OUT, host=host)
    assert torch.equal(host[0], torch.cat([pool[5] for pool in before]))
    assert torch.equal(host[3], torch.cat([pool[2] for pool in before]))
    assert (host[1:3] == 77).all()
    block_copy_ref(cache.pools, torch.tensor([[3, 1], [0, 4]]), kind=CopyKind.INTO, host=host)
    for old, new in zip(before, bytes_of(cache), strict=True):
        assert torch.equal(new, old[[0, 2, 2, 3, 5, 5]])


@pytest.mark.parametrize("is_latent", [False, True])
@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_a_run_is_as_long_as_the_plan_counts(dtype: torch.dtype, is_latent: bool) -> None:
    cache = random_cache(dtype, num_blocks=2, is_latent=is_latent, device=CPU)
    assert cache.pools.bytes_per_block == cache.shape.bytes_per_block
