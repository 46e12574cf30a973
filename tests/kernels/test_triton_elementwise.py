"""The small kernels between products against their references: one element in, one element out."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from graphllm.kernels.activation import activation, activation_ref
from graphllm.kernels.add_rows import add_rows, add_rows_ref
from graphllm.kernels.gated_activation import Activation
from graphllm.kernels.logit_adjustment import adjust_logits, adjust_logits_ref
from graphllm.kernels.residual_add import residual_add, residual_add_ref
from graphllm.kernels.triton_support import INTERPRETED
from tests.kernels.device import DEVICE

pytestmark = pytest.mark.triton

# A rounding to bfloat16, which the interpreter does by truncation.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6 if INTERPRETED else 2**-7}
SHAPES = [(1, 1), (3, 7), (2, 1024), (2, 1536), (3, 1100), (0, 64)]


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).mul_(3).to(dtype).to(DEVICE)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of e^-x, where f is 0
@pytest.mark.parametrize("kind", get_args(Activation))
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_activation_equals_its_reference(
    shape: tuple[int, int], dtype: torch.dtype, kind: Activation
) -> None:
    x = random(*shape, dtype=dtype)
    memory = torch.full((shape[0] + 2, shape[1]), torch.nan, dtype=dtype, device=DEVICE)
    assert activation(x, kind, out=memory[1:-1]).data_ptr() == memory[1:-1].data_ptr()
    expected = activation_ref(x, kind, out=torch.empty_like(x))
    assert_close(memory[1:-1], expected)
    assert memory[0].isnan().all() and memory[-1].isnan().all()
    assert_close(activation(x, kind, out=x), expected)  # in place


@pytest.mark.parametrize("scale", [1.0, 0.22])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_add_equals_its_reference(shape: tuple[int, int], dtype: torch.dtype, scale: float) -> None:
    x, residual = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    before, expected = x.clone(), residual_add_ref(x, residual.clone(), scale=scale)
    assert residual_add(x, residual, scale=scale) is residual
    assert_close(residual, expected)
    assert torch.equal(x, before)


def test_the_scaled_part_is_rounded_before_it_is_added() -> None:
    # float16, because the interpreter rounds it correctly.
    x, residual = random(4, 1024, dtype=torch.float16), random(4, 1024, dtype=torch.float16, seed=1)
    exact = (residual.float() + x.float() * 0.22).half()
    expected = residual_add_ref(x, residual.clone(), scale=0.22)
    assert torch.equal(residual_add(x, residual, scale=0.22), expected)
    assert (expected != exact).float().mean() > 0.02


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("hidden", [1, 48, 80, 1024, 2304])
def test_add_rows_equals_its_reference(hidden: int, dtype: torch.dtype) -> None:
    table = random(11, hidden, dtype=dtype)
    table[5] = torch.nan  # nobody's row
    rows = torch.tensor([8, 0, 3, 3, 7], device=DEVICE)
    out = random(5, hidden, dtype=dtype, seed=1)
    expected = add_rows_ref(table[2:], rows, out=out.clone()) if hidden else out
    assert add_rows(table[2:], rows, out=out) is out  # a table that begins elsewhere, as OPT's
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True)
    assert out.isnan().any(dim=1).tolist() == [False, False, True, True, False]


@pytest.mark.parametrize(("multiplier", "softcap"), [(1.0, 30.0), (0.0625, None), (0.25, 3.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_adjusted_logits_equal_their_reference(
    shape: tuple[int, int], multiplier: float, softcap: float | None
) -> None:
    logits = random(*shape, dtype=torch.float32).mul_(10)
    expected = adjust_logits_ref(logits.clone(), multiplier=multiplier, softcap=softcap)
    assert adjust_logits(logits, multiplier=multiplier, softcap=softcap) is logits
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=4e-6)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # infinity is meant to be reached
def test_a_cap_holds_and_keeps_the_order_of_what_is_far_from_it() -> None:
    logits = torch.tensor([[-1e30, -100.0, -1.0, 0.0, 1.0, 2.0, 100.0, 1e30]], device=DEVICE)
    capped = adjust_logits(logits.clone(), softcap=30.0)[0].cpu()
    assert capped.abs().max() <= 30.0 and (capped.diff()[1:-1] > 0).all()
    assert torch.allclose(capped[2:6], logits[0, 2:6].cpu(), atol=0.01)


def test_no_change_of_logits_is_no_launch() -> None:
    logits = random(2, 7, dtype=torch.float32)
    before = logits.clone()
    assert torch.equal(adjust_logits(logits), before)
