"""The kernel that copies blocks against its reference: every kind of copy, tile by tile."""

from __future__ import annotations

import pytest
import torch

from graphllm.cache.kv_cache import KVCache
from graphllm.kernels import block_copy as block_copy_file
from graphllm.kernels.block_copy import CopyKind, block_copy, block_copy_ref
from tests.kernels.block_pools import bytes_of, random_cache
from tests.kernels.device import DEVICE

pytestmark = pytest.mark.triton

DTYPES = [torch.bfloat16, torch.int8, torch.float8_e4m3fn]
PAIRS = {
    CopyKind.WITHIN: [[1, 4], [1, 6], [3, 2]],
    CopyKind.OUT: [[5, 0], [2, 3], [6, 1]],
    CopyKind.INTO: [[3, 1], [0, 4]],
}


def host_memory(num_blocks: int, num_bytes: int) -> torch.Tensor:
    drawn = torch.randint(256, (num_blocks, num_bytes), dtype=torch.uint8)
    return drawn.pin_memory() if DEVICE.type == "cuda" else drawn


def copied(cache: KVCache, kind: CopyKind, host: torch.Tensor | None, *, by_kernel: bool) -> None:
    pairs = torch.tensor(PAIRS[kind], device=DEVICE if by_kernel else "cpu")
    (block_copy if by_kernel else block_copy_ref)(cache.pools, pairs, kind=kind, host=host)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("kind", CopyKind)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "is_latent"), [(2, False), (18, False), (18, True)])
def test_kernel_copies_what_its_reference_copies(
    kind: CopyKind, dtype: torch.dtype, head_dim: int, is_latent: bool
) -> None:
    sizes = {"num_blocks": 7, "head_dim": head_dim, "is_latent": is_latent}
    cache = random_cache(dtype, **sizes, device=DEVICE)
    expected = random_cache(dtype, **sizes, device=torch.device("cpu"))
    host = None if kind is CopyKind.WITHIN else host_memory(4, cache.pools.bytes_per_block)
    expected_host = None if host is None else host.clone()
    copied(cache, kind, host, by_kernel=True)
    copied(expected, kind, expected_host, by_kernel=False)
    for pool, expected_pool in zip(bytes_of(cache), bytes_of(expected), strict=True):
        assert torch.equal(pool.cpu(), expected_pool)
    if host is not None:
        assert torch.equal(host, expected_host)


def test_pieces_of_several_tiles_and_programs_with_several_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_copy_file, "_MAX_TILE_WORDS", 64)
    monkeypatch.setattr(block_copy_file, "_BUS_PROGRAMS", 3)
    cache = random_cache(torch.bfloat16, num_blocks=7, num_layers=1, head_dim=18, device=DEVICE)
    host = host_memory(4, cache.pools.bytes_per_block)
    expected = torch.cat([pool[5] for pool in bytes_of(cache)])
    copied(cache, CopyKind.OUT, host, by_kernel=True)
    assert torch.equal(host[0], expected.cpu())


def test_no_pairs_launch_nothing() -> None:
    cache = random_cache(torch.float32, num_blocks=2, device=DEVICE)
    block_copy(cache.pools, torch.zeros(0, 2, dtype=torch.int64, device=DEVICE), kind=CopyKind.WITHIN)
