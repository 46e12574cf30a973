"""Seed-OSS (ByteDance, 2025): Llama with biases of queries, keys and values, and heads of their own size."""

from __future__ import annotations

from graphllm.models.config import ModelConfig
from graphllm.models.families.llama import LLAMA
from graphllm.models.family import Family
from graphllm.models.hf_config import HFConfig
from graphllm.models.hf_decoder import read_decoder_config


def read_config(config: HFConfig) -> ModelConfig:
    """The projection behind attention has a switch of its own."""
    config.get("residual_dropout")  # of training alone
    return read_decoder_config(
        config,
        attention_bias=config.flag("attention_bias", default=True),
        attention_output_bias=config.flag("attention_out_bias", default=False),
        mlp_bias=config.flag("mlp_bias", default=False),
    )


SEED_OSS = Family(
    architectures=("SeedOssForCausalLM",),
    read_config=read_config,
    weight_names=LLAMA.weight_names,
)
