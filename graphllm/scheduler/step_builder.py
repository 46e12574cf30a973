"""Puts one step together: rows, the blocks that they write to, slots, and who samples.

Owns the batch while it grows, its token budget and which sequences are in it. Which sequence is to run
is the scheduler's decision, who gives way the preemption's.
"""

from __future__ import annotations

from dataclasses import replace

from graphllm.batch import BlockAppend, SamplePair, ScheduledBatch, ScheduledRow, ScoredSpan, SlotInstall
from graphllm.cache.block_manager import BlockManager
from graphllm.scheduler.preemption import Preemption
from graphllm.scheduler.prefix_sharing import PrefixSharing
from graphllm.scheduler.queues import Queues
from graphllm.scheduler.slots import SlotAllocator
from graphllm.scheduler.windows import release_behind_windows
from graphllm.sequence import Sequence, SequenceStatus


class StepBuilder:
    """One step of at most `budget` tokens and `max_num_seqs` rows.

    `blocked`: a sequence that should run was left out for want of blocks. `prefixes` is None where
    prefixes are not cached. `previous` is the step before: a step of unchanged membership consists of its
    rows and pairs, which are values and need not be built again.
    """

    __slots__ = (
        "_manager",
        "_max_num_seqs",
        "_preemption",
        "_prefixes",
        "_previous",
        "_queues",
        "_scheduled",
        "_slots",
        "batch",
        "blocked",
        "budget",
    )

    def __init__(
        self,
        step_id: int,
        *,
        budget: int,
        max_num_seqs: int,
        manager: BlockManager,
        slots: SlotAllocator,
        queues: Queues,
        preemption: Preemption,
        prefixes: PrefixSharing | None,
        previous: ScheduledBatch,
    ) -> None:
        self.batch = ScheduledBatch(step_id)
        self.budget = budget
        self.blocked = False
        self._max_num_seqs = max_num_seqs
        self._manager = manager
        self._slots = slots
        self._queues = queues
        self._preemption = preemption
        self._prefixes = prefixes
        self._previous = previous
        self._scheduled: set[Sequence] = set()

    @property
    def has_slot(self) -> bool:
        """Whether one more sequence may run."""
        return len(self._queues.running) < self._max_num_seqs and self._slots.num_free > 0

    def start(self, sequence: Sequence, *, num_computed_tokens: int) -> None:
        """Give a sequence a slot, whose rows the step installs. The caller adds it to the step."""
        sequence.slot, sequence.slot_generation = self._slots.take(sequence.group.adapter)
        sequence.num_computed_tokens = num_computed_tokens
        sequence.status = SequenceStatus.RUNNING
        self._queues.add_running(sequence)
        place = self._slots.adapter_place(sequence.slot)
        self.batch.installs.append(SlotInstall(sequence, sequence.slot, num_computed_tokens, place))

    def add(self, sequence: Sequence, num_tokens: int) -> bool:
        """Commit `num_tokens` of a running sequence to the step; False, and `blocked`, without the blocks."""
        if not self._grow(sequence, num_tokens):
            self.blocked = True
            return False
        assert sequence.slot is not None
        rows, old_rows = self.batch.rows, self._previous.rows
        row = len(rows)
        old = old_rows[row] if row < len(old_rows) else None
        if (
            old is not None
            and old.sequence is sequence
            and old.slot == sequence.slot
            and old.num_tokens == num_tokens
        ):
            rows.append(old)
        else:
            rows.append(ScheduledRow(sequence, sequence.slot, num_tokens))
        self._scheduled.add(sequence)
        self.batch.pools |= sequence.group.pooling
        self.batch.uses_adapters |= sequence.group.adapter is not None
        self.budget -= num_tokens
        if sequence.num_unscored_tokens:
            self._add_span(row, sequence, num_tokens=num_tokens)
        sequence.num_computed_tokens += num_tokens
        if sequence.num_uncomputed_tokens == 0:  # the row of the last known token samples
            self._add_pair(row, sequence)
            if not sequence.group.siblings_joined:
                self._join_siblings(row, sequence)
        return True

    def finish(self) -> ScheduledBatch:
        """The batch, rows of one token first, as attention wants them."""
        batch = self.batch
        batch.num_decode_rows = sum(row.num_tokens == 1 for row in batch.rows)
        if any(row.num_tokens > 1 for row in batch.rows[: batch.num_decode_rows]):
            order = sorted(range(len(batch.rows)), key=lambda row: batch.rows[row].num_tokens > 1)
            new_row = {old: new for new, old in enumerate(order)}
            batch.rows = [batch.rows[old] for old in order]
            batch.pairs = [replace(pair, row=new_row[pair.row]) for pair in batch.pairs]
            batch.spans = [replace(span, row=new_row[span.row]) for span in batch.spans]
        return batch

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Extend the block table to hold `num_tokens` more, preempting if need be.

        What has fallen behind windows is released where a column is added. A column that others hold too is
        copied with this step, before it is written. False leaves the sequence out of this step: it was
        preempted itself, or the blocks it needs wait behind a fence or a copy, and preempting more would free
        nothing now.
        """
        manager, table = self._manager, sequence.block_table
        layout = manager.layout
        num_groups = layout.num_groups
        column, num_written = divmod(sequence.num_computed_tokens, layout.block_size)
        first = column * num_groups
        total = layout.num_columns(sequence.num_computed_tokens + num_tokens) * num_groups
        if total > len(table) and layout.windowed:
            release_behind_windows(sequence, manager)
        while True:
            # Whoever holds a column that is not full holds it in every group.
            copies = num_groups if num_written > 0 and manager.reference_count(table[first]) > 1 else 0
            missing = total - len(table) + copies
            if missing <= 0:
                return True
            if missing <= manager.num_free_blocks:
                break
            if missing <= manager.num_free_blocks + self._preemption.num_blocks_coming:
                return False
            victim = self._preemption.victim(self._scheduled)
            if victim is None:
                return False
            self._preemption.preempt(victim)
            if victim is sequence:
                return False
        blocks = manager.allocate(missing)
        if copies:
            assert first == len(table) - num_groups, "only the last column is written"
            sources = table[first:]
            del table[first:]
            self.batch.copies.extend(zip(sources, blocks, strict=False))
            manager.fence_next_step(self.batch.step_id)
            manager.release(sources)
        assert sequence.slot is not None
        start = len(table) // num_groups
        self.batch.block_appends.append(BlockAppend(sequence.slot, start, tuple(blocks)))
        table.extend(blocks)
        return True

    def _add_pair(self, row: int, sequence: Sequence) -> None:
        assert sequence.slot is not None
        sequence.num_in_flight_tokens += 1
        pairs, old_pairs = self.batch.pairs, self._previous.pairs
        old = old_pairs[len(pairs)] if len(pairs) < len(old_pairs) else None
        # A generation has one slot and one sequence, and a sequence is constrained from its first token on.
        if old is not None and old.generation == sequence.slot_generation and old.row == row:
            pairs.append(old)
        else:
            held = sequence.constraint is not None
            pairs.append(SamplePair(row, sequence, sequence.slot, sequence.slot_generation, held))

    def _add_span(self, row: int, sequence: Sequence, *, num_tokens: int) -> None:
        """Score what the row reaches of a prompt; what was scored before a preemption is not scored again."""
        start, first = sequence.num_computed_tokens, sequence.num_prompt_tokens - sequence.num_unscored_tokens
        end = min(start + num_tokens + 1, sequence.num_prompt_tokens)
        if end <= first:
            return
        assert start < first, "every token in front of one that is to be scored is computed"
        self.batch.spans.append(ScoredSpan(row, sequence, first - 1 - start, end - first, first))
        sequence.num_unscored_tokens -= end - first

    def _join_siblings(self, row: int, leader: Sequence) -> None:
        """The prompt is computed by this step: its siblings share its blocks and start here.

        Each copies the last, partly filled block when it first writes to it. A sibling for which there is
        no room now waits, and starts from the prompt's cached blocks or computes them itself.
        """
        leader.group.siblings_joined = True
        manager = self._manager
        layout = manager.layout
        table = leader.block_table[: layout.num_columns(leader.num_prompt_tokens) * layout.num_groups]
        num_joined = 0
        for sibling in leader.group.sequences[1:]:
            if sibling.is_finished:
                continue
            if not self.has_slot or (num_joined + 1) * layout.num_groups > manager.num_free_blocks:
                self._queues.add_waiting(sibling)
                continue
            num_joined += 1
            manager.share(table)
            sibling.block_table = list(table)
            if self._prefixes is not None:
                self._prefixes.join(leader, sibling)
            self.start(sibling, num_computed_tokens=leader.num_prompt_tokens)
            self._scheduled.add(sibling)
            self._add_pair(row, sibling)
