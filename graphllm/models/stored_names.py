"""Where a checkpoint keeps what the decoder calls otherwise: modules and tensors by name.

Owns the translation from paths in `Decoder` ("layers.3.attention.qkv", part "q", "weight") to names in a
checkpoint, as a family declares it. Reads no tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import chain

from graphllm.models.family import Family

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_TENSORS = ("weight", "bias")


def without_numbers(path: str) -> str:
    """The path as families write it: "layers.{}.attention.qkv"."""
    return _NUMBER.sub("{}", path)


@dataclass(frozen=True, slots=True)
class StoredNames:
    """The names of one checkpoint.

    tensors: all that it has; None where it is a configuration alone. prefix: what it leaves out of the
    names that the family declares.
    """

    family: Family
    tensors: Collection[str] | None
    prefix: str

    @classmethod
    def of(cls, family: Family, tensors: Collection[str] | None) -> StoredNames:
        """tensors: see the class."""
        known = None if tensors is None else frozenset(tensors)
        left_out = family.optional_prefix
        if left_out and (known is None or any(name.startswith(left_out) for name in known)):
            left_out = ""
        return cls(family, known, left_out)

    def is_whole(self, path: str) -> bool:
        """Whether the checkpoint has one tensor for all parts of the merged layer at `path`."""
        pattern = without_numbers(path)
        names = {pattern, *(f"{pattern}.{tensor}" for tensor in _TENSORS)}
        return not names.isdisjoint(self.family.weight_names)

    def tensor(self, part: str, tensor: str) -> str:
        """part: path of a layer or of a part of one. Returns the name of its `tensor`."""
        pattern, numbers = without_numbers(part), _NUMBER.findall(part)
        in_full = self.family.weight_names.get(f"{pattern}.{tensor}")
        if in_full is not None:
            name = in_full
        elif pattern in self.family.weight_names:
            name = f"{self.family.weight_names[pattern]}.{tensor}"
        else:  # a tensor beside one that is named in full, as scales are
            name = f"{self.family.weight_names[f'{pattern}.weight']}_{tensor}"
        if (other := self.family.alternative_names.get(pattern)) is not None and self.tensors is not None:
            other = f"{other}.{tensor}"
            name = other if other.format(*numbers).removeprefix(self.prefix) in self.tensors else name
        return name.format(*numbers).removeprefix(self.prefix)

    def modules(self, path: str, *, num_experts: int) -> list[str]:
        """The checkpoint's modules that the linear layer or stack at `path` is made of.

        num_experts: of a stack; each is a module where the family names them one by one. Where the
        checkpoint has other names for a module, both are listed, and those that it does not have left out.
        """
        pattern, numbers = without_numbers(path), _NUMBER.findall(path)
        names = self.family.weight_names
        if pattern in names:
            found = [pattern]
        elif f"{pattern}.weight" in names:
            found = [f"{pattern}.weight"]
        else:
            found = [name for name in names if name.startswith(f"{pattern}.")]
        spelled = chain.from_iterable(self._spelled(name, numbers, num_experts) for name in found)
        return [name.removeprefix(self.prefix) for name in spelled]

    def _spelled(self, pattern: str, numbers: list[str], num_experts: int) -> list[str]:
        stored = self.family.weight_names[pattern]
        other = self.family.alternative_names.get(pattern)
        experts = [[]] if stored.count("{}") <= len(numbers) else [[str(e)] for e in range(num_experts)]
        spelled = []
        for expert in experts:
            name = stored.format(*numbers, *expert)
            if other is not None and self.tensors is not None:
                second = other.format(*numbers, *expert)
                beginning = f"{second}.".removeprefix(self.prefix)
                name = second if any(known.startswith(beginning) for known in self.tensors) else name
            spelled.append(name)
        return spelled
