"""What single architectures of GGUF say in words of their own, in those of config.json.

Each function adds to a config that has the common keys already, and raises CheckpointError naming the
metadata key for what is not understood. Which architecture needs which is declared in `gguf_families.py`.
"""

from __future__ import annotations

from typing import Any

from graphllm.models.gguf_architectures import Settings
from graphllm.models.gguf_metadata import GGUFMetadata

_SOFTMAX, _SIGMOID = 1, 2  # values of expert_gating_func
_MAX_UNGROUPED_EXPERTS = 64
_GEMMA2_27B_LAYERS = 46


def biases(**stems: tuple[str, ...]) -> Settings:
    """Flags of config.json, each true where a layer has a bias of one of these tensors."""

    def read(metadata: GGUFMetadata, config: dict[str, Any]) -> None:
        for key, names in stems.items():
            config[key] = metadata.has_layer_tensor(*names, kind="bias")

    return read


def presences(**stems: str) -> Settings:
    """Flags of config.json, each true where a layer has this tensor."""

    def read(metadata: GGUFMetadata, config: dict[str, Any]) -> None:
        for key, name in stems.items():
            config[key] = metadata.has_layer_tensor(name)

    return read


def numbers(**keys: str) -> Settings:
    """Positive numbers that are left out where the metadata has none."""

    def read(metadata: GGUFMetadata, config: dict[str, Any]) -> None:
        for name, key in keys.items():
            if (value := metadata.optional_float(key)) is not None:
                config[name] = value

    return read


def no_experts(metadata: GGUFMetadata, config: dict[str, Any]) -> None:
    """Dense models of architectures that have others too."""
    metadata.expect("expert_count", 0)
    metadata.expect("expert_used_count", 0)


def window(metadata: GGUFMetadata, config: dict[str, Any]) -> None:
    """A window in tokens, which may be 0 for none; which layers have it where the file says so."""
    size = metadata.non_negative_int("attention.sliding_window", default=0)
    config["sliding_window"] = size or None
    key = "attention.sliding_window_pattern"
    if metadata.is_list(key):
        windowed = metadata.flags(key, number=config["num_hidden_layers"])
        config["layer_types"] = ["sliding_attention" if flag else "full_attention" for flag in windowed]
    elif metadata.has(key):
        config["sliding_window_pattern"] = metadata.positive_int(key)
    if metadata.has("rope.freq_base_swa"):
        config["rope_local_base_freq"] = metadata.positive_float("rope.freq_base_swa")


def granite_multipliers(metadata: GGUFMetadata, config: dict[str, Any]) -> None:
    """Factors at every joint, 1 where the file is silent."""
    for name, key in {
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    }.items():
        config[name] = metadata.positive_float(key, default=1.0)


def gemma2_attention(metadata: GGUFMetadata, config: dict[str, Any]) -> None:
    """Caps, and the scale of scores: of the head's dimensions, but for the largest model."""
    config["attn_logit_softcapping"] = metadata.optional_float("attn_logit_softcapping")
    config["final_logit_softcapping"] = metadata.optional_float("final_logit_softcapping")
    is_largest = config["num_hidden_layers"] == _GEMMA2_27B_LAYERS
    _read_query_scalar(metadata, config, spread_over_width=is_largest)


def gemma3_attention(metadata: GGUFMetadata, config: dict[str, Any]) -> None:
    """The same without caps of scores; the largest has 62 layers."""
    if (cap := metadata.optional_float("final_logit_softcapping")) is not None:
        config["final_logit_softcapping"] = cap
    _read_query_scalar(metadata, config, spread_over_width=config["num_hidden_layers"] == 62)


def _read_query_scalar(metadata: GGUFMetadata, config: dict[str, Any], *, spread_over_width: bool) -> None:
    if (scale := metadata.optional_float("attention.scale")) is not None:
        config["query_pre_attn_scalar"] = scale**-2
    elif spread_over_width:
        config["query_pre_attn_scalar"] = config["hidden_size"] // config["num_attention_heads"]
    else:
        config["query_pre_attn_scalar"] = config["head_dim"]


