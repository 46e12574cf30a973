"""FP8 and int8 checkpoints, by row, tensor and block, against transformers' model of what they mean."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from graphllm.attention.paged import PagedAttention
from graphllm.errors import CheckpointError, ConfigError
from graphllm.kernels.linear import linear_ref
from graphllm.layers.linear import Linear
from graphllm.layers.moe import ExpertStack
from graphllm.models.decoder import Decoder
from graphllm.models.quantization import read_quantization
from graphllm.models.weights import load_model
from graphllm.quant.scaled_form import StoredScaled
from tests.models.equality import prompt, theirs
from tests.models.memory_checkpoint import TINY_SHAPE, MemoryCheckpoint, as_checkpoint, redraw, tiny_llama
from tests.models.paged_model import BLOCK_SIZE, PagedModel
from tests.quant.scaled_models import E4M3, INT8, by_block, by_row, by_tensor, quantized

CPU = torch.device("cpu")
# Blocks of 128 do not fill it, and query, key and value share one.
SHAPE = {"hidden_size": 160, "intermediate_size": 288, "attention_bias": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def compressed(weights: dict[str, Any], activations: dict[str, Any], *, format: str) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def arguments(kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False} | more


CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "fp8, blocks": (
        partial(by_block, block=(128, 128)),
        FP8 | {"weight_block_size": [128, 128], "fmt": "e4m3"},
        {"dtype": E4M3, "group": 128},
    ),
    "fp8, tensors, as transformers": (
        partial(by_tensor, dtype=E4M3, name="weight_scale_inv"),
        FP8 | {"activation_scheme": "static", "weight_block_size": None},
        {"dtype": E4M3, "given": 0.02, "given_name": "activation_scale"},
    ),
    "fp8, tensors, as AutoFP8": (
        partial(by_tensor, dtype=E4M3),
        FP8 | {"ignored_layers": ["lm_head"]},
        {"dtype": E4M3},
    ),
    "fp8, rows": (
        partial(by_row, dtype=E4M3),
        compressed(
            arguments("float", "channel"),
            arguments("float", "token", dynamic=True),
            format="float-quantized",
        ),
        {"dtype": E4M3},
    ),
    "int8, rows": (
        partial(by_row, dtype=INT8),
        compressed(
            arguments("int", "channel"), arguments("int", "token", dynamic=True), format="int-quantized"
        ),
        {"dtype": INT8},
    ),
    "int8, given activations": (
        partial(by_row, dtype=INT8),
        compressed(arguments("int", "channel"), arguments("int", "tensor"), format="int-quantized"),
        {"dtype": INT8, "given": 0.05, "given_name": "input_scale"},
    ),
}


def load(checkpoint: MemoryCheckpoint) -> Decoder:
    return load_model(
        checkpoint,
        backend=PagedAttention(block_size=BLOCK_SIZE),
        device=CPU,
        dtype=torch.float32,
        product=linear_ref,
    )


def row_errors(checkpoint: MemoryCheckpoint, expected: torch.Tensor, token_ids: list[int]) -> torch.Tensor:
    ours = load(checkpoint)
    found = PagedModel(ours, ours.layers[0].attention.backend).step([(0, token_ids)])
    return (found - expected).abs().amax(1) / expected.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_rounded_weights_and_activations(name: str) -> None:
    quantizer, config, activations = CASES[name]
    checkpoint, meant = quantized(tiny_llama(**SHAPE), quantizer, config, **activations)
    token_ids = prompt(40)
    expected = theirs(meant, token_ids)
    errors = row_errors(checkpoint, expected, token_ids)
    # A number between two of the format may be rounded to either by sums that differ in their last bit.
    assert errors.median() < 1e-4 and errors.max() < 2e-2
    for module in meant.modules():
        module._forward_pre_hooks.clear()
    plain = (theirs(meant, token_ids) - expected).abs().amax(1) / expected.abs().max()
    assert plain.median() > 2e-3, "activations that are not rounded are told apart"


def tiny_experts(family: str) -> PreTrainedModel:
    """Qwen3-MoE, or DeepSeek-V3, whose latents and key are one product, and not of whole blocks."""
    shape = TINY_SHAPE | {"hidden_size": 160, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    if family == "Qwen3-MoE":
        model: PreTrainedModel = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, head_dim=16, num_experts=4))
    else:
        config = DeepseekV3Config(
            **shape | {"num_key_value_heads": 4, "intermediate_size": 96},
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=128,
            kv_lora_rank=40,
            qk_rope_head_dim=16,
            qk_nope_head_dim=24,
            v_head_dim=24,
        )
        model = DeepseekV3ForCausalLM(config)
    redraw(model.eval(), seed=0)
    return model


@pytest.mark.parametrize("family", ["Qwen3-MoE", "DeepSeek-V3"])
def test_experts_and_latents_in_blocks_are_the_numbers_that_are_meant(family: str) -> None:
    """All weights are, bit for bit, and nothing rounds the router."""
    checkpoint = as_checkpoint(tiny_experts(family))
    plain = MemoryCheckpoint(checkpoint.hf_config.copy(), checkpoint.tensors.copy())
    checkpoint.hf_config["quantization_config"] = FP8 | {"weight_block_size": [128, 128]}
    names = [name for name in checkpoint.tensors if re.search(r"_proj(_with_mqa)?\.weight$", name)]
    assert any("experts.3.down_proj" in name for name in names)
    for name in names:
        tensors, meant = by_block(checkpoint.tensors.pop(name), (128, 128))
        beginning = name.removesuffix("weight")
        checkpoint.tensors |= {beginning + last: tensor for last, tensor in tensors.items()}
        plain.tensors[name] = meant
    ours, dense = load(checkpoint), load(plain)
    num_compared = 0
    for path, layer in ours.named_modules():
        if isinstance(layer, (Linear, ExpertStack)):
            expected = dense.get_submodule(path).weight
            found = layer.scheme.dequantized_rows(layer, 0, len(expected), dtype=torch.float32)
            assert torch.equal(found, expected), path
            num_compared += isinstance(layer.scheme, StoredScaled)
    assert num_compared >= 8
    moe = ours.layers[1].moe
    assert moe is not None and not isinstance(moe.router.scheme, StoredScaled)
    token_ids = prompt(40)
    logits = [
        PagedModel(model, model.layers[0].attention.backend).step([(0, token_ids)]) for model in (ours, dense)
    ]
    difference = float((logits[0] - logits[1]).norm() / logits[1].norm())
    assert 5e-3 < difference < 0.3, "activations are rounded, and no more"


def test_online_fp8_is_what_a_checkpoint_with_a_scale_a_row_is() -> None:
    quantizer, config, activations = CASES["fp8, rows"]
    model = tiny_llama(**SHAPE)
    checkpoint, _ = quantized(model, quantizer, config, **activations)
    token_ids = prompt(30)
    online = load_model(
        as_checkpoint(model),
        backend=PagedAttention(block_size=BLOCK_SIZE),
        device=CPU,
        dtype=torch.float32,
        product=linear_ref,
        quantization="fp8",
    )
    expected = PagedModel(online, online.layers[0].attention.backend).step([(0, token_ids)])
    assert row_errors(checkpoint, expected, token_ids).median() < 1e-4


NAME = "model.layers.1.mlp.up_proj"
DAMAGE: list[tuple[str, str, torch.Tensor | None, str]] = [
    ("fp8, blocks", "weight_scale_inv", None, f"and '{NAME}' unquantized"),
    ("fp8, blocks", "weight_scale_inv", torch.ones(2, 2), f"'{NAME}.weight_scale_inv' has shape [2, 2]"),
    ("fp8, blocks", "weight_scale_inv", torch.full((3, 2), torch.nan), "holds what is no finite number"),
    ("fp8, blocks", "weight_scale_inv", -torch.ones(3, 2), "'weight_scale_inv' holds negative numbers"),
    ("int8, rows", "weight_scale", -torch.ones(288, 1), "'weight_scale' holds negative numbers"),
    ("fp8, blocks", "weight_scale_inv", torch.ones(3, 2, dtype=torch.int32), "weight_scale_inv' holds int32"),
    ("fp8, rows", "weight_scale", torch.ones(0, 1), f"'{NAME}.weight_scale' has shape [0, 1]"),
    ("fp8, tensors, as AutoFP8", "weight_scale", torch.tensor(0.0), "is 0.0, not a positive number"),
    ("fp8, blocks", "weight", torch.ones(288, 160), f"'{NAME}.weight' holds float32, not float8_e4m3fn"),
    ("fp8, blocks", "weight", torch.ones(288, 32).to(E4M3), f"'{NAME}.weight' has shape [288, 32]"),
    ("fp8, tensors, as AutoFP8", "weight_scale", torch.ones(2), "'weight_scale' holds 2 numbers, not one"),
    ("fp8, tensors, as transformers", "activation_scale", None, f"'{NAME}.activation_scale' is missing"),
    ("fp8, tensors, as transformers", "activation_scale", torch.zeros(1), "is 0.0, not a positive number"),
    ("int8, rows", "weight", torch.ones(288, 160).to(E4M3), "holds float8_e4m3fn, not int8"),
]


@pytest.mark.parametrize(("case", "tensor", "value", "complaint"), DAMAGE)
def test_damage_is_refused_by_name(
    case: str, tensor: str, value: torch.Tensor | None, complaint: str
) -> None:
    quantizer, config, activations = CASES[case]
    checkpoint, _ = quantized(tiny_llama(**SHAPE), quantizer, config, **activations)
    del checkpoint.tensors[f"{NAME}.{tensor}"]
    if value is not None:
        checkpoint.tensors[f"{NAME}.{tensor}"] = value
    with pytest.raises(CheckpointError) as caught:
        load(checkpoint)
    assert complaint in caught.value.message


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"weight_block_size": [128, 128], "activation_scheme": "static"}, "activation_scheme"),
        ({"weight_block_size": [128]}, "weight_block_size"),
        ({"weight_block_size": [128, 48]}, "blocks of 48 inputs"),
        ({"activation_scheme": "perhaps"}, "activation_scheme"),
        ({"fmt": "e5m2"}, "fmt"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_configuration_that_is_not_served_is_refused_by_its_key(keys: Any, complaint: str) -> None:
    quantizer, _, activations = CASES["fp8, blocks"]
    checkpoint, _ = quantized(tiny_llama(**SHAPE), quantizer, FP8 | keys, **activations)
    with pytest.raises(CheckpointError, match=complaint):
        load(checkpoint)


def test_a_card_without_fp8_is_refused_with_the_reason_and_the_nearest() -> None:
    quantizer, config, activations = CASES["fp8, blocks"]
    checkpoint, _ = quantized(tiny_llama(**SHAPE), quantizer, config, **activations)
    stored = read_quantization(checkpoint, asked=None)
    with pytest.raises(
        ConfigError, match=r"8-bit floating-point.*8\.9; this one's is 8\.6.*--quantization int8"
    ):
        stored.check_device(device_type="cuda", capability=(8, 6))
    stored.check_device(device_type="cuda", capability=(8, 9))
    stored.check_device(device_type="cpu", capability=None)
    int8 = CASES["int8, rows"]
    checkpoint, _ = quantized(tiny_llama(**SHAPE), int8[0], int8[1], **int8[2])
    read_quantization(checkpoint, asked=None).check_device(device_type="cuda", capability=(8, 0))
