"""GLM-4 (Team GLM, 2024, arXiv:2406.12793): half of each head turns, neighbours together.

The models of 2025 also have norms on outputs.
"""

from __future__ import annotations

from dataclasses import replace

from graphllm.models.config import ModelConfig
from graphllm.models.families.llama import LLAMA
from graphllm.models.family import Family
from graphllm.models.hf_config import HFConfig
from graphllm.models.hf_decoder import read_decoder_config
from graphllm.models.hf_rope import RopeDefaults

_ROPE = RopeDefaults(partial_rotary_factor=0.5, is_interleaved=True)


def read_glm(config: HFConfig) -> ModelConfig:
    """Queries, keys and values have biases, or none has any."""
    return read_decoder_config(config, attention_bias=config.flag("attention_bias", default=True), rope=_ROPE)


def read_glm4(config: HFConfig) -> ModelConfig:
    """The same with twice the norms."""
    return replace(read_glm(config), norm_placement="both")


_WEIGHT_NAMES = {**LLAMA.weight_names, "layers.{}.mlp.gate_up": "model.layers.{}.mlp.gate_up_proj"}

GLM = Family(architectures=("GlmForCausalLM",), read_config=read_glm, weight_names=_WEIGHT_NAMES)
GLM4 = Family(
    architectures=("Glm4ForCausalLM",),
    read_config=read_glm4,
    weight_names={
        **_WEIGHT_NAMES,
        "layers.{}.attention_output_norm": "model.layers.{}.post_self_attn_layernorm",
        "layers.{}.mlp_output_norm": "model.layers.{}.post_mlp_layernorm",
    },
)
