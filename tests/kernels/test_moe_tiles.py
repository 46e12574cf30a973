"""Tiles hold each pair once, under its expert, and there is always room for them."""

from __future__ import annotations

import pytest
import torch

from graphllm.kernels.moe_tiles import MAX_ROWS_PER_TILE, expert_tiles, max_expert_tiles, rows_per_tile_for
from tests.kernels.moe_inputs import empty_tiles


@pytest.mark.parametrize("rows_per_tile", [1, 4, 16])
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts"), [(1, 1, 1), (9, 2, 5), (40, 3, 8), (6, 4, 64)]
)
def test_every_pair_is_in_one_tile_of_its_expert(
    num_tokens: int, top_k: int, num_experts: int, rows_per_tile: int
) -> None:
    torch.manual_seed(0)
    experts = torch.randint(num_experts, (num_tokens, top_k), dtype=torch.int32)
    experts[num_tokens // 2] = -1
    tiles = empty_tiles(experts.numel(), num_experts=num_experts, rows_per_tile=rows_per_tile)
    expert_tiles(experts, num_experts=num_experts, out=tiles)
    found: dict[int, list[int]] = {}
    for expert, pairs in zip(tiles.experts.tolist(), tiles.pairs.tolist(), strict=True):
        kept = [pair for pair in pairs if pair >= 0]
        assert pairs == kept + [-1] * (rows_per_tile - len(kept)), "what is empty comes last"
        assert bool(kept) == (expert >= 0)
        found.setdefault(expert, []).extend(kept)
    found.pop(-1, None)
    chosen = experts.flatten().tolist()
    assert found == {
        expert: [pair for pair, owner in enumerate(chosen) if owner == expert]
        for expert in sorted(set(chosen) - {-1})
    }
    assert list(found) == sorted(found)


@pytest.mark.parametrize("rows_per_tile", [1, 3, 16])
def test_the_most_tiles_are_as_many_as_the_worst_choice_needs(rows_per_tile: int) -> None:
    for num_pairs in range(1, 40):
        for num_experts in range(1, 12):
            # One pair for each other expert, the rest in one: the most that can be left empty.
            num_used = min(num_pairs, num_experts)
            counts = [1] * (num_used - 1) + [num_pairs - num_used + 1]
            needed = sum(-(-count // rows_per_tile) for count in counts)
            room = max_expert_tiles(num_pairs, num_experts, rows_per_tile)
            assert needed <= room < needed + num_used


@pytest.mark.parametrize(
    ("num_pairs", "num_experts", "rows"), [(1, 8, 16), (512, 128, 16), (8192, 128, 64), (10**6, 8, 128)]
)
def test_tiles_are_as_large_as_an_average_expert_fills(num_pairs: int, num_experts: int, rows: int) -> None:
    assert rows_per_tile_for(num_pairs, num_experts) == rows <= MAX_ROWS_PER_TILE
