"""Qwen3 equals transformers, and a decoder that leaves out its norms of queries and keys does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from graphllm.errors import CheckpointError
from graphllm.layers.attention import QKNormConfig
from graphllm.layers.norm import NormConfig
from graphllm.models.decoder import Decoder
from graphllm.models.registry import find_family, read_model_config
from tests.models.equality import (
    TOLERANCE,
    WeightMutation,
    assert_equal_in_every_split,
    mutated_error,
    neutral_norm,
)
from tests.models.memory_checkpoint import as_checkpoint, tiny_qwen3

VARIANTS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "tied": {"tie_word_embeddings": True},
    "one query head a key head": {"num_key_value_heads": 4},
    "large heads": {"head_dim": 40},
    "attention biases": {"attention_bias": True},
    "another norm epsilon": {"rms_norm_eps": 1e-6},
    "yarn rotary": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_chunks_and_decode_equal_transformers(variant: str) -> None:
    assert_equal_in_every_split(tiny_qwen3(**VARIANTS[variant]))


def test_a_decoder_that_ignores_qk_norm_fails() -> None:
    model = tiny_qwen3()
    assert mutated_error(model) < TOLERANCE, "without the mutation it passes"
    assert mutated_error(model, config=lambda config: replace(config, qk_norm=None)) > TOLERANCE


def swapped_query_and_key_norm(model: Decoder) -> None:
    for layer in model.layers:
        weights = layer.attention.query_norm.weight, layer.attention.key_norm.weight
        values = [weight.clone() for weight in weights]
        for weight, value in zip(weights, reversed(values), strict=True):
            weight.copy_(value)


def other_epsilon(model: Decoder) -> None:
    """Queries and keys normed with an epsilon that is not the configuration's."""
    for layer in model.layers:
        layer.attention.query_norm.eps = layer.attention.key_norm.eps = 1.0


WEIGHT_MUTANTS: dict[str, WeightMutation] = {
    "factors of the query norm": neutral_norm("query_norm"),
    "factors of the key norm": neutral_norm("key_norm"),
    # A dimension's two factors would multiply to the same score but for rotary in between.
    "which norm is whose": swapped_query_and_key_norm,
    "epsilon": other_epsilon,
}


@pytest.mark.parametrize("switch", WEIGHT_MUTANTS)
def test_a_decoder_that_mistakes_a_norm_fails(switch: str) -> None:
    assert mutated_error(tiny_qwen3(), weights=WEIGHT_MUTANTS[switch]) > TOLERANCE


def read(**keys: Any) -> Any:
    checkpoint = as_checkpoint(tiny_qwen3())
    checkpoint.hf_config |= keys
    return read_model_config(checkpoint, find_family(checkpoint))


def test_configuration_is_read_as_published() -> None:
    config = read(
        use_sliding_window=False, sliding_window=4096, max_window_layers=2, torch_dtype="bfloat16", dtype=None
    )
    assert (config.head_dim, config.dtype) == (16, torch.bfloat16)
    assert config.qk_norm == QKNormConfig(norm=NormConfig(eps=1e-2))
    assert not (config.attention_bias or config.attention_output_bias or config.mlp_bias)


def test_one_switch_is_the_bias_of_all_four_projections() -> None:
    config = read(attention_bias=True)
    assert config.attention_bias
    assert config.attention_output_bias
    assert not config.mlp_bias


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "'use_sliding_window' denies"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "'layer_types'"),
        ({"head_dim": None}, "'head_dim' is missing"),
        ({"num_key_value_heads": None}, "'num_key_value_heads' is missing"),
        ({"mlp_bias": True}, "'mlp_bias' is True, which is not supported"),
    ],
)
def test_what_would_be_another_model_is_refused(keys: dict[str, Any], complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        read(**keys)
