"""Checked access to a GGUF file's metadata.

Owns the errors that name a metadata key, and the rule that a key which nobody read is refused: it could
mean anything. What the keys mean is `gguf_config.py`'s and the architectures' business.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any, NoReturn

import numpy as np

from graphllm.errors import CheckpointError
from graphllm.models.gguf_file import GGUFFile

# Notes on training and on who converted the file, without mathematics.
_HARMLESS_KEYS = frozenset({"rope.scaling.finetuned", "tensor_data_layout"})


def is_positive_int(value: object) -> bool:
    """An integer above zero; true is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def shortest_decimal(value: float) -> float:
    """What float32 holds as the shortest decimal that means it: 1e-05, not 9.99...e-06."""
    return float(str(np.float32(value)))


class GGUFMetadata:
    """The metadata under one architecture's prefix; every getter raises CheckpointError naming the key.

    A list with one value for each layer counts as that value where all are equal.
    """

    def __init__(self, file: GGUFFile, prefix: str) -> None:
        self.file = file
        self.prefix = prefix
        self._read: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether the key is present; it does not count as read."""
        return f"{self.prefix}.{key}" in self.file.fields

    def positive_int(self, key: str, *, default: int | None = None) -> int:
        """A count."""
        return int(self._value(key, is_positive_int, "a positive integer", default))

    def non_negative_int(self, key: str, *, default: int | None = None) -> int:
        """A count that may be 0."""

        def accepts(value: object) -> bool:
            return value == 0 or is_positive_int(value)

        return int(self._value(key, accepts, "an integer from 0", default))

    def positive_float(self, key: str, *, default: float | None = None) -> float:
        """A number, as its shortest decimal."""

        def accepts(value: object) -> bool:
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            return is_number and isfinite(value) and value > 0  # type: ignore[arg-type, operator]

        return shortest_decimal(self._value(key, accepts, "a positive number", default))

    def optional_float(self, key: str) -> float | None:
        """A positive number, None when absent."""
        return self.positive_float(key) if self.has(key) else None

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false."""
        return bool(self._value(key, lambda value: isinstance(value, bool), "true or false", default))

    def flags(self, key: str, *, number: int) -> list[bool]:
        """A list of so many truth values."""
        self._read.add(key)
        values = self.file.fields.get(f"{self.prefix}.{key}")
        if not isinstance(values, list) or any(not isinstance(value, bool) for value in values):
            self.refuse(key, "should be a list of truth values")
        if len(values) != number:
            self.refuse(key, f"has {len(values)} entries for {number} layers")
        return values

    def text(self, key: str, *, default: str) -> str:
        """A string."""
        return str(self._value(key, lambda value: isinstance(value, str), "a string", default))

    def expect(self, key: str, *values: object) -> None:
        """Refuse any value of the key but these; absent is as good."""
        self._read.add(key)
        value = self.file.fields.get(f"{self.prefix}.{key}", values[0])
        if value not in values:
            self.refuse(key, f"is {value!r}, which is not supported")

    def is_list(self, key: str) -> bool:
        """Whether the key is present and has a value for each layer."""
        return isinstance(self.file.fields.get(f"{self.prefix}.{key}"), list)

    def has_layer_tensor(self, *stems: str, kind: str = "weight") -> bool:
        """Whether any layer has a tensor of one of these names, for example "attn_q"."""
        ends = tuple(f".{stem}.{kind}" for stem in stems)
        return any(name.startswith("blk.") and name.endswith(ends) for name in self.file.tensors)

    def refuse(self, key: str, reason: str) -> NoReturn:
        """Raise CheckpointError naming file and key."""
        raise CheckpointError(f"{self.file.path}: metadata key '{self.prefix}.{key}' {reason}.")

    def check_understood(self) -> None:
        """Refuse the first key under the prefix that was not read."""
        prefix = f"{self.prefix}."
        for name in self.file.fields:
            key = name.removeprefix(prefix)
            if name.startswith(prefix) and key not in self._read | _HARMLESS_KEYS:
                self.refuse(key, "is not understood, and may change the mathematics")

    def _value(self, key: str, accepts: Callable[[object], bool], wanted: str, default: Any) -> Any:
        self._read.add(key)
        value = self.file.fields.get(f"{self.prefix}.{key}", default)
        if value is None:
            self.refuse(key, "is missing")
        if isinstance(value, list) and value:
            if any(item != value[0] for item in value):
                self.refuse(key, "differs from layer to layer, which is not supported")
            value = value[0]
        if not accepts(value):
            self.refuse(key, f"is {value!r}; it should be {wanted}")
        return value
