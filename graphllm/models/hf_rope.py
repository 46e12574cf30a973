"""The rotary part of config.json, in its two generations.

transformers 5 writes `rope_parameters`, sometimes one for each layer type; before, there were `rope_theta`
and `rope_scaling`. Owns their defaults, and refuses what is not understood.
"""

from __future__ import annotations

import math

from graphllm.layers.rotary import LinearRopeScaling, Llama3RopeScaling, RopeScaling, YarnRopeScaling
from graphllm.models.hf_config import HFConfig

_DEFAULT_THETA = 10000.0


def read_rope(config: HFConfig, *, max_position_embeddings: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary frequencies. Raises CheckpointError naming what is not understood."""
    rope = _rope_section(config)
    theta = rope.positive_float("rope_theta", config.positive_float("rope_theta", _DEFAULT_THETA))
    for section in (config, rope):
        if section.get("partial_rotary_factor", 1.0) != 1.0:
            section.refuse("partial_rotary_factor", "is not 1, which is not supported")
    # Some files keep it outside the rotary parameters, and there it has the last word.
    original = config.positive_int(
        "original_max_position_embeddings",
        rope.positive_int("original_max_position_embeddings", max_position_embeddings),
    )
    rope.get("finetuned")  # a note about training
    older_name = rope.get("type", "default")
    scaling: RopeScaling | None = None
    match rope.get("rope_type", older_name):
        case "default":
            pass
        case "linear":
            scaling = LinearRopeScaling(rope.positive_float("factor"))
        case "llama3":
            scaling = Llama3RopeScaling(
                factor=rope.positive_float("factor"),
                low_freq_factor=rope.positive_float("low_freq_factor"),
                high_freq_factor=rope.positive_float("high_freq_factor"),
                original_max_position_embeddings=original,
            )
            if scaling.high_freq_factor <= scaling.low_freq_factor:
                rope.refuse("high_freq_factor", "is not above low_freq_factor")
        case "yarn":
            scaling = _read_yarn(rope, original, extended=max_position_embeddings)
        case other:
            rope.refuse("rope_type", f"is {other!r}; default, linear, llama3 and yarn are supported")
    rope.check_understood()
    return theta, scaling


def _rope_section(config: HFConfig) -> HFConfig:
    """The one set of rotary parameters that all layers share, whatever it is called."""
    newer, older = config.get("rope_parameters"), config.get("rope_scaling")
    if newer is not None and older is not None and newer != older:
        config.refuse("rope_scaling", "contradicts 'rope_parameters'")
    rope = config.section("rope_scaling" if newer is None else "rope_parameters")
    layer_types = rope.sections()
    if not layer_types:
        return rope
    first = rope.get(layer_types[0])
    for layer_type in layer_types:
        if rope.get(layer_type) != first:
            rope.refuse(layer_type, f"differs from {layer_types[0]!r}, which is not supported")
    rope.check_understood()
    return rope.section(layer_types[0])


def _read_yarn(rope: HFConfig, original: int, *, extended: int) -> YarnRopeScaling:
    """Yarn's parameters; attention is sharpened as the paper says unless the file says how."""
    factor = rope.positive_float("factor", extended / original)
    attention_factor = rope.get("attention_factor")
    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if attention_factor is not None:
        attention_factor = rope.positive_float("attention_factor")
    elif mscale and mscale_all_dim:
        numerator = _attention_factor(factor, rope.positive_float("mscale"))
        attention_factor = numerator / _attention_factor(factor, rope.positive_float("mscale_all_dim"))
    else:
        attention_factor = _attention_factor(factor, 1.0)
    return YarnRopeScaling(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=attention_factor,
        beta_fast=rope.positive_float("beta_fast", 32.0),
        beta_slow=rope.positive_float("beta_slow", 1.0),
        truncate=rope.flag("truncate", default=True),
    )


def _attention_factor(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0
