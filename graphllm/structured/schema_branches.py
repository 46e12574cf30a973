"""Where several schemas apply to one value: references, intersections, and the combinations they come to.

Owns the look-up of references within a schema, and the count of combinations, which the budget of a
compilation needs: the library writes an intersection of alternatives out as alternatives of intersections.
Everything else about schemas is in `json_schema.py` and `closed_objects.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

MAX_COUNTED = 1_000_000
# References to references, one within the other, that are followed.
_MAX_CHAIN = 100

_COMBINING = frozenset({"allOf", "anyOf", "oneOf", "$ref"})
# What may stand beside those without being combined with them.
_HARMLESS_BESIDE = frozenset(
    {"$comment", "$defs", "$id", "$schema", "default", "definitions", "deprecated", "description"}
    | {"discriminator", "examples", "nullable", "readOnly", "title", "type", "writeOnly"}
)


def intersects(schema: Mapping[str, Any]) -> bool:
    """Whether the schema is an intersection of more than one part, alternatives perhaps among them."""
    if _COMBINING.isdisjoint(schema):
        return False
    return len(schema.keys() - _HARMLESS_BESIDE) > 1 or len(_branches(schema, "allOf")) > 1


class BranchCounter:
    """Counts for the subschemas of one schema."""

    __slots__ = ("_counts", "_root")

    def __init__(self, root: Any) -> None:
        self._root = root
        self._counts: dict[int, int] = {}

    def count(self, schema: Any, depth: int = 0) -> int:
        """The number of combinations, at most MAX_COUNTED; a reference to itself counts once."""
        if not isinstance(schema, dict) or _COMBINING.isdisjoint(schema):
            return 1
        known = self._counts.get(id(schema))
        if known is not None:
            return known
        if depth > _MAX_CHAIN:
            return MAX_COUNTED
        self._counts[id(schema)] = 1
        product = self.count(target_of(self._root, schema.get("$ref")), depth + 1)
        product *= math.prod(self.count(branch, depth + 1) for branch in _branches(schema, "allOf"))
        for key in ("anyOf", "oneOf"):
            if branches := _branches(schema, key):
                product *= sum(self.count(branch, depth + 1) for branch in branches)
        self._counts[id(schema)] = min(product, MAX_COUNTED)
        return self._counts[id(schema)]


def target_of(root: Any, reference: Any) -> Any:
    """What a reference within the schema `root` points at (RFC 6901); None for any other."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    pointer = unquote(reference[1:])
    if pointer and not pointer.startswith("/"):  # the name of an anchor
        return None
    found = root
    for part in pointer.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdecimal() and len(name) < 10:
            found = found[int(name)] if int(name) < len(found) else None
        else:
            found = found.get(name) if isinstance(found, dict) else None
    return found


def _branches(schema: Mapping[str, Any], key: str) -> Sequence[Any]:
    branches = schema.get(key)
    return branches if isinstance(branches, list) else ()
