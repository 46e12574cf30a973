"""Decides, anew at every step, which sequences run and for how many tokens.

Owns admission, chunked prefill, and the host's two counts of each sequence (confirmed, upper bound). Blocks
are the block manager's, slots the slot allocator's; `step_builder` puts the step together, `preemption`
chooses who gives way, `prefix_sharing` and `tiers` know cached prefixes and copies between the tiers. What a
step computes is the runner's. Pure Python: steps can be simulated by the million.

The policy is first come, first served, within a priority. Decodes go before prompt chunks, so that running
streams keep their pace; what is left of the token budget goes to prompts in order of priority and arrival.
When blocks run out the last in that order is preempted: it is swapped to the host tier, or, where that cannot
be, released and computed again. Nobody overtakes an earlier sequence that waits for memory, so the first
always comes to its end, and then the next. A better priority takes nothing from those that run already, as
long as memory lasts. Who waits for an adapter is overtaken meanwhile; `adapter_places` says why not for long.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from heapq import merge
from itertools import islice

from graphllm.adapter import AdapterUpload
from graphllm.batch import BlockTransfer, ScheduledBatch, StepResult
from graphllm.cache.block_manager import BlockManager
from graphllm.cache.host_tier import HostTier
from graphllm.cache.prefix_hash import PrefixHasher
from graphllm.outputs import FinishReason, TokenLogprob
from graphllm.scheduler import invariants
from graphllm.scheduler.kv_counters import KVCounters
from graphllm.scheduler.preemption import Preemption, end_is_foreseen
from graphllm.scheduler.prefix_sharing import NO_HIT, PinnedPrefix, PrefixHit, PrefixSharing
from graphllm.scheduler.queues import Queues, has_arrived, is_away, place
from graphllm.scheduler.slots import SlotAllocator
from graphllm.scheduler.step_builder import StepBuilder
from graphllm.scheduler.tiers import ConstantRates, SwapInOutcome, Tiers, TransferPredictor, forget_computed
from graphllm.sequence import Sequence, SequenceGroup, SequenceStatus

# How many sequences that wait for their adapters may be overtaken at once; also what a step looks at.
_MAX_OVERTAKEN = 128
_MAX_NEW_HASHES = 256  # a step, about half a millisecond; more when the device has nothing to do


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """max_num_seqs: most rows in a step. max_num_batched_tokens: most tokens in a step.

    The latter is the largest size that steps are padded to, so a prompt that is cut fills its step exactly.
    max_pinned_blocks: quota of pinned prefixes; the rest must hold the longest sequence.
    max_swaps_per_sequence: how often a sequence is swapped; after that it is computed again instead.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool = False
    max_pinned_blocks: int = 0
    max_swaps_per_sequence: int = 4


@dataclass(frozen=True, slots=True)
class AppliedToken:
    """A sampled token that was added to its sequence; of a sequence that generates nothing, its end."""

    sequence: Sequence
    token_id: int
    logprob: TokenLogprob | None
    pooled: array[float] | None = None


