"""Mixtral (Jiang et al., 2024, arXiv:2401.04088): Mistral with experts in every layer."""

from __future__ import annotations

from graphllm.layers.moe import MoEConfig
from graphllm.models.config import ModelConfig
from graphllm.models.families.mistral import MISTRAL
from graphllm.models.family import Family
from graphllm.models.hf_config import HFConfig
from graphllm.models.hf_moe import read_routing, with_experts


def read_config(config: HFConfig) -> ModelConfig:
    """What is not of the experts is Mistral's."""
    base = MISTRAL.read_config(config)
    moe = MoEConfig(
        routing=read_routing(config, num_experts="num_local_experts", scoring="softmax", normalizes=True),
        expert_intermediate_size=base.intermediate_size,
        expert_activation=base.activation,
    )
    return with_experts(base, moe)


MIXTRAL = Family(
    architectures=("MixtralForCausalLM",),
    read_config=read_config,
    weight_names={
        **MISTRAL.weight_names,
        "layers.{}.moe.router.experts": "model.layers.{}.block_sparse_moe.gate",
        "layers.{}.moe.gate_up.{}.gate": "model.layers.{}.block_sparse_moe.experts.{}.w1",
        "layers.{}.moe.gate_up.{}.up": "model.layers.{}.block_sparse_moe.experts.{}.w3",
        "layers.{}.moe.down.{}": "model.layers.{}.block_sparse_moe.experts.{}.w2",
    },
    ignored_weights=MISTRAL.ignored_weights,
)
