"""Layers that compressed-tensors' own library wrote, and what it computes with them.

golden/compressed_tensors.json has, of compressed-tensors 0.20.0, a configuration for each scheme, the tensors
of a linear layer [32, 64] as its compressor saves them, and the layer's output for one x [8, 64], by the
library's own rounding of weights and activations in float32; data are bytes in base64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graphllm.arena import Arena
from graphllm.kernels import packed_cpu
from graphllm.kernels.linear import linear_ref
from graphllm.layers.linear import Linear
from graphllm.models.quantization import read_quantization
from tests.models.test_packed_checkpoints import configured_llama
from tests.quant.test_bitsandbytes import from_base64

GOLDEN = json.loads(
    (Path(__file__).parent / "golden" / "compressed_tensors.json").read_text(encoding="utf-8")
)
CPU = torch.device("cpu")
# The library divides a token's largest number by 127.5, and
# the kernels that serve such checkpoints by 127.
TOLERANCE = {"w8a8 int8, tokens": 1e-2}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", [name for name in GOLDEN if name != "x"])
def test_products_are_the_librarys_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_cpu, "takes_library", lambda weight: False)
    case: dict[str, Any] = GOLDEN[name]
    x, expected = from_base64(**GOLDEN["x"]), from_base64(**case["out"])
    rules = read_quantization(configured_llama(quantization_config=case["section"]), asked=None).rules
    assert rules is not None
    form = rules.form_of("model.layers.0.mlp.down_proj", None)
    assert form is not None
    scheme = form.make_scheme(linear_ref, num_experts=0)
    layer = Linear(64, {"": 32}, bias=False, scheme=scheme, device=CPU, dtype=torch.float32)
    slots = {name: slot for name, slot in layer.weight_slots().items() if not slot.is_optional}
    assert slots.keys() == case["tensors"].keys()
    for tensor_name, stored in case["tensors"].items():
        tensor = from_base64(**stored)
        assert slots[tensor_name].shape in (None, tuple(tensor.shape))
        assert tensor.dtype in slots[tensor_name].dtypes
        slots[tensor_name].load(tensor)
    scheme.finish(layer)
    found = layer(x, arena=Arena(CPU), name="out")
    assert relative_error(found, expected) < TOLERANCE.get(name, 1e-6)
    plain = x @ scheme.dequantized_rows(layer, 0, 32, dtype=torch.float32).t()
    if "w8a8" in name:
        assert relative_error(plain, expected) > 5e-3, "activations that are not rounded are told apart"
