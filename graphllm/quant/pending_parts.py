"""Checkpoint tensors that mean something only together, kept until all of a part's are there."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor


class PendingParts:
    """The tensors of a layer's parts that have come so far; a part is known by its first row."""

    def __init__(self) -> None:
        self._tensors: dict[int, dict[str, Tensor]] = {}

    def add(
        self, name: str, tensor: Tensor, *, first_row: int, wanted: Collection[str]
    ) -> dict[str, Tensor] | None:
        """Keep a tensor. Returns all of the part's, and forgets them, once the last one of `wanted` comes."""
        part = self._tensors.setdefault(first_row, {})
        part[name] = tensor
        return self._tensors.pop(first_row) if part.keys() >= set(wanted) else None
