"""OLMoE (Muennighoff et al., 2024, arXiv:2409.02060): many small experts, norms over all heads."""

from __future__ import annotations

from dataclasses import replace

from graphllm.layers.attention import QKNormConfig
from graphllm.layers.moe import MoEConfig
from graphllm.models.config import ModelConfig
from graphllm.models.families.qwen2_moe import EXPERT_NAMES
from graphllm.models.families.qwen3 import QWEN3
from graphllm.models.family import Family
from graphllm.models.hf_config import HFConfig
from graphllm.models.hf_decoder import read_decoder_config
from graphllm.models.hf_moe import read_routing, with_experts


def read_config(config: HFConfig) -> ModelConfig:
    """One switch covers the biases of all four attention projections."""
    if config.get("clip_qkv") is not None:
        config.refuse("clip_qkv", f"is {config.get('clip_qkv')!r}, which is not supported")
    attention_bias = config.flag("attention_bias", default=False)
    base = read_decoder_config(config, attention_bias=attention_bias, attention_output_bias=attention_bias)
    moe = MoEConfig(
        routing=read_routing(
            config,
            num_experts="num_experts",
            scoring="softmax",
            normalizes=config.flag("norm_topk_prob", default=False),
        ),
        expert_intermediate_size=base.intermediate_size,
        expert_activation=base.activation,
    )
    return with_experts(replace(base, qk_norm=QKNormConfig(span="all_heads", norm=base.norm)), moe)


OLMOE = Family(
    architectures=("OlmoeForCausalLM",),
    read_config=read_config,
    weight_names={**QWEN3.weight_names, **EXPERT_NAMES},
    ignored_weights=QWEN3.ignored_weights,
)
