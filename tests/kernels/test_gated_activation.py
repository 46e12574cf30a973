from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from graphllm.kernels.gated_activation import Activation, gated_activation

FORMULAS: dict[Activation, Callable[[float], float]] = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 2), (3, 10), (17, 34), (0, 8)])
def test_equals_the_formula_in_python_floats(
    shape: tuple[int, int], dtype: torch.dtype, activation: Activation
) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(shape).mul_(2).to(dtype)
    before = gate_up.clone()
    activated = torch.full((shape[0], shape[1] // 2), torch.nan, dtype=dtype)
    assert gated_activation(gate_up, activation, out=activated) is activated
    assert torch.equal(gate_up, before)
    for row, values in zip(gate_up.tolist(), activated.tolist(), strict=True):
        gates, ups = row[: shape[1] // 2], row[shape[1] // 2 :]
        for gate, up, value in zip(gates, ups, values, strict=True):
            assert value == pytest.approx(
                FORMULAS[activation](gate) * up, rel=TOLERANCE[dtype], abs=TOLERANCE[dtype]
            )
