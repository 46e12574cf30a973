"""Every family with experts that is served, like the dense ones in `families.py`.

Mutants change the configuration of the mixtures themselves where weights have no place for a switch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from graphllm.kernels.expert_activation import ClampedSwiGLU
from graphllm.layers.moe import MoE
from graphllm.layers.norm import NormConfig
from graphllm.models.config import ModelConfig
from graphllm.models.decoder import Decoder
from tests.models.equality import (
    ConfigMutation,
    WeightMutation,
    change,
    layers,
    neutral_norm,
    rotary,
)
from tests.models.families import FamilyCases

GROUPS = {"n_group": 4, "topk_group": 2}


def moes(model: Decoder) -> list[MoE]:
    found = [module for module in model.modules() if isinstance(module, MoE)]
    assert found, "the model has no experts"
    return found


def of_moe(mutate_one: Callable[[MoE], None]) -> WeightMutation:
    """The same change to every mixture of experts."""

    def mutate(model: Decoder) -> None:
        for module in moes(model):
            mutate_one(module)

    return mutate


def moe(**changes: Any) -> WeightMutation:
    """Another configuration of the mixtures, their weights being as they are."""

    def mutate(module: MoE) -> None:
        module.config = replace(module.config, **changes)

    return of_moe(mutate)


def routing(**changes: Any) -> WeightMutation:
    """Another rule of routing."""

    def mutate(module: MoE) -> None:
        module.config = replace(module.config, routing=replace(module.config.routing, **changes))

    return of_moe(mutate)


def no_shared_experts(module: MoE) -> None:
    module.shared = None


def no_selection_bias(module: MoE) -> None:
    module.selection = None


def no_router_bias(module: MoE) -> None:
    module.router.get_parameter("bias").zero_()


def no_expert_bias(stack: str) -> WeightMutation:
    """One projection of all experts without its biases."""

    def mutate(module: MoE) -> None:
        module.get_submodule(stack).get_parameter("bias").zero_()

    return of_moe(mutate)


def swapped_gates_and_factors(module: MoE) -> None:
    inner = module.config.expert_intermediate_size
    stacked = module.gate_up.get_parameter("weight").view(module.gate_up.num_experts, 2, inner, -1)
    stacked.copy_(stacked.flip(1).clone())


def rotated_experts(module: MoE) -> None:
    """Each expert with the last projection of the one before it."""
    stacked = module.down.get_parameter("weight").view(module.down.num_experts, -1)
    stacked.copy_(stacked.roll(1, 0).clone())


def no_sinks(model: Decoder) -> None:
    for layer in model.layers:
        layer.attention.sinks = None


def no_value_bias(model: Decoder) -> None:
    for layer in model.layers:
        slot = layer.attention.qkv.weight_slots()["v.bias"]
        slot.load(torch.zeros(slot.shape))


MIXTRAL = FamilyCases(
    name="Mixtral",
    models="Mixtral 8x7B and 8x22B",
    architecture="MixtralForCausalLM",
    base={"num_local_experts": 5, "num_experts_per_tok": 3},
    variants={
        "three of five experts": {},
        "windows, wide heads, one expert a token": {
            "sliding_window": 13,
            "head_dim": 16,
            "num_experts_per_tok": 1,
        },
    },
    config_mutants={
        "window": ("windows, wide heads, one expert a token", layers(sliding_window=None)),
    },
    weight_mutants={
        "normalization": ("three of five experts", routing(normalizes=False)),
        "number of experts": ("three of five experts", routing(top_k=2)),
        "softmax": ("three of five experts", routing(scoring="sigmoid")),
        "order of gates and factors": ("three of five experts", of_moe(swapped_gates_and_factors)),
        "order of experts": ("three of five experts", of_moe(rotated_experts)),
        "activation": ("three of five experts", moe(expert_activation="gelu")),
    },
)
QWEN2_MOE = FamilyCases(
    name="Qwen2-MoE",
    models="Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
    architecture="Qwen2MoeForCausalLM",
    base={
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 28,
        "use_sliding_window": False,
    },
    variants={
        "a gated shared expert": {},
        "normalized, some layers dense, no biases": {
            "norm_topk_prob": True,
            "num_hidden_layers": 5,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [1],
            "qkv_bias": False,
        },
    },
    config_mutants={"dense layers": ("a gated shared expert", layers(moe=None))},
    weight_mutants={
        "no normalization": ("a gated shared expert", routing(normalizes=True)),
        "normalization": ("normalized, some layers dense, no biases", routing(normalizes=False)),
        "shared expert": ("a gated shared expert", of_moe(no_shared_experts)),
        "gate of the shared expert": ("a gated shared expert", moe(has_shared_gate=False)),
        "biases": ("a gated shared expert", no_value_bias),
    },
)
QWEN3_MOE = FamilyCases(
    name="Qwen3-MoE",
    models="Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder",
    architecture="Qwen3MoeForCausalLM",
    base={
        "num_experts": 7,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "head_dim": 16,
        "norm_topk_prob": True,
    },
    variants={
        "normalized": {},
        "not normalized, a dense layer, biases": {
            "norm_topk_prob": False,
            "mlp_only_layers": [0],
            "attention_bias": True,
        },
    },
    config_mutants={"head norms": ("normalized", change(qk_norm=None))},
    weight_mutants={
        "normalization": ("normalized", routing(normalizes=False)),
        "no normalization": ("not normalized, a dense layer, biases", routing(normalizes=True)),
    },
)
OLMOE = FamilyCases(
    name="OLMoE",
    models="OLMoE-1B-7B",
    architecture="OlmoeForCausalLM",
    base={"num_experts": 9, "num_experts_per_tok": 3, "intermediate_size": 24},
    variants={
        "nine experts": {},
        "normalized, biases, tied": {
            "norm_topk_prob": True,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    },
    config_mutants={"head norms": ("nine experts", change(qk_norm=None))},
    weight_mutants={"no normalization": ("nine experts", routing(normalizes=True))},
)
GRANITE_MOE = FamilyCases(
    name="Granite-MoE",
    models="Granite 3 1B-A400M and 3B-A800M",
    architecture="GraniteMoeForCausalLM",
    base={
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "attention_multiplier": 0.4,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "logits_scaling": 2.0,
    },
    variants={
        "three of five experts": {},
        "biases, tied, one expert a token": {
            "attention_bias": True,
            "tie_word_embeddings": True,
            "num_experts_per_tok": 1,
        },
    },
    config_mutants={
        "scale of attention": ("three of five experts", change(attention_scale=12**-0.5)),
        "multiplier of embeddings": ("three of five experts", change(embedding_multiplier=None)),
        "multiplier of sums": ("three of five experts", change(residual_multiplier=1.0)),
        "divisor of logits": ("three of five experts", change(logit_multiplier=1.0)),
    },
    weight_mutants={
        "normalization": ("three of five experts", routing(normalizes=False)),
        "order of gates and factors": ("three of five experts", of_moe(swapped_gates_and_factors)),
    },
)
GLM4_MOE = FamilyCases(
    name="GLM-4.5",
    models="GLM-4.5, GLM-4.5-Air, GLM-4.6",
    architecture="Glm4MoeForCausalLM",
    base={
        "n_routed_experts": 12,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "n_shared_experts": 2,
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.8,
        "head_dim": 16,
        "n_group": 1,
        "topk_group": 1,
    },
    variants={
        "no groups": {},
        "groups, head norms, a dense layer": GROUPS
        | {"use_qk_norm": True, "attention_bias": True, "first_k_dense_replace": 1, "num_hidden_layers": 3},
        "groups, not normalized": GROUPS | {"norm_topk_prob": False},
    },
    config_mutants={
        "head norms": ("groups, head norms, a dense layer", change(qk_norm=None)),
        "the part that turns": ("no groups", rotary(rotary_dim=16)),
    },
    weight_mutants={
        "sigmoid": ("no groups", routing(scoring="softmax")),
        "scale": ("no groups", routing(scale=1.0)),
        "normalization": ("no groups", routing(normalizes=False)),
        "no normalization": ("groups, not normalized", routing(normalizes=True)),
        "selection bias": ("no groups", of_moe(no_selection_bias)),
        "shared experts": ("no groups", of_moe(no_shared_experts)),
        "groups": ("groups, head norms, a dense layer", routing(num_chosen_groups=4)),
        "number of groups": ("groups, head norms, a dense layer", routing(num_chosen_groups=3)),
        "groups' scores": ("groups, head norms, a dense layer", routing(group_scoring="maximum")),
    },
)
GPT_OSS = FamilyCases(
    name="gpt-oss",
    models="gpt-oss-20b, gpt-oss-120b",
    architecture="GptOssForCausalLM",
    base={
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 13,
        # Small enough that values of these models reach it.
        "swiglu_limit": 0.8,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "truncate": False,
        },
    },
    variants={
        "windows in every other layer": {"num_hidden_layers": 3},
        "no windows, plain rotary, one expert a token": {
            "layer_types": ["full_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
            "num_experts_per_tok": 1,
        },
    },
    config_mutants={
        "windows": ("windows in every other layer", layers(sliding_window=None)),
        "layers without windows": ("windows in every other layer", layers(sliding_window=13)),
        "yarn": ("windows in every other layer", rotary(scaling=None)),
    },
    weight_mutants={
        "sinks": ("windows in every other layer", no_sinks),
        "normalization": ("windows in every other layer", routing(normalizes=False)),
        "bias of the router": ("windows in every other layer", of_moe(no_router_bias)),
        "biases of gates and factors": ("windows in every other layer", no_expert_bias("gate_up")),
        "biases of the last projection": ("windows in every other layer", no_expert_bias("down")),
        "limit": (
            "windows in every other layer",
            moe(expert_activation=ClampedSwiGLU(alpha=1.702, limit=7.0)),
        ),
        "alpha": (
            "windows in every other layer",
            moe(expert_activation=ClampedSwiGLU(alpha=1.0, limit=0.8)),
        ),
        "one added to factors": ("windows in every other layer", moe(expert_activation="silu")),
        "order of gates and factors": ("windows in every other layer", of_moe(swapped_gates_and_factors)),
    },
)

LATENT_SHAPE = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 12,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "n_shared_experts": 2,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.8,
}
LATENT_YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}


def latent(**changes: Any) -> ConfigMutation:
    """Other numbers in latent attention."""

    def mutate(config: ModelConfig) -> ModelConfig:
        assert config.latent is not None
        return replace(config, latent=replace(config.latent, **changes))

    return mutate


DEEPSEEK_V2 = FamilyCases(
    name="DeepSeek-V2",
    models="DeepSeek-V2, V2-Lite, Coder-V2",
    architecture="DeepseekV2ForCausalLM",
    base=LATENT_SHAPE | {"q_lora_rank": 24, "topk_method": "greedy"},
    variants={
        "queries from a latent": {},
        "queries from the hidden state, groups, yarn": {
            "q_lora_rank": None,
            "topk_method": "group_limited_greedy",
            "rope_parameters": LATENT_YARN,
        }
        | GROUPS,
    },
    config_mutants={
        "what turns together": ("queries from a latent", rotary(is_interleaved=False)),
        "norm of latents": ("queries from a latent", latent(norm=NormConfig(eps=1e-2))),
        "sharper attention": (
            "queries from the hidden state, groups, yarn",
            change(attention_scale=16**-0.5),
        ),
    },
    weight_mutants={
        "norm of the queries' latent": ("queries from a latent", neutral_norm("attention.query_norm")),
        "norm of the keys' latent": ("queries from a latent", neutral_norm("attention.key_value_norm")),
        "no normalization": ("queries from a latent", routing(normalizes=True)),
        "scale": ("queries from a latent", routing(scale=1.0)),
        "groups": ("queries from the hidden state, groups, yarn", routing(num_chosen_groups=4)),
        "groups' scores": (
            "queries from the hidden state, groups, yarn",
            routing(group_scoring="two_best"),
        ),
        "shared experts": ("queries from a latent", of_moe(no_shared_experts)),
    },
)
DEEPSEEK_V3 = FamilyCases(
    name="DeepSeek-V3",
    models="16-bit checkpoints of DeepSeek-V3 and R1",
    architecture="DeepseekV3ForCausalLM",
    base=LATENT_SHAPE | GROUPS | {"q_lora_rank": 24, "norm_topk_prob": True},
    variants={
        "queries from a latent, yarn": {"rope_parameters": LATENT_YARN},
        "queries from the hidden state, halves turn, not normalized": {
            "q_lora_rank": None,
            "rope_interleave": False,
            "norm_topk_prob": False,
            "v_head_dim": 20,
        },
    },
    config_mutants={
        "neighbours turn": ("queries from a latent, yarn", rotary(is_interleaved=False)),
        "halves turn": (
            "queries from the hidden state, halves turn, not normalized",
            rotary(is_interleaved=True),
        ),
        "sharper attention": ("queries from a latent, yarn", change(attention_scale=16**-0.5)),
    },
    weight_mutants={
        "selection bias": ("queries from a latent, yarn", of_moe(no_selection_bias)),
        "sigmoid": ("queries from a latent, yarn", routing(scoring="softmax")),
        "normalization": ("queries from a latent, yarn", routing(normalizes=False)),
        "no normalization": (
            "queries from the hidden state, halves turn, not normalized",
            routing(normalizes=True),
        ),
        "groups": ("queries from a latent, yarn", routing(num_chosen_groups=4)),
        "shared experts": ("queries from a latent, yarn", of_moe(no_shared_experts)),
    },
)

MOE_FAMILIES = (
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    OLMOE,
    GRANITE_MOE,
    GLM4_MOE,
    GPT_OSS,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
)
