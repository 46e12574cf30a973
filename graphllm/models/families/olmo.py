"""OLMo 2 and 3 (OLMo Team, 2025, arXiv:2501.00656): norms on outputs, and of queries and keys across heads.

OLMo 3 adds windows, and stretches only the frequencies of layers without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from graphllm.layers.attention import QKNormConfig
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
    base = read_decoder_config(
        config,
        attention_bias=attention_bias,
        attention_output_bias=attention_bias,
        rope=rope,
        layer_types=layer_types,
    )
    return replace(base, norm_placement="output", qk_norm=QKNormConfig(span="all_heads", norm=base.norm))


def read_olmo2(config: HFConfig) -> ModelConfig:
    """All layers are alike."""
    return _read_common(config)


def read_olmo3(config: HFConfig) -> ModelConfig:
    """Every fourth layer sees everything."""
    rope = RopeDefaults(theta=500000.0, has_plain_windows=True)
    return _read_common(config, rope=rope, layer_types=read_layer_types(config, every=4))


_WEIGHT_NAMES = {
    **LLAMA.weight_names,
    "layers.{}.attention.query_norm": "model.layers.{}.self_attn.q_norm",
    "layers.{}.attention.key_norm": "model.layers.{}.self_attn.k_norm",
    "layers.{}.attention_output_norm": "model.layers.{}.post_attention_layernorm",
    "layers.{}.mlp_output_norm": "model.layers.{}.post_feedforward_layernorm",
}

OLMO2 = Family(architectures=("Olmo2ForCausalLM",), read_config=read_olmo2, weight_names=_WEIGHT_NAMES)
OLMO3 = Family(architectures=("Olmo3ForCausalLM",), read_config=read_olmo3, weight_names=_WEIGHT_NAMES)
