"""bitsandbytes checkpoints: what its own library wrote, and whole models written as the format says.

golden/bitsandbytes.json has what bitsandbytes 0.50.2 wrote on a CPU, of Linear4bit and Linear8bitLt with
random weights [2, 128], and beside it what the library makes of its own tensors; data are bytes in base64.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graphllm.errors import CheckpointError
from graphllm.kernels.linear import linear_ref
from graphllm.layers.linear import Linear
from graphllm.models.quantization import read_quantization
from graphllm.quant.bitsandbytes import CODEBOOKS, EightBitForm, FourBitForm
from graphllm.quant.scheme import WeightForm
from tests.models.equality import error, prompt, theirs
from tests.models.memory_checkpoint import MemoryCheckpoint, tiny_llama
from tests.models.paged_model import PagedModel
from tests.quant.scaled_models import LINEAR, as_checkpoint
from tests.quant.test_scaled_checkpoints import load

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parent / "golden" / "bitsandbytes.json"
SHAPE = {"hidden_size": 128, "intermediate_size": 192}


def from_base64(dtype: str, shape: list[int], data: str) -> Tensor:
    numbers = torch.frombuffer(bytearray(base64.b64decode(data)), dtype=getattr(torch, dtype))
    return numbers.view(shape)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("nf4", FourBitForm(kind="nf4", is_nested=False)),
        ("nf4_nested", FourBitForm(kind="nf4", is_nested=True)),
        ("fp4_nested", FourBitForm(kind="fp4", is_nested=True)),
        ("int8", EightBitForm()),
    ],
)
def test_weights_are_what_the_library_makes_of_its_own_tensors(name: str, form: WeightForm) -> None:
    stored = {
        key.removeprefix(f"{name}."): from_base64(**tensor)
        for key, tensor in json.loads(GOLDEN.read_text(encoding="utf-8")).items()
        if key.startswith(f"{name}.")
    }
    expected = stored.pop("dequantized")
    scheme = form.make_scheme(linear_ref, num_experts=0)
    layer = Linear(128, {"": 2}, bias=False, scheme=scheme, device=CPU, dtype=torch.float32)
    slots = layer.weight_slots()
    assert stored.keys() == slots.keys()
    for key, tensor in stored.items():
        assert slots[key].shape in (None, tuple(tensor.shape)) and tensor.dtype in slots[key].dtypes
        slots[key].load(tensor)
    found = scheme.dequantized_rows(layer, 0, 2, dtype=torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def four_bits(weight: Tensor, kind: str, *, is_nested: bool) -> tuple[dict[str, Tensor], Tensor]:
    """A weight's tensors, and what they mean; absmax are rounded down to 8 bits by a map of their own."""
    codebook = torch.tensor(CODEBOOKS[kind])  # type: ignore[index]
    blocks = weight.reshape(-1, 64)
    absmax = blocks.abs().amax(1)
    tensors: dict[str, Tensor] = {"weight.quant_map": codebook}
    state: dict[str, Any] = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16"}
    state["shape"] = list(weight.shape)
    if is_nested:
        offset, nested_map = float(absmax.mean()), torch.linspace(-1, 1, 256)
        pieces = (absmax - offset).split(256)
        nested = torch.stack([piece.abs().amax() for piece in pieces])
        factors = nested.repeat_interleave(256)[: len(absmax)]
        stored = ((absmax - offset) / factors)[:, None].sub(nested_map).abs().argmin(1)
        absmax = nested_map[stored] * factors + offset
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        tensors |= {"weight.absmax": stored.to(torch.uint8), "weight.nested_absmax": nested}
        tensors["weight.nested_quant_map"] = nested_map
    else:
        tensors["weight.absmax"] = absmax
    codes = (blocks / absmax[:, None])[:, :, None].sub(codebook).abs().argmin(2)
    pairs = codes.reshape(-1, 2).to(torch.uint8)
    tensors["weight"] = (pairs[:, :1] << 4) | pairs[:, 1:]
    packed = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = packed
    return tensors, (codebook[codes] * absmax[:, None]).view_as(weight)


