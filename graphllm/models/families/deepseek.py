"""DeepSeek-V2 (2024, arXiv:2405.04434) and V3 (2024, arXiv:2412.19437): latent attention, and experts.

Layers behind the last one predict further tokens; they are not served.
"""

from __future__ import annotations

import math
from dataclasses import replace

from graphllm.kernels.moe_routing import RoutingRule
from graphllm.layers.latent_attention import LatentConfig
from graphllm.layers.moe import MoEConfig
from graphllm.layers.norm import NormConfig
from graphllm.layers.rotary import YarnRopeScaling
from graphllm.models.config import ModelConfig
from graphllm.models.families.glm4_moe import SELECTION_BIAS_NAMES, SHARED_EXPERT_NAMES
from graphllm.models.families.llama import LLAMA
from graphllm.models.families.qwen2_moe import EXPERT_NAMES
from graphllm.models.family import Family
from graphllm.models.hf_config import HFConfig
from graphllm.models.hf_decoder import read_decoder_config
from graphllm.models.hf_moe import read_routing, with_experts
from graphllm.models.hf_rope import RopeDefaults

# The norms of latents have it whatever the others have.
_LATENT_NORM = NormConfig(eps=1e-6)


def read_v2(config: HFConfig) -> ModelConfig:
    """Softmax routing, in groups where the file says so."""
    if config.get("scoring_func", "softmax") != "softmax":
        config.refuse("scoring_func", "is not softmax")
    for key in ("norm_topk_prob", "mlp_bias"):
        if config.flag(key, default=False):
            config.refuse(key, "is true, which is not supported")
    limits_groups = config.choice(
        "topk_method", {"greedy": False, "group_limited_greedy": True}, default="greedy"
    )
    num_groups, num_chosen = (config.get(key) for key in ("n_group", "topk_group"))
    if limits_groups:
        num_groups, num_chosen = (config.positive_int(key) for key in ("n_group", "topk_group"))
    routing = read_routing(
        config,
        num_experts="n_routed_experts",
        scoring="softmax",
        normalizes=False,
        scale=config.positive_float("routed_scaling_factor", 1.0),
        num_groups=num_groups if limits_groups else 1,
        num_chosen_groups=num_chosen if limits_groups else 1,
        group_scoring="maximum",
    )
    return _read_common(
        config,
        routing,
        is_interleaved=True,
        num_dense=config.non_negative_int("first_k_dense_replace", 0),
    )


def read_v3(config: HFConfig) -> ModelConfig:
    """Sigmoid routing in groups, with a bias that only the choice sees."""
    for key, only in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if config.get(key, only) != only:
            config.refuse(key, f"is not {only}")
    routing = read_routing(
        config,
        num_experts="n_routed_experts",
        scoring="sigmoid",
        normalizes=config.flag("norm_topk_prob", default=True),
        scale=config.positive_float("routed_scaling_factor", 2.5),
        num_groups=config.positive_int("n_group", 8),
        num_chosen_groups=config.positive_int("topk_group", 4),
    )
    return _read_common(
        config,
        routing,
        is_interleaved=config.flag("rope_interleave", default=True),
        has_selection_bias=True,
        num_dense=config.non_negative_int("first_k_dense_replace", 3),
    )


def _read_common(
    config: HFConfig,
    routing: RoutingRule,
    *,
    is_interleaved: bool,
    num_dense: int,
    has_selection_bias: bool = False,
) -> ModelConfig:
    """Latent attention, and experts in all but the first layers."""
    for key in ("num_nextn_predict_layers", "num_mtp_layers", "head_dim", "qk_head_dim"):
        config.get(key)  # of layers that are not served; sums of other keys
    if config.positive_int("moe_layer_freq", 1) != 1:
        config.refuse("moe_layer_freq", "is not 1, which is not supported")
    base = read_decoder_config(
        config.renamed(head_dim="qk_rope_head_dim"),
        attention_bias=config.flag("attention_bias", default=False),
        rope=RopeDefaults(is_interleaved=is_interleaved),
    )
    if base.num_kv_heads != base.num_heads:
        config.refuse("num_key_value_heads", "is not 'num_attention_heads', as latent attention has it")
    turned_dim, value_dim = base.head_dim, config.positive_int("v_head_dim")
    head_dim = turned_dim + config.positive_int("qk_nope_head_dim")
    latent = LatentConfig(
        query_rank=None if config.get("q_lora_rank") is None else config.positive_int("q_lora_rank"),
        key_value_rank=config.positive_int("kv_lora_rank"),
        turned_dim=turned_dim,
        value_dim=value_dim,
        norm=_LATENT_NORM,
    )
    inner = config.positive_int("moe_intermediate_size")
    moe = MoEConfig(
        routing=routing,
        expert_intermediate_size=inner,
        expert_activation=base.activation,
        has_selection_bias=has_selection_bias,
        shared_intermediate_size=inner * config.positive_int("n_shared_experts"),
        shared_activation=base.activation,
    )
    scale = head_dim**-0.5 * _sharpness(config, base) ** 2
    base = replace(base, head_dim=head_dim, attention_scale=scale, latent=latent)
    return with_experts(base, moe, layers=range(num_dense, base.num_layers))


def _sharpness(config: HFConfig, base: ModelConfig) -> float:
    """What YaRN multiplies queries and keys by beside what it does to cosines and sines."""
    rotary = base.layers[0].rotary
    if rotary is None or not isinstance(rotary.scaling, YarnRopeScaling) or rotary.scaling.factor <= 1.0:
        return 1.0
    rope = config.section("rope_scaling" if config.get("rope_parameters") is None else "rope_parameters")
    strength = rope.optional_float("mscale_all_dim")
    return 1.0 if strength is None else 0.1 * strength * math.log(rotary.scaling.factor) + 1.0


_ATTENTION_NAMES = {
    "layers.{}.attention.query": "model.layers.{}.self_attn.q_proj",
    "layers.{}.attention.query_up": "model.layers.{}.self_attn.q_b_proj",
    "layers.{}.attention.query_norm": "model.layers.{}.self_attn.q_a_layernorm",
    "layers.{}.attention.down.query": "model.layers.{}.self_attn.q_a_proj",
    "layers.{}.attention.down.key_value": "model.layers.{}.self_attn.kv_a_proj_with_mqa",
    "layers.{}.attention.key_value_norm": "model.layers.{}.self_attn.kv_a_layernorm",
    "layers.{}.attention.key_value": "model.layers.{}.self_attn.kv_b_proj",
}
_WEIGHT_NAMES = {
    **LLAMA.weight_names,
    **_ATTENTION_NAMES,
    **EXPERT_NAMES,
    **SHARED_EXPERT_NAMES,
    **SELECTION_BIAS_NAMES,
}

DEEPSEEK_V2 = Family(
    architectures=("DeepseekV2ForCausalLM",),
    read_config=read_v2,
    weight_names=_WEIGHT_NAMES,
    ignored_weights=LLAMA.ignored_weights,
    spare_layers="model.layers.{}.",
)
DEEPSEEK_V3 = Family(
    architectures=("DeepseekV3ForCausalLM",),
    read_config=read_v3,
    weight_names=_WEIGHT_NAMES,
    ignored_weights=LLAMA.ignored_weights,
    spare_layers="model.layers.{}.",
)
