"""A world for the scheduler, from one seed: arrivals, aborts, late and failing steps and copies.

Owns the dice and the clock (a launched step is a tick); the scheduler, block manager, host tier and
prefix cache in it are the real ones, the device is `tests/scheduler/simulated_device.py`. A world lives
for a few thousand steps with one configuration, then it is drained and must hold nothing.
"""

from __future__ import annotations

import random
from bisect import insort
from dataclasses import dataclass, replace

from graphllm.batch import ScheduledBatch
from graphllm.cache.block_layout import BlockLayout
from graphllm.cache.block_manager import BlockManager
from graphllm.cache.host_tier import HostTier
from graphllm.outputs import FinishReason
from graphllm.sampling_params import SamplingParams
from graphllm.scheduler.queues import is_away, is_moved
from graphllm.scheduler.scheduler import AppliedToken, Scheduler, SchedulerLimits
from graphllm.scheduler.slots import SlotAllocator
from graphllm.scheduler.tiers import ConstantRates
from graphllm.sequence import Sequence, SequenceGroup, SequenceStatus
from tests.scheduler.simulated_constraint import SimulatedConstraint
from tests.scheduler.simulated_device import EOS, SimulatedDevice, assert_scored, expected_output

STEPS_BETWEEN_FULL_CHECKS = 1_000
# The first request in order of priority and arrival ends within so many steps, whatever happens to others.
MAX_STEPS_OF_THE_OLDEST = 400
MAX_TURNS_WITHOUT_A_STEP = 400


