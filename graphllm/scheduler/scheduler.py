"""Decides, anew at every step, which sequences run and for how many tokens.

Owns the waiting queue and the running list, admission, chunked prefill, preemption, and the host's
two counts of each sequence (confirmed, upper bound). Blocks are the block manager's, slots the slot
allocator's; what a step computes is the runner's. Pure Python: steps can be simulated by the million.

The policy is first come, first served. Decodes go before prompt chunks, so that running streams
keep their pace; what is left of the token budget goes to prompts in order of arrival. When blocks
run out the newest sequence is preempted: its blocks are released and its tokens computed again when
there is room (a swap to host memory takes this place later).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from graphllm.batch import BlockAppend, SamplePair, ScheduledBatch, ScheduledRow, SlotInstall, StepResult
from graphllm.cache.block_manager import BlockManager
from graphllm.outputs import FinishReason, TokenLogprob
from graphllm.scheduler.slots import SlotAllocator
from graphllm.sequence import Sequence, SequenceGroup, SequenceStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """max_num_seqs: most rows in a step. max_num_batched_tokens: most tokens in a step.

    The latter is the largest size that steps are padded to, so a prompt that is cut fills its step exactly.
    """

    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True, slots=True)
class AppliedToken:
    """A sampled token that was added to its sequence."""

    sequence: Sequence
    token_id: int
    logprob: TokenLogprob | None


class Scheduler:
    """Continuous batching over one block manager."""

    def __init__(
        self,
        limits: SchedulerLimits,
        block_manager: BlockManager,
        *,
        slots: SlotAllocator,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        assert limits.max_num_batched_tokens >= limits.max_num_seqs, "every decode fits in a step"
        self.limits = limits
        self.block_manager = block_manager
        self.slots = slots
        self.eos_token_ids = eos_token_ids
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._next_step_id = 1
        self._due_copies: list[tuple[int, int]] = []
        self._noted_copies: list[tuple[int, int]] = []

    # -- requests ---------------------------------------------------------------------------------

    def add(self, group: SequenceGroup) -> None:
        """Queue a request. Its leader computes the prompt; siblings join when it is computed."""
        self.waiting.append(group.sequences[0])

    def finish(
        self, sequence: Sequence, reason: FinishReason, *, stop_reason: str | int | None = None
    ) -> None:
        """End one sequence and release what it holds. Ending it again does nothing."""
        if sequence.is_finished:
            return
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence.index == 0 or sequence.group.siblings_joined:  # else it was never queued
            self.waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        sequence.stop_reason = stop_reason

    def abort(self, group: SequenceGroup) -> None:
        """End all sequences of a request."""
        for sequence in group.sequences:
            self.finish(sequence, FinishReason.ABORT)

    @property
    def has_unfinished(self) -> bool:
        return bool(self.running or self.waiting)

    # -- a step -----------------------------------------------------------------------------------

    def schedule(self) -> ScheduledBatch | None:
        """The next step, or None when nothing can run before a step in flight completes."""
        batch = ScheduledBatch(step_id=self._next_step_id)
        num_preemptions = self.num_preemptions
        budget = self.limits.max_num_batched_tokens
        scheduled: set[Sequence] = set()
        blocked = False
        prefills = []
        for sequence in tuple(self.running):
            if sequence.status is not SequenceStatus.RUNNING or _end_is_foreseen(sequence):
                continue
            if sequence.num_uncomputed_tokens > 1:
                prefills.append(sequence)
            elif self._grow(sequence, 1, batch, scheduled=scheduled):
                self._add_row(sequence, 1, batch, scheduled=scheduled)
                budget -= 1
            else:
                blocked = True
        for sequence in prefills:
            num_tokens = min(budget, sequence.num_uncomputed_tokens)
            if num_tokens == 0 or sequence.status is not SequenceStatus.RUNNING:
                continue
            if self._grow(sequence, num_tokens, batch, scheduled=scheduled):
                self._add_row(sequence, num_tokens, batch, scheduled=scheduled)
                budget -= num_tokens
            else:
                blocked = True
        if not blocked and self.num_preemptions == num_preemptions:
            self._admit(budget, batch, scheduled=scheduled)
        if not batch.rows:
            return None
        # Copies noted while scheduling read what this very step writes: they go with the next one.
        batch.copies, self._due_copies = self._due_copies, self._noted_copies
        self._noted_copies = []
        self._order_rows(batch)
        self._next_step_id += 1
        self.block_manager.step_launched(batch.step_id)
        self.slots.step_launched(batch.step_id)
        return batch

    def apply(self, batch: ScheduledBatch, result: StepResult) -> list[AppliedToken]:
        """Confirm a completed step's tokens; ends sequences at stop tokens and at their length.

        Rows of sequences that ended meanwhile are dropped; a preempted sequence keeps its token.
        """
        applied = []
        for pair, token_id, logprob in zip(batch.pairs, result.token_ids, result.logprobs, strict=True):
            sequence = pair.sequence
            if sequence.is_finished or pair.generation != sequence.slot_generation:
                continue
            sequence.num_in_flight_tokens -= 1
            sequence.token_ids.append(token_id)
            applied.append(AppliedToken(sequence, token_id, logprob))
            self._check_stop(sequence, token_id)
        return applied

    def step_completed(self, step_id: int) -> None:
        """No launched step up to `step_id` touches memory any more: open its fences."""
        self.block_manager.step_completed(step_id)
        self.slots.step_completed(step_id)

    def check(self) -> None:
        """Prove the invariants of blocks and slots. Raises AssertionError."""
        assert all(sequence.status is SequenceStatus.RUNNING for sequence in self.running)
        assert all(not sequence.block_table for sequence in self.waiting)
        self.block_manager.check(sequence.block_table for sequence in self.running)
        owned = [sequence.slot for sequence in self.running]
        assert len(set(owned)) == len(owned) == self.slots.num_held, "slots and their owners differ"

    # -- parts of a step --------------------------------------------------------------------------

    def _admit(self, budget: int, batch: ScheduledBatch, *, scheduled: set[Sequence]) -> None:
        """Start waiting sequences, in order, while slots, blocks and the token budget last."""
        while self.waiting and budget > 0:
            sequence = self.waiting[0]
            if sequence.num_in_flight_tokens:  # preempted; its last token is not known yet
                return
            if len(self.running) >= self.limits.max_num_seqs or self.slots.num_free == 0:
                return
            # Leave each running sequence room for the step in flight and the next.
            needed = self.block_manager.num_blocks_for(sequence.num_uncomputed_tokens) + len(self.running)
            is_alone = not self.running and self.block_manager.num_pending_blocks == 0
            if needed > self.block_manager.num_free_blocks and not is_alone:
                return
            self.waiting.popleft()
            self._start(sequence, batch, num_computed_tokens=0)
            num_tokens = min(budget, sequence.num_uncomputed_tokens)
            grown = self._grow(sequence, num_tokens, batch, scheduled=scheduled)
            assert grown, "admission was checked"
            self._add_row(sequence, num_tokens, batch, scheduled=scheduled)
            budget -= num_tokens

    def _start(self, sequence: Sequence, batch: ScheduledBatch, *, num_computed_tokens: int) -> None:
        sequence.slot, sequence.slot_generation = self.slots.take()
        sequence.num_computed_tokens = num_computed_tokens
        sequence.status = SequenceStatus.RUNNING
        self.running.append(sequence)
        batch.installs.append(SlotInstall(sequence, sequence.slot, num_computed_tokens))

    def _grow(
        self, sequence: Sequence, num_tokens: int, batch: ScheduledBatch, *, scheduled: set[Sequence]
    ) -> bool:
        """Extend the block table to hold `num_tokens` more, preempting if need be.

        False leaves the sequence out of this step: it was preempted itself, or the blocks it needs
        wait behind a fence, and preempting more would free nothing now.
        """
        manager = self.block_manager
        total = manager.num_blocks_for(sequence.num_computed_tokens + num_tokens)
        missing = total - len(sequence.block_table)
        if missing <= 0:
            return True
        while missing > manager.num_free_blocks:
            if missing <= manager.num_free_blocks + manager.num_pending_blocks:
                return False
            victim = next((other for other in reversed(self.running) if other not in scheduled), None)
            if victim is None:
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        blocks = manager.allocate(missing)
        assert sequence.slot is not None
        batch.block_appends.append(BlockAppend(sequence.slot, len(sequence.block_table), tuple(blocks)))
        sequence.block_table.extend(blocks)
        return True

    def _add_row(
        self, sequence: Sequence, num_tokens: int, batch: ScheduledBatch, *, scheduled: set[Sequence]
    ) -> None:
        """Commit `num_tokens` of `sequence` to the step; the last known token's row samples."""
        assert sequence.slot is not None
        row = len(batch.rows)
        batch.rows.append(ScheduledRow(sequence, sequence.slot, num_tokens))
        scheduled.add(sequence)
        sequence.num_computed_tokens += num_tokens
        if sequence.num_uncomputed_tokens > 0:
            return
        self._add_pair(row, sequence, batch)
        if not sequence.group.siblings_joined:
            self._join_siblings(row, sequence, batch, scheduled=scheduled)

    def _add_pair(self, row: int, sequence: Sequence, batch: ScheduledBatch) -> None:
        assert sequence.slot is not None
        batch.pairs.append(SamplePair(row, sequence, sequence.slot, sequence.slot_generation))
        sequence.num_in_flight_tokens += 1

    def _join_siblings(
        self, row: int, leader: Sequence, batch: ScheduledBatch, *, scheduled: set[Sequence]
    ) -> None:
        """The prompt is computed by this step: its siblings share the full blocks and start here.

        A sibling's own copy of the last, partly filled block is made at the start of the next step,
        before anything writes to either. A sibling for which there is no room now waits, and
        computes the prompt itself.
        """
        leader.group.siblings_joined = True
        manager = self.block_manager
        num_full_blocks, num_partial_tokens = divmod(leader.num_prompt_tokens, manager.block_size)
        latecomers = []
        for sibling in leader.group.sequences[1:]:
            if sibling.is_finished:
                continue
            num_own_blocks = 1 if num_partial_tokens else 0
            if (
                self.slots.num_free == 0
                or len(self.running) >= self.limits.max_num_seqs
                or num_own_blocks > manager.num_free_blocks
            ):
                latecomers.append(sibling)
                continue
            shared = leader.block_table[:num_full_blocks]
            manager.share(shared)
            own = manager.allocate(num_own_blocks)
            self._noted_copies.extend(zip(leader.block_table[num_full_blocks:], own, strict=False))
            sibling.block_table = shared + own
            self._start(sibling, batch, num_computed_tokens=leader.num_prompt_tokens)
            scheduled.add(sibling)
            self._add_pair(row, sibling, batch)
        self.waiting.extendleft(reversed(latecomers))

    def _order_rows(self, batch: ScheduledBatch) -> None:
        """Put rows of one token first, as attention wants them, and count them."""
        batch.num_decode_rows = sum(row.num_tokens == 1 for row in batch.rows)
        order = sorted(range(len(batch.rows)), key=lambda row: batch.rows[row].num_tokens > 1)
        if order == list(range(len(order))):
            return
        new_row = {old: new for new, old in enumerate(order)}
        batch.rows = [batch.rows[old] for old in order]
        batch.pairs = [replace(pair, row=new_row[pair.row]) for pair in batch.pairs]

    def _preempt(self, victim: Sequence) -> None:
        self.num_preemptions += 1
        victim.num_preemptions += 1
        self.running.remove(victim)
        self._release(victim)
        victim.status = SequenceStatus.WAITING
        victim.num_computed_tokens = 0
        self.waiting.appendleft(victim)

    def _release(self, sequence: Sequence) -> None:
        self.block_manager.release(sequence.block_table)
        sequence.block_table = []
        assert sequence.slot is not None
        self.slots.release(sequence.slot)
        sequence.slot = None

    def _check_stop(self, sequence: Sequence, token_id: int) -> None:
        params = sequence.params
        if sequence.num_output_tokens >= params.min_tokens:
            if token_id in self.eos_token_ids and not params.ignore_eos:
                self.finish(sequence, FinishReason.STOP)
                return
            if token_id in params.stop_token_ids:
                self.finish(sequence, FinishReason.STOP, stop_reason=token_id)
                return
        if len(sequence.token_ids) >= sequence.group.max_total_tokens:
            self.finish(sequence, FinishReason.LENGTH)


def _end_is_foreseen(sequence: Sequence) -> bool:
    """Whether the tokens in flight already reach the sequence's length: no step can help it."""
    return sequence.max_num_tokens >= sequence.group.max_total_tokens
