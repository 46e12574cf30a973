"""Random adapters and tokens for the LoRA kernels, in memory where whatever nobody may read is NaN."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphllm.kernels.lora_expand import feature_tiles, lora_expand
from graphllm.kernels.lora_shrink import lora_shrink


@dataclass(frozen=True, slots=True)
class LoraCase:
    """x: [num_tokens, in_features]; base: what the layer gave; the rest as the kernels take it."""

    x: torch.Tensor
    base: torch.Tensor
    down: torch.Tensor
    up: torch.Tensor
    scales: torch.Tensor
    token_adapters: torch.Tensor
    part_sizes: tuple[int, ...]

    def to(self, device: torch.device) -> LoraCase:
        tensors = (self.x, self.base, self.down, self.up, self.scales, self.token_adapters)
        return LoraCase(*(tensor.to(device) for tensor in tensors), self.part_sizes)


def lora_case(
    token_adapters: list[int],
    *,
    part_sizes: tuple[int, ...] = (80, 24),
    in_features: int = 72,
    max_rank: int = 8,
    num_adapters: int = 3,
    dtype: torch.dtype = torch.float32,
    unchanged: tuple[tuple[int, int], ...] = (),
) -> LoraCase:
    """unchanged: (adapter, part) whose scale is 0 and whose matrices are NaN, like all unused adapters'."""
    generator = torch.Generator().manual_seed(len(token_adapters) + max_rank)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    num_tokens, out_features = len(token_adapters), sum(part_sizes)
    # Each adapter's memory has something behind it, as in the engine.
    down = torch.cat([random(num_adapters, len(part_sizes), max_rank, in_features)] * 2, 1)[
        :, : len(part_sizes)
    ]
    up = torch.cat([random(num_adapters, out_features, max_rank)] * 2, 1)[:, :out_features]
    scales = 0.5 + torch.rand(num_adapters, len(part_sizes), generator=generator)
    starts = [sum(part_sizes[:part]) for part in range(len(part_sizes))]
    idle = [(each, part) for each in range(num_adapters) for part in range(len(part_sizes))]
    idle = [(each, part) for each, part in idle if each not in token_adapters or (each, part) in unchanged]
    for adapter, part in idle:
        down[adapter, part] = up[adapter, starts[part] : starts[part] + part_sizes[part]] = torch.nan
        scales[adapter, part] = 0.0 if adapter in token_adapters else torch.nan
    adapters = torch.tensor(token_adapters, dtype=torch.int32)
    return LoraCase(
        random(num_tokens, in_features),
        random(num_tokens, out_features),
        down,
        up,
        scales,
        adapters,
        part_sizes,
    )


def with_adapters(case: LoraCase) -> torch.Tensor:
    """What the launchers make of the case: the layer's output, [num_tokens, out_features]."""
    _, num_parts, max_rank, _ = case.down.shape
    device, out = case.x.device, case.base.clone()
    shrunk = torch.full((len(out), num_parts, max_rank), torch.nan, device=device)
    lora_shrink(case.x, case.down, case.scales, case.token_adapters, out=shrunk)
    tiles = feature_tiles(case.part_sizes, device=device)
    return lora_expand(shrunk, case.up, case.scales, case.token_adapters, tiles, out=out)


def token_by_token(case: LoraCase) -> torch.Tensor:
    """The formula in float64, token by token and part by part: [num_tokens, out_features]."""
    result = case.base.double()
    for token, adapter in enumerate(case.token_adapters.tolist()):
        start = 0
        for part, size in enumerate(case.part_sizes):
            if adapter >= 0 and case.scales[adapter, part] != 0:
                down, up = case.down[adapter, part].double(), case.up[adapter, start : start + size].double()
                delta = up @ (down @ case.x[token].double())
                result[token, start : start + size] += case.scales[adapter, part].double() * delta
            start += size
    return result
