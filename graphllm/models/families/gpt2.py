"""GPT-2 (Radford et al., 2019): learned positions, and matrices stored with their inputs first."""

from __future__ import annotations

from dataclasses import replace

from graphllm.layers.norm import NormConfig
from graphllm.models.config import ModelConfig
from graphllm.models.family import Family
from graphllm.models.hf_config import HFConfig
from graphllm.models.hf_decoder import read_decoder_config
from graphllm.models.weight_layouts import transposed


def read_config(config: HFConfig) -> ModelConfig:
    """Everything but the head has a bias."""
    for key in ("n_ctx", "predict_special_tokens", "reorder_and_upcast_attn"):
        config.get(key)  # of no effect on results
    config.expect("n_special", 0)
    config.expect("scale_attn_by_inverse_layer_idx", False)
    config = config.renamed(
        hidden_act="activation_function",
        hidden_size="n_embd",
        intermediate_size="n_inner",
        max_position_embeddings="n_positions",
        num_attention_heads="n_head",
        num_hidden_layers="n_layer",
    )
    base = read_decoder_config(
        config,
        intermediate_size=4 * config.positive_int("hidden_size"),
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        norm=NormConfig(kind="layer", eps=config.positive_float("layer_norm_epsilon"), bias=True),
        rope=None,
        default_activation="gelu_new",
        ties_embeddings=True,
    )
    is_scaled = config.flag("scale_attn_weights", default=True)
    return replace(
        base,
        attention_scale=base.attention_scale if is_scaled else 1.0,
        is_gated=False,
        num_learned_positions=base.max_position_embeddings,
    )


GPT2 = Family(
    architectures=("GPT2LMHeadModel",),
    read_config=read_config,
    weight_names={
        "embedding": "transformer.wte",
        "positions": "transformer.wpe",
        "layers.{}.attention_norm": "transformer.h.{}.ln_1",
        "layers.{}.attention.qkv": "transformer.h.{}.attn.c_attn",
        "layers.{}.attention.output": "transformer.h.{}.attn.c_proj",
        "layers.{}.mlp_norm": "transformer.h.{}.ln_2",
        "layers.{}.mlp.up": "transformer.h.{}.mlp.c_fc",
        "layers.{}.mlp.down": "transformer.h.{}.mlp.c_proj",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    },
    layouts={
        "layers.{}.attention.qkv": transposed,
        "layers.{}.attention.output": transposed,
        "layers.{}.mlp.up": transposed,
        "layers.{}.mlp.down": transposed,
    },
    optional_prefix="transformer.",
    # Masks that old versions of transformers stored.
    ignored_weights=("transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias"),
)
