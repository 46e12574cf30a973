from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from graphllm.errors import CheckpointError
from graphllm.layers.norm import NormConfig
from graphllm.layers.rotary import LinearRopeScaling, Llama3RopeScaling, RotaryConfig, YarnRopeScaling
from graphllm.models.config import LayerConfig, ModelConfig
from graphllm.models.registry import find_family, read_model_config
from tests.models.memory_checkpoint import MemoryCheckpoint

# As published with SmolLM2-135M-Instruct (transformers 4.42).
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
LLAMA3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def read(values: dict[str, Any]) -> ModelConfig:
    checkpoint = MemoryCheckpoint(values, {})
    return read_model_config(checkpoint, find_family(checkpoint))


def changed(**changes: Any) -> dict[str, Any]:
    return SMOLLM2 | changes


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in SMOLLM2.items() if key not in keys}


def rotary_of(config: ModelConfig) -> RotaryConfig:
    """The rotary of a model whose layers are all alike."""
    (layer,) = set(config.layers)
    assert layer.rotary is not None
    return layer.rotary


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(values)
    assert str(Path("memory.safetensors")) in caught.value.message
    return caught.value.message


def test_demo_model_is_read_in_full() -> None:
    assert read(SMOLLM2) == ModelConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        layers=30 * (LayerConfig(rotary=RotaryConfig(rotary_dim=64, theta=100000.0)),),
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        norm=NormConfig(eps=1e-5),
        attention_scale=0.125,
        activation="silu",
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


@pytest.mark.parametrize("use_diff", [True, False])
def test_whatever_transformers_writes_is_understood(use_diff: bool) -> None:
    import json

    written = json.loads(LlamaConfig(head_dim=64).to_json_string(use_diff=use_diff))
    config = read(written | {"architectures": ["LlamaForCausalLM"]})
    assert config.head_dim == 64
    assert rotary_of(config) == RotaryConfig(rotary_dim=64, theta=10000.0)


def test_both_generations_of_rotary_settings_mean_the_same() -> None:
    older = read(changed(rope_theta=500000.0, rope_scaling=LLAMA3))
    flat = LLAMA3 | {"rope_theta": 500000.0}
    newer = read(without("rope_theta", "rope_scaling") | {"rope_parameters": flat})
    by_layer_type = read(
        without("rope_theta", "rope_scaling")
        | {"rope_parameters": {"full_attention": flat}, "layer_types": ["full_attention"] * 30}
    )
    assert older == newer == by_layer_type
    assert rotary_of(older).theta == 500000.0
    assert rotary_of(older).scaling == Llama3RopeScaling(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )


def test_oldest_spelling_of_the_rotary_type_is_read() -> None:
    scaling = {"type": "linear", "factor": 4.0}
    assert rotary_of(read(changed(rope_scaling=scaling))).scaling == LinearRopeScaling(4.0)


def test_rotary_base_defaults_to_ten_thousand() -> None:
    assert rotary_of(read(without("rope_theta"))).theta == 10000.0


def test_yarn_defaults_are_the_papers() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    yarn = rotary_of(read(changed(rope_scaling=scaling))).scaling
    assert isinstance(yarn, YarnRopeScaling)
    assert yarn.attention_factor == pytest.approx(1.1386294)
    assert (yarn.beta_fast, yarn.beta_slow) == (32.0, 1.0)


def test_original_context_outside_the_rotary_settings_has_the_last_word() -> None:
    scaling = rotary_of(read(changed(rope_scaling=LLAMA3, original_max_position_embeddings=4096))).scaling
    assert isinstance(scaling, Llama3RopeScaling)
    assert scaling.original_max_position_embeddings == 4096


def test_defaults_follow_from_the_other_sizes() -> None:
    config = read(without("num_key_value_heads", "tie_word_embeddings", "attention_bias", "mlp_bias"))
    assert (config.num_kv_heads, config.head_dim, config.tie_word_embeddings) == (9, 64, False)
    assert not config.attention_bias and not config.mlp_bias


def test_one_switch_biases_all_four_attention_projections() -> None:
    config = read(changed(attention_bias=True))
    assert config.attention_bias and config.attention_output_bias and not config.mlp_bias


def test_several_end_tokens_are_kept() -> None:
    assert read(changed(eos_token_id=[128001, 128008])).eos_token_ids == (128001, 128008)
    assert read(changed(eos_token_id=None, bos_token_id=None)).bos_token_id is None


