"""The part of config.json that dense decoders write alike."""

from __future__ import annotations

from graphllm.models.config import ModelConfig
from graphllm.models.hf_config import HFConfig
from graphllm.models.hf_rope import read_rope

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def read_decoder_config(
    config: HFConfig,
    *,
    attention_bias: bool,
    attention_output_bias: bool,
    mlp_bias: bool,
    qk_norm: bool = False,
) -> ModelConfig:
    """Everything but the switches that families name differently, which are passed in.

    Raises CheckpointError for keys that are missing, malformed or at odds with each other.
    """
    hidden_size = config.positive_int("hidden_size")
    num_heads = config.positive_int("num_attention_heads")
    num_kv_heads = config.positive_int("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        config.refuse("num_key_value_heads", f"is {num_kv_heads}, which does not divide {num_heads} heads")
    head_dim = config.positive_int("head_dim", max(1, hidden_size // num_heads))
    if head_dim % 2:
        config.refuse("head_dim", f"is {head_dim}, but rotary needs pairs of dimensions")
    max_position_embeddings = config.positive_int("max_position_embeddings")
    rope_theta, rope_scaling = read_rope(config, max_position_embeddings=max_position_embeddings)
    if any(layer_type != "full_attention" for layer_type in config.get("layer_types", [])):
        config.refuse("layer_types", "asks for other layers than full_attention, which is not supported")
    bos_token_ids = config.token_ids("bos_token_id")
    return ModelConfig(
        vocab_size=config.positive_int("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.positive_int("intermediate_size"),
        num_layers=config.positive_int("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=config.positive_float("rms_norm_eps"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        attention_scale=head_dim**-0.5,
        attention_bias=attention_bias,
        attention_output_bias=attention_output_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        activation=config.choice("hidden_act", _ACTIVATIONS, default="silu"),
        tie_word_embeddings=config.flag("tie_word_embeddings", default=False),
        dtype=config.dtype(),
        bos_token_id=bos_token_ids[0] if bos_token_ids else None,
        eos_token_ids=config.token_ids("eos_token_id"),
    )
