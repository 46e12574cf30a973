"""Inputs of the kernels of a mixture of experts, in memory that has NaN around them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from graphllm.kernels.moe_tiles import ExpertTiles, expert_tiles_ref, max_expert_tiles
from tests.kernels.device import DEVICE


def amid_nan(*size: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Random numbers in memory that has NaN before and behind them."""
    num_elements = math.prod(size)
    memory = torch.full((num_elements + 256,), math.nan, dtype=dtype, device=DEVICE)
    values = memory[128 : 128 + num_elements]
    values.copy_(torch.randn(num_elements).mul_(scale))
    return values.view(size)


def nan_like(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.full(size, math.nan, dtype=dtype, device=DEVICE)


@dataclass(frozen=True, slots=True)
class MoEInputs:
    """One layer's tensors; the last token is padding, and its row of x is NaN."""

    x: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    experts: Tensor
    weights: Tensor
    tiles: ExpertTiles


def moe_inputs(
    *,
    num_tokens: int,
    top_k: int,
    num_experts: int,
    hidden: int,
    intermediate: int,
    dtype: torch.dtype,
    rows_per_tile: int = 16,
    has_bias: bool = False,
) -> MoEInputs:
    x = amid_nan(num_tokens, hidden, dtype=dtype)
    x[-1] = math.nan
    chosen = [torch.randperm(num_experts)[:top_k] for _ in range(num_tokens)]
    experts = torch.stack(chosen).to(dtype=torch.int32, device=DEVICE)
    experts[-1] = -1
    weights = torch.rand(num_tokens, top_k, device=DEVICE)
    weights[-1] = 0.0
    return MoEInputs(
        x=x,
        gate_up=amid_nan(num_experts, 2 * intermediate, hidden, dtype=dtype, scale=hidden**-0.5),
        gate_up_bias=amid_nan(num_experts, 2 * intermediate, dtype=dtype) if has_bias else None,
        down=amid_nan(num_experts, hidden, intermediate, dtype=dtype, scale=intermediate**-0.5),
        down_bias=amid_nan(num_experts, hidden, dtype=dtype) if has_bias else None,
        experts=experts,
        weights=weights,
        tiles=tiles_of(experts, num_experts=num_experts, rows_per_tile=rows_per_tile),
    )


def empty_tiles(num_pairs: int, *, num_experts: int, rows_per_tile: int) -> ExpertTiles:
    """Room for tiles, full of what belongs to nobody."""
    num_tiles = max_expert_tiles(num_pairs, num_experts, rows_per_tile)
    experts = torch.full((num_tiles,), -9, dtype=torch.int32, device=DEVICE)
    pairs = torch.full((num_tiles, rows_per_tile), -9, dtype=torch.int32, device=DEVICE)
    return ExpertTiles(experts, pairs)


def tiles_of(experts: Tensor, *, num_experts: int, rows_per_tile: int) -> ExpertTiles:
    out = empty_tiles(experts.numel(), num_experts=num_experts, rows_per_tile=rows_per_tile)
    return expert_tiles_ref(experts, num_experts=num_experts, out=out)
