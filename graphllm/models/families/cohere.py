"""Command R, Aya and Command R7B (Cohere, 2024): attention and feed-forward in parallel, one layer norm.

The second generation has windows, and its layers without one know no positions (Yang et al., 2025,
arXiv:2501.18795).
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
from graphllm.models.hf_decoder import read_decoder_config, read_layer_types
from graphllm.models.hf_rope import RopeDefaults

# What published files say of the second generation beside the keys that transformers reads.
_EXPECTED = {
    "order_of_interleaved_layers": "local_attn_first",
    "position_embedding_type": "rope_gptj",
    "rotary_pct": 1.0,
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
}


def _read_common(config: HFConfig, *, theta: float, layer_types: Sequence[str] | None = None) -> ModelConfig:
    attention_bias = config.flag("attention_bias", default=False)
    base = read_decoder_config(
        config,
        attention_bias=attention_bias,
        attention_output_bias=attention_bias,
        norm=NormConfig(kind="layer", eps=config.positive_float("layer_norm_eps")),
        rope=RopeDefaults(theta=theta, is_interleaved=True),
        layer_types=layer_types,
        ties_embeddings=True,
    )
    return replace(base, is_parallel=True, logit_multiplier=config.positive_float("logit_scale", 0.0625))


def read_cohere(config: HFConfig) -> ModelConfig:
    """Where queries and keys are normalized, each head has factors of its own."""
    base = _read_common(config, theta=500000.0)
    has_qk_norm = config.flag("use_qk_norm", default=False)
    qk_norm = QKNormConfig(span="each_head", norm=base.norm) if has_qk_norm else None
    return replace(base, qk_norm=qk_norm)


def read_cohere2(config: HFConfig) -> ModelConfig:
    """Files without `layer_types` say how often a layer sees everything."""
    for key, value in _EXPECTED.items():
        config.expect(key, value)
    config.get("use_parallel_embedding")  # how training laid the table out
    every = config.positive_int("sliding_window_pattern", config.positive_int("layer_switch", 4))
    base = _read_common(config, theta=10000.0, layer_types=read_layer_types(config, every=every))
    layers = tuple(
        replace(layer, rotary=None) if layer.sliding_window is None else layer for layer in base.layers
    )
    return replace(base, layers=layers)


COHERE = Family(
    architectures=("CohereForCausalLM",),
    read_config=read_cohere,
    weight_names={
        **LLAMA.weight_names,
        "layers.{}.attention.query_norm": "model.layers.{}.self_attn.q_norm",
        "layers.{}.attention.key_norm": "model.layers.{}.self_attn.k_norm",
    },
    ignored_weights=LLAMA.ignored_weights,
)
COHERE2 = Family(
    architectures=("Cohere2ForCausalLM",), read_config=read_cohere2, weight_names=LLAMA.weight_names
)
