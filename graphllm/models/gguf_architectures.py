"""What an architecture of GGUF declares, and how its tensors are found.

Owns the form of the declarations and the matching of names. The declarations themselves are in
`gguf_families.py`, the common metadata in `gguf_config.py`, bytes in `gguf_file.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from graphllm.errors import CheckpointError
from graphllm.models.gguf_arrangements import Arrangement, Heads
from graphllm.models.gguf_file import GGUFFile
from graphllm.models.gguf_metadata import GGUFMetadata

Settings = Callable[[GGUFMetadata, dict[str, Any]], None]
"""Adds to a config what one architecture says in words of its own."""

_NUMBER = re.compile(r"(?<=\.)(?:0|[1-9][0-9]{0,5})(?=\.)")
_KINDS = ("weight", "bias")
_MAX_ENTRIES = 4096  # more experts or heads than any model has: a damaged header must not fill the memory


@dataclass(frozen=True, slots=True)
class TensorRule:
    """Where one tensor of Hugging Face's comes from.

    stored: GGUF names without .weight or .bias (then it is a rule for both), or one with its kind in full;
    "{}" stands for a number, that of the layer first. Several are the parts that `arrange` makes one of.
    name: Hugging Face's, in full where the stored one is. One "{}" more than in the stored name counts the
    entries of its first dimension: experts, or heads. arrange: None for numbers as they are stored.
    """

    stored: tuple[str, ...]
    name: str
    arrange: Arrangement | None = None

    @property
    def is_indexed(self) -> bool:
        """Whether each entry of the first dimension is a tensor of its own."""
        return self.name.count("{}") > self.stored[0].count("{}")


def rules(names: Mapping[str, str], arrange: Arrangement | None = None) -> tuple[TensorRule, ...]:
    """A rule for each stored name."""
    return tuple(TensorRule((stored,), name, arrange) for stored, name in names.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryStyle:
    """How an architecture's files speak of rotary. is_partial: whether part of a head may turn."""

    is_partial: bool = False
    truncates_yarn: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFArchitecture:
    """One value of general.architecture and its Hugging Face equivalent.

    applies: which of several declarations of one name a file needs; None for any. norm: which epsilon the
    file has, and eps_key what Hugging Face calls it. rotary: None where no head turns. has_latent_heads:
    heads come out of a latent. constants: what no file says. settings: what it says in words of its own,
    one after the other. renames: Hugging Face's own words for common keys. consumed_tensors: they say
    something of the configuration, and are no parameters.
    """

    hf_architecture: str
    model_type: str
    tensors: tuple[TensorRule, ...]
    applies: Callable[[GGUFMetadata], bool] | None = None
    norm: Literal["rms", "layer"] = "rms"
    eps_key: str = "rms_norm_eps"
    rotary: RotaryStyle | None = field(default_factory=RotaryStyle)
    has_latent_heads: bool = False
    constants: Mapping[str, Any] = field(default_factory=lambda: {"hidden_act": "silu"})
    settings: tuple[Settings, ...] = ()
    renames: Mapping[str, str] = field(default_factory=dict)
    consumed_tensors: frozenset[str] = frozenset({"rope_freqs.weight"})


@dataclass(frozen=True, slots=True)
class TensorSource:
    """A Hugging Face tensor: GGUF tensors, or one entry of their first dimension, and their arrangement."""

    stored: tuple[str, ...]
    index: int | None
    arrange: Arrangement | None
    heads: Heads


def layer_indices(names: Iterable[str]) -> set[int]:
    """The layers that the GGUF names speak of."""
    return {index for index in map(_layer_index, names) if index is not None}


def find_tensors(
    file: GGUFFile, architecture: GGUFArchitecture, *, heads: Heads, num_layers: int
) -> dict[str, TensorSource]:
    """Hugging Face name to where it comes from, in file order.

    Layers from `num_layers` on are left out: they predict further tokens. Raises CheckpointError for a
    tensor that no rule knows, for parts that are missing, and for two tensors of one meaning.
    """
    by_stored: dict[str, list[TensorRule]] = {}
    for rule in architecture.tensors:
        for stored in rule.stored:
            by_stored.setdefault(stored, []).append(rule)
    sources: dict[str, TensorSource] = {}
    for gguf_name in file.tensors:
        layer = _layer_index(gguf_name)
        if gguf_name in architecture.consumed_tensors or (layer is not None and layer >= num_layers):
            continue
        found = _matching_rules(gguf_name, by_stored)
        if not found:
            raise CheckpointError(
                f"{file.path}: tensor {gguf_name!r} is not one of architecture "
                f"{file.fields['general.architecture']!r}, as far as it is understood."
            )
        for rule, kind in found:
            for name, source in _sources(file, gguf_name, rule, kind=kind, heads=heads):
                if sources.setdefault(name, source).stored != source.stored:
                    raise CheckpointError(
                        f"{file.path}: tensors {sources[name].stored[0]!r} and {gguf_name!r} are both the "
                        f"model's {name!r}."
                    )
    return sources


def _matching_rules(
    gguf_name: str, by_stored: Mapping[str, list[TensorRule]]
) -> list[tuple[TensorRule, str | None]]:
    """Rules for the name in full, else those for both kinds, with the kind."""
    pattern = _NUMBER.sub("{}", gguf_name)
    if pattern in by_stored:
        return [(rule, None) for rule in by_stored[pattern]]
    stem, _, kind = pattern.rpartition(".")
    return [(rule, kind) for rule in by_stored.get(stem, ())] if kind in _KINDS else []


def _sources(
    file: GGUFFile, gguf_name: str, rule: TensorRule, *, kind: str | None, heads: Heads
) -> list[tuple[str, TensorSource]]:
    """What one rule makes of a stored tensor and of the other parts that belong to it."""
    end = "" if kind is None else f".{kind}"
    numbers = _NUMBER.findall(gguf_name)
    parts = tuple(f"{stored}{end}".format(*numbers) for stored in rule.stored)
    for part in parts:
        if part not in file.tensors:
            raise CheckpointError(f"{file.path}: tensor {gguf_name!r} has no {part!r} beside it.")
    name = f"{rule.name}{end}"
    if not rule.is_indexed:
        return [(name.format(*numbers), TensorSource(parts, None, rule.arrange, heads))]
    num_entries = file.tensors[gguf_name].shape[0]
    if num_entries > _MAX_ENTRIES:
        raise CheckpointError(
            f"{file.path}: tensor {gguf_name!r} has {num_entries} entries; {_MAX_ENTRIES} are supported."
        )
    return [
        (name.format(*numbers, index), TensorSource(parts, index, rule.arrange, heads))
        for index in range(num_entries)
    ]


def _layer_index(name: str) -> int | None:
    layer = re.match(r"blk\.(0|[1-9][0-9]{0,5})\.", name)
    return None if layer is None else int(layer[1])
