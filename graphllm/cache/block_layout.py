"""How a sequence's context lies in blocks: in columns of tokens, and in groups of layers.

Owns the arithmetic of windows. Holds no tensors and knows no sequences: which layers make a group is
`kv_groups.py`'s, who owns a block the block manager's.

A column is `block_size` consecutive tokens of a sequence. Each group of layers keeps a column in a block of
its own, so a block table has `num_groups` entries a column, those of one column side by side: the entry of
column c in group g is `table[c * num_groups + g]`. Layers of a group see the same tokens: all before a query,
or those in its window, the last w with the query's own. A query at position p sees p - w + 1 and what
follows, so when p is the first position that is still to be computed, the columns that end before lie behind
the group's window for good. Their entries are 0, the null block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """windows: of each group, in tokens; None for a group that sees everything.

    full_groups: those that do. windowed: (group, window) of the others.
    """

    block_size: int
    windows: tuple[int | None, ...] = (None,)
    num_groups: int = field(init=False)
    full_groups: tuple[int, ...] = field(init=False)
    windowed: tuple[tuple[int, int], ...] = field(init=False)

    def __post_init__(self) -> None:
        assert self.windows and all(window is None or window > 0 for window in self.windows)
        windowed = [(group, window) for group, window in enumerate(self.windows) if window is not None]
        object.__setattr__(self, "num_groups", len(self.windows))
        full_groups = [group for group, window in enumerate(self.windows) if window is None]
        object.__setattr__(self, "full_groups", tuple(full_groups))
        object.__setattr__(self, "windowed", tuple(windowed))

    def num_columns(self, num_tokens: int) -> int:
        """Columns that `num_tokens` tokens take."""
        return -(-num_tokens // self.block_size)

    def first_column(self, num_tokens: int, window: int | None) -> int:
        """The first column that a query behind `num_tokens` tokens sees through a window."""
        return 0 if window is None else max(0, num_tokens - window + 1) // self.block_size

    def num_needed(self, num_tokens: int, *, num_settled: int) -> int:
        """Blocks that a sequence needs of `num_tokens` tokens if those before `num_settled` are settled."""
        num_columns = self.num_columns(num_tokens)
        if not self.windowed:
            return num_columns * self.num_groups
        return sum(num_columns - self.first_column(num_settled, window) for window in self.windows)

    def num_at_most(self, num_tokens: int, *, max_step_tokens: int, num_present: int = 0) -> int:
        """The most blocks that a sequence holds at once on its way to `num_tokens` tokens.

        It has `num_present` columns, and no step computes more than `max_step_tokens`. A windowed group holds
        its window and the step, which may begin and end within a block; what falls behind is released before
        the next step's blocks are taken, one confirmed token later at the most.
        """
        num_columns = self.num_columns(num_tokens)
        if not self.windowed:
            return num_columns * self.num_groups
        total = 0
        for window in self.windows:
            first = self.first_column(num_present * self.block_size, window)
            total += min(num_columns - first, self.most_columns(window, max_step_tokens))
        return total

    def most_columns(self, window: int | None, max_step_tokens: int) -> int:
        """The most columns that a group ever holds of a sequence, however long; without a window, all."""
        if window is None:
            return 2**62
        return self.num_columns(window + max_step_tokens) + 2

    def longest_fitting(self, num_blocks: int, *, max_step_tokens: int, at_most: int) -> int:
        """The longest sequence that `num_blocks` blocks hold, in whole columns or `at_most` tokens."""
        low, high = 0, self.num_columns(at_most)
        while low < high:
            middle = (low + high + 1) // 2
            if self.num_at_most(middle * self.block_size, max_step_tokens=max_step_tokens) <= num_blocks:
                low = middle
            else:
                high = middle - 1
        return min(at_most, low * self.block_size)

    def longest_prefix(self, num_columns: int, is_present: Callable[[int, int], bool]) -> int:
        """How many of the first `num_columns` columns a sequence can start behind.

        It needs, in each windowed group, the columns that the next query sees; `is_present(group, column)`
        says whether there is a block. Groups that see everything are known to have them all. Looks at each
        block once at most: what lies before a missing one is the only prefix that does without it.
        """
        lowest = [num_columns] * self.num_groups  # present from here to the prefix's end
        while num_columns:
            missing = None
            for group, window in self.windowed:
                column = min(lowest[group], num_columns)
                first = self.first_column(num_columns * self.block_size, window)
                while column > first and is_present(group, column - 1):
                    column -= 1
                lowest[group] = column
                if column > first:
                    missing = column - 1
                    break
            if missing is None:
                break
            num_columns = missing
        return num_columns
