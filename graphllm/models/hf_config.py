"""Checked reading of Hugging Face's config.json.

Owns the errors that name a key, and the decision which keys change no mathematics. A key that nobody
read and that is not known to be harmless is refused: it could mean anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from graphllm.errors import CheckpointError
from graphllm.models.hf_keys import GENERATION_KEYS, HARMLESS_KEYS, NEUTRAL_VALUES, POOLING_KEYS

MAX_SIZE = 2**31 - 1
MAX_NUM_LAYERS = 2048
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class HFConfig:
    """config.json of one checkpoint; every getter raises CheckpointError naming file and key.

    A key that is null counts as absent.
    """

    def __init__(self, values: Mapping[str, Any], path: Path, *, section: str = "") -> None:
        self.path = path
        self._values = values
        self._section = section
        self._read: set[str] = set()
        self._names: Mapping[str, str] = {}

    def renamed(self, **names: str) -> HFConfig:
        """The same file for who asks by other names: asked for `key`, it looks for `names[key]`.

        What is read through it counts as read here, and errors name the file's own key.
        """
        other = HFConfig(self._values, self.path, section=self._section)
        other._read = self._read
        other._names = {**self._names, **names}
        return other

    def get(self, key: str, default: Any = None) -> Any:
        """The raw value, `default` when absent or null; the key counts as understood."""
        key = self._names.get(key, key)
        self._read.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def positive_int(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.refuse(key, self._found(value, "a positive integer"))
        if value > MAX_SIZE:
            self.refuse(key, f"is {_short(value)}, more than any model has")
        return value

    def num_layers(self) -> int:
        """`num_hidden_layers`, bounded: lists of that length are made before a tensor is looked for."""
        number = self.positive_int("num_hidden_layers")
        if number > MAX_NUM_LAYERS:
            self.refuse("num_hidden_layers", f"is {number}; at most {MAX_NUM_LAYERS} are supported")
        return number

    def non_negative_int(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            self.refuse(key, self._found(value, "an integer from 0"))
        return value

    def positive_float(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if not is_positive_number(value):
            self.refuse(key, self._found(value, "a positive number"))
        return float(value)

    def optional_float(self, key: str) -> float | None:
        """A positive number, or None when absent."""
        return None if self.get(key) is None else self.positive_float(key)

    def nullable_float(self, key: str) -> float | None:
        """A positive number, or None where the file says null: it has to say one of the two."""
        if self._names.get(key, key) not in self._values:
            self.refuse(key, self._found(None, "a positive number or null"))
        return self.optional_float(key)

    def expect(self, key: str, value: object) -> None:
        """Refuse any value of the key but this one; null and absent are as good."""
        if self.get(key, value) != value:
            self.refuse(key, f"is {_short(self.get(key))}, which is not supported")

    def positive_floats(self, key: str, *, number: int) -> tuple[float, ...]:
        """A list of so many positive numbers."""
        values = self.get(key)
        if not isinstance(values, list) or not all(is_positive_number(value) for value in values):
            self.refuse(key, self._found(_short(values) if values else values, "a list of positive numbers"))
        if len(values) != number:
            self.refuse(key, f"has {len(values)} numbers instead of {number}")
        return tuple(float(value) for value in values)

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            self.refuse(key, self._found(value, "true or false"))
        return value

    def choice(self, key: str, choices: Mapping[str, Any], *, default: str | None = None) -> Any:
        """The entry of `choices` that the key names."""
        value = self.get(key, default)
        if not isinstance(value, str) or value not in choices:
            self.refuse(key, self._found(value, f"one of {', '.join(sorted(choices))}"))
        return choices[value]

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id or a list of them; empty when absent."""
        value = self.get(key, [])
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
            self.refuse(key, self._found(value, "a token id or a list of token ids"))
        return tuple(ids)

    def dtype(self) -> torch.dtype | None:
        """The weights' format (transformers 5 calls it `dtype`, 4 `torch_dtype`); None if it is another."""
        name = self.get("dtype") or self.get("torch_dtype")
        self.get("torch_dtype")
        return _DTYPES.get(str(name).removeprefix("torch."))

    def section(self, key: str, defaults: Mapping[str, Any] | None = None) -> HFConfig:
        """An object inside the configuration, {} when absent; it has a `check_understood` of its own.

        defaults: what it says where it leaves a key out.
        """
        values = self.get(key, {})
        if not isinstance(values, dict):
            self.refuse(key, self._found(values, "an object"))
        return HFConfig(
            {**(defaults or {}), **values}, self.path, section=f"{self._section}{self._names.get(key, key)}."
        )

    def sections(self) -> list[str]:
        """The keys that are objects themselves."""
        return [key for key, value in self._values.items() if isinstance(value, dict)]

    def refuse(self, key: str, reason: str) -> NoReturn:
        """Raise CheckpointError: the configuration's key, and what is wrong with it."""
        key = self._names.get(key, key)
        raise CheckpointError(f"{self.path}: configuration key '{self._section}{key}' {reason}.")

    def check_understood(self) -> None:
        """Refuse the first key that is set, was not read, and is not known to be harmless."""
        for key, value in self._values.items():
            if key in self._read or key in HARMLESS_KEYS | GENERATION_KEYS | POOLING_KEYS or value is None:
                continue
            if key not in NEUTRAL_VALUES:
                self.refuse(key, f"({_short(value)}) is not understood, and may change the mathematics")
            if value != NEUTRAL_VALUES[key]:
                self.refuse(key, f"is {_short(value)}, which is not supported")

    @staticmethod
    def _found(value: object, wanted: str) -> str:
        return f"is missing; it should be {wanted}" if value is None else f"is {value!r}, not {wanted}"


def is_positive_number(value: object) -> bool:
    """A finite int or float above zero (JSON's true is neither)."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value) and value > 0
    except OverflowError:  # an integer beyond every float
        return False


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
