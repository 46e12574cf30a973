"""Granite 3 (IBM, 2024): Llama with factors at every joint (Yang et al., 2022, arXiv:2203.03466)."""

from __future__ import annotations

from dataclasses import replace

from graphllm.models.config import ModelConfig
from graphllm.models.families.llama import LLAMA, read_config
from graphllm.models.family import Family
from graphllm.models.hf_config import HFConfig


def read_granite(config: HFConfig) -> ModelConfig:
    """The factors are 1 where the file is silent."""
    return replace(
        read_config(config),
        attention_scale=config.positive_float("attention_multiplier", 1.0),
        embedding_multiplier=config.positive_float("embedding_multiplier", 1.0),
        residual_multiplier=config.positive_float("residual_multiplier", 1.0),
        logit_multiplier=1.0 / config.positive_float("logits_scaling", 1.0),
    )


GRANITE = Family(
    architectures=("GraniteForCausalLM",),
    read_config=read_granite,
    weight_names=LLAMA.weight_names,
    ignored_weights=LLAMA.ignored_weights,
)
