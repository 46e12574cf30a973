"""Copies of whole KV blocks, over all layers at once: within the pools, out to host memory, back in.

A block of the cache is a piece of each pool (a layer's keys and values, or its latents, and where they are in
8 bits their scales). On the host a block is one run of bytes, its pieces in the order of the pools:

    within:  pool_p[destination] = pool_p[source]        for each pool p and (source, destination)
    out:     host[destination, piece p] = pool_p[source]
    into:    pool_p[destination] = host[source, piece p]

Bytes are moved, whatever they mean. One launch moves all blocks and layers: block by block and layer by
layer it would be thousands of copies. Host memory is pinned, and the kernel itself reads and writes it over
the bus; a few programs keep the bus full and leave the multiprocessors to the steps beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.triton_support import runs_triton

_WORD_BYTES = 4
# 16 KiB: eight 16-byte loads for each thread of four warps, issued before the first is stored.
_MAX_TILE_WORDS = 4096
_NUM_WARPS = 4
# A latency of two microseconds times 64 GB/s is 128 KiB; this many tiles in flight are four times that.
_BUS_PROGRAMS = 32
_MEMORY_PROGRAMS = 1024


class CopyKind(IntEnum):
    """Where copies go from and to."""

    WITHIN = 0
    OUT = 1
    INTO = 2


@dataclass(frozen=True, slots=True)
class BlockPools:
    """The pools of a cache, as copies see them.

    pools: the layers' tensors in order, [num_blocks, ...] each and contiguous; a layer has its keys and
    values, or only its latents (tensors_per_layer), then their scales or none. addresses: [num_pools] int64,
    where each pool begins, on its device.
    """

    pools: tuple[Tensor, ...]
    addresses: Tensor
    has_scales: bool
    tensors_per_layer: int = 2

    @property
    def kv_bytes(self) -> int:
        """Bytes of a block in a pool of keys, values or latents."""
        return self.pools[0][0].nbytes

    @property
    def scale_bytes(self) -> int:
        """Bytes of a block in a pool of scales; 0 where there are none."""
        return self.pools[self.tensors_per_layer][0].nbytes if self.has_scales else 0

    @property
    def bytes_per_block(self) -> int:
        """A block's run on the host."""
        return sum(pool[0].nbytes for pool in self.pools)


def find_pools(pools: Sequence[Tensor], *, has_scales: bool, tensors_per_layer: int = 2) -> BlockPools:
    """Look up where pools lie, once; they must stay there. See `BlockPools`."""
    assert all(pool.is_contiguous() for pool in pools), "a block is one piece of each pool"
    assert len(pools) % (tensors_per_layer * (1 + has_scales)) == 0, "every layer has the same pools"
    addresses = torch.tensor([pool.data_ptr() for pool in pools], dtype=torch.int64)
    found = BlockPools(tuple(pools), addresses.to(pools[0].device), has_scales, tensors_per_layer)
    assert found.kv_bytes % _WORD_BYTES == 0, "blocks are moved in whole words"
    return found


def block_copy_ref(pools: BlockPools, pairs: Tensor, *, kind: CopyKind, host: Tensor | None = None) -> None:
    """Copy whole blocks. pairs: [num_pairs, 2] int64, from and to, no destination twice or also a source.

    host: [num_host_blocks, bytes_per_block] uint8, contiguous; None within the pools.
    """
    sources, destinations = pairs[:, 0], pairs[:, 1]
    first = 0
    for pool in pools.pools:
        blocks = pool.view(pool.shape[0], -1).view(torch.uint8)  # [num_blocks, bytes of a piece]
        piece = slice(first, first + blocks.shape[1])
        first = piece.stop
        if kind is CopyKind.WITHIN:
            blocks.index_copy_(0, destinations, blocks.index_select(0, sources))
            continue
        assert host is not None, "copies between tiers need both"
        if kind is CopyKind.OUT:
            host[destinations, piece] = blocks.index_select(0, sources)
        else:
            blocks.index_copy_(0, destinations, host[sources, piece])


