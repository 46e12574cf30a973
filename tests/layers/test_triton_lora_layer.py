"""A feed-forward layer of packed weights, whose kernels fuse gate, up and activation, beside adapters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphllm.arena import Arena
from graphllm.kernels.linear import linear_ref
from graphllm.layers.lora import AdapterMemory, TokenAdapters
from graphllm.layers.mlp import GatedMLP
from graphllm.quant.int8 import Int8
from graphllm.quant.scheme_source import one_scheme
from tests.kernels.device import DEVICE

pytestmark = pytest.mark.triton

HIDDEN, INTERMEDIATE, RANK = 48, 80, 8
FACTOR = 0.75


def plain_rows(mlp: GatedMLP, name: str) -> Tensor:
    layer = mlp.get_submodule(name)
    return layer.scheme.dequantized_rows(layer, 0, layer.out_features, dtype=torch.float32)


def feed_forward(gate_up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    gate, up = (x @ gate_up.t()).chunk(2, dim=1)
    return (torch.nn.functional.silu(gate) * up) @ down.t()


@pytest.mark.parametrize(
    "of_tokens", [[1, -1, 0], [-1, -1, -1, 0, 0, 0, 0, 1, 1, -1, 1]], ids=["few", "many"]
)
@torch.inference_mode()
def test_the_fused_product_gives_way_to_adapters(of_tokens: list[int]) -> None:
    scheme = Int8(linear_ref)
    mlp = GatedMLP(
        HIDDEN,
        INTERMEDIATE,
        activation="silu",
        bias=False,
        schemes=one_scheme(scheme),
        device=DEVICE,
        dtype=torch.float32,
    )
    generator = torch.Generator(DEVICE).manual_seed(0)
    for layer in (mlp.gate_up, mlp.down):
        scheme.fill_random(layer, generator=generator, deviation=0.2)
    arena = Arena(DEVICE)
    tokens = TokenAdapters(torch.tensor(of_tokens, dtype=torch.int32, device=DEVICE), arena)
    linears = {"gate_up": mlp.gate_up, "down": mlp.down}
    memory = AdapterMemory(linears, max_loras=2, max_rank=RANK, dtype=torch.float32, tokens=tokens)
    weights = {name: plain_rows(mlp, name) for name in linears}
    adapted = []
    for adapter in range(2):
        of_up = memory.layout.views(memory.memory, "gate_up")  # the gate is left alone
        of_up.down[adapter, 1].normal_(0, 0.2, generator=generator)
        of_up.up[adapter, INTERMEDIATE:].normal_(0, 0.5, generator=generator)
        of_up.scales[adapter, 1] = FACTOR
        delta = FACTOR * of_up.up[adapter, INTERMEDIATE:] @ of_up.down[adapter, 1]
        adapted.append(weights["gate_up"] + torch.cat((torch.zeros_like(delta), delta)))
    x = torch.randn(len(of_tokens), HIDDEN, device=DEVICE, generator=generator)
    activated = torch.empty(len(x), INTERMEDIATE, device=DEVICE)
    assert scheme.apply_gated(mlp.gate_up, x, "silu", out=activated), "there is a fused product"
    base = feed_forward(weights["gate_up"], weights["down"], x)
    expected = base.clone()
    for adapter, gate_up in enumerate(adapted):
        own = tokens.of_tokens == adapter
        expected[own] = feed_forward(gate_up, weights["down"], x[own])
    assert (expected - base).abs().max() > 0.1
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(mlp(x, arena=arena), base, **close)  # not in play
    tokens.in_play = True
    torch.testing.assert_close(mlp(x, arena=arena), expected, **close)