def growing_queries(metadata: GGUFMetadata, config: dict[str, Any]) -> None:
    """How queries grow with their position, in steps of the context that was first trained for.

    Mistral's converter writes Hugging Face's number of YaRN's sharpening as it is, unlike DeepSeek's; that of
    cosines and sines is the same in all releases.
    """
    if (strength := metadata.optional_float("rope.scaling.yarn_log_multiplier")) is not None:
        scaling = _yarn(metadata, config, key="rope.scaling.yarn_log_multiplier")
        scaling |= dict.fromkeys(("mscale", "mscale_all_dim"), strength)
    if (growth := metadata.optional_float("attention.temperature_scale")) is not None:
        scaling = _yarn(metadata, config, key="attention.temperature_scale")
        scaling["llama_4_scaling_beta"] = growth
        metadata.expect("attention.temperature_length", scaling["original_max_position_embeddings"])


def falcon_shape(metadata: GGUFMetadata, config: dict[str, Any]) -> None:
    """The old architecture has one key head; the new one has groups, and a second norm or not."""
    num_norms = 2 if metadata.has_layer_tensor("attn_norm_2") else 1
    is_new = num_norms == 2 or config["num_key_value_heads"] > 1
    config |= {"new_decoder_architecture": is_new, "multi_query": not is_new, "parallel_attn": True}
    if is_new:
        config["num_ln_in_parallel_attn"] = num_norms


def gpt_neox_residual(metadata: GGUFMetadata, config: dict[str, Any]) -> None:
    """Whether attention and feed-forward both see the layer's input."""
    config["use_parallel_residual"] = metadata.flag("use_parallel_residual", default=True)


def stablelm_residual(metadata: GGUFMetadata, config: dict[str, Any]) -> None:
    """Parallel layers have no second norm. What the key says is the converter's default, right or wrong."""
    metadata.flag("use_parallel_residual", default=True)
    config["use_parallel_residual"] = not metadata.has_layer_tensor("ffn_norm")


def mixture(number: str) -> Settings:
    """How many experts there are, by Hugging Face's key `number`, and how many a token gets."""

    def read(metadata: GGUFMetadata, config: dict[str, Any]) -> None:
        config[number] = metadata.positive_int("expert_count")
        config["num_experts_per_tok"] = metadata.positive_int("expert_used_count")

    return read


def expert_size(metadata: GGUFMetadata, config: dict[str, Any]) -> None:
    """The inner size of an expert, which old files show only in their tensors."""
    config["moe_intermediate_size"] = metadata.positive_int(
        "expert_feed_forward_length", default=_rows(metadata, "ffn_up_exps")
    )


def equal_expert_size(metadata: GGUFMetadata, config: dict[str, Any]) -> None:
    """For architectures whose experts are as wide as `intermediate_size` says."""
    size = metadata.positive_int("expert_feed_forward_length", default=config["intermediate_size"])
    config["intermediate_size"] = size


def shared_expert_size(metadata: GGUFMetadata, config: dict[str, Any]) -> None:
    """The inner size of the expert that all tokens share."""
    config["shared_expert_intermediate_size"] = metadata.positive_int(
        "expert_shared_feed_forward_length", default=_rows(metadata, "ffn_up_shexp")
    )


def normalized_weights(*, default: bool) -> Settings:
    """Whether the chosen experts' weights sum to 1; `default` is all published models'."""

    def read(metadata: GGUFMetadata, config: dict[str, Any]) -> None:
        config["norm_topk_prob"] = metadata.flag("expert_weights_norm", default=default)

    return read


def plain_softmax(metadata: GGUFMetadata, config: dict[str, Any]) -> None:
    """For families that know no other routing than softmax over all experts."""
    metadata.expect("expert_gating_func", _SOFTMAX)
    metadata.expect("expert_weights_scale", 1.0)
    metadata.expect("expert_group_count", 1)
    metadata.expect("expert_group_used_count", 1)


