"""Phi-1, Phi-1.5 and Phi-2 (Li et al., 2023, arXiv:2309.05463): attention and feed-forward in parallel."""

from __future__ import annotations

from dataclasses import replace

from graphllm.layers.attention import QKNormConfig
from graphllm.layers.norm import NormConfig
from graphllm.models.config import ModelConfig
from graphllm.models.families.llama import LLAMA
from graphllm.models.family import Family
from graphllm.models.hf_config import HFConfig
from graphllm.models.hf_decoder import read_decoder_config
from graphllm.models.hf_rope import RopeDefaults


def read_config(config: HFConfig) -> ModelConfig:
    """Everything has a bias, the head included."""
    base = read_decoder_config(
        config,
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        norm=NormConfig(kind="layer", eps=config.positive_float("layer_norm_eps"), bias=True),
        rope=RopeDefaults(partial_rotary_factor=0.5),
        default_activation="gelu_new",
    )
    rotary = base.layers[0].rotary
    assert rotary is not None
    config.expect("rotary_dim", rotary.rotary_dim)  # the same once more, in some files
    has_qk_norm = config.flag("qk_layernorm", default=False)
    if base.tie_word_embeddings:
        config.refuse("tie_word_embeddings", "is true, but the head has a bias of its own")
    return replace(
        base,
        is_parallel=True,
        is_gated=False,
        qk_norm=QKNormConfig(norm=base.norm) if has_qk_norm else None,
        head_bias=True,
    )


PHI = Family(
    architectures=("PhiForCausalLM",),
    read_config=read_config,
    weight_names={
        **LLAMA.weight_names,
        "layers.{}.attention.output": "model.layers.{}.self_attn.dense",
        "layers.{}.attention.query_norm": "model.layers.{}.self_attn.q_layernorm",
        "layers.{}.attention.key_norm": "model.layers.{}.self_attn.k_layernorm",
        "layers.{}.mlp.up": "model.layers.{}.mlp.fc1",
        "layers.{}.mlp.down": "model.layers.{}.mlp.fc2",
        "final_norm": "model.final_layernorm",
    },
    ignored_weights=LLAMA.ignored_weights,
)
