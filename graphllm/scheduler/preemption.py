"""Who gives way when KV memory is short, and how.

Owns the choice of victims and what becomes of them: swapped to the host tier, or released and computed
again. Victims are the newest of the lowest priority; one that has just come back is left alone until it has
got somewhere.
"""

from __future__ import annotations

from graphllm.cache.block_manager import BlockManager
from graphllm.scheduler.kv_counters import KVCounters
from graphllm.scheduler.queues import Queues
from graphllm.scheduler.slots import SlotAllocator
from graphllm.scheduler.tiers import Tiers, forget_computed
from graphllm.sequence import Sequence


class Preemption:
    """Takes running sequences' slots and blocks away; `max_num_batched_tokens` bounds what a step needs."""

    def __init__(
        self,
        manager: BlockManager,
        slots: SlotAllocator,
        *,
        queues: Queues,
        tiers: Tiers,
        counters: KVCounters,
        max_num_batched_tokens: int,
    ) -> None:
        self._manager = manager
        self._slots = slots
        self._queues = queues
        self._tiers = tiers
        self._counters = counters
        self._max_num_batched_tokens = max_num_batched_tokens

    @property
    def num_blocks_soon_at_most(self) -> int:
        """A bound of the blocks that two more steps take, without looking at each sequence."""
        layout = self._manager.layout
        num_prefill_columns = layout.num_columns(2 * self._max_num_batched_tokens)
        return (2 * len(self._queues.running) + num_prefill_columns) * layout.num_groups

    @property
    def num_blocks_coming(self) -> int:
        """Blocks that steps in flight and transfers under way will free."""
        return self._manager.num_pending_blocks + self._tiers.num_leaving_blocks

    @property
    def nothing_is_coming(self) -> bool:
        """Whether no step and no transfer is under way, so that what is not free stays so."""
        manager = self._manager
        return (
            manager.num_pending_blocks == 0
            and not self._tiers.has_transfers
            and manager.launched_step == manager.completed_step
        )

    def swap_early(self) -> None:
        """Swap the last out while two more steps of everybody still fit, so that nobody has to stop.

        Copies take as long as they take: a victim that is found only when the last block is gone frees
        nothing for the step that needs it.
        """
        manager, running = self._manager, self._queues.running
        if self._tiers.host.num_swap_blocks == 0 or len(running) < 2:
            return
        if manager.num_free_blocks + self.num_blocks_coming >= self.num_blocks_soon_at_most:
            return
        needs = {each: self._num_blocks_soon(each) for each in running if not end_is_foreseen(each)}
        needed = sum(needs.values())
        first = running[0]
        for victim in reversed(tuple(needs)):
            if victim is first or manager.num_free_blocks + self.num_blocks_coming >= needed:
                return
            if not _is_protected(victim) and self._tiers.can_swap_out(victim):
                self.preempt(victim)
                needed -= needs[victim]

    def _num_blocks_soon(self, sequence: Sequence) -> int:
        """Blocks that two more steps of a sequence take at the worst: in each group one, unless it ends or is
        a prompt.

        Those that fall behind windows meanwhile may still be behind a fence.
        """
        layout = self._manager.layout
        num_tokens = min(sequence.num_uncomputed_tokens + 1, 2 * self._max_num_batched_tokens)
        num_tokens = max(2, num_tokens, self._manager.block_size)
        end = min(sequence.num_computed_tokens + num_tokens, sequence.group.max_total_tokens)
        return max(0, layout.num_columns(end) * layout.num_groups - len(sequence.block_table))

    def victim(self, spared: set[Sequence]) -> Sequence | None:
        """The last in order that is not among `spared` and has not just come back."""
        for sequence in reversed(self._queues.running):
            if sequence not in spared and not _is_protected(sequence):
                return sequence
        return None

    def preempt(self, victim: Sequence) -> None:
        """Take a running sequence's slot and blocks, keeping its KV on the host if that can be."""
        self._counters.num_preemptions += 1
        victim.num_preemptions += 1
        self._queues.running.remove(victim)
        assert victim.slot is not None
        self._slots.release(victim.slot)
        victim.slot = None
        if not end_is_foreseen(victim) and self._tiers.can_swap_out(victim):
            self._tiers.swap_out(victim)
            return
        self._counters.num_recomputed += 1
        self._manager.release(reversed(victim.block_table))
        forget_computed(victim)
        self._queues.add_waiting(victim)


def end_is_foreseen(sequence: Sequence) -> bool:
    """Whether the tokens in flight already reach the sequence's length: no step can help it."""
    return sequence.max_num_tokens >= sequence.group.max_total_tokens


def _is_protected(sequence: Sequence) -> bool:
    return sequence.num_computed_tokens < sequence.min_tokens_to_swap
