"""Every architecture of GGUF that is served: tiny models of it, and what its files say beside the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf

from tests.models import families as dense
from tests.models import moe_families as sparse
from tests.models.families import FamilyCases
from tests.models.gguf_conversion import (
    Change,
    absorbed,
    norms_plus_one,
    outputs_first,
    permuted,
    selection_bias,
    single_vector_gate,
    split_experts,
    ungrouped,
    unpaired_experts,
)

Config = Mapping[str, Any]
Extra = Callable[[gguf.GGUFWriter, Config], None]


def no_extra(writer: gguf.GGUFWriter, config: Config) -> None:
    """Nothing but what all files have."""


def partial_rotary(writer: gguf.GGUFWriter, config: Config) -> None:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    part = config["rope_parameters"].get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(head_dim * part))


def llama_dimensions(writer: gguf.GGUFWriter, config: Config) -> None:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(head_dim)


def granite_multipliers(writer: gguf.GGUFWriter, config: Config) -> None:
    llama_dimensions(writer, config)
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])


def growing_queries(writer: gguf.GGUFWriter, config: Config) -> None:
    llama_dimensions(writer, config)
    rope = config["rope_parameters"]
    writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    if "mscale_all_dim" in rope:
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])


def gemma2_caps(writer: gguf.GGUFWriter, config: Config) -> None:
    for cap, add in (
        (config["attn_logit_softcapping"], writer.add_attn_logit_softcapping),
        (config["final_logit_softcapping"], writer.add_final_logit_softcapping),
    ):
        if cap is not None:
            add(cap)
    writer.add_sliding_window(config["sliding_window"])


def gemma3_windows(writer: gguf.GGUFWriter, config: Config) -> None:
    if config.get("final_logit_softcapping") is not None:
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    listed_windows(writer, config)


def listed_windows(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern([name == "sliding_attention" for name in config["layer_types"]])


def phi3_window(writer: gguf.GGUFWriter, config: Config) -> None:
    partial_rotary(writer, config)
    writer.add_sliding_window(config["sliding_window"] or 0)


def parallel_residual(writer: gguf.GGUFWriter, config: Config) -> None:
    partial_rotary(writer, config)
    writer.add_parallel_residual(config["use_parallel_residual"])


def cohere_scale(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_logit_scale(config["logit_scale"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)


def cohere2_windows(writer: gguf.GGUFWriter, config: Config) -> None:
    cohere_scale(writer, config)
    writer.add_sliding_window(config["sliding_window"])


def one_key_head(writer: gguf.GGUFWriter, config: Config) -> None:
    if not config["new_decoder_architecture"]:
        writer.kv_data[0].pop("falcon.attention.head_count_kv", None)
        writer.add_head_count_kv(1)
    writer.add_tensor_data_layout("jploski")


def glm4_experts(writer: gguf.GGUFWriter, config: Config) -> None:
    partial_rotary(writer, config)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    shared_and_dense(writer, config)


def shared_and_dense(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(bool(config.get("norm_topk_prob")))


def gpt_oss_experts(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_sliding_window(config["sliding_window"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])


def latent_heads(writer: gguf.GGUFWriter, config: Config) -> None:
    """The absorbed form: one key head, as wide as the latent and the part that turns."""
    for key in ("head_count_kv", "key_length", "value_length"):
        writer.kv_data[0].pop(f"deepseek2.attention.{key}", None)
    rank, turned = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_head_count_kv(1)
    writer.add_kv_lora_rank(rank)
    if config["q_lora_rank"] is not None:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_key_length(rank + turned)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + turned)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(turned)
    strength = config["rope_parameters"].get("mscale_all_dim")
    if strength is not None:
        writer.add_rope_scaling_yarn_log_mul(0.1 * strength)
    shared_and_dense(writer, config)


def older_latent_heads(writer: gguf.GGUFWriter, config: Config) -> None:
    """Files that keep the projection out of the latent whole, and as many key heads as others."""
    latent_heads(writer, config)
    for name in ("key_length", "value_length"):
        of_heads = writer.kv_data[0].pop(f"deepseek2.attention.{name}_mla")
        writer.kv_data[0][f"deepseek2.attention.{name}"] = of_heads
    writer.kv_data[0].pop("deepseek2.attention.head_count_kv")
    writer.add_head_count_kv(config["num_attention_heads"])


def sigmoid_latent_heads(writer: gguf.GGUFWriter, config: Config) -> None:
    latent_heads(writer, config)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFCase:
    """A variant of a family in GGUF. keys: in place of the variant's; as published where GGUF is silent."""

    architecture: str
    family: FamilyCases
    variant: str
    keys: Config = field(default_factory=dict)
    changes: tuple[Change, ...] = ()
    extra: Extra = no_extra

    def __str__(self) -> str:
        return f"{self.architecture}: {self.family.name}, {self.variant}"


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ONE_YARN = sparse.LATENT_YARN | {"mscale": 0.7}
SHAPED_YARN = dense.YARN | {
    "original_max_position_embeddings": 2048,
    "beta_fast": 8.0,
    "beta_slow": 3.0,
    "attention_factor": 1.3,
}
HEAD_SCALE = {"query_pre_attn_scalar": 16}


def cases(
    architecture: str, family: FamilyCases, *variants: str, keys: Config | None = None, **options: Any
) -> list[GGUFCase]:
    return [
        GGUFCase(architecture=architecture, family=family, variant=variant, keys=keys or {}, **options)
        for variant in variants or family.variants
    ]


LLAMA_STYLE: dict[str, Any] = {"changes": (permuted,), "extra": llama_dimensions}
CASES = [
    *cases("llama", dense.LLAMA, **LLAMA_STYLE),
    *cases("llama", dense.LLAMA, "grouped queries", keys={"rope_parameters": LLAMA3_ROPE}, **LLAMA_STYLE),
    *cases(
        "llama",
        dense.LLAMA,
        "grouped queries",
        keys={"rope_parameters": dense.YARN, "head_dim": 20},
        **LLAMA_STYLE,
    ),
    *cases("llama", dense.MISTRAL, "full attention", **LLAMA_STYLE),
    *cases(
        "mistral3",
        dense.MINISTRAL3,
        "queries grow, yarn",
        changes=(permuted,),
        extra=growing_queries,
    ),
    *cases(
        "mistral3",
        dense.MINISTRAL3,
        "queries grow, yarn",
        keys={"rope_parameters": dense.YARN | dense.GROWTH | {"mscale": 0.8, "mscale_all_dim": 0.8}},
        changes=(permuted,),
        extra=growing_queries,
    ),
    *cases("llama", sparse.MIXTRAL, "three of five experts", **LLAMA_STYLE),
    *cases(
        "smollm3",
        dense.SMOLLM3,
        "every second layer without positions",
        keys={"no_rope_layer_interval": 4, "num_hidden_layers": 4},
        **LLAMA_STYLE,
    ),
    *cases("granite", dense.GRANITE, changes=(permuted,), extra=granite_multipliers),
    *cases("granitemoe", sparse.GRANITE_MOE, changes=(split_experts,), extra=granite_multipliers),
    *cases("qwen2", dense.QWEN2, "biases of queries, keys and values", "tied"),
    *cases("qwen2", dense.QWEN2, "tied", keys={"rope_parameters": dense.YARN}),
    *cases("qwen2", dense.QWEN2, "tied", keys={"rope_parameters": SHAPED_YARN}),
    *cases("qwen2moe", sparse.QWEN2_MOE, "a gated shared expert", changes=(single_vector_gate,)),
    *cases("qwen3", dense.QWEN3, "norms of queries and keys", "biases, tied"),
    *cases("qwen3moe", sparse.QWEN3_MOE, "normalized"),
    *cases("qwen3moe", sparse.QWEN3_MOE, "normalized", keys={"attention_bias": True}),
    *cases("gemma", dense.GEMMA, "one key head", "biases", changes=(norms_plus_one,)),
    *cases(
        "gemma2",
        dense.GEMMA2,
        "caps and a window in every other layer",
        keys=HEAD_SCALE,
        changes=(norms_plus_one,),
        extra=gemma2_caps,
    ),
    *cases("gemma3", dense.GEMMA3, keys=HEAD_SCALE, changes=(norms_plus_one,), extra=gemma3_windows),
    *cases("phi2", dense.PHI, "half of each head turns", extra=partial_rotary),
    *cases("phi3", dense.PHI3, extra=phi3_window),
    *cases("stablelm", dense.STABLELM, extra=parallel_residual),
    *cases("starcoder2", dense.STARCODER2, keys={"sliding_window": 4096}),
    *cases("olmo2", dense.OLMO2),
    *cases("olmo2", dense.OLMO3, extra=listed_windows),
    *cases("olmoe", sparse.OLMOE, "nine experts"),
    *cases("command-r", dense.COHERE, extra=cohere_scale),
    *cases("cohere2", dense.COHERE2, "every fourth layer full, without positions", extra=cohere2_windows),
    *cases("chatglm", dense.GLM, extra=partial_rotary),
    *cases("glm4", dense.GLM4, extra=partial_rotary),
    *cases("glm4moe", sparse.GLM4_MOE, changes=(selection_bias,), extra=glm4_experts),
    *cases(
        "gptneox",
        dense.GPT_NEOX,
        "in parallel, half of each head turns",
        changes=(ungrouped,),
        extra=parallel_residual,
    ),
    *cases(
        "gptneox",
        dense.GPT_NEOX,
        "one after the other, no biases",
        keys={"hidden_act": "gelu"},
        changes=(ungrouped,),
        extra=parallel_residual,
    ),
    *cases("gpt2", dense.GPT2, "learned positions", changes=(outputs_first,)),
    *cases(
        "falcon",
        dense.FALCON,
        "one key head",
        "groups, a norm each",
        "groups, one norm, biases",
        changes=(ungrouped,),
        extra=one_key_head,
    ),
    *cases(
        "gpt-oss",
        sparse.GPT_OSS,
        "windows in every other layer",
        keys={"swiglu_limit": 7.0},
        changes=(unpaired_experts,),
        extra=gpt_oss_experts,
    ),
    *cases("deepseek2", sparse.DEEPSEEK_V2, "queries from a latent", changes=(absorbed,), extra=latent_heads),
    *cases(
        "deepseek2",
        sparse.DEEPSEEK_V2,
        "queries from the hidden state, groups, yarn",
        keys={"rope_parameters": ONE_YARN},
        changes=(absorbed,),
        extra=latent_heads,
    ),
    *cases("deepseek2", sparse.DEEPSEEK_V2, "queries from a latent", extra=older_latent_heads),
    *cases(
        "deepseek2",
        sparse.DEEPSEEK_V3,
        "queries from a latent, yarn",
        keys={"rope_parameters": ONE_YARN},
        changes=(absorbed,),
        extra=sigmoid_latent_heads,
    ),
]