def eight_bits(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    absmax = weight.abs().amax(1)
    stored = (weight * (127 / absmax[:, None])).round().to(torch.int8)
    tensors = {"weight": stored, "SCB": absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, stored.float() * (absmax[:, None] / 127)


def checkpoint_of(kind: str, *, is_nested: bool = False) -> tuple[MemoryCheckpoint, Any]:
    """A checkpoint, and transformers' model of what its tensors mean."""
    model = tiny_llama(**SHAPE)
    checkpoint = as_checkpoint(model)
    checkpoint.hf_config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": kind != "int8",
        "load_in_8bit": kind == "int8",
        "bnb_4bit_quant_type": "fp4" if kind == "int8" else kind,
        "bnb_4bit_use_double_quant": is_nested,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": ["lm_head"],
    }
    for name in [name for name in checkpoint.tensors if LINEAR.search(name)]:
        weight = checkpoint.tensors.pop(name)
        tensors, meant = (
            eight_bits(weight) if kind == "int8" else four_bits(weight, kind, is_nested=is_nested)
        )
        beginning = name.removesuffix("weight")
        checkpoint.tensors |= {beginning + last: tensor for last, tensor in tensors.items()}
        model.get_parameter(name).data.copy_(meant)
    return checkpoint, model


@pytest.mark.parametrize(
    ("kind", "is_nested"), [("nf4", True), ("nf4", False), ("fp4", False), ("int8", False)]
)
def test_logits_are_those_of_the_weights_that_are_meant(kind: str, is_nested: bool) -> None:
    checkpoint, meant = checkpoint_of(kind, is_nested=is_nested)
    token_ids, ours = prompt(50), load(checkpoint)
    logits = PagedModel(ours, ours.layers[0].attention.backend).step([(0, token_ids)])
    # Products of 8-bit codes round activations to 15 bits on a CPU (`kernels/packed_cpu.py`).
    assert error(logits, theirs(meant, token_ids)) < (5e-4 if kind == "int8" else 1e-4)
    assert error(logits, theirs(tiny_llama(**SHAPE), token_ids)) > 1e-3
    assert read_quantization(checkpoint, asked="bitsandbytes").description.startswith("bitsandbytes")


NAME = "model.layers.1.self_attn.k_proj"
STATE = "weight.quant_state.bitsandbytes__nf4"


def state_with(**changes: Any) -> Tensor:
    """The state of the layer that is damaged, but for the changes."""
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 128]} | changes
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


NAN = torch.full((128,), torch.nan)
DAMAGE: list[tuple[str, Tensor | None, str]] = [
    ("weight.quant_map", None, f"'{NAME}.weight.quant_map' is missing"),
    ("weight.quant_map", torch.linspace(-1, 1, 16), "is not the codebook of nf4"),
    ("weight", torch.zeros(64, 128, dtype=torch.uint8), f"'{NAME}.weight' has shape [64, 128]"),
    ("weight.absmax", torch.zeros(128, dtype=torch.uint8), "holds uint8, not float32"),
    (STATE, state_with(blocksize=128), "says 'blocksize' is 128, not 64"),
    (STATE, state_with(shape=[128, 64]), "says 'shape' is [128, 64], not [64, 128]"),
    (STATE, torch.tensor([200, 1], dtype=torch.uint8), "is no JSON"),
    (STATE, torch.tensor([[91, 93]], dtype=torch.uint8), "is no JSON object"),
    (STATE, torch.tensor([], dtype=torch.uint8), "is no JSON"),
    ("weight.absmax", NAN, "its scales are not all finite"),
]
NESTED_DAMAGE: list[tuple[str, Tensor, str]] = [
    ("weight.nested_absmax", torch.full((1,), torch.inf), "its scales are not all finite"),
    ("weight.nested_quant_map", torch.full((256,), torch.nan), "its scales are not all finite"),
    ("weight.nested_quant_map", torch.zeros(16), f"'{NAME}.weight.nested_quant_map' has shape [16]"),
    (STATE, state_with(nested_blocksize=64), "says 'nested_blocksize' is 64, not 256"),
    (STATE, state_with(nested_blocksize=256), "'nested_offset' is None, not a number"),
    (STATE, state_with(nested_blocksize=256, nested_offset=10**400), "'nested_offset' is 1000"),
    (STATE, state_with(nested_blocksize=256, nested_offset=torch.nan), "its scales are not all finite"),
]


@pytest.mark.parametrize(
    ("is_nested", "tensor", "value", "complaint"),
    [*((False, *damage) for damage in DAMAGE), *((True, *damage) for damage in NESTED_DAMAGE)],
)
def test_damage_is_refused_by_name(
    is_nested: bool, tensor: str, value: Tensor | None, complaint: str
) -> None:
    checkpoint, _ = checkpoint_of("nf4", is_nested=is_nested)
    del checkpoint.tensors[f"{NAME}.{tensor}"]
    if value is not None:
        checkpoint.tensors[f"{NAME}.{tensor}"] = value
    with pytest.raises(CheckpointError) as caught:
        load(checkpoint)
    assert complaint in caught.value.message and NAME in caught.value.message


@pytest.mark.parametrize(
    ("tensor", "value", "complaint"),
    [
        ("SCB", torch.full((64,), torch.nan), "its scales are not all finite"),
        ("SCB", torch.ones(64, 1), f"'{NAME}.SCB' has shape [64, 1]"),
        ("weight", torch.zeros(64, 128), "holds float32, not int8"),
        ("weight_format", torch.tensor(2, dtype=torch.uint8), "is 2; only 0, row by row"),
    ],
)
def test_damage_of_eight_bits_is_refused_by_name(tensor: str, value: Tensor, complaint: str) -> None:
    checkpoint, _ = checkpoint_of("int8")
    checkpoint.tensors[f"{NAME}.{tensor}"] = value
    with pytest.raises(CheckpointError) as caught:
        load(checkpoint)
    assert complaint in caught.value.message and NAME in caught.value.message


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"load_in_8bit": True}, "load_in_4bit"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage"),
        ({"bnb_4bit_quant_type": "nf3"}, "bnb_4bit_quant_type"),
        ({"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight"),
    ],
)
def test_a_configuration_that_is_not_served_is_refused_by_its_key(keys: Any, complaint: str) -> None:
    checkpoint, _ = checkpoint_of("nf4")
    checkpoint.hf_config["quantization_config"] |= keys
    with pytest.raises(CheckpointError, match=complaint):
        load(checkpoint)
