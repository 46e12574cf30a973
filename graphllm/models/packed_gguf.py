"""A GGUF file whose matrices are handed out packed, as far as something multiplies them so.

Owns which of its tensors those are, and their names: of a matrix X.weight there are X.codes, X.scales and, in
types with offsets, X.zeros instead. Blocks are `gguf_packed.py`'s, files `gguf.py`'s.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graphllm.models.family import Family
from graphllm.models.gguf import GGUFCheckpoint
from graphllm.models.gguf_packed import PackedRows
from graphllm.models.stored_names import StoredNames
from graphllm.quant.gguf import GgufForm
from graphllm.quant.scheme import WeightForm
from graphllm.tokenizer.tokenizer import Tokenizer

_WEIGHT = ".weight"
# Looked up by rows, and not multiplied.
_TABLES = ("embedding", "positions")


@dataclass(frozen=True, slots=True)
class GgufRules:
    """`Rules` of one file: the form of each module that has one."""

    form_of_module: Mapping[str, GgufForm]

    @classmethod
    def of(cls, checkpoint: GGUFCheckpoint, family: Family) -> GgufRules:
        """All matrices of types that something multiplies, but for tables."""
        names = checkpoint.tensor_names()
        stored = StoredNames.of(family, names)
        tables = [
            module
            for path in _TABLES
            if path in family.weight_names
            for module in stored.modules(path, num_experts=0)
        ]
        found = {}
        for name in names:
            module = name.removesuffix(_WEIGHT)
            form = checkpoint.packed_form(name) if name.endswith(_WEIGHT) and module not in tables else None
            if form is not None:
                found[module] = GgufForm(*form)
        return cls(found)

    @property
    def forms(self) -> tuple[WeightForm, ...]:
        """See `Rules`."""
        return tuple(dict.fromkeys(self.form_of_module.values()))

    def form_of(self, module: str, tensors: Collection[str] | None) -> WeightForm | None:
        """See `Rules`."""
        return self.form_of_module.get(module)


class PackedGGUFCheckpoint:
    """Implements `Checkpoint` over a file's packed tensors, and the plain ones that it has beside them."""

    path: Path
    hf_config: dict[str, Any]
    generation_config: dict[str, Any]

    def __init__(self, checkpoint: GGUFCheckpoint, rules: GgufRules) -> None:
        self.path = checkpoint.path
        self.hf_config = checkpoint.hf_config
        self.generation_config = checkpoint.generation_config
        self._checkpoint = checkpoint
        self._parts: dict[str, tuple[str, str]] = {}  # of a packed tensor: the stored one, and what of it
        self._names: list[str] = []
        for name in checkpoint.tensor_names():
            module = name.removesuffix(_WEIGHT)
            form = rules.form_of_module.get(module) if name.endswith(_WEIGHT) else None
            if form is None:
                self._names.append(name)
                continue
            parts = ("codes", "scales") if form.format.zeros == "none" else ("codes", "scales", "zeros")
            self._parts |= {f"{module}.{part}": (name, part) for part in parts}
            self._names += [f"{module}.{part}" for part in parts]
        self._rules = rules
        # A tensor's parts are asked for one after the other, and unpacked together.
        self._unpacked: tuple[str, PackedRows] | None = None

    def tensor_names(self) -> Collection[str]:
        return dict.fromkeys(self._names)

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        if name not in self._parts:
            return self._checkpoint.tensor_shape(name)
        stored, part = self._parts[name]
        num_rows, columns = self._checkpoint.tensor_shape(stored)
        form = self._rules.form_of_module[stored.removesuffix(_WEIGHT)].format
        return num_rows, columns if part == "codes" else form.num_groups(columns)

    def tensor(self, name: str) -> torch.Tensor:
        if name not in self._parts:
            return self._checkpoint.tensor(name)
        stored, part = self._parts[name]
        if self._unpacked is None or self._unpacked[0] != stored:
            self._unpacked = None  # the one before, of which nothing more is asked
            self._unpacked = stored, self._checkpoint.packed_rows(stored)
        rows = self._unpacked[1]
        found = {"codes": rows.codes, "scales": rows.scales, "zeros": rows.offsets}[part]
        assert found is not None
        return torch.from_numpy(found.copy() if not found.flags.writeable else found)

    def load_tokenizer(self) -> Tokenizer:
        return self._checkpoint.load_tokenizer()
