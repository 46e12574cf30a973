from __future__ import annotations

import math

import pytest
import torch

from graphllm.kernels.rotary import QueryGrowth, rotary_tables, rotary_tables_ref
from tests.kernels.device import DEVICE

pytestmark = pytest.mark.triton


def tables(
    positions: torch.Tensor, frequencies: torch.Tensor, *, scale: float, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The kernel's tables; fails where it writes outside them."""
    size = (2, len(positions), 2 * len(frequencies))
    guarded = torch.full((math.prod(size) + 128,), torch.nan, dtype=dtype, device=DEVICE)
    out = guarded[64:-64].view(size)
    found = rotary_tables(positions.to(DEVICE), frequencies.to(DEVICE), scale=scale, out=out)
    assert found is out
    assert guarded[:64].isnan().all() and guarded[-64:].isnan().all()
    return out.cpu()


def reference(
    positions: torch.Tensor, frequencies: torch.Tensor, *, scale: float, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    out = torch.empty(2, len(positions), 2 * len(frequencies), dtype=dtype)
    return rotary_tables_ref(positions, frequencies, scale=scale, out=out)


def model_frequencies(head_dim: int) -> torch.Tensor:
    return 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2) / head_dim)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256, 6])
def test_tables_are_the_references_up_to_131072(head_dim: int) -> None:
    torch.manual_seed(head_dim)
    edges = torch.tensor([0, 1, 2, 131071, 131072])
    positions = torch.cat((edges, torch.randint(131072, (28,))))
    frequencies = model_frequencies(head_dim)
    found = tables(positions, frequencies, scale=1.0)
    assert (found - reference(positions, frequencies, scale=1.0)).abs().max() < 2e-6


def test_tables_are_the_references_up_to_a_million() -> None:
    torch.manual_seed(0)
    positions = torch.cat((torch.tensor([999_999, 1_000_000]), torch.randint(131072, 1_000_000, (126,))))
    frequencies = torch.cat((torch.ones(1), torch.rand(31)))
    found = tables(positions, frequencies, scale=1.0)
    assert (found - reference(positions, frequencies, scale=1.0)).abs().max() < 1e-5


def test_angles_beside_every_quarter_turn_keep_their_signs() -> None:
    # A frequency that hits multiples of pi / 4 on the nose, where quadrants and the series' ends meet.
    positions = torch.arange(64)
    around = torch.tensor([-1e-6, 0.0, 1e-6])
    frequencies = torch.cat((math.pi / 4 + around, math.pi / 2 + around, math.pi + around))
    exact = positions.float()[:, None] * frequencies
    cos, signed_sin = tables(positions, frequencies, scale=1.0)
    assert (cos[:, :9].double() - exact.double().cos()).abs().max() < 2e-7
    assert (signed_sin[:, 9:].double() - exact.double().sin()).abs().max() < 2e-7
    assert torch.equal(cos[:, 9:], cos[:, :9])
    assert torch.equal(signed_sin[:, :9], -signed_sin[:, 9:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_are_rounded_to_the_models_dtype_after_scaling(dtype: torch.dtype) -> None:
    positions, frequencies = torch.arange(0, 5000, 317), model_frequencies(96)
    found = tables(positions, frequencies, scale=1.3, dtype=dtype)
    expected = reference(positions, frequencies, scale=1.3)
    assert found.dtype == dtype
    # The interpreter truncates: one unit in the last place, not half of one.
    assert ((found - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + 1e-6).all()


def test_no_tokens_are_no_work() -> None:
    assert tables(torch.zeros(0, dtype=torch.int64), model_frequencies(64), scale=1.0).shape == (2, 0, 64)


@pytest.mark.parametrize("interval", [16384, 1000])
def test_tables_of_growing_queries_are_the_references_on_both_sides_of_every_step(interval: int) -> None:
    multiples = torch.arange(0, 131072, interval)
    positions = torch.cat((multiples, multiples[1:] - 1, multiples + 1))
    frequencies, growth = model_frequencies(80), QueryGrowth(growth=0.1, interval=interval)
    found, expected = (torch.full((4, len(positions), 80), torch.nan) for _ in range(2))
    on_device = torch.empty_like(found, device=DEVICE)
    rotary_tables(positions.to(DEVICE), frequencies.to(DEVICE), scale=1.2, query_growth=growth, out=on_device)
    found.copy_(on_device)
    rotary_tables_ref(positions, frequencies, scale=1.2, query_growth=growth, out=expected)
    assert (found - expected).abs().max() < 4e-6
    assert torch.equal(found[:2].cpu(), tables(positions, frequencies, scale=1.2))
    early = positions < interval
    assert torch.equal(found[2:, early], found[:2, early])
