"""A device for the scheduler's tests: it runs a step's bookkeeping over real block tables.

The KV of a position depends on all tokens up to it, so KV memory here holds, for each (block, offset), a
checksum of exactly these tokens. Every row checks that the context it reads through its slot's block
table is that of its slot's token history, so that a block given to two owners, a missed copy, a wrong
cached prefix or a stale table fails at once. Of a windowed group it reads what the window shows. The
"model" is a hash of the context and the sibling's number.

Steps run only when the test completes them, as late as can be. A step that fails leaves garbage wherever
it would have written. Copies between the tiers spoil their destination when they are launched and fill
it when they are completed, and their source must not change in between.
"""

from __future__ import annotations

import random
import zlib
from array import array
from collections import deque
from dataclasses import dataclass, field

from graphllm.batch import BlockTransfer, ScheduledBatch, ScoredSpan, StepResult, TransferDirection
from graphllm.cache.block_manager import BlockManager
from graphllm.cache.host_tier import HostTier
from graphllm.outputs import FinishReason, PromptScores
from graphllm.sampling_params import SamplingParams
from graphllm.scheduler.scheduler import Scheduler, SchedulerLimits
from graphllm.scheduler.slots import SlotAllocator
from graphllm.sequence import Sequence, SequenceGroup
from tests.scheduler.simulated_constraint import SimulatedConstraint

VOCAB_SIZE = 97
EOS = 96
GARBAGE = -1
_GROUP = 1 << 32  # what tells one group's fake KV of a position from the next one's
_BYTES = [bytes((number,)) for number in range(256)]


def kv_chain(tokens: list[int]) -> list[int]:
    """The fake KV of each position: a checksum of the tokens up to it."""
    chain: list[int] = []
    _extend_chain(chain, tokens)
    return chain


def _extend_chain(chain: list[int], tokens: list[int]) -> None:
    value = chain[-1] if chain else 1
    for token in tokens[len(chain) :]:
        value = zlib.crc32(_BYTES[token], value)
        chain.append(value)


def next_token(last_kv: int, sibling: int, *, shift: int = 0) -> int:
    """The fake model and its fake mask: any change of the context or of the `shift` changes the token."""
    return (zlib.crc32(_BYTES[sibling], last_kv) + shift) % VOCAB_SIZE


def expected_output(group: SequenceGroup, sibling: int) -> list[int]:
    """What a sequence generates when nothing ever disturbs it."""
    if not group.generates:
        return []
    value = kv_chain(group.prompt_token_ids)[-1]
    tokens: list[int] = []
    constraint = None if group.sequences[sibling].constraint is None else SimulatedConstraint()
    while len(group.prompt_token_ids) + len(tokens) < group.max_total_tokens:
        shift = 0 if constraint is None else constraint.shift
        tokens.append(next_token(value, sibling, shift=shift))
        value = zlib.crc32(_BYTES[tokens[-1]], value)
        if tokens[-1] == EOS and not group.params.ignore_eos:
            break
        if constraint is not None:
            constraint.accept(tokens[-1])
            if constraint.is_finished:
                break
    return tokens


def expected_score(prompt_chain: list[int], position: int) -> float:
    """The fake logprob of a prompt's token: any change of what stands in front of it changes it."""
    return float(prompt_chain[position - 1] % 2**20)


def assert_scored(group: SequenceGroup) -> None:
    """Each token of the prompt was scored once, by a step that had all tokens in front of it."""
    assert group.prompt_logprobs is not None
    chain = kv_chain(group.prompt_token_ids)
    expected = [expected_score(chain, position) for position in range(1, len(chain))]
    found = [entry.logprob for entry in group.prompt_logprobs[1:] if entry is not None]
    assert group.prompt_logprobs.num_scored == len(expected), f"{group.request_id} is scored in part"
    assert found == expected, f"{group.request_id} has wrong scores"


@dataclass(slots=True)
class _Slot:
    """`is_spoiled`: a step of this slot failed, or it read what a failed step should have written."""

    tokens: list[int]
    chain: list[int]
    blocks: list[int]
    num_computed: int
    sibling: int
    is_spoiled: bool = False


@dataclass(slots=True)
class _Step:
    """What launch copies out of host state, as staging memory does."""

    batch: ScheduledBatch
    installs: list[tuple[int, _Slot]]
    owners: list[tuple[Sequence, int]]  # the rows' sequences and their slots' generations
    shifts: dict[int, int] | None  # of held pairs, by their index; None until they are sampled


