"""The dense models of Qwen3 (Qwen Team, 2025, arXiv:2505.09388): Llama with normalized queries and keys."""

from __future__ import annotations

from dataclasses import replace

from graphllm.layers.attention import QKNormConfig
from graphllm.models.config import ModelConfig
from graphllm.models.families.llama import LLAMA
from graphllm.models.families.qwen2 import read_windowed_layers
from graphllm.models.family import Family
from graphllm.models.hf_config import HFConfig
from graphllm.models.hf_decoder import read_decoder_config


def read_config(config: HFConfig) -> ModelConfig:
    """One switch covers the biases of all four attention projections; there are no others."""
    # transformers' own defaults for these two are those of one size of the family: never guessed.
    for key in ("head_dim", "num_key_value_heads"):
        config.positive_int(key)
    attention_bias = config.flag("attention_bias", default=False)
    base = read_decoder_config(
        config,
        attention_bias=attention_bias,
        attention_output_bias=attention_bias,
        layer_types=read_windowed_layers(config),
    )
    return replace(base, qk_norm=QKNormConfig(norm=base.norm))


QWEN3 = Family(
    architectures=("Qwen3ForCausalLM",),
    read_config=read_config,
    weight_names={
        **LLAMA.weight_names,
        "layers.{}.attention.query_norm": "model.layers.{}.self_attn.q_norm",
        "layers.{}.attention.key_norm": "model.layers.{}.self_attn.k_norm",
    },
    ignored_weights=LLAMA.ignored_weights,
)
