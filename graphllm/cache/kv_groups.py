"""Which layers share block tables, and which of a block's pools each of them has.

Owns the choice of groups. Blocks, tables and windows' arithmetic are `block_layout.py`'s, tensors
`kv_cache.py`'s.

Layers that see the same tokens need the same blocks, so they share a block table. All groups take their
blocks from one pool, so a block must mean as many layers in each of them: the group size g. Layer i of a
group keeps its part in place i of the block. Layers of one kind (one window, or none) make ceil(count / g)
groups; what is missing in the last is padding, which costs memory and nothing else. With m tokens a sequence,
the bytes of a sequence at full length are proportional to

    sum over kinds of  g ceil(count / g) min(1, window / m)

A small g wastes little and makes many groups, each with tables and allocations of its own. So g is the one
with the fewest groups whose sum is within a sixteenth of the smallest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_MAX_GROUPS = 32
_WASTE = 1 / 16


@dataclass(frozen=True, slots=True)
class KVGroups:
    """windows: of each group, in tokens; None for one that sees everything. layers: of each, in order."""

    windows: tuple[int | None, ...]
    layers: tuple[tuple[int, ...], ...]

    @property
    def num_groups(self) -> int:
        return len(self.windows)

    @property
    def num_layers(self) -> int:
        return sum(map(len, self.layers))

    @property
    def size(self) -> int:
        """Layers that a block has room for: those of the largest group."""
        return max(map(len, self.layers))

    def places(self) -> list[tuple[int, int]]:
        """(group, place in the group's blocks) of each layer, by the layers' numbers."""
        places = {
            layer: (group, place)
            for group, layers in enumerate(self.layers)
            for place, layer in enumerate(layers)
        }
        return [places[layer] for layer in range(self.num_layers)]


def one_group(num_layers: int) -> KVGroups:
    """All layers see everything."""
    return KVGroups((None,), (tuple(range(num_layers)),))


def group_layers(windows: Sequence[int | None], *, max_model_len: int) -> KVGroups:
    """Divide layers into groups. windows: of each layer; one that no sequence outgrows is none.

    Groups that see everything come first, then those of the largest windows.
    """
    seen = [None if window is None or window >= max_model_len else window for window in windows]
    counts = Counter(seen)
    kinds = sorted(counts, key=lambda window: -(window or max_model_len))
    size = _group_size(counts, max_model_len)
    group_windows: list[int | None] = []
    group_members: list[tuple[int, ...]] = []
    for kind in kinds:
        members = [layer for layer, window in enumerate(seen) if window == kind]
        for first in range(0, len(members), size):
            group_windows.append(kind)
            group_members.append(tuple(members[first : first + size]))
    return KVGroups(tuple(group_windows), tuple(group_members))


def _group_size(counts: Counter[int | None], max_model_len: int) -> int:
    def num_groups(size: int) -> int:
        return sum(-(-count // size) for count in counts.values())

    def cost(size: int) -> float:
        return sum(
            size * -(-count // size) * (1.0 if window is None else window / max_model_len)
            for window, count in counts.items()
        )

    sizes = [
        size
        for size in range(1, max(counts.values()) + 1)
        if num_groups(size) <= max(_MAX_GROUPS, len(counts))
    ]
    limit = min(map(cost, sizes)) * (1 + _WASTE)
    return min(
        (size for size in sizes if cost(size) <= limit), key=lambda size: (num_groups(size), cost(size))
    )
