"""Rows that the host constrains, in a real engine: obeyed, beside free rows that notice nothing."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from graphllm.engine import step_loop
from graphllm.engine.engine import Engine
from graphllm.errors import StepFailedError
from graphllm.outputs import FinishReason
from graphllm.runner.device import CpuDevice, DeviceEvent, DeviceTimes, InlineDevice, Work
from graphllm.runner.model_runner import StepHandle
from graphllm.sampling_params import SamplingParams
from tests.engine.harness import (
    FaultyCpuDevice,
    FaultyDevice,
    FaultyInlineDevice,
    add,
    assert_nothing_held,
    ended,
    running_engine,
    settle,
)
from tests.engine.languages import (
    FREE,
    FREE_SAMPLED,
    TRAFFIC,
    WORDS_3,
    LanguageCompiler,
    WordConstraint,
    add_all,
    is_sentence,
    one_by_one,
    tokens_of,
    words,
)

DEVICES = pytest.mark.parametrize("device", [InlineDevice, lambda: CpuDevice(1)], ids=["inline", "cpu"])
FAULTY_DEVICES = pytest.mark.parametrize(
    "device", [FaultyInlineDevice, lambda: FaultyCpuDevice(1)], ids=["inline", "cpu"]
)


class LateDevice(InlineDevice):
    """Work is said to have ended when somebody has asked a few times, so steps are in flight for sure."""

    must_poll = True

    def submit(self, work: Work) -> DeviceEvent:
        return _LateEvent(super().submit(work))


class _LateEvent:
    def __init__(self, event: DeviceEvent) -> None:
        self._event = event
        self._num_queries = 0

    @property
    def times(self) -> DeviceTimes:
        return self._event.times

    @property
    def error(self) -> BaseException | None:
        return self._event.error

    def query(self) -> bool:
        self._num_queries += 1
        return self._num_queries > 3


class FaultyLateDevice(FaultyDevice, LateDevice):
    """Late, with faults."""


# -- obeyed, and nobody else is touched -----------------------------------------------------------


@DEVICES
@pytest.mark.parametrize("look_ahead", [True, False])
@pytest.mark.parametrize("max_num_batched_tokens", [16, 256])
def test_constrained_and_free_rows_together_give_the_tokens_of_undisturbed_runs(
    tiny_model: Path, *, device: type, look_ahead: bool, max_num_batched_tokens: int
) -> None:
    async def scenario() -> None:
        expected = await one_by_one(tiny_model, TRAFFIC)
        async with running_engine(
            tiny_model,
            device=device(),
            look_ahead=look_ahead,
            max_num_seqs=6,
            max_num_batched_tokens=max_num_batched_tokens,
            debug_kv=True,
        ) as engine:
            compiler = LanguageCompiler().install(engine)
            collectors = add_all(engine)
            await ended(*collectors)
            assert tokens_of(collectors) == expected
            texts = [text for index in (1, 3, 4) for text in collectors[index].texts]
            assert len(set(texts)) > 3, "temperature 1 gives siblings and requests their own words"
            assert all(is_sentence(text) for text in texts), texts
            assert all(collectors[1].finish_reasons[each] is FinishReason.STOP for each in range(3))
            # What each constraint was told is what its client got.
            outputs = [output for index in (1, 3, 4) for output in collectors[index].token_ids]
            assert sorted(made.output for made in compiler.made) == sorted(outputs)
            assert all(made.num_restricts == len(made.output) for made in compiler.made)
            await settle(engine)
            assert_nothing_held(engine)

    asyncio.run(scenario())


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step is launched as soon as it may be, however slow this machine is."""
    monkeypatch.setattr(step_loop, "_SHORT_STEP", float("inf"))


class Launches:
    """What was in flight at each launch: steps before it, held pairs, free pairs."""

    def __init__(self, engine: Engine) -> None:
        self.seen: list[tuple[int, int, int]] = []
        loop, launch = engine._loaded, engine._loaded.model.runner.launch

        def record(batch: Any) -> StepHandle:
            num_held = sum(pair.held for pair in batch.pairs)
            self.seen.append((len(loop._in_flight), num_held, len(batch.pairs) - num_held))
            return launch(batch)

        loop.model.runner.launch = record  # type: ignore[method-assign]


