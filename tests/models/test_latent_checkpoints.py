"""What becomes of latent attention's projection out of the latent, which no product multiplies as stored."""

from __future__ import annotations

import pytest
import torch

from graphllm.attention.paged import PagedAttention
from graphllm.errors import CheckpointError
from graphllm.kernels.linear import linear_ref
from graphllm.layers.head_projection import HeadProjection
from graphllm.models.weights import load_model
from tests.models import packers
from tests.models.equality import CPU, TOLERANCE, error, prompt
from tests.models.memory_checkpoint import MemoryCheckpoint, as_checkpoint
from tests.models.moe_families import DEEPSEEK_V2
from tests.models.paged_model import BLOCK_SIZE, PagedModel

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
NAME = "model.layers.{}.self_attn.kv_b_proj"


def model_of(checkpoint: MemoryCheckpoint) -> PagedModel:
    backend = PagedAttention(block_size=BLOCK_SIZE)
    model = load_model(checkpoint, backend=backend, device=CPU, dtype=torch.float32, product=linear_ref)
    return PagedModel(model, backend)


def test_a_packed_projection_is_taken_as_the_numbers_that_it_stands_for() -> None:
    plain = as_checkpoint(DEEPSEEK_V2.tiny("queries from a latent", kv_lora_rank=64, qk_nope_head_dim=12))
    tensors = dict(plain.tensors)
    packer = packers.gptq(bits=4, group_size=32, symmetric=True)
    for layer in range(3):
        name = NAME.format(layer)
        stored, meant = packer(name, tensors.pop(f"{name}.weight"))
        tensors |= {f"{name}.{tensor}": value for tensor, value in stored.items()}
        plain.tensors[f"{name}.weight"] = meant
    packed = MemoryCheckpoint(plain.hf_config | {"quantization_config": GPTQ}, tensors)
    found, expected = (model_of(checkpoint) for checkpoint in (packed, plain))
    assert isinstance(found.model.layers[0].attention.key_value, HeadProjection)
    token_ids = prompt(20)
    assert error(found.step([(0, token_ids)]), expected.step([(0, token_ids)])) < TOLERANCE


@pytest.mark.parametrize("rows", [slice(0, 87), slice(0, 0)])
def test_a_projection_of_another_size_is_refused_by_name(rows: slice) -> None:
    checkpoint = as_checkpoint(DEEPSEEK_V2.tiny("queries from a latent"))
    name = f"{NAME.format(1)}.weight"
    checkpoint.tensors[name] = checkpoint.tensors[name][rows]
    with pytest.raises(CheckpointError, match=rf"{name}.*has shape.*asks for \[88, 20\]"):
        model_of(checkpoint)
