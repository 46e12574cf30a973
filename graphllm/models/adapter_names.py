"""What LoRA adapters call a model's layers.

An adapter names layers as the model's checkpoint does, so a name may mean a part of one of our merged layers,
or several of them. Owns the map from names to layers, and what is said of names that can have no adapter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from graphllm.models.adaptable import adaptable_layers
from graphllm.models.decoder import Decoder
from graphllm.models.family import Family

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class AdapterTarget:
    """A layer of the checkpoint as rows of one of ours.

    path: our layer's. parts: numbers of the parts that it is made of, next to each other. start, end: their
    rows, which are the layer's out_features. name: the checkpoint's, the first where there are several.
    """

    path: str
    parts: tuple[int, ...]
    start: int
    end: int
    in_features: int
    name: str


class AdapterNames:
    """The names of one model's layers."""

    def __init__(self, model: Decoder, family: Family) -> None:
        self._family = family
        self.targets: dict[str, AdapterTarget] = {}
        self._rearranged: set[str] = set()
        for path, linear in adaptable_layers(model).items():
            pattern = _NUMBER.sub("{}", path)
            sizes = list(linear.parts.values())
            parts = {"": range(len(sizes))} | {part: range(i, i + 1) for i, part in enumerate(linear.parts)}
            for part, numbers in parts.items():
                module = f"{pattern}.{part}" if part else pattern
                names = [*self._names(module, path)]
                if not names:
                    continue
                if module in family.layouts:
                    self._rearranged.update(names)
                    continue
                target = AdapterTarget(
                    path,
                    tuple(numbers),
                    sum(sizes[: numbers.start]),
                    sum(sizes[: numbers.stop]),
                    linear.in_features,
                    names[0],
                )
                self.targets |= dict.fromkeys(names, target)

    def _names(self, module: str, path: str) -> Iterator[str]:
        """All names that checkpoints of the family have for a module of `Decoder`."""
        prefix, numbers = self._family.optional_prefix, _NUMBER.findall(path)
        for names in (self._family.weight_names, self._family.alternative_names):
            if module in names:
                name = names[module].format(*numbers)
                yield name
                if prefix and name.startswith(prefix):
                    yield name.removeprefix(prefix)

    def refusal(self, name: str) -> str:
        """Why a layer of this name has no adapter here, as the end of a sentence."""
        pattern = _NUMBER.sub("{}", name)
        if name in self._rearranged:
            return "which this model keeps in another order than its checkpoint: no adapter of it is served"
        is_expert = any(_is_like(pattern, stored) for stored in self._stored_names("moe.gate_up", "moe.down"))
        if is_expert or "experts" in name.split("."):
            return "which is of experts: adapters of experts are not served"
        if any(_is_like(pattern, stored) for stored in self._stored_names("attention.key_value")):
            return "which attention computes with inside the latent: no adapter of it is served"
        if any(_is_like(pattern, stored) for stored in self._stored_names("embedding", "head")):
            return "an embedding or a head: adapters of these are not served"
        return "which is no linear layer of this model that can have an adapter"

    def _stored_names(self, *modules: str) -> Iterator[str]:
        for module, name in self._family.weight_names.items():
            if any(module == end or f".{end}" in module for end in modules):
                yield _NUMBER.sub("{}", name)


def _is_like(pattern: str, stored: str) -> bool:
    """Whether one is the other, or lies inside it."""
    return pattern == stored or pattern.startswith(f"{stored}.")
