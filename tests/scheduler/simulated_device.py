"""A device for the scheduler's tests: it runs a step's bookkeeping over real block tables.

KV memory is a table from (block, offset) to the token whose KV lies there. Every row checks that the
context it reads through its slot's block table is exactly its slot's token history, so that a block
given to two owners, a missed copy or a stale table fails at once. The "model" is a hash of the
context and the sibling's number. Steps run only when the test completes them, as late as can be.
"""

from __future__ import annotations

import random
import zlib
from collections import deque
from dataclasses import dataclass

from graphllm.batch import ScheduledBatch, StepResult
from graphllm.cache.block_manager import BlockManager
from graphllm.outputs import FinishReason
from graphllm.sampling_params import SamplingParams
from graphllm.scheduler.scheduler import Scheduler, SchedulerLimits
from graphllm.scheduler.slots import SlotAllocator
from graphllm.sequence import SequenceGroup

VOCAB_SIZE = 97
EOS = 96


def next_token(context: list[int], sibling: int) -> int:
    """The fake model: any change of the context changes the token."""
    return zlib.crc32(bytes([sibling, *context])) % VOCAB_SIZE


def expected_output(group: SequenceGroup, sibling: int) -> list[int]:
    """What a sequence generates when nothing ever disturbs it."""
    tokens = list(group.prompt_token_ids)
    while len(tokens) < group.max_total_tokens:
        tokens.append(next_token(tokens, sibling))
        if tokens[-1] == EOS and not group.params.ignore_eos:
            break
    return tokens[len(group.prompt_token_ids) :]


@dataclass
class _Slot:
    tokens: list[int]
    blocks: list[int]
    num_computed: int
    sibling: int


class SimulatedDevice:
    """Runs batches against fake KV memory."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.memory: dict[tuple[int, int], int] = {}
        self.slots: dict[int, _Slot] = {}
        # What launch copies out of host state, as staging memory does.
        self.queue: deque[tuple[ScheduledBatch, list[tuple[int, _Slot]]]] = deque()

    def launch(self, batch: ScheduledBatch) -> None:
        installs = [
            (
                install.slot,
                _Slot(
                    list(install.sequence.token_ids),
                    list(install.sequence.block_table),
                    install.num_computed_tokens,
                    install.sequence.index,
                ),
            )
            for install in batch.installs
        ]
        self.queue.append((batch, installs))

    def complete(self) -> tuple[ScheduledBatch, StepResult]:
        batch, installs = self.queue.popleft()
        for source, destination in batch.copies:
            for offset in range(self.block_size):
                self.memory[destination, offset] = self.memory.get((source, offset), -1)
        for slot, state in installs:
            self.slots[slot] = state
        for append in batch.block_appends:
            self.slots[append.slot].blocks[append.start :] = append.blocks
        for row in batch.rows:
            self._forward(row.slot, row.num_tokens)
        tokens = []
        for pair in batch.pairs:
            slot = self.slots[pair.slot]
            position = slot.num_computed
            token = next_token(self.context_of(batch.rows[pair.row].slot), slot.sibling)
            slot.tokens[position:] = [token]
            tokens.append(token)
        return batch, StepResult(batch.step_id, tokens, [None] * len(tokens))

    def context_of(self, slot: int) -> list[int]:
        state = self.slots[slot]
        return [
            self.memory[state.blocks[position // self.block_size], position % self.block_size]
            for position in range(state.num_computed)
        ]

    def _forward(self, slot: int, num_tokens: int) -> None:
        state = self.slots[slot]
        start, end = state.num_computed, state.num_computed + num_tokens
        assert end <= len(state.tokens), "a row beyond its tokens"
        for position in range(start, end):
            block = state.blocks[position // self.block_size]
            assert block != 0, "the null block is never written"
            self.memory[block, position % self.block_size] = state.tokens[position]
        state.num_computed = end
        assert self.context_of(slot) == state.tokens[:end], "a row read somebody else's KV"


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
    ) -> None:
        self.manager = BlockManager(num_blocks, block_size)
        self.slots = SlotAllocator(max_num_seqs + 2)
        self.scheduler = Scheduler(
            SchedulerLimits(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens),
            self.manager,
            slots=self.slots,
            eos_token_ids=frozenset({EOS}),
        )
        self.device = SimulatedDevice(block_size)
        self.depth = depth
        self.groups: list[SequenceGroup] = []
        self.num_steps = 0

    def add(
        self, prompt: list[int], *, max_tokens: int = 8, n: int = 1, ignore_eos: bool = True
    ) -> SequenceGroup:
        group = SequenceGroup(
            f"request-{len(self.groups)}",
            prompt,
            params=SamplingParams(n=n, max_tokens=max_tokens, ignore_eos=ignore_eos),
            seed=0,
            max_total_tokens=len(prompt) + max_tokens,
        )
        self.groups.append(group)
        self.scheduler.add(group)
        return group

    def launch(self) -> ScheduledBatch | None:
        batch = self.scheduler.schedule()
        if batch is not None:
            assert batch.num_tokens <= self.scheduler.limits.max_num_batched_tokens
            assert len(batch.rows) <= self.scheduler.limits.max_num_seqs
            assert len({row.slot for row in batch.rows}) == len(batch.rows)
            self.device.launch(batch)
            self.num_steps += 1
        self.scheduler.check()
        return batch

    def complete(self) -> None:
        batch, result = self.device.complete()
        self.scheduler.step_completed(batch.step_id)
        self.scheduler.apply(batch, result)
        self.scheduler.check()

    def run(self, *, rng: random.Random | None = None, max_steps: int = 10_000) -> None:
        """Launch and complete until nothing is left; with `rng` in a random interleaving."""
        while self.scheduler.has_unfinished or self.device.queue:
            assert self.num_steps < max_steps, "no progress"
            in_flight = len(self.device.queue)
            eager = in_flight == 0 or (in_flight < self.depth and (rng is None or rng.random() < 0.7))
            launched = eager and self.scheduler.has_unfinished and self.launch() is not None
            if not launched:
                assert self.device.queue, "nothing runs and nothing is in flight"
                self.complete()

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