@triton.jit(do_not_specialize=["num_items"])
def _block_copy_kernel(
    addresses,  # [NUM_POOLS] int64
    pairs,  # [num_pairs, 2] int64
    host,  # [num_host_blocks, NUM_LAYERS * TENSORS * (KV_WORDS + SCALE_WORDS)] int32, or None
    num_items,  # num_pairs * NUM_POOLS * TILES
    NUM_POOLS: tl.constexpr,
    TENSORS: tl.constexpr,
    POOLS_PER_LAYER: tl.constexpr,
    KV_WORDS: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    KIND: tl.constexpr,
):
    """An item is a tile of one block's piece in one pool; programs share the items out among themselves.

    No dependent launch: copies run on streams of their own, or before a step's first kernel.
    """
    LAYER_WORDS: tl.constexpr = TENSORS * (KV_WORDS + SCALE_WORDS)
    RUN_WORDS: tl.constexpr = LAYER_WORDS * (NUM_POOLS // POOLS_PER_LAYER)
    words = tl.arange(0, TILE)
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        pair = item // (NUM_POOLS * TILES)
        pool = item // TILES % NUM_POOLS
        within = (item % TILES) * TILE + words
        kind_of_pool = pool % POOLS_PER_LAYER  # keys and values, or latents; then their scales
        is_scale = kind_of_pool >= TENSORS
        size = tl.where(is_scale, SCALE_WORDS, KV_WORDS)
        source = tl.load(pairs + 2 * pair)  # int64
        destination = tl.load(pairs + 2 * pair + 1)
        # Multiples of 16 bytes wherever a block is moved, which the compiler cannot know of an address.
        piece = tl.multiple_of(tl.load(addresses + pool).to(tl.pointer_type(tl.int32)), 16)
        before_scales = TENSORS * KV_WORDS + (kind_of_pool - TENSORS) * SCALE_WORDS
        before = tl.where(is_scale, before_scales, kind_of_pool * KV_WORDS)
        in_run = (pool // POOLS_PER_LAYER) * LAYER_WORDS + before
        if KIND == 0:
            read = piece + source * size
            write = piece + destination * size
        elif KIND == 1:
            read = piece + source * size
            write = host + (destination * RUN_WORDS + in_run)
        else:
            read = host + (source * RUN_WORDS + in_run)
            write = piece + destination * size
        tl.store(write + within, tl.load(read + within, mask=within < size), mask=within < size)


def block_copy(pools: BlockPools, pairs: Tensor, *, kind: CopyKind, host: Tensor | None = None) -> None:
    """See `block_copy_ref`. pairs lie on the pools' device; host memory is pinned."""
    if len(pairs) == 0:
        return
    if not runs_triton(pairs):
        block_copy_ref(pools, pairs, kind=kind, host=host)
        return
    assert (host is None) == (kind is CopyKind.WITHIN), "copies between tiers need both, others one"
    assert pairs.is_contiguous() and (host is None or host.is_contiguous())
    kv_words, scale_words = pools.kv_bytes // _WORD_BYTES, pools.scale_bytes // _WORD_BYTES
    tile = min(triton.next_power_of_2(kv_words), _MAX_TILE_WORDS)
    tiles = triton.cdiv(max(kv_words, scale_words), tile)
    num_items = len(pairs) * len(pools.pools) * tiles
    num_programs = min(num_items, _MEMORY_PROGRAMS if kind is CopyKind.WITHIN else _BUS_PROGRAMS)
    _block_copy_kernel[(num_programs,)](
        pools.addresses,
        pairs,
        None if host is None else host.view(torch.int32),
        num_items,
        NUM_POOLS=len(pools.pools),
        TENSORS=pools.tensors_per_layer,
        POOLS_PER_LAYER=pools.tensors_per_layer * (1 + pools.has_scales),
        KV_WORDS=kv_words,
        SCALE_WORDS=scale_words,
        TILES=tiles,
        TILE=tile,
        KIND=int(kind),
        num_warps=_NUM_WARPS,
    )
