"""GPT-NeoX and Pythia (Black et al., 2022, arXiv:2204.06745; Biderman et al., 2023, arXiv:2304.01373)."""

from __future__ import annotations

from dataclasses import replace

from graphllm.layers.norm import NormConfig
from graphllm.models.config import ModelConfig
from graphllm.models.family import Family
from graphllm.models.hf_config import HFConfig
from graphllm.models.hf_decoder import read_decoder_config
from graphllm.models.hf_rope import RopeDefaults
from graphllm.models.weight_layouts import grouped_qkv


def read_config(config: HFConfig) -> ModelConfig:
    """In parallel, attention and feed-forward each have their norm of the layer's input."""
    attention_bias = config.flag("attention_bias", default=True)
    base = read_decoder_config(
        config.renamed(rope_theta="rotary_emb_base", partial_rotary_factor="rotary_pct"),
        attention_bias=attention_bias,
        attention_output_bias=attention_bias,
        mlp_bias=True,
        norm=NormConfig(kind="layer", eps=config.positive_float("layer_norm_eps"), bias=True),
        rope=RopeDefaults(partial_rotary_factor=0.25),
        default_activation="gelu",
    )
    is_parallel = config.flag("use_parallel_residual", default=True)
    return replace(base, is_gated=False, is_parallel=is_parallel, has_parallel_mlp_norm=is_parallel)


GPT_NEOX = Family(
    architectures=("GPTNeoXForCausalLM",),
    read_config=read_config,
    weight_names={
        "embedding": "gpt_neox.embed_in",
        "layers.{}.attention_norm": "gpt_neox.layers.{}.input_layernorm",
        "layers.{}.attention.qkv": "gpt_neox.layers.{}.attention.query_key_value",
        "layers.{}.attention.output": "gpt_neox.layers.{}.attention.dense",
        "layers.{}.mlp_norm": "gpt_neox.layers.{}.post_attention_layernorm",
        "layers.{}.mlp.up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
        "layers.{}.mlp.down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
        "final_norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
    },
    layouts={"layers.{}.attention.qkv": grouped_qkv},
    # Masks and tables of rotary frequencies that old versions of transformers stored.
    ignored_weights=(
        "gpt_neox.layers.{}.attention.bias",
        "gpt_neox.layers.{}.attention.masked_bias",
        "gpt_neox.layers.{}.attention.rotary_emb.inv_freq",
    ),
)