class Scheduler:
    """Continuous batching over one block manager and one host tier (none: no swaps, no offloading).

    `kv_fingerprint` names whatever changes KV beside the tokens; `hash_secret` is random unless given.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        block_manager: BlockManager,
        *,
        slots: SlotAllocator,
        eos_token_ids: frozenset[int] = frozenset(),
        host_tier: HostTier | None = None,
        kv_fingerprint: bytes = b"",
        predictor: TransferPredictor | None = None,
        hash_secret: bytes | None = None,
    ) -> None:
        assert limits.max_num_batched_tokens >= limits.max_num_seqs, "every decode fits in a step"
        self.limits = limits
        self.block_manager = block_manager
        self.slots = slots
        self.eos_token_ids = eos_token_ids
        self.host_tier = host_tier or HostTier()
        self.queues = Queues()
        self.waiting = self.queues.waiting
        self.running = self.queues.running
        self.moved = self.queues.moved
        self.counters = KVCounters()
        self.hasher = PrefixHasher(block_manager.block_size, fingerprint=kv_fingerprint, secret=hash_secret)
        self.prefixes = PrefixSharing(block_manager, self.hasher, max_pinned_blocks=limits.max_pinned_blocks)
        self.tiers = Tiers(
            block_manager,
            self.host_tier,
            queues=self.queues,
            prefixes=self.prefixes,
            counters=self.counters,
            predictor=predictor or ConstantRates(),
            max_swaps_per_sequence=limits.max_swaps_per_sequence,
        )
        self._preemption = Preemption(
            block_manager,
            slots,
            queues=self.queues,
            tiers=self.tiers,
            counters=self.counters,
            max_num_batched_tokens=limits.max_num_batched_tokens,
        )
        self.last_batch: ScheduledBatch | None = None  # until anything else happens: for the checker
        self._previous = ScheduledBatch(0)
        self._next_step_id = 1
        self._next_order = 0

    # -- requests ---------------------------------------------------------------------------------

    def add(self, group: SequenceGroup) -> None:
        """Queue a request. Its leader computes the prompt; siblings join when it is computed."""
        group.order = self._next_order
        self._next_order += 1
        self.queues.add_waiting(group.sequences[0])

    def finish(
        self, sequence: Sequence, reason: FinishReason, *, stop_reason: str | int | None = None
    ) -> None:
        """End one sequence and release what it holds. Ending it again does nothing."""
        if sequence.is_finished:
            return
        if sequence.index == 0 or sequence.group.siblings_joined:  # else it was never queued
            self._take_out(sequence)
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        sequence.stop_reason = stop_reason

    def abort(self, group: SequenceGroup) -> None:
        """End all sequences of a request."""
        for sequence in group.sequences:
            self.finish(sequence, FinishReason.ABORT)

    @property
    def has_unfinished(self) -> bool:
        return bool(self.running or self.waiting or self.moved)

    @property
    def num_preemptions(self) -> int:
        return self.counters.num_preemptions

    # -- pinned prefixes --------------------------------------------------------------------------

    def pin(self, token_ids: list[int], cache_salt: str | None) -> PinnedPrefix:
        """Keep the computed blocks of this prefix on the device until `unpin`.

        The result's `num_tokens` says how much of it exists and fits into the quota.
        """
        self.last_batch = None
        return self.prefixes.pin(token_ids, cache_salt)

    def unpin(self, pin_id: int) -> None:
        """Let a pinned prefix grow cold again. Raises KeyError for an unknown pin."""
        self.prefixes.unpin(pin_id)

    @property
    def num_pinned_blocks(self) -> int:
        return self.prefixes.num_pinned_blocks

    # -- a step -----------------------------------------------------------------------------------

    def schedule(self) -> ScheduledBatch | None:
        """The next step, or None when nothing can run before a step in flight or a transfer ends."""
        self.last_batch = None
        step = self._build()
        if not step.batch.rows and self.running and self._preemption.nothing_is_coming:
            # Everybody lacks a block, and whoever might give way has only just come back.
            self._preemption.preempt(self.running[-1])
            step = self._build()
        self.tiers.offload_cold(self._preemption.num_blocks_soon_at_most)
        if not step.batch.rows:
            return None
        batch = step.finish()
        self._next_step_id += 1
        self.block_manager.step_launched(batch.step_id)
        self.slots.step_launched(batch.step_id)
        if self.limits.enable_prefix_caching:
            for row in batch.rows:
                if row.num_tokens > 1:
                    self.prefixes.publish_launched(row.sequence, batch.step_id)
        self.last_batch = self._previous = batch
        return batch

    def take_transfers(self) -> list[BlockTransfer]:
        """The copies to launch now. To be asked after each `schedule`, whatever that returned."""
        return self.tiers.take_due()

    def take_uploads(self) -> list[AdapterUpload]:
        """The copies of adapters to launch now. To be asked after each `schedule`, whatever that returned."""
        return self.slots.adapters.take_uploads()

    def upload_completed(self, upload: AdapterUpload) -> None:
        """An adapter lies in its place: sequences that wait for it may start."""
        self.slots.adapters.upload_completed(upload)

    def transfer_completed(self, transfer_id: int, *, failed: bool) -> None:
        """A transfer that was taken touches no memory any more; `failed`: what it copied is worth nothing."""
        self.tiers.completed(transfer_id, failed=failed)

    @property
    def has_transfers(self) -> bool:
        """Whether a transfer is due or under way; also when no request is left."""
        return self.tiers.has_transfers

    def apply(self, batch: ScheduledBatch, result: StepResult) -> list[AppliedToken]:
        """Confirm a completed step's tokens; ends sequences at stop tokens and at their length.

        Rows of sequences that ended meanwhile are dropped; a preempted sequence keeps its token.
        """
        self.prefixes.confirm(batch.step_id)
        publishes = self.limits.enable_prefix_caching
        applied = []
        for span, scores in zip(batch.spans, result.scores, strict=True):
            if not span.sequence.is_finished:
                assert span.sequence.group.prompt_logprobs is not None, "only what was asked for is scored"
                span.sequence.group.prompt_logprobs.append(scores)
        for index, (pair, token_id, logprob) in enumerate(
            zip(batch.pairs, result.token_ids, result.logprobs, strict=True)
        ):
            sequence = pair.sequence
            if sequence.is_finished or pair.generation != sequence.slot_generation:
                continue
            sequence.num_in_flight_tokens -= 1
            if not sequence.group.generates:
                applied.append(AppliedToken(sequence, token_id, None, result.pooled.get(index)))
                self.finish(sequence, FinishReason.STOP if sequence.group.pooling else FinishReason.LENGTH)
                continue
            sequence.token_ids.append(token_id)
            applied.append(AppliedToken(sequence, token_id, logprob))
            if publishes and sequence.status is SequenceStatus.RUNNING:
                self.prefixes.publish_confirmed(sequence)
            self._check_stop(sequence, token_id)
        return applied

    def step_completed(self, step_id: int) -> None:
        """No launched step up to `step_id` touches memory any more: open its fences."""
        self.last_batch = None
        self.block_manager.step_completed(step_id)
        self.slots.step_completed(step_id)

    def step_failed(self, batch: ScheduledBatch) -> None:
        """A completed step has computed nothing: withdraw what it published.

        Sequences of other requests that read it wait to be computed again, and their rows in steps already
        launched become no-ops. The caller aborts the requests of the step's own rows afterwards.
        """
        failed = [sequence for row in batch.rows for sequence in row.sequence.group.sequences]
        for sequence in self.prefixes.withdraw(batch.step_id, failed):
            if sequence.is_finished:
                continue
            self._take_out(sequence)
            forget_computed(sequence)
            sequence.num_in_flight_tokens = 0
            sequence.slot_generation = 0  # nobody's: the tokens in flight are dropped
            self.queues.add_waiting(sequence)
            self.counters.num_voided_sequences += 1

    # -- what can be asked ------------------------------------------------------------------------

    @property
    def unused_share(self) -> float:
        """Allocated KV positions that hold no token and are kept for one, over all that are held."""
        layout, size = self.block_manager.layout, self.block_manager.block_size
        unused: dict[int, int] = {}  # by last block, which siblings share until they write to it
        for each in (*self.running, *self.moved):
            spare = len(each.block_table) // layout.num_groups * size - each.num_computed_tokens
            for last in each.block_table[-layout.num_groups :]:
                unused[last] = min(spare, unused.get(last, spare))
        held = self.block_manager.num_held_blocks * size
        return sum(unused.values()) / held if held else 0.0

    def check(self, full: bool = True) -> None:
        """Prove the invariants of blocks, slots and queues; not `full`: of what the last step touched.

        The full check recomputes the hashes of all held blocks from their owners' tokens. Raises
        AssertionError.
        """
        invariants.check(self, full=full)

    # -- parts of a step --------------------------------------------------------------------------

    def _build(self) -> StepBuilder:
        num_preemptions = self.num_preemptions
        self._preemption.swap_early()
        step = StepBuilder(
            self._next_step_id,
            budget=self.limits.max_num_batched_tokens,
            max_num_seqs=self.limits.max_num_seqs,
            manager=self.block_manager,
            slots=self.slots,
            queues=self.queues,
            preemption=self._preemption,
            prefixes=self.prefixes if self.limits.enable_prefix_caching else None,
            previous=self._previous,
        )
        prefills = []
        for sequence in tuple(self.running):
            if sequence.status is not SequenceStatus.RUNNING or end_is_foreseen(sequence):
                continue
            if sequence.num_uncomputed_tokens > 1:
                prefills.append(sequence)
            else:
                step.add(sequence, 1)
        for sequence in prefills:
            num_tokens = min(step.budget, sequence.num_uncomputed_tokens)
            if num_tokens > 0 and sequence.status is SequenceStatus.RUNNING:
                step.add(sequence, num_tokens)
        if self.moved:
            self._start_arrived(step)
        if not step.blocked and self.num_preemptions == num_preemptions:
            self._admit(step)
        return step

    def _start_arrived(self, step: StepBuilder) -> None:
        """Start the sequences whose blocks have been copied up; they hold room for a token more."""
        manager = self.block_manager
        num_groups = manager.layout.num_groups
        for sequence in tuple(self.moved):
            if step.budget == 0 or not step.has_slot:
                return
            if not (has_arrived(sequence) and self._has_adapter(sequence)):
                continue
            self.moved.remove(sequence)
            num_computed_tokens = sequence.num_computed_tokens
            if sequence.status is SequenceStatus.WAITING:
                self._count_cached(sequence, num_computed_tokens)
            step.start(sequence, num_computed_tokens=num_computed_tokens)
            num_columns = (len(sequence.block_table) + manager.num_free_blocks) // num_groups
            room = num_columns * manager.block_size
            num_tokens = min(step.budget, sequence.num_uncomputed_tokens, room - num_computed_tokens)
            added = step.add(sequence, num_tokens)
            assert added, "room was reserved"

    def _admit(self, step: StepBuilder) -> None:
        """Start waiting and swapped sequences, in order, while slots, blocks and the token budget last."""
        put_off = self._ask_for_adapters()
        while step.budget > 0 and step.has_slot:
            swapped = next((each for each in self.moved if is_away(each) and each not in put_off), None)
            waiting = next(
                (
                    each
                    for each in islice(self.waiting, _MAX_OVERTAKEN)
                    if each not in put_off and self._has_adapter(each)
                ),
                None,
            )
            if swapped is not None and (waiting is None or swapped.group.place <= waiting.group.place):
                if not self._swap_in(swapped):
                    return
                continue
            if waiting is None or waiting.num_in_flight_tokens:  # preempted; its last token is not known yet
                return
            hit = self._look_up(waiting, in_haste=bool(step.batch.rows))
            if hit is None:
                return
            fetches = not waiting.skips_host_lookup and self.tiers.should_fetch(hit)
            table = hit.fetched_table if fetches else hit.device_table
            if not self._has_room_for(waiting, table):
                return
            if waiting.group.in_one_step and waiting.num_uncomputed_tokens > step.budget:
                return
            self.waiting.remove(waiting)
            if fetches:
                self.tiers.fetch(waiting, hit)
            else:
                self._start_prompt(waiting, table, step=step)

    def _ask_for_adapters(self) -> set[Sequence]:
        """The sequences that may not start in this step for want of their adapters, asked for herewith."""
        if not self.slots.adapters.num_places:
            return set()
        self.slots.adapters.begin_round()
        first = islice(merge(self.moved, self.waiting, key=place), _MAX_OVERTAKEN)
        adapters = ((each, each.group.adapter) for each in first)
        return {each for each, adapter in adapters if adapter and not self.slots.adapters.admit(adapter)}

    def _has_adapter(self, sequence: Sequence) -> bool:
        adapter = sequence.group.adapter
        return adapter is None or self.slots.adapters.is_ready(adapter)

    def _start_prompt(self, sequence: Sequence, cached_table: list[int], *, step: StepBuilder) -> None:
        """Start a sequence from the blocks of its prompt that are on the device."""
        self.prefixes.start_from(sequence, cached_table)
        sequence.block_table = list(cached_table)
        sequence.num_published_columns = len(cached_table) // self.block_manager.layout.num_groups
        num_cached_tokens = sequence.num_published_columns * self.block_manager.block_size
        self._count_cached(sequence, num_cached_tokens)
        step.start(sequence, num_computed_tokens=num_cached_tokens)
        added = step.add(sequence, min(step.budget, sequence.num_uncomputed_tokens))
        assert added, "admission was checked"

    def _count_cached(self, sequence: Sequence, num_cached_tokens: int) -> None:
        """Note how much of a prompt was cached; not when a preempted sequence finds itself again."""
        was_asked = self.limits.enable_prefix_caching and not sequence.group.skips_prefix_lookup
        if was_asked and sequence.num_preemptions == 0:
            sequence.num_cached_tokens = num_cached_tokens
            self.counters.num_prefix_queries_tokens += len(sequence.token_ids)
            self.counters.num_prefix_hit_tokens += num_cached_tokens

    def _look_up(self, sequence: Sequence, *, in_haste: bool) -> PrefixHit | None:
        """What of a waiting sequence is cached; None when finding out would make this step late."""
        if not self.limits.enable_prefix_caching:
            return NO_HIT
        max_new_hashes = _MAX_NEW_HASHES if in_haste else None
        return self.prefixes.look_up(sequence, self.host_tier, max_new_hashes=max_new_hashes)

    def _has_room_for(self, sequence: Sequence, cached_table: list[int]) -> bool:
        """Whether there are blocks for all that a waiting sequence needs at once, but for those it has."""
        manager = self.block_manager
        num_groups = manager.layout.num_groups
        num_blocks = manager.layout.num_at_most(
            sequence.num_uncomputed_tokens,
            max_step_tokens=self.limits.max_num_batched_tokens,
            num_present=len(cached_table) // num_groups,
        )
        # Blocks that others hold cost nothing; those that nobody holds are free now.
        num_blocks -= sum(manager.reference_count(block) > 0 for block in cached_table)
        # Leave each running sequence, this one too, room for the step in flight and the next.
        num_spare = (len(self.running) + 1) * num_groups
        return num_blocks + num_spare <= manager.num_free_blocks or self._is_alone()

    def _is_alone(self) -> bool:
        """Whether nobody runs, and nobody holds blocks that will be free or run again."""
        return (
            not self.running
            and self._preemption.nothing_is_coming
            and not any(has_arrived(each) for each in self.moved)
        )

    def _swap_in(self, sequence: Sequence) -> bool:
        """Bring the first swapped sequence back; False when it waits for room, a step or its copy out."""
        num_spare = (len(self.running) + 1) * self.block_manager.layout.num_groups
        num_spare_blocks = 0 if self._is_alone() else num_spare
        outcome = self.tiers.swap_in(sequence, num_spare_blocks=num_spare_blocks)
        if outcome is SwapInOutcome.LOST:
            self.tiers.recompute(sequence)
        return outcome is not SwapInOutcome.NO_ROOM

    def _take_out(self, sequence: Sequence) -> None:
        """Remove a sequence from its queue and release what it holds on either tier.

        A transfer of its blocks holds them until it ends.
        """
        self.queues.remove(sequence)
        self.block_manager.release(reversed(sequence.block_table))
        sequence.block_table = []
        self.tiers.drop_host_blocks(sequence)
        sequence.transfer_id = None
        if sequence.slot is not None:
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