@pytest.mark.parametrize(
    ("written", "dtype"),
    [("float16", torch.float16), ("torch.bfloat16", torch.bfloat16), ("float64", None), (None, None)],
)
def test_format_of_the_weights_is_read_where_it_is_served(written: str | None, dtype: Any) -> None:
    assert read(changed(torch_dtype=None, dtype=written)).dtype == dtype


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sliding_window", 4096),
        ("attention_multiplier", 0.0625),
        ("logits_scaling", 8),
        ("final_logit_softcapping", 30.0),
        ("num_local_experts", 8),
        ("some_key_of_tomorrow", False),
        ("rope_interleaved", True),
        ("is_encoder_decoder", True),
        ("pruned_heads", {"1": [0]}),
        ("per_layer_config", {"0": {"hidden_size": 3}}),
        ("partial_rotary_factor", 0.5),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("layer_types", ["full_attention"]),
        ("layer_types", ["chunked_attention"] * 30),
        ("hidden_act", "tanh"),
        ("num_key_value_heads", 2),
        ("head_dim", 63),
        ("hidden_size", 576.5),
        ("hidden_size", True),
        ("vocab_size", 0),
        ("rms_norm_eps", "small"),
        ("rope_theta", -1.0),
        ("mlp_bias", "no"),
        ("eos_token_id", "</s>"),
        ("rope_scaling", "linear"),
    ],
)
def test_key_that_cannot_be_honoured_is_named(key: str, value: Any) -> None:
    assert f"'{key}'" in refusal(changed(**{key: value}))


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_hidden_layers", "vocab_size", "rms_norm_eps", "max_position_embeddings"]
)
def test_missing_key_is_named(key: str) -> None:
    assert f"'{key}' is missing" in refusal(without(key))


def test_null_is_the_same_as_absent() -> None:
    assert read(changed(sliding_window=None, some_key_of_tomorrow=None, head_dim=None)) == read(SMOLLM2)


@pytest.mark.parametrize(
    ("scaling", "key"),
    [
        ({"rope_type": "dynamic"}, "factor"),
        ({"rope_type": "longrope", "factor": 2.0}, "short_factor"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 32}, "short_factor"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [0.0] * 32}, "long_factor"),
        ({"type": "mrope"}, "rope_type"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": 0}, "factor"),
        ({"rope_type": "linear", "factor": 2.0, "short_factor": [1.0]}, "short_factor"),
        ({"rope_type": "default", "factor": 2.0}, "factor"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor"),
        (LLAMA3 | {"low_freq_factor": None}, "low_freq_factor"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "truncate"),
        ({"rope_type": "default", "partial_rotary_factor": 0.25}, "partial_rotary_factor"),
    ],
)
def test_rotary_setting_that_cannot_be_honoured_is_named(scaling: dict[str, Any], key: str) -> None:
    assert f"'rope_scaling.{key}'" in refusal(changed(rope_scaling=scaling))


def test_rotary_settings_of_a_layer_type_that_no_layer_has_are_of_no_effect() -> None:
    parameters = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert rotary_of(read(without("rope_theta") | {"rope_parameters": parameters})).theta == 1e6


def test_rotary_settings_that_leave_out_a_layer_type_are_refused() -> None:
    parameters = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    message = refusal(without("rope_theta") | {"rope_parameters": parameters})
    assert "'rope_parameters.full_attention'" in message


def test_a_dynamic_base_is_the_base_within_the_trained_context() -> None:
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    assert rotary_of(read(changed(rope_scaling=scaling))).scaling is None


def test_two_generations_that_contradict_each_other_are_refused() -> None:
    values = changed(rope_scaling=LLAMA3, rope_parameters={"rope_type": "default"})
    assert "'rope_scaling'" in refusal(values)


@pytest.mark.parametrize("architectures", [None, [], ["LlamaForCausalLM", "Other"], "LlamaForCausalLM"])
def test_architecture_must_be_one(architectures: Any) -> None:
    assert "'architectures'" in refusal(changed(architectures=architectures))


def test_unknown_architecture_is_answered_with_the_known_ones() -> None:
    message = refusal(changed(architectures=["MambaForCausalLM"]))
    assert "'MambaForCausalLM'" in message and "LlamaForCausalLM" in message
