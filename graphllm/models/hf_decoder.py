"""The part of config.json that decoders write alike.

Owns what the common keys mean. A family adds its own switches with `dataclasses.replace`.
"""

from __future__ import annotations

from collections.abc import Sequence

from graphllm.layers.norm import NormConfig
from graphllm.models.config import LayerConfig, ModelConfig
from graphllm.models.hf_config import HFConfig
from graphllm.models.hf_rope import FULL, SLIDING, RopeDefaults, read_rotary

_MAX_HEAD_DIM = 8192
PLAIN_ROPE = RopeDefaults()
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def read_decoder_config(
    config: HFConfig,
    *,
    attention_bias: bool = False,
    attention_output_bias: bool = False,
    mlp_bias: bool = False,
    norm: NormConfig | None = None,
    rope: RopeDefaults | None = PLAIN_ROPE,
    layer_types: Sequence[str] | None = None,
    default_activation: str = "silu",
    ties_embeddings: bool = False,
    intermediate_size: int | None = None,
    max_position_embeddings: int | None = None,
) -> ModelConfig:
    """Everything but the switches that families name differently; a gated decoder with norms on inputs.

    norm: None for an RMS norm with `rms_norm_eps`. rope: None for heads that do not turn. layer_types: as
    `read_layer_types` gives them; None reads them from the file and allows no windows. ties_embeddings:
    what a file without `tie_word_embeddings` means; intermediate_size and max_position_embeddings: the
    same, None where the file has to say it. Raises CheckpointError for keys that are missing, malformed or
    at odds with each other.
    """
    hidden_size = config.positive_int("hidden_size")
    num_heads = config.positive_int("num_attention_heads")
    num_kv_heads = config.positive_int("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        config.refuse("num_key_value_heads", f"is {num_kv_heads}, which does not divide {num_heads} heads")
    head_dim = config.positive_int("head_dim", max(1, hidden_size // num_heads))
    if head_dim > _MAX_HEAD_DIM:
        config.refuse("head_dim", f"is {head_dim}; at most {_MAX_HEAD_DIM} is supported")
    max_position_embeddings = config.positive_int("max_position_embeddings", max_position_embeddings)
    bos_token_ids = config.token_ids("bos_token_id")
    return ModelConfig(
        vocab_size=config.positive_int("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.positive_int("intermediate_size", intermediate_size),
        layers=_read_layers(
            config,
            layer_types,
            head_dim=head_dim,
            max_position_embeddings=max_position_embeddings,
            rope=rope,
        ),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        norm=NormConfig(eps=config.positive_float("rms_norm_eps")) if norm is None else norm,
        attention_scale=head_dim**-0.5,
        attention_bias=attention_bias,
        attention_output_bias=attention_output_bias,
        activation=config.choice("hidden_act", ACTIVATIONS, default=default_activation),
        mlp_bias=mlp_bias,
        tie_word_embeddings=config.flag("tie_word_embeddings", default=ties_embeddings),
        dtype=config.dtype(),
        bos_token_id=bos_token_ids[0] if bos_token_ids else None,
        eos_token_ids=config.token_ids("eos_token_id"),
    )


def read_layer_types(
    config: HFConfig, *, every: int | None = None, default: Sequence[str] | None = None
) -> list[str]:
    """`layer_types`, one for each layer.

    Where the file has none: `default`, or, with `every`, each every-th layer full and the others with a
    window; otherwise all full. Raises CheckpointError for other types and another number of them.
    """
    num_layers = config.num_layers()
    if default is None:
        default = [
            SLIDING if every is not None and (layer + 1) % every else FULL for layer in range(num_layers)
        ]
    layer_types = config.get("layer_types", [*default])
    if not isinstance(layer_types, list) or any(name not in (FULL, SLIDING) for name in layer_types):
        config.refuse("layer_types", f"asks for other layers than {FULL} and {SLIDING}")
    if len(layer_types) != num_layers:
        config.refuse("layer_types", f"has {len(layer_types)} entries for {num_layers} layers")
    return layer_types


def same_layer_types(config: HFConfig, name: str) -> list[str]:
    """The same type for every layer."""
    return [name] * config.num_layers()


def _read_layers(
    config: HFConfig,
    layer_types: Sequence[str] | None,
    *,
    head_dim: int,
    max_position_embeddings: int,
    rope: RopeDefaults | None,
) -> tuple[LayerConfig, ...]:
    window = None
    if layer_types is None:
        layer_types = read_layer_types(config)
        if SLIDING in layer_types:
            config.refuse("layer_types", "asks for windows, which this architecture does not have")
    elif SLIDING in layer_types:
        window = config.positive_int("sliding_window")
    rotary_of = dict.fromkeys(layer_types)
    if rope is not None:
        rotary_of |= read_rotary(
            config,
            set(layer_types),
            head_dim=head_dim,
            max_position_embeddings=max_position_embeddings,
            defaults=rope,
        )
    return tuple(
        LayerConfig(rotary=rotary_of[name], sliding_window=window if name == SLIDING else None)
        for name in layer_types
    )
