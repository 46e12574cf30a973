from __future__ import annotations

import cmath

import pytest
import torch

from graphllm.kernels.rotary import rotary, rotary_tables


@pytest.mark.parametrize("head_dim", [2, 6, 10, 64])
@pytest.mark.parametrize("num_heads", [1, 3])
def test_pairs_of_dimensions_turn_like_complex_numbers(head_dim: int, num_heads: int) -> None:
    torch.manual_seed(0)
    positions = torch.tensor([0, 1, 5, 1000])
    frequencies = torch.rand(head_dim // 2)
    heads = torch.randn(4, num_heads, head_dim)
    cos, sin = rotary_tables(positions, frequencies, scale=1.5, dtype=torch.float32)
    turned = rotary(heads, cos, sin)
    half = head_dim // 2
    for token, position in enumerate(positions.tolist()):
        for head in range(num_heads):
            for pair, frequency in enumerate(frequencies.tolist()):
                x = heads[token, head]
                point = complex(x[pair], x[pair + half])
                expected = point * cmath.exp(1j * position * frequency) * 1.5
                found = complex(turned[token, head, pair], turned[token, head, pair + half])
                assert abs(found - expected) < 2e-4  # float32 angles of up to 1000


def test_scores_depend_on_the_distance_only() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 16), torch.randn(1, 1, 16)
    frequencies = torch.rand(8)

    def score(query_position: int, key_position: int) -> float:
        positions = torch.tensor([query_position, key_position])
        cos, sin = rotary_tables(positions, frequencies, scale=1.0, dtype=torch.float32)
        turned = rotary(torch.cat((query, key)), cos, sin)
        return float((turned[0] * turned[1]).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_close_to_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    positions, frequencies = torch.arange(9), torch.rand(4)
    heads = torch.randn(9, 2, 8).to(dtype)
    exact = rotary(heads.float(), *rotary_tables(positions, frequencies, scale=1.0, dtype=torch.float32))
    turned = rotary(heads, *rotary_tables(positions, frequencies, scale=1.0, dtype=dtype))
    assert turned.dtype == dtype
    assert (turned - exact).abs().max() < 4 * torch.finfo(dtype).eps * heads.abs().max()


def test_a_slice_of_a_merged_projection_is_turned_without_touching_it() -> None:
    torch.manual_seed(0)
    merged = torch.randn(3, 5, 8)
    before = merged.clone()
    tables = rotary_tables(torch.tensor([4, 5, 6]), torch.rand(4), scale=1.0, dtype=torch.float32)
    turned = rotary(merged[:, :3], *tables)
    assert torch.equal(merged, before)
    assert turned.is_contiguous()
    assert torch.equal(turned, rotary(merged[:, :3].contiguous(), *tables))
