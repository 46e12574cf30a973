"""GLM-4.5 and its like (GLM-4.5 Team, 2025, arXiv:2508.06471): experts as DeepSeek-V3 has them.

Layers behind the last one predict further tokens; they are not served.
"""

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
from graphllm.models.hf_rope import RopeDefaults

SHARED_EXPERT_NAMES = {
    "layers.{}.moe.shared.gate_up.gate": "model.layers.{}.mlp.shared_experts.gate_proj",
    "layers.{}.moe.shared.gate_up.up": "model.layers.{}.mlp.shared_experts.up_proj",
    "layers.{}.moe.shared.down": "model.layers.{}.mlp.shared_experts.down_proj",
}
SELECTION_BIAS_NAMES = {
    "layers.{}.moe.selection.bias": "model.layers.{}.mlp.gate.e_score_correction_bias",
}


def read_config(config: HFConfig) -> ModelConfig:
    """The first layers are dense; half of a head's dimensions turn where the file does not say how many."""
    base = read_decoder_config(
        config,
        attention_bias=config.flag("attention_bias", default=False),
        rope=RopeDefaults(partial_rotary_factor=0.5),
    )
    if config.flag("use_qk_norm", default=False):
        base = replace(base, qk_norm=QKNormConfig(norm=base.norm))
    for key in ("num_nextn_predict_layers", "num_mtp_layers"):
        config.get(key)
    inner = config.positive_int("moe_intermediate_size")
    moe = MoEConfig(
        routing=read_routing(
            config,
            num_experts="n_routed_experts",
            scoring="sigmoid",
            normalizes=config.flag("norm_topk_prob", default=True),
            scale=config.positive_float("routed_scaling_factor", 1.0),
            num_groups=config.positive_int("n_group", 1),
            num_chosen_groups=config.positive_int("topk_group", 1),
        ),
        expert_intermediate_size=inner,
        expert_activation=base.activation,
        has_selection_bias=True,
        shared_intermediate_size=inner * config.positive_int("n_shared_experts", 1),
        shared_activation=base.activation,
    )
    num_dense = config.non_negative_int("first_k_dense_replace", 1)
    return with_experts(base, moe, layers=range(num_dense, base.num_layers))


GLM4_MOE = Family(
    architectures=("Glm4MoeForCausalLM",),
    read_config=read_config,
    weight_names={**QWEN3.weight_names, **EXPERT_NAMES, **SHARED_EXPERT_NAMES, **SELECTION_BIAS_NAMES},
    ignored_weights=QWEN3.ignored_weights,
    spare_layers="model.layers.{}.",
)
