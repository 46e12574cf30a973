"""The tensors behind the KV blocks.

Owns the pools, one key and one value tensor for each layer (a tensor a layer, because one large
tensor mutated under compilation is far slower), and moves of whole blocks. Does not know who owns a
block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class KVCacheShape:
    """What a block of one layer holds; `dtype` is that of the stored keys and values."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes of KV a token takes over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def bytes_per_block(self) -> int:
        return self.block_size * self.bytes_per_token


@dataclass(frozen=True, slots=True)
class LayerKV:
    """key, value: [num_blocks, block_size, num_kv_heads, head_dim]."""

    key: torch.Tensor
    value: torch.Tensor


class KVCache:
    """The pools of all layers. Block 0 stays zero."""

    __slots__ = ("layers", "num_blocks", "shape")

    def __init__(self, shape: KVCacheShape, num_blocks: int, *, device: torch.device) -> None:
        self.shape = shape
        self.num_blocks = num_blocks
        size = (num_blocks, shape.block_size, shape.num_kv_heads, shape.head_dim)
        self.layers = [
            LayerKV(
                key=_zeros(size, dtype=shape.dtype, device=device),
                value=_zeros(size, dtype=shape.dtype, device=device),
            )
            for _ in range(shape.num_layers)
        ]

    def copy_blocks(self, sources: torch.Tensor, destinations: torch.Tensor) -> None:
        """Copy whole blocks in every layer. sources, destinations: [num_copies] int64."""
        for layer in self.layers:
            layer.key.index_copy_(0, destinations, layer.key.index_select(0, sources))
            layer.value.index_copy_(0, destinations, layer.value.index_select(0, sources))


def _zeros(size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that take a CPU's memory only when they are written.

    numpy asks the system for zeroed pages; torch would write zeros to gigabytes that few requests
    ever use, which takes seconds at every start.
    """
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    num_bytes = math.prod(size) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(size)
