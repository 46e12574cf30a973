"""Families with experts: which configurations and checkpoints of theirs are taken, and which are refused.

That they equal transformers is shown with all other families in `test_family_equality.py`.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from graphllm.attention.paged import PagedAttention
from graphllm.errors import CheckpointError
from graphllm.kernels.linear import linear_ref
from graphllm.layers.linear import Linear
from graphllm.models.decoder import Decoder
from graphllm.models.mxfp4 import MXFP4Checkpoint, unpack_mxfp4
from graphllm.models.registry import find_family, read_model_config
from graphllm.models.weights import _attention_shapes, _feed_forward_shapes, load_model
from tests.models.equality import CPU, TOLERANCE, error, prompt, theirs
from tests.models.memory_checkpoint import MemoryCheckpoint, as_checkpoint
from tests.models.moe_families import MOE_FAMILIES
from tests.models.paged_model import BLOCK_SIZE, PagedModel

FAMILIES = {family.name: family for family in MOE_FAMILIES}


def tiny(family: str, *, variant: int = 0, **keys: Any) -> PreTrainedModel:
    cases = FAMILIES[family]
    return cases.tiny(list(cases.variants)[variant], **keys)


def load(checkpoint: Any, *, dtype: torch.dtype = torch.float32) -> Decoder:
    backend = PagedAttention(block_size=BLOCK_SIZE)
    return load_model(checkpoint, backend=backend, device=CPU, dtype=dtype, product=linear_ref)


# -- configurations --------------------------------------------------------------------------------


def read(family: str, *, variant: int = 0, **keys: Any) -> Any:
    checkpoint = as_checkpoint(tiny(family, variant=variant))
    checkpoint.hf_config |= keys
    return read_model_config(checkpoint, find_family(checkpoint))


def test_which_layers_have_experts_is_read_from_the_file() -> None:
    def sparse(family: str, *, variant: int = 0, **keys: Any) -> list[int]:
        config = read(family, variant=variant, **keys)
        return [number for number, layer in enumerate(config.layers) if layer.moe is not None]

    assert sparse("Mixtral") == [0, 1]
    assert sparse("Qwen2-MoE", variant=1) == [3]
    assert sparse("Qwen2-MoE", decoder_sparse_step=2) == [1]
    assert sparse("Qwen3-MoE", mlp_only_layers=[1]) == [0]
    assert sparse("GLM-4.5", first_k_dense_replace=1) == [1]
    assert sparse("GLM-4.5", first_k_dense_replace=2) == []


def test_windows_of_gpt_oss_alternate_where_the_file_does_not_say() -> None:
    config = read("gpt-oss", layer_types=None, num_hidden_layers=4)
    assert [layer.sliding_window for layer in config.layers] == [13, None, 13, None]


def test_published_gpt_oss_configuration_is_read() -> None:
    config = read(
        "gpt-oss",
        experts_per_token=2,
        initial_context_length=64,
        quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    )
    assert config.has_sinks and config.attention_bias and config.attention_output_bias


def test_published_deepseek_configuration_is_read() -> None:
    """As DeepSeek-V2-Lite writes it: older rotary keys, and keys of training."""
    config = read(
        "DeepSeek-V2",
        attention_bias=False,
        aux_loss_alpha=0.001,
        ep_size=1,
        moe_layer_freq=1,
        n_group=1,
        norm_topk_prob=False,
        q_lora_rank=None,
        rope_parameters=None,
        rope_scaling={
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 64,
            "type": "yarn",
        },
        rope_theta=10000,
        scoring_func="softmax",
        seq_aux=True,
        topk_group=1,
        topk_method="greedy",
    )
    sharpness = 0.1 * 0.707 * math.log(40) + 1
    assert config.attention_scale == pytest.approx(16**-0.5 * sharpness**2)
    assert (config.num_kv_heads, config.head_dim) == (4, 16)
    assert config.latent is not None and config.latent.query_rank is None
    assert [layer.moe is None for layer in config.layers] == [True, False, False]


@pytest.mark.parametrize(
    ("family", "keys", "complaint"),
    [
        ("Mixtral", {"num_experts_per_tok": 6}, "'num_experts_per_tok' is 6, which cannot be"),
        ("Mixtral", {"num_local_experts": None}, "'num_local_experts' is missing"),
        ("Mixtral", {"num_local_experts": 4096}, "'num_local_experts' is 4096; at most"),
        ("Qwen2-MoE", {"mlp_only_layers": "1"}, "'mlp_only_layers' is '1', not a list"),
        ("Qwen2-MoE", {"decoder_sparse_step": 0}, "'decoder_sparse_step' is 0"),
        ("Qwen2-MoE", {"use_sliding_window": True}, "'use_sliding_window' is true"),
        ("Qwen2-MoE", {"moe_intermediate_size": None}, "'moe_intermediate_size' is missing"),
        ("Qwen3-MoE", {"norm_topk_prob": "yes"}, "'norm_topk_prob' is 'yes'"),
        ("Qwen3-MoE", {"use_sliding_window": True}, "'use_sliding_window' is true"),
        ("OLMoE", {"clip_qkv": 8.0}, "'clip_qkv' is 8.0, which is not supported"),
        ("Granite-MoE", {"logits_scaling": 0}, "'logits_scaling' is 0"),
        ("GLM-4.5", {"n_group": 5}, "'num_experts_per_tok' is 3, which cannot be: 1 of 5 groups of 12"),
        ("GLM-4.5", {"n_group": 12, "topk_group": 4}, "two best"),
        ("GLM-4.5", {"first_k_dense_replace": -1}, "'first_k_dense_replace' is -1"),
        ("GLM-4.5", {"scoring_func": "softmax"}, "'scoring_func' .* is not understood"),
        ("gpt-oss", {"experts_per_token": 4}, "'experts_per_token' contradicts"),
        ("gpt-oss", {"hidden_act": "gelu"}, "'hidden_act' is not silu"),
        ("gpt-oss", {"swiglu_limit": 0}, "'swiglu_limit' is 0"),
        ("DeepSeek-V2", {"norm_topk_prob": True}, "'norm_topk_prob' is true"),
        ("DeepSeek-V2", {"mlp_bias": True}, "'mlp_bias' is true"),
        ("DeepSeek-V2", {"topk_method": "noaux_tc"}, "'topk_method' is 'noaux_tc', not one of greedy"),
        ("DeepSeek-V2", {"topk_method": "group_limited_greedy"}, "'n_group' is missing"),
        ("DeepSeek-V2", {"scoring_func": "sigmoid"}, "'scoring_func' is not softmax"),
        ("DeepSeek-V2", {"moe_layer_freq": 2}, "'moe_layer_freq' is not 1"),
        ("DeepSeek-V2", {"num_key_value_heads": 2}, "'num_key_value_heads' is not 'num_attention_heads'"),
        ("DeepSeek-V2", {"kv_lora_rank": None}, "'kv_lora_rank' is missing"),
        ("DeepSeek-V2", {"qk_rope_head_dim": 7}, "'qk_rope_head_dim' is 7, but rotary needs pairs"),
        ("DeepSeek-V3", {"topk_method": "greedy"}, "'topk_method' is not noaux_tc"),
        ("DeepSeek-V3", {"scoring_func": "softmax"}, "'scoring_func' is not sigmoid"),
    ],
)
def test_what_cannot_be_is_refused_by_name(family: str, keys: dict[str, Any], complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        read(family, **keys)


def test_every_product_of_a_decoder_is_known_when_its_library_is_chosen() -> None:
    """The shapes that the workspace on a card is sized for are those of the layers."""
    for family in MOE_FAMILIES:
        for variant in family.variants:
            model = load(as_checkpoint(family.tiny(variant)))
            shapes = {*_attention_shapes(model.config), *_feed_forward_shapes(model.config)}
            linears = {
                (module.out_features, module.in_features)
                for name, module in model.layers.named_modules()
                if isinstance(module, Linear)
            }
            assert linears <= shapes, f"{family.name}: {variant}"


# -- tensors ---------------------------------------------------------------------------------------


def refusal(checkpoint: MemoryCheckpoint) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(checkpoint)
    assert str(checkpoint.path) in caught.value.message
    return caught.value.message


def test_one_expert_s_missing_tensor_is_named() -> None:
    checkpoint, name = as_checkpoint(tiny("Mixtral")), "model.layers.1.block_sparse_moe.experts.4.w3.weight"
    del checkpoint.tensors[name]
    assert f"'{name}' is missing" in refusal(checkpoint)


def test_an_expert_too_many_is_named() -> None:
    checkpoint, name = as_checkpoint(tiny("Mixtral")), "model.layers.0.block_sparse_moe.experts.5.w1.weight"
    checkpoint.tensors[name] = torch.zeros(80, 48)
    assert f"'{name}' is not used" in refusal(checkpoint)


def test_a_stack_of_another_number_of_experts_is_named_with_both_shapes() -> None:
    checkpoint, name = (
        as_checkpoint(tiny("Granite-MoE")),
        "model.layers.0.block_sparse_moe.input_linear.weight",
    )
    checkpoint.tensors[name] = torch.zeros(4, 160, 48)
    message = refusal(checkpoint)
    assert f"'{name}' has shape [4, 160, 48]" in message and "[5, 160, 48]" in message


def test_layers_that_predict_further_tokens_are_left_out() -> None:
    checkpoint = as_checkpoint(tiny("GLM-4.5"))
    spare = {
        name.replace(".layers.1.", ".layers.2."): tensor
        for name, tensor in checkpoint.tensors.items()
        if ".layers.1." in name
    }
    checkpoint.tensors |= spare | {"model.layers.2.eh_proj.weight": torch.zeros(48, 96)}
    checkpoint.hf_config["num_nextn_predict_layers"] = 1
    assert len(load(checkpoint).layers) == 2
    checkpoint.tensors["model.layers.1.eh_proj.weight"] = torch.zeros(48, 96)
    assert "'model.layers.1.eh_proj.weight' is not used" in refusal(checkpoint)


def test_what_decides_in_float32_stays_in_float32() -> None:
    for layer in load(as_checkpoint(tiny("GLM-4.5")), dtype=torch.bfloat16).layers:
        assert layer.moe.selection.bias.dtype == torch.float32
        assert layer.moe.gate_up.weight.dtype == torch.bfloat16
    for layer in load(as_checkpoint(tiny("gpt-oss")), dtype=torch.bfloat16).layers:
        assert layer.attention.sinks.weight.dtype == torch.float32


@pytest.mark.parametrize("family", ["Mixtral", "Qwen2-MoE", "gpt-oss"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-1), (torch.float16, 2e-2)])
def test_low_precision_stays_close_where_the_choice_is_clear(
    family: str, dtype: torch.dtype, tolerance: float
) -> None:
    """With as many experts a token as there are, no rounding can lead to another."""
    number = {"Mixtral": 5, "Qwen2-MoE": 6, "gpt-oss": 5}[family]
    model, token_ids = tiny(family, num_experts_per_tok=number), prompt(40)
    ours = load(as_checkpoint(model), dtype=dtype)
    backend = ours.layers[0].attention.backend
    logits = PagedModel(ours, backend, dtype=dtype).step([(0, token_ids)])
    assert error(logits, theirs(model, token_ids)) < tolerance


# -- MXFP4 -----------------------------------------------------------------------------------------


def random_mxfp4(*size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(blocks, scales) of numbers around 0.1; size: [..., rows, in_features]."""
    generator = torch.Generator().manual_seed(sum(size))
    *rows, in_features = size
    blocks = torch.randint(256, (*rows, in_features // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(122, 126, (*rows, in_features // 32), generator=generator, dtype=torch.uint8)
    return blocks, scales


def packed_gpt_oss() -> tuple[PreTrainedModel, MemoryCheckpoint]:
    """A model whose experts are numbers of MXFP4, and its checkpoint with these packed."""
    model = tiny("gpt-oss", hidden_size=64, intermediate_size=32)
    packed = {}
    for number, layer in enumerate(model.model.layers):
        for name, size in (("gate_up_proj", (5, 64, 64)), ("down_proj", (5, 64, 32))):
            blocks, scales = random_mxfp4(*size)
            whole = f"model.layers.{number}.mlp.experts.{name}"
            packed[whole] = {f"{whole}_blocks": blocks, f"{whole}_scales": scales}
            numbers = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            getattr(layer.mlp.experts, name).data.copy_(numbers)
    checkpoint = as_checkpoint(model)
    checkpoint.hf_config["quantization_config"] = {"quant_method": "mxfp4"}
    for whole, parts in packed.items():
        del checkpoint.tensors[whole]
        checkpoint.tensors |= parts
    return model, checkpoint


def test_every_pair_of_4_bits_and_every_scale_is_the_number_it_stands_for() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values += [-value for value in values]
    for exponent in (-100, -3, 0, 5):
        scales = torch.full((1, 16), 127 + exponent, dtype=torch.uint8)
        expected = [values[half] * 2.0**exponent for byte in range(256) for half in (byte % 16, byte // 16)]
        assert unpack_mxfp4(blocks, scales)[0].tolist() == expected


def test_unpacked_experts_are_transformers_own() -> None:
    model, checkpoint = packed_gpt_oss()
    unpacked = MXFP4Checkpoint(checkpoint)
    for name in ("gate_up_proj", "down_proj"):
        whole = f"model.layers.1.mlp.experts.{name}"
        expected = getattr(model.model.layers[1].mlp.experts, name)
        assert unpacked.tensor_shape(whole) == tuple(expected.shape)
        assert torch.equal(unpacked.tensor(whole).float(), expected)


def test_logits_of_a_packed_checkpoint_equal_transformers() -> None:
    model, checkpoint = packed_gpt_oss()
    token_ids = prompt(60)
    ours = load(checkpoint)
    logits = PagedModel(ours, ours.layers[0].attention.backend).step([(0, token_ids)])
    assert error(logits, theirs(model, token_ids)) < TOLERANCE


def test_damaged_packing_is_refused_by_name() -> None:
    whole = "model.layers.1.mlp.experts.down_proj"
    changes: list[tuple[str, torch.Tensor | None, str]] = [
        ("_scales", None, f"'{whole}_scales' is missing"),
        ("_blocks", None, f"'{whole}_blocks' is missing"),
        ("_scales", torch.zeros(5, 64, 2, dtype=torch.uint8), f"'{whole}_scales' has shape [5, 64, 2]"),
        ("_blocks", torch.zeros(5, 64, 8, dtype=torch.uint8), f"'{whole}_blocks' has shape [5, 64, 8]"),
        ("_blocks", torch.zeros(5, 64, 1, 16), f"'{whole}_blocks' holds float32, not uint8"),
        ("_scales", torch.full((5, 64, 1), 255, dtype=torch.uint8), f"'{whole}_scales': a scale is 255"),
    ]
    for suffix, tensor, complaint in changes:
        _, checkpoint = packed_gpt_oss()
        checkpoint.tensors.pop(whole + suffix)
        if tensor is not None:
            checkpoint.tensors[whole + suffix] = tensor
        assert complaint in refusal(checkpoint)
