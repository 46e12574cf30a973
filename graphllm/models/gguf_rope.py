"""A GGUF file's rotary metadata in the words of config.json.

Owns the ways of stretching frequencies: linear and YaRN are named by the metadata, Llama 3.1's rule and
LongRoPE's divisors are tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from graphllm.errors import CheckpointError
from graphllm.models.gguf_architectures import RotaryStyle
from graphllm.models.gguf_metadata import GGUFMetadata, shortest_decimal

_LLAMA3_FACTORS = "rope_freqs.weight"
LONGROPE_FACTORS = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
_TYPES = ("none", "linear", "yarn", "longrope")


def read_rotary(metadata: GGUFMetadata, config: dict[str, Any], style: RotaryStyle) -> None:
    """Add base, turning part and stretching to `config`, which has the head's dimensions already.

    Raises CheckpointError for what is malformed, contradictory, or not understood.
    """
    head_dim = config["head_dim"]
    config["rope_theta"] = metadata.positive_float("rope.freq_base", default=10000.0)
    rotary_dim = metadata.positive_int("rope.dimension_count", default=head_dim)
    if style.is_partial and rotary_dim <= head_dim:
        config["partial_rotary_factor"] = _part(rotary_dim, head_dim)
    elif rotary_dim != head_dim:
        metadata.refuse(
            "rope.dimension_count", f"differs from the head's {head_dim} dimensions, which is not supported"
        )
    scaling = _scaling(metadata, style, rope_theta=config["rope_theta"], rotary_dim=rotary_dim)
    if scaling is not None:
        config["rope_scaling"] = scaling


def _part(rotary_dim: int, head_dim: int) -> float:
    """The fraction of which int(head_dim * fraction) is rotary_dim again."""
    part = rotary_dim / head_dim
    return part if int(head_dim * part) == rotary_dim else math.nextafter(part, 1.0)


def _scaling(
    metadata: GGUFMetadata, style: RotaryStyle, *, rope_theta: float, rotary_dim: int
) -> dict[str, Any] | None:
    tensors = metadata.file.tensors
    factor_key = "rope.scaling.factor" if metadata.has("rope.scaling.factor") else "rope.scale_linear"
    factor = metadata.positive_float(factor_key, default=1.0)
    has_longrope = any(name in tensors for name in LONGROPE_FACTORS.values())
    # A factor without a type has always meant linear interpolation.
    kind = metadata.text("rope.scaling.type", default="longrope" if has_longrope else "linear")
    if kind not in _TYPES:
        metadata.refuse("rope.scaling.type", f"is {kind!r}; {', '.join(_TYPES)} are supported")
    if has_longrope != (kind == "longrope"):
        metadata.refuse("rope.scaling.type", f"is {kind!r}, which the tensors of rotary factors contradict")
    scales = has_longrope or (kind != "none" and factor != 1.0)
    if _LLAMA3_FACTORS in tensors:
        if scales:
            metadata.refuse(
                factor_key, f"and the tensor {_LLAMA3_FACTORS!r} both scale the rotary frequencies"
            )
        return _llama3_scaling(metadata, rope_theta, rotary_dim)
    if has_longrope:
        return _longrope_scaling(metadata, rotary_dim)
    if kind == "yarn":
        return _yarn_scaling(metadata, style, factor) if scales else None
    # Some converters write the context that was pretrained on for other kinds too.
    metadata.positive_int("rope.scaling.original_context_length", default=1)
    return {"rope_type": "linear", "factor": factor} if scales else None


def _yarn_scaling(metadata: GGUFMetadata, style: RotaryStyle, factor: float) -> dict[str, Any]:
    """YaRN; converters write Hugging Face's attention_factor as it is."""
    metadata.expect("rope.scaling.yarn_ext_factor", 1.0)
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": metadata.positive_int("rope.scaling.original_context_length"),
    }
    for key, name in (
        ("yarn_attn_factor", "attention_factor"),
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
    ):
        if (value := metadata.optional_float(f"rope.scaling.{key}")) is not None:
            scaling[name] = value
    if style.truncates_yarn is not None:
        scaling["truncate"] = style.truncates_yarn
    return scaling


def _longrope_scaling(metadata: GGUFMetadata, rotary_dim: int) -> dict[str, Any]:
    scaling: dict[str, Any] = {
        "rope_type": "longrope",
        "original_max_position_embeddings": metadata.positive_int("rope.scaling.original_context_length"),
    }
    for name, tensor in LONGROPE_FACTORS.items():
        scaling[name] = [shortest_decimal(value) for value in _factors(metadata, tensor, rotary_dim)]
    if (attention_factor := metadata.optional_float("rope.scaling.attn_factor")) is not None:
        scaling["attention_factor"] = attention_factor
    return scaling


def _factors(metadata: GGUFMetadata, name: str, rotary_dim: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    path = metadata.file.path
    if name not in metadata.file.tensors:
        raise CheckpointError(f"{path}: it has no tensor {name!r}.")
    factors = metadata.file.read_float32(name)
    if factors.shape != (rotary_dim // 2,):
        raise CheckpointError(
            f"{path}: tensor {name!r} has shape {list(factors.shape)}, not [{rotary_dim // 2}]."
        )
    return factors


def _llama3_scaling(metadata: GGUFMetadata, rope_theta: float, rotary_dim: int) -> dict[str, Any]:
    """Recognize the factors that Llama 3.1's scaling rule gives; refuse any others.

    The file keeps the outcome of the rule, one divisor for each frequency, and not its parameters.
    All releases share low 1, high 4 and a context of 8192; only the factor differs.
    """
    factors = _factors(metadata, _LLAMA3_FACTORS, rotary_dim)
    factor = float(f"{factors.max():.6g}")  # without what float32 adds to 32
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": metadata.positive_int(
            "rope.scaling.original_context_length", default=8192
        ),
    }
    is_llama3 = factor >= 1.0 and np.allclose(
        factors, _llama3_factors(rope_theta, rotary_dim, scaling), rtol=1e-4, atol=0.0
    )
    if not is_llama3:
        raise CheckpointError(
            f"{metadata.file.path}: tensor {_LLAMA3_FACTORS!r} does not follow Llama 3.1's scaling rule, "
            "and other tables of rotary factors are not supported."
        )
    return scaling


def _llama3_factors(rope_theta: float, rotary_dim: int, scaling: dict[str, Any]) -> Sequence[float]:
    """What each rotary frequency is divided by (the rule of Meta's Llama 3.1 reference code).

    Long wavelengths are divided by `factor`, short ones by 1; in between the frequency is interpolated.
    """
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    factors = []
    for index in range(rotary_dim // 2):
        wavelength = 2 * math.pi * rope_theta ** (2 * index / rotary_dim)
        rotations = scaling["original_max_position_embeddings"] / wavelength
        smooth = min(max((rotations - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors
