from __future__ import annotations

import cmath
import math

import pytest
import torch

from graphllm.kernels.rotary import QueryGrowth, rotary_ref, rotary_tables_ref


def tables(
    positions: torch.Tensor,
    frequencies: torch.Tensor,
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    out = torch.full((2, len(positions), 2 * len(frequencies)), torch.nan, dtype=dtype)
    return rotary_tables_ref(positions, frequencies, scale=scale, out=out)


def turned(heads: torch.Tensor, tables: torch.Tensor, *, is_interleaved: bool = False) -> torch.Tensor:
    heads = heads.clone()
    rotary_ref(heads, tables, is_interleaved=is_interleaved)
    return heads


@pytest.mark.parametrize("head_dim", [2, 6, 10, 64])
@pytest.mark.parametrize("num_heads", [1, 3])
def test_pairs_of_dimensions_turn_like_complex_numbers(head_dim: int, num_heads: int) -> None:
    torch.manual_seed(0)
    positions = torch.tensor([0, 1, 5, 1000])
    frequencies = torch.rand(head_dim // 2)
    heads = torch.randn(4, num_heads, head_dim)
    found_heads = turned(heads, tables(positions, frequencies, scale=1.5))
    half = head_dim // 2
    for token, position in enumerate(positions.tolist()):
        for head in range(num_heads):
            for pair, frequency in enumerate(frequencies.tolist()):
                x = heads[token, head]
                point = complex(x[pair], x[pair + half])
                expected = point * cmath.exp(1j * position * frequency) * 1.5
                found = complex(found_heads[token, head, pair], found_heads[token, head, pair + half])
                assert abs(found - expected) < 2e-4  # float32 angles of up to 1000


@pytest.mark.parametrize("rotary_dim", [2, 6, 10])
def test_neighbours_turn_as_the_halves_of_the_same_numbers_in_another_order(rotary_dim: int) -> None:
    torch.manual_seed(0)
    heads = torch.randn(4, 3, 10)
    angles = tables(torch.tensor([0, 1, 5, 1000]), torch.rand(rotary_dim // 2), scale=1.5)
    order = torch.cat((torch.arange(rotary_dim).view(-1, 2).t().flatten(), torch.arange(rotary_dim, 10)))
    expected = torch.empty_like(heads)
    expected[..., order] = turned(heads[..., order], angles)
    found = turned(heads, angles, is_interleaved=True)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-6)
    assert torch.equal(found[..., rotary_dim:], heads[..., rotary_dim:])


def test_scores_depend_on_the_distance_only() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 16), torch.randn(1, 1, 16)
    frequencies = torch.rand(8)

    def score(query_position: int, key_position: int) -> float:
        positions = torch.tensor([query_position, key_position])
        heads = turned(torch.cat((query, key)), tables(positions, frequencies))
        return float((heads[0] * heads[1]).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_close_to_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    positions, frequencies = torch.arange(9), torch.rand(4)
    heads = torch.randn(9, 2, 8).to(dtype)
    exact = turned(heads.float(), tables(positions, frequencies))
    found = turned(heads, tables(positions, frequencies, dtype=dtype))
    assert found.dtype == dtype
    assert (found - exact).abs().max() < 4 * torch.finfo(dtype).eps * heads.abs().max()


def test_a_slice_of_a_merged_projection_is_turned_without_touching_the_rest() -> None:
    torch.manual_seed(0)
    merged = torch.randn(3, 5, 8)
    before = merged.clone()
    angles = tables(torch.tensor([4, 5, 6]), torch.rand(4))
    rotary_ref(merged[:, :3], angles)
    assert torch.equal(merged[:, 3:], before[:, 3:])
    assert torch.equal(merged[:, :3], turned(before[:, :3].contiguous(), angles))


def test_both_halves_of_the_tables_hold_the_same_angles() -> None:
    torch.manual_seed(0)
    cos, signed_sin = tables(torch.arange(7), torch.rand(5), scale=1.25)
    assert torch.equal(cos[:, :5], cos[:, 5:])
    assert torch.equal(signed_sin[:, :5], -signed_sin[:, 5:])
    assert torch.allclose(cos**2 + signed_sin**2, torch.tensor(1.25**2))


def test_queries_grow_at_every_multiple_of_the_interval_and_keys_do_not() -> None:
    positions, frequencies = torch.tensor([0, 7, 8, 15, 16, 800]), torch.rand(4)
    out = torch.full((4, 6, 8), torch.nan)
    growth = QueryGrowth(growth=0.5, interval=8)
    rotary_tables_ref(positions, frequencies, scale=1.25, query_growth=growth, out=out)
    assert torch.equal(out[:2], tables(positions, frequencies, scale=1.25))
    expected = torch.tensor([1.0 + 0.5 * math.log(n) for n in (1, 1, 2, 2, 3, 101)])
    torch.testing.assert_close(out[2:], out[:2] * expected[:, None])
