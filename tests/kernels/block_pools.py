"""Small caches whose bytes are all different from one another's, for tests of copies."""

from __future__ import annotations

import torch

from graphllm.cache.kv_cache import KVCache, KVCacheShape

KV_DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
]


def random_cache(
    dtype: torch.dtype,
    *,
    num_blocks: int,
    num_layers: int = 2,
    head_dim: int = 10,
    is_latent: bool = False,
    device: torch.device,
) -> KVCache:
    """Random bytes in every pool, NaN among them."""
    shape = KVCacheShape(
        num_layers=num_layers,
        num_kv_heads=1 if is_latent else 2,
        head_dim=head_dim,
        block_size=8,
        dtype=dtype,
        is_latent=is_latent,
    )
    cache = KVCache(shape, num_blocks, device=device)
    generator = torch.Generator().manual_seed(0)
    for pool in cache.pools.pools:
        drawn = torch.randint(256, (pool.nbytes,), generator=generator, dtype=torch.uint8)
        pool.view(-1).view(torch.uint8).copy_(drawn)
    return cache


def bytes_of(cache: KVCache) -> list[torch.Tensor]:
    """Every pool, [num_blocks, bytes] uint8: a copy."""
    return [pool.view(cache.num_blocks, -1).view(torch.uint8).clone() for pool in cache.pools.pools]
