"""The tensors behind the KV blocks.

Owns the pools, a few tensors for each layer of a group (because one large tensor mutated under compilation is
far slower): keys and values of heads, or latents, which are both; their number format, and copies of whole
blocks within them. Does not know who owns a block; copies to and from host memory are `swap.py`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from graphllm.cache.block_layout import BlockLayout
from graphllm.cache.kv_groups import KVGroups, one_group
from graphllm.errors import ConfigError
from graphllm.kernels.block_copy import CopyKind, block_copy, find_pools

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
}
_FIRST_CAPABILITY_WITH_FP8 = (8, 9)


def resolve_kv_dtype(
    name: str, model_dtype: torch.dtype, *, capability: tuple[int, int] | None = None
) -> torch.dtype:
    """The format that `--kv-cache-dtype` asks for. capability: the card's; None on a CPU, or where unknown.

    Raises ConfigError for a format that the card does not have.
    """
    if name == "auto":
        return model_dtype
    dtype = _DTYPES[name]
    if capability is None:
        return dtype
    if dtype.itemsize == 1 and dtype.is_floating_point and capability < _FIRST_CAPABILITY_WITH_FP8:
        raise ConfigError(
            f"--kv-cache-dtype {name}: this card has compute capability {capability[0]}.{capability[1]}, and "
            "8-bit floats need 8.9; int8 takes as little memory and works here."
        )
    if dtype.itemsize > 1 and dtype != model_dtype:
        model_name = str(model_dtype).removeprefix("torch.")
        raise ConfigError(
            f"--kv-cache-dtype {name}: on a card the KV cache is in the model's {model_name} or in 8 bits; "
            f"take auto, int8 or fp8, or --dtype {name}."
        )
    return dtype


@dataclass(frozen=True, slots=True)
class KVCacheShape:
    """What a block of one layer holds, and which layers a block has; `dtype` is that of the stored numbers.

    A token of a layer is num_kv_heads keys of head_dim dimensions, and as many values. Where is_latent it is
    one vector of head_dim dimensions that all heads share and read both from (multi-head latent attention,
    arXiv:2405.04434); num_kv_heads is then 1. kv_groups: None for one group of all layers.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    is_latent: bool = False
    kv_groups: KVGroups | None = None

    def __post_init__(self) -> None:
        assert not self.is_latent or self.num_kv_heads == 1, "all heads share a latent"

    @property
    def has_scales(self) -> bool:
        """Whether the cache is in 8 bits, with a float32 scale for each token and key or value head."""
        return self.dtype.itemsize == 1

    @property
    def tensors_per_layer(self) -> int:
        """Keys and values, or latents alone; scales not counted."""
        return 1 if self.is_latent else 2

    @property
    def groups(self) -> KVGroups:
        return self.kv_groups or one_group(self.num_layers)

    @property
    def layout(self) -> BlockLayout:
        """How a sequence's context lies in blocks."""
        return BlockLayout(self.block_size, self.groups.windows)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of KV a token takes over all layers, scales included, while all of them see it."""
        return self.num_layers * self._bytes_per_layer

    @property
    def bytes_per_block(self) -> int:
        """Of one group's part of a column of tokens."""
        return self.block_size * self.groups.size * self._bytes_per_layer

    @property
    def _bytes_per_layer(self) -> int:
        """Of a token."""
        bytes_per_head = self.head_dim * self.dtype.itemsize
        if self.has_scales:
            bytes_per_head += torch.float32.itemsize
        return self.tensors_per_layer * self.num_kv_heads * bytes_per_head


@dataclass(frozen=True, slots=True)
class LayerKV:
    """key, value: [num_blocks, block_size, num_kv_heads, head_dim]. The scales belong to 8-bit formats.

    group: of layers, whose block tables say which blocks are this layer's; it shares the tensors with layers
    of other groups.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None
    group: int = field(default=0, kw_only=True)


@dataclass(frozen=True, slots=True)
class LayerLatents:
    """latent: [num_blocks, block_size, width]; scale: [num_blocks, block_size] float32, of 8-bit formats.

    group: as in `LayerKV`.
    """

    latent: torch.Tensor
    scale: torch.Tensor | None = None
    group: int = field(default=0, kw_only=True)


class KVCache:
    """The pools of all layers. layers: by their numbers. Block 0 stays zero."""

    __slots__ = ("layers", "num_blocks", "pools", "shape")

    def __init__(self, shape: KVCacheShape, num_blocks: int, *, device: torch.device) -> None:
        self.shape = shape
        self.num_blocks = num_blocks
        heads = () if shape.is_latent else (shape.num_kv_heads,)
        size = (num_blocks, shape.block_size, *heads, shape.head_dim)

        def tensors() -> list[torch.Tensor]:
            """A layer's: what is stored, then the scales where there are any."""
            stored = [_zeros(size, dtype=shape.dtype, device=device) for _ in range(shape.tensors_per_layer)]
            if not shape.has_scales:
                return stored
            return stored + [_zeros(size[:-1], dtype=torch.float32, device=device) for _ in stored]

        places = [tensors() for _ in range(shape.groups.size)]
        layer_type: type[LayerKV | LayerLatents] = LayerLatents if shape.is_latent else LayerKV
        self.layers = [layer_type(*places[place], group=group) for group, place in shape.groups.places()]
        self.pools = find_pools(
            [pool for place in places for pool in place],
            tensors_per_layer=shape.tensors_per_layer,
            has_scales=shape.has_scales,
        )

    def copy_blocks(self, pairs: torch.Tensor) -> None:
        """Copy whole blocks in every layer, scales included. pairs: [num_copies, 2] int64, from and to."""
        block_copy(self.pools, pairs, kind=CopyKind.WITHIN)


def _zeros(size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that take a CPU's memory only when they are written.

    numpy asks the system for zeroed pages; torch would write zeros to gigabytes that few requests
    ever use, which takes seconds at every start.
    """
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    num_bytes = math.prod(size) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(size)
