"""Every dense family that is served: what it is called, variants that exercise its switches, and mutants.

The one list behind `test_family_equality.py` and the table in docs/models.md. A variant is a tiny model of
transformers' own class; a mutant is our decoder of one variant with one switch wrong, and must be found out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import transformers
from transformers import PreTrainedModel

from graphllm.kernels.rotary import QueryGrowth
from graphllm.layers.norm import NormConfig
from graphllm.layers.rotary import LongRopeScaling, RotaryConfig
from graphllm.models.config import ModelConfig
from tests.models.equality import (
    ConfigMutation,
    WeightMutation,
    change,
    layers,
    neutral_norm,
    norm,
    rotary,
)
from tests.models.memory_checkpoint import TINY_SHAPE, redraw
from tests.models.mutations import without_bias

Mutation = tuple[str, ConfigMutation] | tuple[str, WeightMutation]


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyCases:
    """One family. name and models: for the documentation. architecture: transformers' class;
    older_architectures: what files called it before transformers had it.

    shape: the tiny configuration that all variants start from, and base what the family adds to it.
    config_mutants and weight_mutants: what is wrong, to the variant and the change.
    """

    name: str
    models: str
    architecture: str
    older_architectures: tuple[str, ...] = ()
    base: Mapping[str, Any] = field(default_factory=dict)
    shape: Mapping[str, Any] = field(default_factory=lambda: TINY_SHAPE)
    variants: Mapping[str, Mapping[str, Any]]
    config_mutants: Mapping[str, tuple[str, ConfigMutation]] = field(default_factory=dict)
    weight_mutants: Mapping[str, tuple[str, WeightMutation]] = field(default_factory=dict)

    def tiny(self, variant: str, *, seed: int = 0, **keys: Any) -> PreTrainedModel:
        """A random model in float32, every parameter redrawn, norms around 1."""
        model_class = getattr(transformers, self.architecture)
        config = model_class.config_class(**(self.shape | self.base | self.variants[variant] | keys))
        model = model_class(config).eval()
        assert isinstance(model, PreTrainedModel)
        redraw(model, seed=seed)
        return model


def longrope(**changes: Any) -> ConfigMutation:
    """Other numbers in LongRoPE."""

    def mutate(config: ModelConfig) -> ModelConfig:
        assert config.layers[0].rotary is not None
        scaling = config.layers[0].rotary.scaling
        assert isinstance(scaling, LongRopeScaling)
        return rotary(scaling=replace(scaling, **changes))(config)

    return mutate


def qk_norm(**changes: Any) -> ConfigMutation:
    """Another norm of queries and keys."""

    def mutate(config: ModelConfig) -> ModelConfig:
        assert config.qk_norm is not None
        changed = replace(config.qk_norm, norm=replace(config.qk_norm.norm, **changes))
        return replace(config, qk_norm=changed)

    return mutate


def reversed_layers(config: ModelConfig) -> ModelConfig:
    """The last layer's switches in the first, and so on."""
    return replace(config, layers=config.layers[::-1])


def turning_layers(config: ModelConfig) -> ModelConfig:
    """All layers turn as the first one that does."""
    turning = next(layer.rotary for layer in config.layers if layer.rotary is not None)
    return layers(rotary=turning)(config)


def full_turn(config: ModelConfig) -> ModelConfig:
    """The whole head turns."""
    return rotary(rotary_dim=config.head_dim)(config)


def rms_norms(config: ModelConfig) -> ModelConfig:
    """Root-mean-square norms for layer norms."""
    return replace(config, norm=NormConfig(eps=config.norm.eps))


SMALL_ROTARY = RotaryConfig(rotary_dim=6, theta=10000.0)
NO_WINDOW = layers(sliding_window=None)
WIDER_WINDOW = layers(sliding_window=14)
WINDOW = {"sliding_window": 13}
LAYER_NORM_SHAPE = {key: value for key, value in TINY_SHAPE.items() if key != "rms_norm_eps"}
OLDER_SHAPE = {key: value for key, value in LAYER_NORM_SHAPE.items() if key != "num_key_value_heads"}
OWN_INNER_SHAPE = {key: value for key, value in OLDER_SHAPE.items() if key != "intermediate_size"}
TWO_TYPES = ["sliding_attention", "full_attention"]
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0 + 0.1 * pair for pair in range(6)],
    "long_factor": [1.0 + 0.5 * pair for pair in range(6)],
    "attention_factor": 1.2,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 64}

