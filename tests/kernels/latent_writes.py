"""One layer's inputs to the write of latents, and caches whose slots all hold NaN (or, as numbers, 99)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from graphllm.kernels.rotary import rotary_tables_ref
from tests.kernels.device import DEVICE

EIGHT_BITS = (torch.int8, torch.float8_e5m2, torch.float8_e4m3fn)


@dataclass
class LatentWrite:
    """Queries [num_tokens, num_heads, plain + turned], latents behind something else of their rows."""

    num_tokens: int
    num_heads: int = 4
    rank: int = 32
    turned: int = 8
    plain: int = 12
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    is_interleaved: bool = False
    num_padding: int = 0
    arguments: dict[str, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.num_tokens + self.rank)
        num_tokens, width = self.num_tokens, self.rank + self.turned
        cache_dtype = self.cache_dtype or self.dtype
        query = torch.randn(num_tokens, self.num_heads, self.plain + self.turned)
        latents = 3 * torch.randn(num_tokens, 5 + width)
        first_padding = num_tokens - self.num_padding
        # Where numbers are stored as they are; the interpreter complains of a maximum of NaN.
        latents[first_padding:] = 99 if cache_dtype in EIGHT_BITS else torch.nan
        num_blocks = num_tokens // self.block_size + 3
        slots = self.block_size + torch.randperm((num_blocks - 1) * self.block_size)[:num_tokens]
        slots[first_padding:] = -1
        tables = rotary_tables_ref(
            torch.randint(5000, (num_tokens,)),
            torch.rand(self.turned // 2),
            scale=1.25,
            out=torch.empty(2, num_tokens, self.turned, dtype=self.dtype),
        )
        empty = 99 if cache_dtype == torch.int8 else torch.nan
        cache = torch.full((num_blocks, self.block_size, width), empty)
        self.arguments = {
            "query": query.to(DEVICE, self.dtype),
            "latents": latents.to(DEVICE, self.dtype)[:, 5:],
            "tables": tables.to(DEVICE),
            "norm_weight": torch.rand(self.rank).to(DEVICE, self.dtype),
            "norm_eps": 1e-3,
            "slot_mapping": slots.to(DEVICE),
            "cache": cache.to(DEVICE, cache_dtype),
            "is_interleaved": self.is_interleaved,
            "absorbed": torch.full(
                (num_tokens, self.num_heads, width), torch.nan, device=DEVICE, dtype=self.dtype
            ),
        }
        if cache_dtype in EIGHT_BITS:
            self.arguments["cache_scale"] = torch.full(cache.shape[:2], torch.nan, device=DEVICE)

    def run(self, function: Any) -> dict[str, torch.Tensor]:
        """What `function` leaves: the whole cache as it is meant, its scales, and the absorbed queries."""
        arguments = {
            name: value.clone() if isinstance(value, torch.Tensor) else value
            for name, value in self.arguments.items()
        }
        inputs = [arguments.pop(name) for name in ("query", "latents", "tables")]
        function(*inputs, **arguments)
        cache, scale = arguments["cache"].float(), arguments.get("cache_scale")
        left = {"absorbed": arguments["absorbed"].float()[: self.num_tokens - self.num_padding]}
        if scale is None:
            return left | {"cache": cache}
        return left | {"cache": cache * scale[..., None], "scale": scale}