@pytest.mark.usefixtures("at_once")
def test_steps_with_held_rows_are_launched_behind_a_running_step(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running_engine(tiny_model, device=LateDevice()) as engine:
            LanguageCompiler(20).install(engine)
            launches = Launches(engine)
            free = add(engine, "free", [1, 2, 3], FREE)
            held = add(engine, "held", [4, 5, 6], words("ab", max_tokens=24, min_tokens=24))
            await ended(free, held)
            assert launches.seen[:1] == [(0, 1, 1)]
            assert launches.seen[1:] == [(1, 1, 1)] * 23, "the device is a step ahead, held rows or not"

    asyncio.run(scenario())


@pytest.mark.usefixtures("at_once")
def test_first_token_of_a_constrained_prompt_does_not_wait_for_the_running_step(tiny_model: Path) -> None:
    """Nothing before it is unknown, so its mask is made while its neighbour's step still runs."""

    async def scenario() -> None:
        async with running_engine(tiny_model, device=LateDevice()) as engine:
            compiler = LanguageCompiler().install(engine)
            in_flight: list[int] = []
            compiler.on_restrict = lambda made: in_flight.append(len(engine._loaded._in_flight))
            free = add(engine, "free", [1] * 50, SamplingParams(max_tokens=60, ignore_eos=True, seed=0))
            while not free.token_ids[0]:
                await asyncio.sleep(0)
            late = add(engine, "late", [4, 5, 6], words())
            await ended(free, late)
            assert in_flight[0] == 2
            assert set(in_flight[1:]) == {1}, "later ones wait until the token before them is known"

    asyncio.run(scenario())


def test_masks_are_made_in_slices_between_which_the_loop_serves_others(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running_engine(tiny_model, max_num_seqs=8) as engine:
            compiler = LanguageCompiler().install(engine)
            turns, turn_of = 0, []

            def slow(made: WordConstraint) -> None:
                turn_of.append(turns)
                deadline = asyncio.get_running_loop().time() + 0.002
                while asyncio.get_running_loop().time() < deadline:
                    pass

            compiler.on_restrict = slow
            collector = add(engine, "held", [4, 5, 6], words("ab", n=8, max_tokens=3, min_tokens=3))
            while not collector.ended.is_set():
                turns += 1
                await asyncio.sleep(0)
            assert len(turn_of) == 24
            assert len(set(turn_of)) == 24, "two masks of 2 ms were made without a look at the sockets"
            assert_nothing_held(engine)

    asyncio.run(scenario())


# -- memory pressure --------------------------------------------------------------------------------


@DEVICES
@pytest.mark.parametrize("swap_space", [0.0, 0.01], ids=["recomputation", "swaps"])
def test_memory_pressure_does_not_change_constrained_tokens(
    tiny_model: Path, swap_space: float, device: type
) -> None:
    rng = random.Random(3)
    traffic = [
        ([rng.randrange(256) for _ in range(20)], params)
        for seed in range(5)
        for params in (words("ab", "acd", "b", seed=seed, max_tokens=60, min_tokens=60), FREE_SAMPLED)
    ]

    async def scenario() -> None:
        async with running_engine(tiny_model, look_ahead=False) as engine:
            LanguageCompiler(200).install(engine)
            expected = []
            for index, request in enumerate(traffic):
                collector = add(engine, f"r{index}", *request)
                await ended(collector)
                expected.append(collector.token_ids)
        block_bytes = 8 * 2 * 2 * 2 * 16 * 4
        async with running_engine(
            tiny_model,
            device=device(),
            max_model_len=88,
            block_size=8,
            max_num_seqs=10,
            kv_cache_memory_bytes=26 * block_bytes,
            swap_space=swap_space,
            debug_kv=True,
        ) as engine:
            LanguageCompiler(200).install(engine)
            collectors = add_all(engine, traffic)
            await ended(*collectors)
            counters = engine._loaded.model.scheduler.counters
            assert counters.num_preemptions > 0
            assert (counters.num_swapped_in_blocks > 0) == (swap_space > 0)
            assert (counters.num_recomputed > 0) == (swap_space == 0)
            assert tokens_of(collectors) == expected
            await settle(engine)
            assert_nothing_held(engine)

    asyncio.run(scenario())


# -- ends -------------------------------------------------------------------------------------------


@DEVICES
def test_requests_may_be_aborted_at_any_turn_of_the_loop(tiny_model: Path, device: type) -> None:
    async def scenario() -> None:
        expected = await one_by_one(tiny_model, TRAFFIC)
        async with running_engine(tiny_model, device=device(), max_num_seqs=8, debug_kv=True) as engine:
            LanguageCompiler().install(engine)
            for turn in range(40):
                victims = [add(engine, f"v{turn}-{index}", [turn], WORDS_3) for index in range(2)]
                collectors = [add(engine, f"r{turn}-{index}", *TRAFFIC[index]) for index in (0, 1)]
                for _ in range(turn):
                    await asyncio.sleep(0)
                for index in range(2):
                    engine.abort(f"v{turn}-{index}")
                told = [victim.token_ids for victim in victims]
                await ended(*collectors)
                assert tokens_of(collectors) == expected[:2]
                assert [victim.token_ids for victim in victims] == told, "an aborted sink hears nothing"
            await settle(engine)
            assert_nothing_held(engine)

    asyncio.run(scenario())


@DEVICES
def test_requests_may_be_aborted_while_their_masks_are_made(tiny_model: Path, device: type) -> None:
    """The worst moment: between a launch and its sampler, by the constraint's own doing."""

    async def scenario() -> None:
        expected = await one_by_one(tiny_model, TRAFFIC[:1])
        async with running_engine(tiny_model, device=device(), max_num_seqs=8, debug_kv=True) as engine:
            compiler = LanguageCompiler().install(engine)
            compiler.on_restrict = lambda made: engine.abort("victim") if made.num_restricts == 4 else None
            add(engine, "victim", [1], WORDS_3)
            neighbour = add(engine, "neighbour", *TRAFFIC[0])
            await ended(neighbour)
            assert neighbour.token_ids == expected[0]
            assert any(made.num_restricts == 4 for made in compiler.made)
            await settle(engine)
            assert_nothing_held(engine)

    asyncio.run(scenario())


@FAULTY_DEVICES
@pytest.mark.parametrize("look_ahead", [True, False])
def test_failing_steps_end_their_requests_and_the_loop_goes_on(
    tiny_model: Path, device: type, *, look_ahead: bool
) -> None:
    async def scenario() -> None:
        expected = await one_by_one(tiny_model, TRAFFIC[:2])
        faulty = device()
        async with running_engine(
            tiny_model, device=faulty, look_ahead=look_ahead, max_num_seqs=8, debug_kv=True
        ) as engine:
            LanguageCompiler().install(engine)
            for fault in range(12):
                faulty.arm(fault)
                hit = [
                    add(engine, f"a{fault}", [1, 2, 3, 4], words(seed=fault, max_tokens=20)),
                    add(engine, f"b{fault}", [50, 60, 70], FREE),
                ]
                await ended(*hit)
                assert any(isinstance(each.error, StepFailedError) for each in hit)
                faulty.arm()
                collectors = [add(engine, f"c{fault}-{index}", *TRAFFIC[index]) for index in (0, 1)]
                await ended(*collectors)
                assert tokens_of(collectors) == expected
            await settle(engine)
            assert_nothing_held(engine)

    asyncio.run(scenario())


def test_failing_sampler_of_held_rows_is_a_failing_step(tiny_model: Path) -> None:
    async def scenario() -> None:
        expected = await one_by_one(tiny_model, TRAFFIC[:2])
        async with running_engine(tiny_model, device=CpuDevice(1)) as engine:
            LanguageCompiler().install(engine)
            runner = engine._loaded.model.runner
            sample_subset, calls = runner._sample_subset, []

            def explode(handle: StepHandle, *arguments: Any) -> None:
                calls.append(arguments)
                if arguments[-1] and len(calls) > 6:
                    raise RuntimeError("injected fault")
                sample_subset(handle, *arguments)

            runner._sample_subset = explode  # type: ignore[method-assign]
            hit = [add(engine, "free", *TRAFFIC[0]), add(engine, "held", *TRAFFIC[1])]
            await ended(*hit)
            assert all(isinstance(each.error, StepFailedError) for each in hit)
            runner._sample_subset = sample_subset  # type: ignore[method-assign]
            collectors = add_all(engine, TRAFFIC[:2])
            await ended(*collectors)
            assert tokens_of(collectors) == expected
            await settle(engine)
            assert_nothing_held(engine)

    asyncio.run(scenario())


def test_server_stops_while_rows_are_held(tiny_model: Path) -> None:
    async def scenario() -> None:
        for turn in range(12):
            async with running_engine(tiny_model, device=CpuDevice(1)) as engine:
                LanguageCompiler().install(engine)
                collectors = add_all(engine)
                for _ in range(turn):
                    await asyncio.sleep(0)
            assert all(each.ended.is_set() for each in collectors)

    asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.usefixtures("at_once")
def test_held_row_that_read_what_a_failed_step_should_have_written_is_computed_again(
    tiny_model: Path,
) -> None:
    """Its pair is nobody's when the step ahead has failed, and must not keep the loop waiting."""

    async def scenario() -> None:
        prompt = [5] * 40
        expected = await one_by_one(tiny_model, [(prompt, words(seed=3))])
        device = FaultyLateDevice()
        async with running_engine(
            tiny_model, device=device, block_size=8, enable_prefix_caching=True, debug_kv=True
        ) as engine:
            LanguageCompiler().install(engine)
            runner = engine._loaded.model.runner
            launch, readers = runner.launch, []

            def add_behind(batch: Any) -> StepHandle:
                handle = launch(batch)
                if not readers:  # in time for the step behind the one that is going to fail
                    readers.append(add(engine, "reader", prompt, words(seed=3)))
                return handle

            runner.launch = add_behind  # type: ignore[method-assign]
            device.arm(0)
            # Constrained too, so the step behind it waits for its token and is not sampled when it fails.
            failing = add(engine, "failing", prompt, words())
            await ended(failing)
            (reader,) = readers
            await ended(reader)
            assert isinstance(failing.error, StepFailedError)
            assert engine._loaded.model.scheduler.counters.num_voided_sequences == 1
            assert reader.token_ids == expected[0]
            await settle(engine)
            assert_nothing_held(engine)

    asyncio.run(scenario())
