"""The gated activation's kernel against its reference."""

from __future__ import annotations

import pytest
import torch

from graphllm.kernels.gated_activation import Activation, gated_activation, gated_activation_ref
from graphllm.kernels.triton_support import INTERPRETED
from tests.kernels.device import DEVICE

pytestmark = pytest.mark.triton

ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh", "relu")
# Two roundings, which the interpreter does to bfloat16 by truncation.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6 if INTERPRETED else 2**-7}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("num_tokens", "intermediate"), [(1, 1), (3, 7), (2, 1024), (2, 1536), (3, 1100), (0, 64)]
)
def test_kernel_equals_its_reference(
    num_tokens: int, intermediate: int, dtype: torch.dtype, activation: Activation
) -> None:
    generator = torch.Generator().manual_seed(intermediate)
    gate_up = torch.randn(num_tokens, 2 * intermediate, generator=generator).mul_(3).to(dtype).to(DEVICE)
    before = gate_up.clone()
    memory = torch.full((num_tokens + 2, intermediate), torch.nan, dtype=dtype, device=DEVICE)
    out = memory[1:-1]
    assert gated_activation(gate_up, activation, out=out) is out
    expected = gated_activation_ref(gate_up, activation, out=torch.empty_like(out))
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(gate_up, before)
    assert memory[0].isnan().all() and memory[-1].isnan().all()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # infinity is meant to be reached
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_gates_neither_overflow_nor_lose_their_sign(activation: Activation) -> None:
    gates = torch.tensor([-3e38, -1e4, -200.0, -90.0, -20.0, -0.0, 0.0, 20.0, 90.0, 200.0, 1e4, 3e38])
    gate_up = torch.cat((gates, torch.ones(12)))[None].to(DEVICE)
    out = gated_activation(gate_up, activation, out=torch.empty(1, 12, device=DEVICE))[0].cpu()
    assert torch.equal(out[7:], gates[7:])
    assert (out[:4].abs() < 1e-30).all() and (out[4].abs() < 1e-7) and (out[5:7] == 0).all()


def test_the_activation_is_rounded_before_it_is_multiplied() -> None:
    # float16, because the interpreter rounds it correctly.
    gate_up = torch.randn(4, 4096, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    out = torch.empty(4, 2048, dtype=torch.float16, device=DEVICE)
    gated_activation(gate_up, "silu", out=out)
    gate, up = gate_up.chunk(2, dim=-1)
    rounded_once = (torch.nn.functional.silu(gate.float()) * up.float()).half()
    expected = gated_activation_ref(gate_up, "silu", out=torch.empty_like(out))
    assert (out != expected).float().mean() < 0.01
    assert (out != rounded_once).float().mean() > 0.1
