"""Llama 1 to 3.3, SmolLM2, Yi and what else is built like them (Touvron et al., 2023, arXiv:2307.09288)."""

from __future__ import annotations

from graphllm.models.config import ModelConfig
from graphllm.models.family import Family
from graphllm.models.hf_config import HFConfig
from graphllm.models.hf_decoder import read_decoder_config


def read_config(config: HFConfig) -> ModelConfig:
    """One switch covers the biases of all four attention projections."""
    attention_bias = config.flag("attention_bias", default=False)
    return read_decoder_config(
        config,
        attention_bias=attention_bias,
        attention_output_bias=attention_bias,
        mlp_bias=config.flag("mlp_bias", default=False),
    )


LLAMA = Family(
    architectures=("LlamaForCausalLM",),
    read_config=read_config,
    weight_names={
        "embedding": "model.embed_tokens",
        "layers.{}.attention_norm": "model.layers.{}.input_layernorm",
        "layers.{}.attention.qkv.q": "model.layers.{}.self_attn.q_proj",
        "layers.{}.attention.qkv.k": "model.layers.{}.self_attn.k_proj",
        "layers.{}.attention.qkv.v": "model.layers.{}.self_attn.v_proj",
        "layers.{}.attention.output": "model.layers.{}.self_attn.o_proj",
        "layers.{}.mlp_norm": "model.layers.{}.post_attention_layernorm",
        "layers.{}.mlp.gate_up.gate": "model.layers.{}.mlp.gate_proj",
        "layers.{}.mlp.gate_up.up": "model.layers.{}.mlp.up_proj",
        "layers.{}.mlp.down": "model.layers.{}.mlp.down_proj",
        "final_norm": "model.norm",
        "head": "lm_head",
    },
    # Tables of rotary frequencies that old versions of transformers stored.
    ignored_weights=("model.layers.{}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"),
)
