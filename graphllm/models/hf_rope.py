"""The rotary part of config.json, in its two generations.

transformers 5 writes `rope_parameters`, sometimes one for each layer type; before, there were `rope_theta`
and `rope_scaling`. Owns their defaults, and refuses what is not understood.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from graphllm.kernels.rotary import QueryGrowth
from graphllm.layers.rotary import (
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    ProportionalRopeScaling,
    RopeScaling,
    RotaryConfig,
    YarnRopeScaling,
)
from graphllm.models.hf_config import HFConfig

FULL = "full_attention"
SLIDING = "sliding_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeDefaults:
    """What a family means where its file says nothing.

    theta: the base. partial_rotary_factor: the part of a head's dimensions that turns; may_be_partial:
    whether a file may say another, where this is 1: transformers ignores the key for some. is_interleaved:
    whether neighbours turn together, which no file says. type_names: other words for the types of scaling.
    has_plain_windows: in files of the older generation, layers with a window turn without scaling, by
    `rope_local_base_freq` where that is given and else `window_theta` (None: the other layers' base).
    may_grow: whether a file may say how queries grow with their position; for others that is unheard of.
    """

    theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    may_be_partial: bool = False
    is_interleaved: bool = False
    type_names: dict[str, str] = field(default_factory=dict)
    has_plain_windows: bool = False
    window_theta: float | None = None
    may_grow: bool = False


def read_rotary(
    config: HFConfig,
    layer_types: Collection[str],
    *,
    head_dim: int,
    max_position_embeddings: int,
    defaults: RopeDefaults,
) -> dict[str, RotaryConfig]:
    """How layers turn their heads, by layer type. Raises CheckpointError naming what is not understood."""
    reader = _Reader(config, head_dim, max_position_embeddings, defaults)
    newer, older = config.get("rope_parameters"), config.get("rope_scaling")
    if newer is not None and older is not None and newer != older:
        config.refuse("rope_scaling", "contradicts 'rope_parameters'")
    rope = config.section("rope_scaling" if newer is None else "rope_parameters")
    by_type = {name: reader.read(rope.section(name)) for name in rope.sections()}
    if by_type:
        rope.check_understood()
        for name in layer_types:
            if name not in by_type:
                rope.refuse(name, "is missing, though there are layers of this type")
        return {name: by_type[name] for name in layer_types}
    rotary = reader.read(rope)
    plain = rotary
    if defaults.has_plain_windows and newer is None:
        theta = config.positive_float("rope_local_base_freq", defaults.window_theta or rotary.theta)
        plain = replace(rotary, theta=theta, scaling=None)
    return {name: plain if name == SLIDING else rotary for name in layer_types}


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads one set of rotary parameters; what the set leaves out may stand beside it in `config`."""

    config: HFConfig
    head_dim: int
    max_position_embeddings: int
    defaults: RopeDefaults

    def read(self, rope: HFConfig) -> RotaryConfig:
        theta = rope.positive_float(
            "rope_theta", self.config.positive_float("rope_theta", self.defaults.theta)
        )
        part = rope.positive_float(
            "partial_rotary_factor",
            self.config.positive_float("partial_rotary_factor", self.defaults.partial_rotary_factor),
        )
        scaling = self._scaling(rope, part)
        is_known = self.defaults.may_be_partial or isinstance(scaling, ProportionalRopeScaling)
        if part != self.defaults.partial_rotary_factor == 1.0 and not is_known:
            section = self.config if rope.get("partial_rotary_factor") is None else rope
            section.refuse("partial_rotary_factor", f"is {part}, which this architecture does not know")
        rope.get("finetuned")  # a note about training
        query_growth = self._query_growth(rope) if self.defaults.may_grow else None
        rope.check_understood()
        rotary_dim = self._rotary_dim(part)
        if isinstance(scaling, ProportionalRopeScaling):
            rotary_dim = self.head_dim
        return RotaryConfig(
            rotary_dim=rotary_dim,
            theta=theta,
            scaling=scaling,
            is_interleaved=self.defaults.is_interleaved,
            query_growth=query_growth,
        )

    def _query_growth(self, rope: HFConfig) -> QueryGrowth | None:
        """It begins where the context ends that the model was first trained for."""
        rope.get("max_position_embeddings")  # said once more, of no effect
        if not rope.get("llama_4_scaling_beta"):
            return None
        growth = rope.positive_float("llama_4_scaling_beta")
        return QueryGrowth(growth=growth, interval=self._original_context(rope))

    def _original_context(self, rope: HFConfig) -> int:
        """Some files keep it outside the rotary parameters, and there it has the last word."""
        return self.config.positive_int(
            "original_max_position_embeddings",
            rope.positive_int("original_max_position_embeddings", self.max_position_embeddings),
        )

    def _rotary_dim(self, part: float) -> int:
        if part == 1.0 and self.head_dim % 2:
            self.config.refuse("head_dim", f"is {self.head_dim}, but rotary needs pairs of dimensions")
        rotary_dim = int(self.head_dim * part)
        if part > 1.0 or rotary_dim % 2 or rotary_dim == 0:
            self.config.refuse(
                "partial_rotary_factor",
                f"is {part}, no number of pairs of {self.head_dim} dimensions",
            )
        return rotary_dim

    def _scaling(self, rope: HFConfig, part: float) -> RopeScaling | None:
        original = self._original_context(rope)
        older_name = rope.get("type", "default")
        name = rope.get("rope_type", older_name)
        match self.defaults.type_names.get(name, name):
            case "default":
                return None
            case "dynamic":
                # It changes the base for texts longer than `max_position_embeddings`, which are not served.
                rope.positive_float("factor")
                return None
            case "linear":
                return LinearRopeScaling(rope.positive_float("factor"))
            case "llama3":
                return _read_llama3(rope, original)
            case "yarn":
                return _read_yarn(rope, original, extended=self.max_position_embeddings)
            case "longrope":
                num_pairs = self._rotary_dim(part) // 2
                return _read_longrope(
                    rope, original, extended=self.max_position_embeddings, num_pairs=num_pairs
                )
            case "proportional":
                return ProportionalRopeScaling(
                    turned_fraction=part, factor=rope.positive_float("factor", 1.0)
                )
            case other:
                rope.refuse(
                    "rope_type",
                    f"is {other!r}; default, dynamic, linear, llama3, longrope, proportional and yarn "
                    "are supported",
                )


def _read_llama3(rope: HFConfig, original: int) -> Llama3RopeScaling:
    scaling = Llama3RopeScaling(
        factor=rope.positive_float("factor"),
        low_freq_factor=rope.positive_float("low_freq_factor"),
        high_freq_factor=rope.positive_float("high_freq_factor"),
        original_max_position_embeddings=original,
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        rope.refuse("high_freq_factor", "is not above low_freq_factor")
    return scaling


def _read_yarn(rope: HFConfig, original: int, *, extended: int) -> YarnRopeScaling:
    """Yarn's parameters; attention is sharpened as the paper says unless the file says how."""
    factor = rope.positive_float("factor", extended / original)
    attention_factor = rope.optional_float("attention_factor")
    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if attention_factor is not None:
        pass
    elif mscale and mscale_all_dim:
        numerator = _attention_factor(factor, rope.positive_float("mscale"))
        attention_factor = numerator / _attention_factor(factor, rope.positive_float("mscale_all_dim"))
    else:
        # The second one is what an R1 distillate's file has, and transformers reads over.
        attention_factor = _attention_factor(factor, 1.0) * rope.positive_float("attn_factor", 1.0)
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


def _read_longrope(rope: HFConfig, original: int, *, extended: int, num_pairs: int) -> LongRopeScaling:
    """LongRoPE's divisors, and the sharpening that follows from how far the context is stretched."""
    factor = rope.positive_float("factor", extended / original)
    sharpened = 1.0
    if factor > 1.0 and original > 1:
        sharpened = math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRopeScaling(
        short_factors=rope.positive_floats("short_factor", number=num_pairs),
        long_factors=rope.positive_floats("long_factor", number=num_pairs),
        original_max_position_embeddings=original,
        attention_factor=rope.positive_float("attention_factor", sharpened),
    )
