"""Gemma 1 to 3, text (Gemma Team, 2024 and 2025, arXiv:2403.08295, 2408.00118 and 2503.19786).

They share scaled embeddings, norms that multiply by 1 + weight, and GeGLU. Gemma 2 adds norms on outputs,
soft caps and alternating windows; Gemma 3 normalizes queries and keys instead of capping, and its windowed
layers turn by a base of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from graphllm.layers.attention import QKNormConfig
from graphllm.layers.norm import NormConfig
from graphllm.models.config import ModelConfig
from graphllm.models.families.llama import LLAMA
from graphllm.models.family import Family
from graphllm.models.hf_config import HFConfig
from graphllm.models.hf_decoder import PLAIN_ROPE, read_decoder_config, read_layer_types
from graphllm.models.hf_rope import RopeDefaults


def _read_common(
    config: HFConfig, *, rope: RopeDefaults = PLAIN_ROPE, layer_types: Sequence[str] | None = None
) -> ModelConfig:
    attention_bias = config.flag("attention_bias", default=False)
    config.positive_int("head_dim")  # not what would follow from the other sizes: never guessed
    base = read_decoder_config(
        config,
        attention_bias=attention_bias,
        attention_output_bias=attention_bias,
        norm=NormConfig(eps=config.positive_float("rms_norm_eps"), unit_offset=True),
        rope=rope,
        layer_types=layer_types,
        default_activation="gelu_pytorch_tanh",
        ties_embeddings=True,
    )
    # Early files say "gelu" and mean its approximation, which the models were trained with.
    activation = "gelu_tanh" if base.activation == "gelu" else base.activation
    return replace(base, activation=activation, embedding_multiplier=base.hidden_size**0.5)


def _by_newer_activation(config: HFConfig) -> HFConfig:
    """`hidden_activation`, where it is set, goes before `hidden_act`."""
    config.get("hidden_act")
    has_newer_key = config.get("hidden_activation") is not None
    return config.renamed(hidden_act="hidden_activation") if has_newer_key else config


def read_gemma(config: HFConfig) -> ModelConfig:
    """All layers are alike."""
    return _read_common(_by_newer_activation(config))


def read_gemma2(config: HFConfig) -> ModelConfig:
    """The caps may be null, but not left out: without a word they would be the published models'."""
    config = _by_newer_activation(config)
    config.expect("sliding_window_size", config.get("sliding_window"))  # the same once more, in some files
    return replace(
        _read_common(config, layer_types=read_layer_types(config, every=2)),
        norm_placement="both",
        attention_scale=config.positive_float("query_pre_attn_scalar") ** -0.5,
        attention_softcap=config.nullable_float("attn_logit_softcapping"),
        logit_softcap=config.nullable_float("final_logit_softcapping"),
    )


def read_gemma3(config: HFConfig) -> ModelConfig:
    """Files without `layer_types` say how often a layer sees everything."""
    config.expect("attn_logit_softcapping", None)  # a key without meaning, which no published file sets
    config = _by_newer_activation(config)
    every = config.positive_int("_sliding_window_pattern", 6)
    every = config.positive_int("sliding_window_pattern", every)
    rope = RopeDefaults(theta=1e6, has_plain_windows=True, window_theta=1e4)
    base = _read_common(config, rope=rope, layer_types=read_layer_types(config, every=every))
    return replace(
        base,
        norm_placement="both",
        qk_norm=QKNormConfig(norm=base.norm),
        attention_scale=config.positive_float("query_pre_attn_scalar") ** -0.5,
        logit_softcap=config.optional_float("final_logit_softcapping"),
    )


_FOUR_NORMS = {
    **LLAMA.weight_names,
    "layers.{}.attention_output_norm": "model.layers.{}.post_attention_layernorm",
    "layers.{}.mlp_norm": "model.layers.{}.pre_feedforward_layernorm",
    "layers.{}.mlp_output_norm": "model.layers.{}.post_feedforward_layernorm",
}

GEMMA = Family(
    architectures=("GemmaForCausalLM",),
    read_config=read_gemma,
    weight_names=LLAMA.weight_names,
    ignored_weights=LLAMA.ignored_weights,
)
GEMMA2 = Family(
    architectures=("Gemma2ForCausalLM",),
    read_config=read_gemma2,
    weight_names=_FOUR_NORMS,
    ignored_weights=LLAMA.ignored_weights,
)
GEMMA3 = Family(
    architectures=("Gemma3ForCausalLM",),
    read_config=read_gemma3,
    weight_names={
        **_FOUR_NORMS,
        "layers.{}.attention.query_norm": "model.layers.{}.self_attn.q_norm",
        "layers.{}.attention.key_norm": "model.layers.{}.self_attn.k_norm",
    },
)
