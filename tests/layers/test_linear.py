from __future__ import annotations

import torch
from torch import nn

from graphllm.arena import Arena
from graphllm.kernels.linear import linear_ref
from graphllm.layers.linear import Linear
from graphllm.quant.unquantized import Unquantized

CPU = torch.device("cpu")


def merged_linear(*, bias: bool) -> Linear:
    return Linear(
        5,
        {"q": 6, "k": 2, "v": 3},
        bias=bias,
        scheme=Unquantized(linear_ref),
        device=CPU,
        dtype=torch.float32,
    )


def test_merged_layer_computes_its_parts_side_by_side() -> None:
    torch.manual_seed(0)
    merged = merged_linear(bias=True)
    slots = merged.weight_slots()
    assert {name: slot.shape for name, slot in slots.items()} == {
        "q.weight": (6, 5),
        "q.bias": (6,),
        "k.weight": (2, 5),
        "k.bias": (2,),
        "v.weight": (3, 5),
        "v.bias": (3,),
    }
    values = {name: torch.randn(slot.shape) for name, slot in slots.items()}
    for name, slot in slots.items():
        slot.load(values[name])
    x = torch.randn(4, 5)
    parts = [nn.functional.linear(x, values[f"{part}.weight"], values[f"{part}.bias"]) for part in "qkv"]
    out = merged(x, arena=Arena(CPU), name="out")
    torch.testing.assert_close(out, torch.cat(parts, dim=1))


def test_layer_that_is_not_merged_has_plain_names() -> None:
    layer = Linear(5, {"": 3}, bias=True, scheme=Unquantized(linear_ref), device=CPU, dtype=torch.float32)
    assert set(layer.weight_slots()) == {"weight", "bias"}


def test_layer_without_bias_has_none() -> None:
    merged = merged_linear(bias=False)
    assert set(merged.weight_slots()) == {"q.weight", "k.weight", "v.weight"}
    assert [name for name, _ in merged.named_parameters()] == ["weight"]


def test_loading_a_part_leaves_the_others_alone() -> None:
    merged = merged_linear(bias=False)
    merged.weight.fill_(7.0)
    merged.weight_slots()["k.weight"].load(torch.zeros(2, 5))
    assert (merged.weight == 0).all(dim=1).tolist() == [False] * 6 + [True] * 2 + [False] * 3


def test_weights_are_stored_in_the_layers_format_whatever_the_checkpoints() -> None:
    layer = Linear(4, {"": 2}, bias=False, scheme=Unquantized(linear_ref), device=CPU, dtype=torch.bfloat16)
    layer.weight_slots()["weight"].load(torch.full((2, 4), 1.001))
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight, torch.ones(2, 4, dtype=torch.bfloat16))