GROWTH = {"llama_4_scaling_beta": 0.3, "original_max_position_embeddings": 16}

# test_llama_equality.py has more of it.
LLAMA = FamilyCases(
    name="Llama",
    models="Llama 1 to 3.3, SmolLM2, Yi, TinyLlama, DeepSeek-R1-Distill-Llama",
    architecture="LlamaForCausalLM",
    variants={
        "grouped queries": {},
        "biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    },
    config_mutants={
        "no bias": ("biases, tied", change(attention_output_bias=False)),
    },
)
MISTRAL = FamilyCases(
    name="Mistral",
    models="Mistral 7B, Mistral Nemo, Ministral 8B, Codestral",
    architecture="MistralForCausalLM",
    base={"head_dim": 12, "sliding_window": None},
    variants={
        "full attention": {},
        "a window": WINDOW,
        "heads that do not fill the hidden size": {"head_dim": 20, "sliding_window": 50},
    },
    config_mutants={
        "no window": ("a window", NO_WINDOW),
        "a window of one token more": ("a window", WIDER_WINDOW),
        "a window where there is none": ("full attention", layers(sliding_window=13)),
    },
)
MINISTRAL = FamilyCases(
    name="Ministral",
    models="Ministral with layers of two kinds",
    architecture="MinistralForCausalLM",
    base={"head_dim": 12, "layer_types": TWO_TYPES, **WINDOW},
    variants={
        "a window in every other layer": {},
        "windows behind a full layer": {"layer_types": TWO_TYPES[::-1], "sliding_window": 5},
    },
    config_mutants={
        "no window": ("a window in every other layer", NO_WINDOW),
        "the other layer's window": ("a window in every other layer", reversed_layers),
    },
)
MINISTRAL3 = FamilyCases(
    name="Ministral 3",
    models="Devstral 2 123B, and the text models in Ministral 3",
    architecture="Ministral3ForCausalLM",
    base={"head_dim": 12},
    variants={
        "queries grow, yarn": {"rope_parameters": YARN | GROWTH},
        "queries grow, a window, tied": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 50.0} | GROWTH,
            "tie_word_embeddings": True,
            **WINDOW,
        },
    },
    config_mutants={
        "no growth": ("queries grow, yarn", rotary(query_growth=None)),
        "growth from a later position on": (
            "queries grow, yarn",
            rotary(query_growth=QueryGrowth(growth=0.3, interval=17)),
        ),
        "another growth": (
            "queries grow, a window, tied",
            rotary(query_growth=QueryGrowth(growth=0.35, interval=16)),
        ),
        "no window": ("queries grow, a window, tied", NO_WINDOW),
        "no stretching": ("queries grow, yarn", rotary(scaling=None)),
    },
)
QWEN2 = FamilyCases(
    name="Qwen2",
    models="Qwen2, Qwen2.5, QwQ, DeepSeek-R1-Distill-Qwen",
    architecture="Qwen2ForCausalLM",
    variants={
        "biases of queries, keys and values": {},
        "tied": {"tie_word_embeddings": True},
        "windows from a layer on": {
            "use_sliding_window": True,
            "max_window_layers": 1,
            **WINDOW,
        },
    },
    config_mutants={
        "no bias": ("tied", change(attention_bias=False)),
        "windows in the first layers": ("windows from a layer on", reversed_layers),
        "no window": ("windows from a layer on", NO_WINDOW),
    },
)
QWEN3 = FamilyCases(
    name="Qwen3",
    models="Qwen3, dense",
    architecture="Qwen3ForCausalLM",
    base={"head_dim": 16},
    variants={
        "norms of queries and keys": {},
        "biases, tied": {"attention_bias": True, "tie_word_embeddings": True},
        "windows from a layer on": {
            "use_sliding_window": True,
            "max_window_layers": 1,
            **WINDOW,
        },
    },
    config_mutants={
        "no norms of queries and keys": ("norms of queries and keys", change(qk_norm=None)),
        "no window": ("windows from a layer on", NO_WINDOW),
    },
)
GEMMA = FamilyCases(
    name="Gemma",
    models="Gemma 2B and 7B, CodeGemma",
    architecture="GemmaForCausalLM",
    base={"head_dim": 16, "tie_word_embeddings": True},
    variants={
        "one key head": {"num_key_value_heads": 1},
        "biases": {"attention_bias": True, "head_dim": 6},
        "the early files' word for the activation": {"hidden_act": "gelu"},
    },
    config_mutants={
        "factors without 1": ("one key head", norm(unit_offset=False)),
        "embeddings as they are": ("one key head", change(embedding_multiplier=None)),
        "exact GELU": ("the early files' word for the activation", change(activation="gelu")),
        "no bias": ("biases", change(attention_bias=False)),
    },
)
GEMMA2 = FamilyCases(
    name="Gemma 2",
    models="Gemma 2",
    architecture="Gemma2ForCausalLM",
    base={
        "head_dim": 16,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        **WINDOW,
    },
    variants={
        "caps and a window in every other layer": {},
        "no caps, windows everywhere": {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "layer_types": TWO_TYPES[:1] * 2,
        },
    },
    config_mutants={
        "no cap of scores": ("caps and a window in every other layer", change(attention_softcap=None)),
        "no cap of logits": ("caps and a window in every other layer", change(logit_softcap=None)),
        "scale of head_dim": ("no caps, windows everywhere", change(attention_scale=0.25)),
        "no window": ("caps and a window in every other layer", NO_WINDOW),
        "the other layer's window": ("caps and a window in every other layer", reversed_layers),
        "no norm of outputs": ("no caps, windows everywhere", change(norm_placement="input")),
        "no norm of inputs": ("no caps, windows everywhere", change(norm_placement="output")),
        "factors without 1": ("no caps, windows everywhere", norm(unit_offset=False)),
        "embeddings as they are": ("no caps, windows everywhere", change(embedding_multiplier=None)),
    },
)
GEMMA3 = FamilyCases(
    name="Gemma 3",
    models="Gemma 3, text",
    architecture="Gemma3ForCausalLM",
    base={
        "head_dim": 16,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 20,
        "layer_types": TWO_TYPES,
        **WINDOW,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
        },
    },
    variants={
        "two bases": {},
        "stretched frequencies of full layers": {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
            },
            "final_logit_softcapping": 3.0,
        },
    },
    config_mutants={
        "one base": ("two bases", rotary(theta=10.0)),
        "the other base": ("two bases", rotary(theta=1000.0)),
        "the other layer's": ("two bases", reversed_layers),
        "no stretching": ("stretched frequencies of full layers", rotary(scaling=None)),
        "no norms of queries and keys": ("two bases", change(qk_norm=None)),
        "their factors without 1": ("two bases", qk_norm(unit_offset=False)),
        "no window": ("two bases", NO_WINDOW),
        "no norm of outputs": ("two bases", change(norm_placement="input")),
        "scale of head_dim": ("two bases", change(attention_scale=0.25)),
        "no cap of logits": ("stretched frequencies of full layers", change(logit_softcap=None)),
    },
)
PHI = FamilyCases(
    name="Phi",
    models="Phi-1, Phi-1.5, Phi-2",
    architecture="PhiForCausalLM",
    shape=LAYER_NORM_SHAPE,
    base={"layer_norm_eps": 1e-2, "partial_rotary_factor": 0.5},
    variants={
        "half of each head turns": {},
        "norms of queries and keys": {"qk_layernorm": True, "num_key_value_heads": 4},
    },
    config_mutants={
        "one after the other": ("half of each head turns", change(is_parallel=False)),
        "the whole head turns": ("half of each head turns", full_turn),
        "no norms of queries and keys": ("norms of queries and keys", change(qk_norm=None)),
        "no terms in them": ("norms of queries and keys", qk_norm(bias=False)),
        "root-mean-square norms": ("half of each head turns", rms_norms),
        "no bias of the head": ("half of each head turns", change(head_bias=False)),
        "no bias of the feed-forward layer": ("half of each head turns", change(mlp_bias=False)),
        "exact GELU": ("half of each head turns", change(activation="gelu")),
    },
)
PHI3 = FamilyCases(
    name="Phi-3",
    models="Phi-3, Phi-3.5 mini, Phi-4, Phi-4-mini",
    architecture="Phi3ForCausalLM",
    # So short that transformers never changes its divisors in the middle of a test.
    base={"pad_token_id": 0, "original_max_position_embeddings": 1},
    variants={
        "merged projections and a window": WINDOW,
        "longrope": {"rope_parameters": LONG_ROPE},
        "longrope of three quarters of a head, tied": {
            "hidden_size": 64,
            "rope_parameters": LONG_ROPE | {"partial_rotary_factor": 0.75},
            "tie_word_embeddings": True,
        },
    },
    config_mutants={
        "no window": ("merged projections and a window", NO_WINDOW),
        "frequencies as they are": ("longrope", rotary(scaling=None)),
        "divisors of short contexts": ("longrope", longrope(long_factors=tuple(LONG_ROPE["short_factor"]))),
        "no sharpening": ("longrope", longrope(attention_factor=1.0)),
    },
)
GRANITE = FamilyCases(
    name="Granite",
    models="Granite 3.0 to 3.3, dense",
    architecture="GraniteForCausalLM",
    base={
        "attention_multiplier": 0.5,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 4.0,
    },
    variants={
        "a factor at every joint": {},
        "biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    },
    config_mutants={
        "attention by head_dim": ("a factor at every joint", change(attention_scale=12**-0.5)),
        "embeddings as they are": ("a factor at every joint", change(embedding_multiplier=None)),
        "sums as they are": ("a factor at every joint", change(residual_multiplier=1.0)),
        "logits as they are": ("a factor at every joint", change(logit_multiplier=1.0)),
    },
)
OLMO2 = FamilyCases(
    name="OLMo 2",
    models="OLMo 2",
    architecture="Olmo2ForCausalLM",
    variants={
        "norms on outputs": {},
        "biases, one query head a key head": {"attention_bias": True, "num_key_value_heads": 4},
    },
    config_mutants={
        "norms on inputs": ("norms on outputs", change(norm_placement="input")),
        "norms on both": ("norms on outputs", change(norm_placement="both")),
        "no norms of queries and keys": ("norms on outputs", change(qk_norm=None)),
        "their epsilon": ("norms on outputs", qk_norm(eps=1.0)),
    },
    weight_mutants={
        "no factors of queries": ("norms on outputs", neutral_norm("query_norm")),
        "no factors of keys": ("norms on outputs", neutral_norm("key_norm")),
        "no factors of attention's output": ("norms on outputs", neutral_norm("attention_output_norm")),
        "no factors of the feed-forward's": ("norms on outputs", neutral_norm("mlp_output_norm")),
    },
)
OLMO3 = FamilyCases(
    name="OLMo 3",
    models="OLMo 3",
    architecture="Olmo3ForCausalLM",
    base={"num_hidden_layers": 4, **WINDOW},
    variants={
        "every fourth layer full": {},
        "stretched frequencies of full layers": {
            "num_hidden_layers": 2,
            "layer_types": TWO_TYPES,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": YARN,
            },
        },
    },
    config_mutants={
        "no window": ("every fourth layer full", NO_WINDOW),
        "the first layer full": ("every fourth layer full", reversed_layers),
        "no stretching": ("stretched frequencies of full layers", rotary(scaling=None)),
    },
)
SEED_OSS = FamilyCases(
    name="Seed-OSS",
    models="Seed-OSS 36B",
    architecture="SeedOssForCausalLM",
    base={"head_dim": 16},
    variants={
        "biases of queries, keys and values": {},
        "biases of all others, tied": {
            "attention_bias": False,
            "attention_out_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    },
    config_mutants={
        "no biases": ("biases of queries, keys and values", change(attention_bias=False)),
        "no bias behind attention": ("biases of all others, tied", change(attention_output_bias=False)),
        "no biases within the feed-forward layer": ("biases of all others, tied", change(mlp_bias=False)),
    },
)
SMOLLM3 = FamilyCases(
    name="SmolLM3",
    models="SmolLM3",
    architecture="SmolLM3ForCausalLM",
    base={"pad_token_id": 0, "tie_word_embeddings": True},
    variants={
        "every second layer without positions": {"no_rope_layer_interval": 2},
        "given layers without positions, biases": {
            "no_rope_layers": [0, 1],
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
        },
        "windows without positions": {
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            **WINDOW,
        },
    },
    config_mutants={
        "all layers turn": ("every second layer without positions", turning_layers),
        "no layer turns": ("every second layer without positions", layers(rotary=None)),
        "the other layer turns": ("given layers without positions, biases", reversed_layers),
        "no window": ("windows without positions", NO_WINDOW),
    },
)
COHERE = FamilyCases(
    name="Cohere",
    models="Command R, Command R+, Aya",
    architecture="CohereForCausalLM",
    shape=LAYER_NORM_SHAPE,
    base={"layer_norm_eps": 1e-2, "tie_word_embeddings": True, "logit_scale": 0.25},
    variants={
        "in parallel, neighbours turn together": {},
        "norms of queries and keys": {"use_qk_norm": True, "attention_bias": True},
    },
    config_mutants={
        "halves turn together": ("in parallel, neighbours turn together", rotary(is_interleaved=False)),
        "one after the other": ("in parallel, neighbours turn together", change(is_parallel=False)),
        "a norm each": ("in parallel, neighbours turn together", change(has_parallel_mlp_norm=True)),
        "root-mean-square norms": ("in parallel, neighbours turn together", rms_norms),
        "logits as they are": ("in parallel, neighbours turn together", change(logit_multiplier=1.0)),
        "no norms of queries and keys": ("norms of queries and keys", change(qk_norm=None)),
        "their epsilon": ("norms of queries and keys", qk_norm(eps=1.0)),
    },
    weight_mutants={
        "no factors of queries": ("norms of queries and keys", neutral_norm("query_norm")),
    },
)
COHERE2 = FamilyCases(
    name="Cohere 2",
    models="Command R7B, Command A",
    architecture="Cohere2ForCausalLM",
    shape=LAYER_NORM_SHAPE,
    base={
        "layer_norm_eps": 1e-2,
        "tie_word_embeddings": True,
        "logit_scale": 0.25,
        "num_hidden_layers": 4,
        **WINDOW,
    },
    variants={
        "every fourth layer full, without positions": {},
        "given layers": {
            "num_hidden_layers": 2,
            "layer_types": TWO_TYPES[::-1],
            "attention_bias": True,
        },
    },
    config_mutants={
        "all layers turn": ("given layers", turning_layers),
        "no window": ("every fourth layer full, without positions", NO_WINDOW),
        "the first layer full": ("every fourth layer full, without positions", reversed_layers),
        "halves turn together": ("given layers", rotary(is_interleaved=False)),
    },
)
GLM = FamilyCases(
    name="GLM",
    models="GLM-4-9B, GLM-Edge",
    architecture="GlmForCausalLM",
    base={"head_dim": 16, "pad_token_id": 0},
    variants={
        "neighbours of half a head turn": {},
        "no biases, a quarter": {
            "attention_bias": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.25,
            },
        },
    },
    config_mutants={
        "halves turn together": ("neighbours of half a head turn", rotary(is_interleaved=False)),
        "the whole head turns": ("neighbours of half a head turn", full_turn),
        "no bias": ("neighbours of half a head turn", change(attention_bias=False)),
    },
)
GLM4 = FamilyCases(
    name="GLM-4",
    models="GLM-4-0414, GLM-Z1",
    architecture="Glm4ForCausalLM",
    base={"head_dim": 16, "pad_token_id": 0},
    variants={
        "norms on inputs and outputs": {},
        "no biases, tied": {"attention_bias": False, "tie_word_embeddings": True},
    },
    config_mutants={
        "norms on inputs": ("norms on inputs and outputs", change(norm_placement="input")),
        "norms on outputs": ("norms on inputs and outputs", change(norm_placement="output")),
        "halves turn together": ("norms on inputs and outputs", rotary(is_interleaved=False)),
        "the whole head turns": ("norms on inputs and outputs", full_turn),
    },
    weight_mutants={
        "no factors of attention's output": (
            "norms on inputs and outputs",
            neutral_norm("attention_output_norm"),
        ),
    },
)
STABLELM = FamilyCases(
    name="StableLM",
    models="StableLM 3B, StableLM 2 1.6B and 12B",
    architecture="StableLmForCausalLM",
    shape=LAYER_NORM_SHAPE,
    base={"layer_norm_eps": 1e-2, "head_dim": 12, "partial_rotary_factor": 0.5},
    variants={
        "half of each head turns, biases": {"use_qkv_bias": True},
        "in parallel, norms of queries and keys": {
            "use_parallel_residual": True,
            "qk_layernorm": True,
        },
    },
    config_mutants={
        "the whole head turns": ("half of each head turns, biases", full_turn),
        "no bias": ("half of each head turns, biases", change(attention_bias=False)),
        "no terms in norms": ("half of each head turns, biases", norm(bias=False)),
        "root-mean-square norms": ("half of each head turns, biases", rms_norms),
        "one after the other": ("in parallel, norms of queries and keys", change(is_parallel=False)),
        "no norms of queries and keys": ("in parallel, norms of queries and keys", change(qk_norm=None)),
    },
    weight_mutants={
        "no factors of keys": ("in parallel, norms of queries and keys", neutral_norm("key_norm")),
    },
)
STARCODER2 = FamilyCases(
    name="StarCoder2",
    models="StarCoder2",
    architecture="Starcoder2ForCausalLM",
    shape=LAYER_NORM_SHAPE,
    base={"norm_epsilon": 1e-2, "tie_word_embeddings": True},
    variants={
        "biases and a window": WINDOW,
        "no biases": {"use_bias": False, "tie_word_embeddings": False},
    },
    config_mutants={
        "no window": ("biases and a window", NO_WINDOW),
        "no bias of queries, keys and values": ("biases and a window", change(attention_bias=False)),
        "no bias of attention's output": ("biases and a window", change(attention_output_bias=False)),
        "no bias of the feed-forward layer": ("biases and a window", change(mlp_bias=False)),
        "exact GELU": ("biases and a window", change(activation="gelu")),
        "root-mean-square norms": ("no biases", rms_norms),
    },
)
GPT_NEOX = FamilyCases(
    name="GPT-NeoX",
    models="Pythia, GPT-NeoX-20B, Dolly v2, RedPajama-INCITE",
    architecture="GPTNeoXForCausalLM",
    shape=OLDER_SHAPE,
    base={"layer_norm_eps": 1e-2, "rotary_pct": 0.5},
    variants={
        "in parallel, half of each head turns": {},
        "one after the other, no biases": {
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_act": "gelu_pytorch_tanh",
        },
    },
    config_mutants={
        "one after the other": ("in parallel, half of each head turns", change(is_parallel=False)),
        "in parallel": ("one after the other, no biases", change(is_parallel=True)),
        "one norm for both": (
            "in parallel, half of each head turns",
            change(has_parallel_mlp_norm=False),
        ),
        "the whole head turns": ("in parallel, half of each head turns", full_turn),
        "no bias": ("in parallel, half of each head turns", change(attention_bias=False)),
        "GELU by tanh": ("in parallel, half of each head turns", change(activation="gelu_tanh")),
        "exact GELU": ("one after the other, no biases", change(activation="gelu")),
    },
)
GPT2 = FamilyCases(
    name="GPT-2",
    models="GPT-2, DistilGPT2, DialoGPT",
    architecture="GPT2LMHeadModel",
    shape={"vocab_size": 97, "attn_implementation": "eager"},
    base={
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
        "layer_norm_epsilon": 1e-2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    variants={
        "learned positions": {},
        "another inner size, scores as they are": {
            "n_inner": 80,
            "scale_attn_weights": False,
            "tie_word_embeddings": False,
            "activation_function": "relu",
        },
    },
    config_mutants={
        "no positions": ("learned positions", change(num_learned_positions=0)),
        "positions from row 1 on": ("learned positions", change(learned_position_offset=1)),
        "scaled scores": ("another inner size, scores as they are", change(attention_scale=12**-0.5)),
        "GELU": ("another inner size, scores as they are", change(activation="gelu_tanh")),
        "root-mean-square norms": ("learned positions", rms_norms),
    },
    weight_mutants={
        "no bias of attention's output": ("learned positions", without_bias("attention.output")),
        "no bias of the feed-forward layer": ("learned positions", without_bias("mlp.down")),
    },
)
OPT = FamilyCases(
    name="OPT",
    models="OPT, Galactica",
    architecture="OPTForCausalLM",
    shape=OWN_INNER_SHAPE,
    base={
        "ffn_dim": 80,
        "word_embed_proj_dim": 48,
        "tie_word_embeddings": True,
    },
    variants={
        "norms on inputs": {},
        "norms on sums, narrow embeddings": {
            "do_layer_norm_before": False,
            "word_embed_proj_dim": 20,
        },
        "no biases, GELU, untied": {
            "enable_bias": False,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
        },
    },
    config_mutants={
        "positions from row 0 on": ("norms on inputs", change(learned_position_offset=0)),
        "no positions": ("norms on inputs", change(num_learned_positions=0)),
        "GELU": ("norms on inputs", change(activation="gelu")),
        "norms on inputs": ("norms on sums, narrow embeddings", change(norm_placement="input")),
        "norms on sums": ("norms on inputs", change(norm_placement="sum")),
        "wide embeddings": ("norms on sums, narrow embeddings", change(embedding_size=None)),
        "no bias": ("norms on inputs", change(mlp_bias=False)),
    },
)
FALCON = FamilyCases(
    name="Falcon",
    models="Falcon 7B, 11B, 40B and 180B, Falcon-RW",
    architecture="FalconForCausalLM",
    older_architectures=("RWForCausalLM",),
    shape=OWN_INNER_SHAPE,
    base={"layer_norm_epsilon": 1e-2, "ffn_hidden_size": 80, "tie_word_embeddings": True},
    variants={
        "one key head": {},
        "groups, a norm each": {"new_decoder_architecture": True, "num_kv_heads": 2},
        "groups, one norm, biases": {
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
            "bias": True,
            "tie_word_embeddings": False,
        },
        "a key head each, one after the other": {
            "multi_query": False,
            "num_kv_heads": 4,
            "parallel_attn": False,
        },
        # transformers' plain attention adds ALiBi twice.
        "ALiBi, a key head each, biases": {
            "attn_implementation": "sdpa",
            "alibi": True,
            "multi_query": False,
            "num_kv_heads": 4,
            "parallel_attn": False,
            "bias": True,
        },
        "ALiBi, one key head": {
            "attn_implementation": "sdpa",
            "alibi": True,
            "num_attention_heads": 8,
        },
    },
    config_mutants={
        "one after the other": ("one key head", change(is_parallel=False)),
        "one norm for both": ("groups, a norm each", change(has_parallel_mlp_norm=False)),
        "no bias": ("groups, one norm, biases", change(mlp_bias=False)),
        "in parallel": ("a key head each, one after the other", change(is_parallel=True)),
        "no ALiBi": ("ALiBi, one key head", change(alibi_scale=None)),
        "ALiBi that is not scaled": ("ALiBi, a key head each, biases", change(alibi_scale=1.0)),
        "positions twice": ("ALiBi, one key head", layers(rotary=SMALL_ROTARY)),
    },
)

FAMILIES = (
    LLAMA,
    MISTRAL,
    MINISTRAL,
    MINISTRAL3,
    QWEN2,
    QWEN3,
    GEMMA,
    GEMMA2,
    GEMMA3,
    PHI,
    PHI3,
    GRANITE,
    OLMO2,
    OLMO3,
    SMOLLM3,
    SEED_OSS,
    COHERE,
    COHERE2,
    GLM,
    GLM4,
    STABLELM,
    STARCODER2,
    GPT_NEOX,
    GPT2,
    OPT,
    FALCON,
)
