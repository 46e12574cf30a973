"""Gives back what lies behind the windows of a sequence that goes on.

Owns no state: which columns a group still needs is `BlockLayout`'s arithmetic, the blocks are the block
manager's.
"""

from __future__ import annotations

from graphllm.cache.block_manager import NULL_BLOCK, BlockManager
from graphllm.sequence import Sequence


def release_behind_windows(sequence: Sequence, manager: BlockManager) -> None:
    """Release the blocks that no position sees which is still to be computed; their entries become null.

    Counted from what is settled, so that a token in flight may still turn out otherwise. Steps in flight may
    read such a block: it waits behind their fence like any other.
    """
    layout, table = manager.layout, sequence.block_table
    num_groups = layout.num_groups
    for group, window in layout.windowed:
        first = layout.first_column(sequence.num_settled_tokens, window)
        entry = (first - 1) * num_groups + group
        passed = []
        while entry >= 0 and table[entry] != NULL_BLOCK:
            passed.append(table[entry])
            table[entry] = NULL_BLOCK
            entry -= num_groups
        manager.release(passed, passed=True)