def deepseek_experts(metadata: GGUFMetadata, config: dict[str, Any]) -> None:
    """Shared experts, dense layers before the others, scale, and groups."""
    config["n_shared_experts"] = metadata.positive_int("expert_shared_count", default=1)
    config["first_k_dense_replace"] = metadata.non_negative_int("leading_dense_block_count", default=0)
    config["routed_scaling_factor"] = metadata.positive_float("expert_weights_scale", default=1.0)
    config["n_group"], config["topk_group"] = _groups(metadata, config["n_routed_experts"])


def _groups(metadata: GGUFMetadata, num_experts: int) -> tuple[int, int]:
    """Of how many groups how many are chosen. No model of few experts has any, so files need not say so."""
    default = 1 if num_experts <= _MAX_UNGROUPED_EXPERTS or metadata.prefix == "glm4moe" else None
    return (
        metadata.positive_int("expert_group_count", default=default),
        metadata.positive_int("expert_group_used_count", default=default),
    )


def glm4_routing(metadata: GGUFMetadata, config: dict[str, Any]) -> None:
    """Sigmoids, whether the file says so or not."""
    metadata.expect("expert_gating_func", _SIGMOID)


def is_sigmoid(metadata: GGUFMetadata) -> bool:
    """Whether the router's scores are sigmoids; files that do not say so are older than any that are."""
    return metadata.positive_int("expert_gating_func", default=_SOFTMAX) == _SIGMOID


def deepseek_v2_routing(metadata: GGUFMetadata, config: dict[str, Any]) -> None:
    """Softmax; Hugging Face names the limit to groups."""
    metadata.expect("expert_gating_func", _SOFTMAX)
    config["topk_method"] = "group_limited_greedy" if config["n_group"] > 1 else "greedy"


def latent_attention(metadata: GGUFMetadata, config: dict[str, Any]) -> None:
    """The latents' ranks and the parts of a head.

    Newer files give the sizes of the absorbed form as key and value length, and the heads' own under names
    with "mla"; older ones, which keep the projection out of the latent whole, the other way round.
    """
    is_new = metadata.has("attention.key_length_mla")
    rank = metadata.positive_int("attention.kv_lora_rank")
    turned_dim = config["head_dim"]
    key, value = (f"attention.{name}_length{'_mla' if is_new else ''}" for name in ("key", "value"))
    if is_new:
        metadata.expect("attention.key_length", rank + turned_dim)
        metadata.expect("attention.value_length", rank)
    key_dim = metadata.positive_int(key)
    if key_dim <= turned_dim:
        metadata.refuse(key, f"is {key_dim}, no more than the {turned_dim} dimensions that turn")
    has_latent_queries = metadata.has("attention.q_lora_rank")
    config |= {
        "kv_lora_rank": rank,
        "q_lora_rank": metadata.positive_int("attention.q_lora_rank") if has_latent_queries else None,
        "qk_rope_head_dim": turned_dim,
        "qk_nope_head_dim": key_dim - turned_dim,
        "v_head_dim": metadata.positive_int(value),
    }
    # Written as a tenth of Hugging Face's number; that of cosines and sines is the same in all releases.
    if (strength := metadata.optional_float("rope.scaling.yarn_log_multiplier")) is not None:
        scaling = _yarn(metadata, config, key="rope.scaling.yarn_log_multiplier")
        scaling |= dict.fromkeys(("mscale", "mscale_all_dim"), float(f"{10 * strength:.6g}"))


def _yarn(metadata: GGUFMetadata, config: dict[str, Any], *, key: str) -> dict[str, Any]:
    """YaRN's part of the config, without which `key` says nothing."""
    scaling: dict[str, Any] | None = config.get("rope_scaling")
    if scaling is None or scaling["rope_type"] != "yarn":
        metadata.refuse(key, "is there, but rotary is not YaRN's")
    return scaling


def _rows(metadata: GGUFMetadata, stem: str) -> int | None:
    """Rows of the first layer's tensor of this name, None where there is none."""
    for name, tensor in metadata.file.tensors.items():
        if name.endswith(f".{stem}.weight") and len(tensor.shape) > 1:
            return tensor.shape[-2]
    return None