@dataclass(frozen=True, slots=True)
class Configuration:
    """What a world is like. `longest` bounds prompt and output together, in tokens.

    Short prompts with long outputs make memory run out while sequences run, long ones keep them waiting.
    """

    block_size: int
    num_blocks: int
    num_swap_blocks: int
    num_cache_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    depth: int
    longest: int
    longest_prompt: int
    num_waiting: int
    enable_prefix_caching: bool
    max_pinned_blocks: int
    max_swaps_per_sequence: int
    abort_chance: float
    step_failure_chance: float
    transfer_failure_chance: float
    transfer_chance: float
    copy_latency: float
    num_priorities: int
    constrained_share: float
    windows: tuple[int | None, ...] = (None,)

    @staticmethod
    def draw(rng: random.Random) -> Configuration:
        """Small pools, so that memory is short most of the time; now and then one of the worst."""
        num_priorities = rng.choice([1, 1, 4])
        constrained_share = rng.choice([0.0, 0.4])
        if rng.random() < 0.3:
            worst = rng.choice([STORM, CROWD, WINDOWED_STORM, WINDOWED_CROWD])
            return replace(worst, num_priorities=num_priorities, constrained_share=constrained_share)
        block_size = rng.choice([1, 2, 4, 4, 4, 8, 16])
        longest = rng.choice([24, 48, 64])
        max_num_batched_tokens = rng.choice([9, 16, 32])
        windows = rng.choice(_WINDOWS)
        layout = BlockLayout(block_size, windows)
        num_for_longest = layout.num_at_most(longest, max_step_tokens=max_num_batched_tokens)
        max_pinned_blocks = rng.choice([0, 0, 4])
        num_blocks = 1 + num_for_longest + max_pinned_blocks + rng.randrange(0, 2 * num_for_longest + 1)
        return Configuration(
            block_size=block_size,
            num_blocks=num_blocks if len(windows) > 1 else min(num_blocks, 128),
            num_swap_blocks=rng.choice([0, num_for_longest, 4 * num_for_longest]),
            num_cache_blocks=rng.choice([0, 6, 64]),
            max_num_seqs=rng.randrange(1, 9),
            max_num_batched_tokens=max_num_batched_tokens,
            depth=rng.choice([1, 2, 2, 2]),
            longest=longest,
            longest_prompt=rng.choice([longest - 1, longest // 2, longest // 6]),
            num_waiting=rng.choice([1, 3, 5]),
            enable_prefix_caching=rng.random() < 0.8,
            max_pinned_blocks=max_pinned_blocks,
            max_swaps_per_sequence=rng.choice([1, 4, 1_000]),
            abort_chance=rng.choice([0.0, 0.01, 0.05]),
            step_failure_chance=rng.choice([0.0, 0.002, 0.05]),
            transfer_failure_chance=rng.choice([0.0, 0.0, 0.1]),
            transfer_chance=rng.choice([0.1, 0.3, 0.8]),
            copy_latency=rng.choice([0.0, 4e-4]),
            num_priorities=num_priorities,
            constrained_share=constrained_share,
            windows=windows,
        )


# Long prompts in small chunks with every second request like the last, and steps that fail all the time.
STORM = Configuration(
    block_size=2,
    num_blocks=80,
    num_swap_blocks=64,
    num_cache_blocks=16,
    max_num_seqs=6,
    max_num_batched_tokens=9,
    depth=2,
    longest=48,
    longest_prompt=40,
    num_waiting=5,
    enable_prefix_caching=True,
    max_pinned_blocks=4,
    max_swaps_per_sequence=1_000,
    abort_chance=0.02,
    step_failure_chance=0.15,
    transfer_failure_chance=0.1,
    transfer_chance=0.3,
    copy_latency=0.0,
    num_priorities=1,
    constrained_share=0.0,
)

# Short prompts, long outputs and unreliable copies: everybody is swapped, and what is cold moves down.
CROWD = replace(
    STORM,
    block_size=4,
    num_blocks=40,
    num_cache_blocks=64,
    longest_prompt=20,
    max_pinned_blocks=0,
    abort_chance=0.0,
    step_failure_chance=0.0,
    transfer_failure_chance=0.3,
)


# The same with two groups of layers that see a block or two beside one that sees everything.
WINDOWED_STORM = replace(
    STORM, num_blocks=160, num_swap_blocks=128, num_cache_blocks=48, windows=(None, 5, 5)
)
WINDOWED_CROWD = replace(
    CROWD, num_blocks=72, num_swap_blocks=128, num_cache_blocks=128, windows=(None, 7, 7)
)

# Of the groups of layers; half of all worlds have but one, as most models.
_WINDOWS: list[tuple[int | None, ...]] = [
    *[(None,)] * 6,
    (None, 6),
    (6, None),
    (None, 1, 9),
    (None, None, 4),
    (7,),
    (3, 11),
]


class World:
    """One scheduler and what happens to it. Raises AssertionError when anything is wrong."""

    def __init__(self, seed: int, *, configuration: Configuration | None = None) -> None:
        self.rng = random.Random(seed)
        self.configuration = configuration or Configuration.draw(self.rng)
        conf = self.configuration
        self.manager = BlockManager(conf.num_blocks, conf.block_size, windows=conf.windows)
        self.slots = SlotAllocator(conf.max_num_seqs + 2)
        self.host = HostTier(num_swap_blocks=conf.num_swap_blocks, num_cache_blocks=conf.num_cache_blocks)
        self.scheduler = Scheduler(
            SchedulerLimits(
                max_num_seqs=conf.max_num_seqs,
                max_num_batched_tokens=conf.max_num_batched_tokens,
                enable_prefix_caching=conf.enable_prefix_caching,
                max_pinned_blocks=conf.max_pinned_blocks,
                max_swaps_per_sequence=conf.max_swaps_per_sequence,
            ),
            self.manager,
            slots=self.slots,
            eos_token_ids=frozenset({EOS}),
            host_tier=self.host,
            predictor=ConstantRates(seconds_per_block=1e-5, copy_latency=conf.copy_latency),
            hash_secret=b"simulation",
        )
        self.device = SimulatedDevice(
            conf.num_blocks,
            conf.block_size,
            conf.num_swap_blocks + conf.num_cache_blocks,
            conf.windows,
        )
        self.open: list[SequenceGroup] = []  # requests that have not ended, in order of priority and arrival
        self.num_constrained_tokens = 0
        self.num_overtakers = 0  # requests that started before others which had waited for longer
        self.num_steps = 0
        self.num_requests = 0
        self.longest_wait = 0
        self._oldest_since = 0
        self._num_turns = 0
        self._pins: list[int] = []
        length = conf.longest // 2
        self._prefixes = [[self.rng.randrange(90) for _ in range(length)] for _ in range(4)]

    # -- turns ------------------------------------------------------------------------------------

    def run(self, num_steps: int) -> None:
        """Until `num_steps` steps have been launched, then until nothing is left."""
        while self.num_steps < num_steps:
            self._turn(arrivals=True)
        self.drain()

    def drain(self) -> None:
        """Nothing arrives any more: everything ends, and nothing is held."""
        while self.scheduler.has_unfinished or self.device.queue or self.device.transfers:
            self._turn(arrivals=False)
        for pin_id in self._pins:
            self.scheduler.unpin(pin_id)
        self._pins.clear()
        self._retire()
        self.scheduler.check()
        assert not self.open, "a request was forgotten"
        assert not self.scheduler.has_transfers
        assert self.manager.num_held_blocks == self.manager.num_pending_blocks == 0, "blocks are held"
        assert self.host.num_held_blocks == 0, "host blocks are held"
        assert self.slots.num_free == self.slots.num_slots, "slots are held"

    def _turn(self, *, arrivals: bool) -> None:
        rng, conf, device = self.rng, self.configuration, self.device
        draw = rng.random
        self._num_turns += 1
        assert self._num_turns < MAX_TURNS_WITHOUT_A_STEP, "no progress"
        if arrivals and len(self.scheduler.waiting) < conf.num_waiting and draw() < 0.5:
            self._arrive()
        if self.open and draw() < conf.abort_chance:
            self._disturb()
        if device.transfers and draw() < conf.transfer_chance:
            self._complete_transfer()
        if conf.max_pinned_blocks and draw() < 0.01:
            self._pin()
        if device.held_batch is not None:
            self._sample_held(device.held_batch)
        launched = False
        if (
            len(device.queue) < conf.depth
            and device.held_batch is None
            and self.scheduler.has_unfinished
            and (not device.queue or draw() < 0.7)
        ):
            launched = self._launch()
        may_end = bool(device.queue) and device.queue[0].shifts is not None
        if may_end and (not launched or len(device.queue) == conf.depth) and draw() < 0.9:
            self._complete_step()

    def _sample_held(self, batch: ScheduledBatch) -> None:
        """Sample a step's held pairs, now or a little later, when the tokens before theirs are known."""
        live = {
            index: pair.sequence
            for index, pair in enumerate(batch.pairs)
            if pair.held
            and not pair.sequence.is_finished
            and pair.generation == pair.sequence.slot_generation
        }
        is_due = all(sequence.num_in_flight_tokens == 1 for sequence in live.values())
        if len(self.device.queue) == 1:
            assert is_due, "rows wait for a step that is none"
        if not is_due or self.rng.random() < 0.3:
            return
        shifts = {}
        for index, sequence in live.items():
            constraint = sequence.constraint
            assert isinstance(constraint, SimulatedConstraint)
            assert constraint.num_accepted == sequence.num_output_tokens, "a token that is not known"
            shifts[index] = constraint.shift
        self.device.sample(shifts)

    def _launch(self) -> bool:
        transfers_first = self.rng.random() < 0.5
        waiting, swapped = (
            list(self.scheduler.waiting),
            [each for each in self.scheduler.moved if is_away(each)],
        )
        batch = self.scheduler.schedule()
        self.check()
        if batch is not None:
            self._check_order(batch, waiting, swapped)
        if transfers_first:
            self._launch_transfers()
        if batch is not None:
            self._check_batch(batch)
            self.device.launch(batch)
            self.num_steps += 1
            self._num_turns = 0
        if not transfers_first:
            self._launch_transfers()
        return batch is not None

    def _launch_transfers(self) -> None:
        for transfer in self.scheduler.take_transfers():
            self.device.launch_transfer(transfer)

    def _check_batch(self, batch: ScheduledBatch) -> None:
        conf = self.configuration
        assert batch.num_tokens <= conf.max_num_batched_tokens
        assert len(batch.rows) <= conf.max_num_seqs
        assert len({row.slot for row in batch.rows}) == len(batch.rows)
        for pair in batch.pairs:
            assert pair.held == (pair.sequence.constraint is not None), "held for no reason, or not held"

    def _check_order(self, batch: ScheduledBatch, waiting: list[Sequence], swapped: list[Sequence]) -> None:
        """Who waited and has started has overtaken nobody of a better place who waits or is swapped still."""
        had_waited = {id(sequence) for sequence in waiting}
        started = [each.sequence for each in batch.installs if id(each.sequence) in had_waited]
        if not started:
            return
        last = max(sequence.group.place for sequence in started)
        for sequence in waiting:
            if sequence.status is SequenceStatus.WAITING and not is_moved(sequence):
                assert sequence.group.place >= last, "a waiting request was overtaken"
                if sequence.group.order < max(each.group.order for each in started):
                    self.num_overtakers += 1
        for sequence in swapped:
            if is_moved(sequence) and is_away(sequence):
                assert sequence.group.place >= last, "a swapped request was overtaken"

    def _complete_step(self) -> None:
        fails = self.rng.random() < self.configuration.step_failure_chance
        batch, result = self.device.complete(fails=fails)
        self.scheduler.step_completed(batch.step_id)
        if result is None:
            self.scheduler.step_failed(batch)
            for row in batch.rows:
                self.scheduler.abort(row.sequence.group)
        else:
            for token in self.scheduler.apply(batch, result):
                self._accept(token)
        self.check()
        self._retire()

    def _accept(self, token: AppliedToken) -> None:
        constraint = token.sequence.constraint
        if constraint is None:
            return
        self.num_constrained_tokens += 1
        constraint.accept(token.token_id)
        if constraint.is_finished:
            self.scheduler.finish(token.sequence, FinishReason.STOP)

    def _complete_transfer(self) -> None:
        """Any of those that can end, in any order."""
        ready = [each for each in self.device.transfers if self.device.can_complete(each)]
        if ready:
            fails = self.rng.random() < self.configuration.transfer_failure_chance
            transfer_id = self.device.complete_transfer(self.rng.choice(ready), fails=fails)
            self.scheduler.transfer_completed(transfer_id, failed=fails)
            self.check()

    def check(self) -> None:
        """What was touched, every time; everything, every thousand steps."""
        self.scheduler.check(full=self.num_steps % STEPS_BETWEEN_FULL_CHECKS == 0)

    # -- requests ---------------------------------------------------------------------------------

    def _arrive(self) -> None:
        """A request, alone or with others that have the same prompt or its beginning."""
        rng, conf = self.rng, self.configuration
        length = rng.randrange(1, conf.longest_prompt + 1)
        prefix = rng.choice(self._prefixes)
        num_shared = min(length, rng.choice([0, len(prefix), len(prefix), rng.randrange(len(prefix) + 1)]))
        prompt = prefix[:num_shared] + [rng.randrange(90) for _ in range(length - num_shared)]
        self._add(prompt)
        while rng.random() < 0.3:
            self._add(prompt[: rng.choice([length, rng.randrange(1, length + 1)])])

    def _add(self, prompt: list[int]) -> None:
        rng = self.rng
        longest_output = self.configuration.longest - len(prompt)
        max_tokens = rng.choice([longest_output, rng.randrange(1, longest_output + 1)])
        if rng.random() < 0.1:
            max_tokens = 0
        group = SequenceGroup(
            f"request-{self.num_requests}",
            prompt,
            params=SamplingParams(
                n=rng.choice([1, 1, 1, 1, 2, 4]),
                max_tokens=max_tokens,
                ignore_eos=rng.random() < 0.5,
                prompt_logprobs=0 if rng.random() < 0.2 else None,
            ),
            seed=0,
            max_total_tokens=len(prompt) + max(1, max_tokens),
            cache_salt="salted" if rng.random() < 0.1 else None,
            skips_prefix_lookup=rng.random() < 0.1,
            priority=rng.randrange(self.configuration.num_priorities) - 1,
        )
        if group.generates and rng.random() < self.configuration.constrained_share:
            for sequence in group.sequences:
                sequence.constraint = SimulatedConstraint()
        self.num_requests += 1
        self.scheduler.add(group)
        insort(self.open, group, key=lambda each: each.place)
        if self.open[0] is group:
            self._oldest_since = self.num_steps

    def _disturb(self) -> None:
        """A client leaves, all leave at once, or a stop string ends one sequence."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.05:
            for group in self.open:
                self.scheduler.abort(group)
        elif kind < 0.6:
            self.scheduler.abort(rng.choice(self.open))
        elif talking := [each for each in self.scheduler.running if each.num_output_tokens]:
            self.scheduler.finish(rng.choice(talking), FinishReason.STOP, stop_reason="stop")
        self.check()
        self._retire()

    def _pin(self) -> None:
        if self._pins and self.rng.random() < 0.5:
            self.scheduler.unpin(self._pins.pop(self.rng.randrange(len(self._pins))))
        else:
            pin = self.scheduler.pin(self.rng.choice(self._prefixes), None)
            self._pins.append(pin.pin_id)
        assert self.scheduler.num_pinned_blocks <= self.configuration.max_pinned_blocks
        self.check()

    def _retire(self) -> None:
        """Compare what has ended with an undisturbed run, and see how long the first has been waiting."""
        while self.open and self.open[0].is_finished:
            self._compare(self.open.pop(0))
            self._oldest_since = self.num_steps
        if any(group.is_finished for group in self.open):
            for group in self.open:
                if group.is_finished:
                    self._compare(group)
            self.open = [group for group in self.open if not group.is_finished]
        if self.open:
            self.longest_wait = max(self.longest_wait, self.num_steps - self._oldest_since)
            assert self.longest_wait <= MAX_STEPS_OF_THE_OLDEST, "the first request starves"

    def _compare(self, group: SequenceGroup) -> None:
        if group.prompt_logprobs is not None and group.sequences[0].finish_reason is not FinishReason.ABORT:
            assert_scored(group)
        for sequence in group.sequences:
            assert sequence.finish_reason is not None
            assert sequence.num_cached_tokens < sequence.num_prompt_tokens or not sequence.num_cached_tokens
            output = sequence.token_ids[sequence.num_prompt_tokens :]
            expected = expected_output(group, sequence.index)
            if sequence.finish_reason is FinishReason.ABORT or sequence.stop_reason is not None:
                expected = expected[: len(output)]
            assert output == expected, f"{group.request_id} has wrong tokens"