@dataclass(slots=True)
class SimulatedTransfer:
    """A copy under way, `sources` as they were when it could first begin."""

    transfer: BlockTransfer
    after_step: int
    sources: list[list[int]] | None = None


@dataclass(slots=True)
class SimulatedDevice:
    """Runs batches and transfers against fake KV memory of both tiers."""

    num_blocks: int
    block_size: int
    num_host_blocks: int = 0
    windows: tuple[int | None, ...] = (None,)
    memory: list[list[int]] = field(init=False)
    host_memory: list[list[int]] = field(init=False)
    slots: dict[int, _Slot] = field(default_factory=dict)
    queue: deque[_Step] = field(default_factory=deque)
    transfers: list[SimulatedTransfer] = field(default_factory=list)
    launched_step: int = 0
    completed_step: int = 0

    def __post_init__(self) -> None:
        self.memory = [[GARBAGE] * self.block_size for _ in range(self.num_blocks)]
        self.host_memory = [[GARBAGE] * self.block_size for _ in range(self.num_host_blocks)]

    # -- steps ------------------------------------------------------------------------------------

    @property
    def held_batch(self) -> ScheduledBatch | None:
        """The newest step, while its held pairs are not sampled."""
        return self.queue[-1].batch if self.queue and self.queue[-1].shifts is None else None

    def sample(self, shifts: dict[int, int]) -> None:
        """Sample the held pairs of the newest step; those that are missing mean nothing to anybody."""
        assert self.held_batch is not None, "no pair was held back"
        self.queue[-1].shifts = shifts

    def launch(self, batch: ScheduledBatch) -> None:
        assert self.held_batch is None, "the logits of a step are lost that is not sampled"
        installs = []
        for install in batch.installs:
            sequence = install.sequence
            tokens = list(sequence.token_ids)
            table = list(sequence.block_table)
            slot = _Slot(tokens, kv_chain(tokens), table, install.num_computed_tokens, sequence.index)
            installs.append((install.slot, slot))
        owners = [(row.sequence, row.sequence.slot_generation) for row in batch.rows]
        is_held = any(pair.held for pair in batch.pairs)
        self.queue.append(_Step(batch, installs, owners, None if is_held else {}))
        self.launched_step = batch.step_id

    def complete(self, *, fails: bool = False) -> tuple[ScheduledBatch, StepResult | None]:
        """Run the oldest step; no result when it `fails`."""
        step = self.queue.popleft()
        batch, shifts = step.batch, step.shifts
        assert shifts is not None, "a step cannot end that is not sampled"
        for source, destination in batch.copies:
            self.memory[destination] = list(self.memory[source])
        for number, state in step.installs:
            self.slots[number] = state
        for append in batch.block_appends:
            self.slots[append.slot].blocks[append.start * len(self.windows) :] = append.blocks
        if fails:
            for number in {row.slot for row in batch.rows} | {pair.slot for pair in batch.pairs}:
                self.slots[number].is_spoiled = True
        for row, (sequence, generation) in zip(batch.rows, step.owners, strict=True):
            is_live = not sequence.is_finished and sequence.slot_generation == generation
            self._forward(self.slots[row.slot], row.num_tokens, must_be_right=is_live and not fails)
        tokens = []
        for index, pair in enumerate(batch.pairs):
            slot = self.slots[pair.slot]
            source = self.slots[batch.rows[pair.row].slot]
            slot.is_spoiled |= source.is_spoiled
            shift = shifts.get(index, 0)
            token = next_token(source.chain[source.num_computed - 1], slot.sibling, shift=shift)
            del slot.tokens[slot.num_computed :], slot.chain[slot.num_computed :]
            slot.tokens.append(token)
            _extend_chain(slot.chain, slot.tokens)
            tokens.append(token)
        self.completed_step = batch.step_id
        for transfer in self.transfers:
            self._begin(transfer)
        if fails:
            return batch, None
        scores = [self._score(batch, span) for span in batch.spans]
        return batch, StepResult(batch.step_id, tokens, [None] * len(tokens), scores)

    def _score(self, batch: ScheduledBatch, span: ScoredSpan) -> PromptScores:
        row = batch.rows[span.row]
        slot = self.slots[row.slot]
        assert 0 <= span.offset <= row.num_tokens - span.num_tokens, "a span beyond its row"
        first = slot.num_computed - row.num_tokens + span.offset + 1
        scores = [expected_score(slot.chain, position) for position in range(first, first + span.num_tokens)]
        return PromptScores(array("f", scores), array("i", [1] * len(scores)), array("i"), array("f"))

    def _forward(self, slot: _Slot, num_tokens: int, *, must_be_right: bool) -> None:
        start, end = slot.num_computed, slot.num_computed + num_tokens
        assert end <= len(slot.tokens), "a row beyond its tokens"
        assert end * len(self.windows) <= len(slot.blocks) * self.block_size, "a row beyond its blocks"
        if not slot.is_spoiled and not self._reads(slot, start):
            assert not must_be_right, "a row read somebody else's KV"
            slot.is_spoiled = True
        assert not (must_be_right and slot.is_spoiled), "a row goes on that a failed step has spoiled"
        size, memory, chain = self.block_size, self.memory, slot.chain
        for group in range(len(self.windows)):
            blocks = slot.blocks[group :: len(self.windows)]
            for position in range(start, end):
                block = blocks[position // size]
                assert block != 0, "the null block is never written"
                kv = chain[position] + group * _GROUP
                memory[block][position % size] = GARBAGE if slot.is_spoiled else kv
        slot.num_computed = end

    def _reads(self, slot: _Slot, num_tokens: int) -> bool:
        """Whether each group holds this slot's own KV of the positions that the next token sees."""
        size, memory, num_groups = self.block_size, self.memory, len(self.windows)
        for group, window in enumerate(self.windows):
            first = 0 if window is None else max(0, num_tokens - window + 1) // size
            context: list[int] = []
            seen = slice(first * num_groups + group, -(-num_tokens // size) * num_groups, num_groups)
            for block in slot.blocks[seen]:
                context += memory[block]
            expected = slot.chain[first * size : num_tokens]
            if group:
                expected = [value + group * _GROUP for value in expected]
            if context[: len(expected)] != expected:
                return False
        return True

    # -- transfers --------------------------------------------------------------------------------

    def launch_transfer(self, transfer: BlockTransfer) -> None:
        is_out = transfer.direction is TransferDirection.OUT
        simulated = SimulatedTransfer(transfer, self.launched_step if is_out else 0)
        self._spoil(transfer)
        self.transfers.append(simulated)
        self._begin(simulated)

    def can_complete(self, transfer: SimulatedTransfer) -> bool:
        return transfer.sources is not None

    def complete_transfer(self, simulated: SimulatedTransfer, *, fails: bool = False) -> int:
        """Fill the destination, or leave garbage in it. Returns the transfer's number."""
        self.transfers.remove(simulated)
        transfer = simulated.transfer
        sources, targets = self._ends(transfer)
        for (source, target), content in zip(transfer.blocks, simulated.sources or (), strict=True):
            assert sources[source] == content, "a block was written while it was copied"
            assert targets[target] == [GARBAGE] * self.block_size, "a block was written before its copy"
            if not fails:
                targets[target] = list(content)
        return transfer.transfer_id

    def _begin(self, simulated: SimulatedTransfer) -> None:
        if simulated.sources is None and self.completed_step >= simulated.after_step:
            sources, _ = self._ends(simulated.transfer)
            simulated.sources = [list(sources[source]) for source, _ in simulated.transfer.blocks]

    def _spoil(self, transfer: BlockTransfer) -> None:
        _, targets = self._ends(transfer)
        for _, target in transfer.blocks:
            targets[target] = [GARBAGE] * self.block_size

    def _ends(self, transfer: BlockTransfer) -> tuple[list[list[int]], list[list[int]]]:
        """The memories that are read and written."""
        if transfer.direction is TransferDirection.OUT:
            return self.memory, self.host_memory
        return self.host_memory, self.memory


class Simulation:
    """A scheduler over a simulated device; `depth` steps may be in flight."""

    def __init__(
        self,
        *,
        num_blocks: int = 33,
        block_size: int = 4,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 32,
        depth: int = 2,
        host_tier: HostTier | None = None,
        windows: tuple[int | None, ...] = (None,),
        **limits: int,
    ) -> None:
        self.manager = BlockManager(num_blocks, block_size, windows=windows)
        self.slots = SlotAllocator(max_num_seqs + 2)
        self.host_tier = host_tier or HostTier()
        self.scheduler = Scheduler(
            SchedulerLimits(
                max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, **limits
            ),
            self.manager,
            slots=self.slots,
            eos_token_ids=frozenset({EOS}),
            host_tier=self.host_tier,
            hash_secret=b"simulation",
        )
        self.device = SimulatedDevice(num_blocks, block_size, self.host_tier.num_blocks, windows)
        self.depth = depth
        self.groups: list[SequenceGroup] = []
        self.num_steps = 0

    def add(
        self,
        prompt: list[int],
        *,
        max_tokens: int = 8,
        n: int = 1,
        ignore_eos: bool = True,
        cache_salt: str | None = None,
        skips_prefix_lookup: bool = False,
        priority: int = 0,
    ) -> SequenceGroup:
        group = SequenceGroup(
            f"request-{len(self.groups)}",
            prompt,
            params=SamplingParams(n=n, max_tokens=max_tokens, ignore_eos=ignore_eos),
            seed=0,
            max_total_tokens=len(prompt) + max_tokens,
            cache_salt=cache_salt,
            skips_prefix_lookup=skips_prefix_lookup,
            priority=priority,
        )
        self.groups.append(group)
        self.scheduler.add(group)
        return group

    def launch(self) -> ScheduledBatch | None:
        batch = self.scheduler.schedule()
        self.scheduler.check()
        if batch is not None:
            assert batch.num_tokens <= self.scheduler.limits.max_num_batched_tokens
            assert len(batch.rows) <= self.scheduler.limits.max_num_seqs
            assert len({row.slot for row in batch.rows}) == len(batch.rows)
            self.device.launch(batch)
            self.num_steps += 1
        self.launch_transfers()
        return batch

    def launch_transfers(self) -> None:
        for transfer in self.scheduler.take_transfers():
            self.device.launch_transfer(transfer)

    def complete(self) -> None:
        batch, result = self.device.complete()
        assert result is not None
        self.scheduler.step_completed(batch.step_id)
        self.scheduler.apply(batch, result)
        self.scheduler.check()

    def fail(self) -> None:
        """The oldest step in flight fails, and with it the requests of its rows."""
        batch, _ = self.device.complete(fails=True)
        self.scheduler.step_completed(batch.step_id)
        self.scheduler.step_failed(batch)
        for row in batch.rows:
            self.scheduler.abort(row.sequence.group)
        self.scheduler.check()

    def complete_transfers(self, *, fail: bool = False) -> int:
        """End every transfer that can; returns how many."""
        ready = [each for each in self.device.transfers if self.device.can_complete(each)]
        for transfer in ready:
            transfer_id = self.device.complete_transfer(transfer, fails=fail)
            self.scheduler.transfer_completed(transfer_id, failed=fail)
        self.scheduler.check()
        return len(ready)

    def run(self, *, rng: random.Random | None = None, max_steps: int = 10_000) -> None:
        """Launch and complete until nothing is left; with `rng` in a random interleaving."""
        while self.scheduler.has_unfinished or self.device.queue or self.device.transfers:
            assert self.num_steps < max_steps, "no progress"
            if rng is None or rng.random() < 0.5:
                self.complete_transfers()
            in_flight = len(self.device.queue)
            eager = in_flight == 0 or (in_flight < self.depth and (rng is None or rng.random() < 0.7))
            launched = eager and self.scheduler.has_unfinished and self.launch() is not None
            if not launched:
                if self.device.queue:
                    self.complete()
                else:
                    progress = self.complete_transfers() or not self.scheduler.has_unfinished
                    assert progress, "nothing runs and nothing is in flight"

    def assert_all_as_expected(self) -> None:
        for group in self.groups:
            for sequence in group.sequences:
                if sequence.finish_reason is FinishReason.ABORT:
                    continue
                output = sequence.token_ids[sequence.num_prompt_tokens :]
                assert output == expected_output(group, sequence.index), group.request_id

    def assert_nothing_held(self) -> None:
        assert self.manager.num_free_blocks == self.manager.num_usable_blocks
        assert self.slots.num_free == self.slots.num_slots
        assert self.host_tier.num_held_blocks == 0
