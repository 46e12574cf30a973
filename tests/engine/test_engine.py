"""The whole engine over a tiny model: tokens, pressure, look-ahead, ends, failures."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import pytest
import torch

from graphllm.engine.engine import Engine, EngineState
from graphllm.errors import (
    CheckpointError,
    ContextLengthError,
    EngineUnavailableError,
    InvalidRequestError,
    StepFailedError,
)
from graphllm.outputs import FinishReason, SequenceDelta
from graphllm.runner.device import CpuDevice, InlineDevice
from graphllm.sampling_params import SamplingParams
from tests.engine.harness import (
    Collector,
    FaultyCpuDevice,
    FaultyInlineDevice,
    add,
    assert_nothing_held,
    ended,
    running_engine,
    settle,
)


def prompts(count: int, *, longest: int = 60) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(256) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, max_tokens=24, ignore_eos=True, seed=3, top_p=0.9)


async def one_by_one(model: Path, params: SamplingParams, requests: list[list[int]]) -> list[list[list[int]]]:
    """The undisturbed run: no look-ahead, no neighbours, memory to spare."""
    outputs = []
    async with running_engine(model, look_ahead=False) as engine:
        for index, request in enumerate(requests):
            collector = add(engine, f"r{index}", request, params)
            await ended(collector)
            outputs.append(collector.token_ids)
    return outputs


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("look_ahead", [True, False])
@pytest.mark.parametrize("device", [InlineDevice, lambda: CpuDevice(1)], ids=["inline", "cpu"])
def test_batching_and_look_ahead_do_not_change_tokens(
    tiny_model: Path, params: SamplingParams, *, look_ahead: bool, device: type
) -> None:
    async def scenario() -> None:
        requests = prompts(12)
        expected = await one_by_one(tiny_model, params, requests)
        async with running_engine(
            tiny_model,
            device=device(),
            look_ahead=look_ahead,
            max_num_seqs=5,
            max_num_batched_tokens=32,
        ) as engine:
            collectors = [add(engine, f"r{i}", request, params) for i, request in enumerate(requests)]
            await ended(*collectors)
            assert [collector.token_ids for collector in collectors] == expected
            assert_nothing_held(engine)

    asyncio.run(scenario())


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_memory_pressure_does_not_change_tokens(tiny_model: Path, params: SamplingParams) -> None:
    async def scenario() -> None:
        requests = prompts(8, longest=40)
        expected = await one_by_one(tiny_model, params, requests)
        # Room for little more than one sequence of full length: 64 tokens in blocks of 8.
        async with running_engine(
            tiny_model,
            device=CpuDevice(1),
            max_model_len=72,
            block_size=8,
            max_num_seqs=6,
            kv_cache_memory_bytes=12 * 8 * 2 * 2 * 2 * 16 * 4,
        ) as engine:
            collectors = [add(engine, f"r{i}", request, params) for i, request in enumerate(requests)]
            await ended(*collectors)
            assert engine._loaded.model.scheduler.num_preemptions > 0
            assert [collector.token_ids for collector in collectors] == expected
            assert_nothing_held(engine)

    asyncio.run(scenario())


def test_unused_memory_is_never_read(tiny_model: Path) -> None:
    async def scenario() -> None:
        requests = prompts(6)
        expected = await one_by_one(tiny_model, GREEDY, requests)
        async with running_engine(tiny_model, max_num_seqs=4, max_num_batched_tokens=16) as engine:
            with torch.inference_mode():
                for layer in engine._loaded.model.runner.kv_cache.layers:
                    layer.key[1:].fill_(float("nan"))
                    layer.value[1:].fill_(float("nan"))
            collectors = [add(engine, f"r{i}", request, GREEDY) for i, request in enumerate(requests)]
            await ended(*collectors)
            assert [collector.token_ids for collector in collectors] == expected
            for layer in engine._loaded.model.runner.kv_cache.layers:
                assert not layer.key[0].any(), "the null block was written"
                assert not layer.value[0].any(), "the null block was written"

    asyncio.run(scenario())


def test_siblings_get_their_own_draws_and_share_the_prompt(tiny_model: Path) -> None:
    async def scenario() -> None:
        params = SamplingParams(n=3, temperature=1.0, max_tokens=20, seed=11, ignore_eos=True)
        request = prompts(1)[0] + [1] * 37
        async with running_engine(tiny_model) as engine:
            roomy = add(engine, "roomy", request, params)
            await ended(roomy)
        assert len({tuple(tokens) for tokens in roomy.token_ids}) == 3
        # With one slot the siblings compute the prompt themselves, one after another.
        async with running_engine(tiny_model, max_num_seqs=1) as engine:
            cramped = add(engine, "cramped", request, params)
            await ended(cramped)
            assert_nothing_held(engine)
        assert cramped.token_ids == roomy.token_ids

    asyncio.run(scenario())


def test_logprobs_come_with_their_tokens(tiny_model: Path) -> None:
    async def scenario() -> None:
        params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=3, ignore_eos=True)
        async with running_engine(tiny_model) as engine:
            plain = add(
                engine, "plain", [1, 2, 3], SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
            )
            detailed = add(engine, "detailed", [1, 2, 3], params)
            await ended(plain, detailed)
        assert plain.token_ids == detailed.token_ids
        assert plain.logprobs == [[]]
        for token, entry in zip(detailed.token_ids[0], detailed.logprobs[0], strict=True):
            assert entry.token_id == token
            assert entry.top[0] == (token, pytest.approx(entry.logprob))
            assert len(entry.top) == 3

    asyncio.run(scenario())


def test_stop_string_cuts_the_text_and_ends_the_sequence(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running_engine(tiny_model, device=CpuDevice(1)) as engine:
            full = add(engine, "full", [5, 6, 7], GREEDY)
            await ended(full)
            tokens = full.token_ids[0]
            stop = engine.tokenizer.decode(tokens[6:9])
            cut_at = full.texts[0].index(stop)
            params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, stop=(stop,))
            stopped = add(engine, "stopped", [5, 6, 7], params)
            await ended(stopped)
            assert stopped.texts[0] == full.texts[0][:cut_at]
            assert (stopped.finish_reasons[0], stopped.stop_reasons[0]) == (FinishReason.STOP, stop)
            assert len(stopped.token_ids[0]) < 24
            await settle(engine)
            assert_nothing_held(engine)

    asyncio.run(scenario())


def test_abort_frees_blocks_within_a_step_and_disturbs_nobody(tiny_model: Path) -> None:
    async def scenario() -> None:
        expected = (await one_by_one(tiny_model, GREEDY, [[9, 8, 7]]))[0]
        async with running_engine(tiny_model, device=CpuDevice(1)) as engine:
            endless = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True, n=2)
            victim = add(engine, "victim", [1, 2, 3], endless)
            neighbour = add(engine, "neighbour", [9, 8, 7], GREEDY)
            victim.on_write = lambda delta: engine.abort("victim")
            await ended(neighbour)
            assert not victim.ended.is_set(), "an aborted request's sink hears nothing more"
            assert neighbour.token_ids == expected
            await settle(engine)
            assert_nothing_held(engine)

    asyncio.run(scenario())


@pytest.mark.parametrize("device", [FaultyInlineDevice, lambda: FaultyCpuDevice(1)], ids=["inline", "cpu"])
def test_failed_step_fails_its_requests_and_no_others(tiny_model: Path, device: type) -> None:
    async def scenario() -> None:
        expected = await one_by_one(tiny_model, GREEDY, [[1, 2, 3], [4, 5, 6]])
        faulty = device()
        async with running_engine(tiny_model, device=faulty, max_num_seqs=1) as engine:
            faulty.arm(4)
            doomed = add(engine, "doomed", [1, 2, 3], GREEDY)
            waiting = add(engine, "waiting", [4, 5, 6], GREEDY)
            await ended(doomed, waiting)
            assert isinstance(doomed.error, StepFailedError)
            assert "injected fault" in doomed.error.message
            assert waiting.error is None
            assert waiting.token_ids == expected[1]
            again = add(engine, "again", [1, 2, 3], GREEDY)
            await ended(again)
            assert again.token_ids == expected[0]
            assert engine.state is EngineState.READY
            await settle(engine)
            assert_nothing_held(engine)

    asyncio.run(scenario())


def test_sink_that_raises_loses_its_own_request_only(tiny_model: Path) -> None:
    def explode(delta: SequenceDelta) -> None:
        raise RuntimeError("a defect in a sink")

    async def scenario() -> None:
        expected = await one_by_one(tiny_model, GREEDY, [[4, 5, 6]])
        async with running_engine(tiny_model, device=CpuDevice(1)) as engine:
            broken = add(engine, "broken", [1, 2, 3], GREEDY)
            broken.on_write = explode
            neighbour = add(engine, "neighbour", [4, 5, 6], GREEDY)
            await ended(broken, neighbour)
            assert broken.error is not None
            assert "a defect in a sink" in broken.error.message
            assert neighbour.token_ids == expected[0]
            await settle(engine)
            assert_nothing_held(engine)

    asyncio.run(scenario())


def test_stop_string_with_tokens_queued_behind_it_ends_its_request_once(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running_engine(tiny_model) as engine:
            full = add(engine, "full", [5, 6, 7], GREEDY)
            await ended(full)
            stop = engine.tokenizer.decode(full.token_ids[0][6:9])
            params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, stop=(stop,))
            slow = add(engine, "slow", [1, 2, 3], GREEDY)
            # Longer than a slice of publishing: tokens pile up behind it.
            slow.on_write = lambda delta: time.sleep(0.003)
            stopped = add(engine, "stopped", [5, 6, 7], params)
            await ended(slow, stopped)
            assert stopped.stop_reasons == [stop]
            assert engine.state is EngineState.READY
            await settle(engine)
            assert_nothing_held(engine)

    asyncio.run(scenario())


def test_failing_request_may_abort_its_neighbour_of_the_same_answer(tiny_model: Path) -> None:
    async def scenario() -> None:
        faulty = FaultyInlineDevice()
        async with running_engine(tiny_model, device=faulty) as engine:
            faulty.arm(3)
            collectors = [add(engine, name, [1, 2, 3], GREEDY) for name in ("a", "b")]
            for collector, other in zip(collectors, ("b", "a"), strict=True):
                collector.on_fail = lambda other=other: engine.abort(other)
            await asyncio.wait(
                [asyncio.ensure_future(collector.ended.wait()) for collector in collectors],
                timeout=30,
                return_when=asyncio.FIRST_COMPLETED,
            )
            assert sum(collector.ended.is_set() for collector in collectors) == 1
            assert engine.state is EngineState.READY
            await settle(engine)
            assert_nothing_held(engine)

    asyncio.run(scenario())


def test_flush_that_cuts_its_client_at_the_last_token_is_no_failure(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running_engine(tiny_model) as engine:
            cut = add(engine, "cut", [1, 2, 3], GREEDY)
            cut.on_flush = lambda: engine.abort("cut") if cut.finish_reasons[0] else None
            neighbour = add(engine, "neighbour", [4, 5, 6], GREEDY)
            await ended(neighbour)
            await asyncio.sleep(0)
            assert cut.finish_reasons == [FinishReason.LENGTH]
            assert not cut.ended.is_set(), "an aborted request's sink hears nothing more"
            assert engine.state is EngineState.READY

    asyncio.run(scenario())


def test_device_that_keeps_failing_fails_the_engine(tiny_model: Path) -> None:
    async def scenario() -> None:
        faulty = FaultyCpuDevice(1)
        told = asyncio.Event()
        async with running_engine(tiny_model, device=faulty, max_num_seqs=1) as engine:
            engine.on_failure = told.set
            faulty.arm(*range(100))
            collectors = [add(engine, f"r{index}", [1, 2, 3], GREEDY) for index in range(5)]
            await ended(*collectors)
            assert all(collector.error is not None for collector in collectors)
            await asyncio.wait_for(told.wait(), 10)
            assert engine.state is EngineState.FAILED
            with pytest.raises(EngineUnavailableError, match="injected fault"):
                engine.check_ready()

    asyncio.run(scenario())


def test_request_that_could_never_fit_is_refused(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running_engine(tiny_model) as engine:
            for prompt, params, error, text in [
                ([], GREEDY, InvalidRequestError, "empty"),
                ([1] * 256, GREEDY, ContextLengthError, "256 tokens"),
                ([1] * 240, GREEDY, ContextLengthError, "max_tokens is 24"),
                ([1, 999], GREEDY, InvalidRequestError, "999"),
                ([1, -1], GREEDY, InvalidRequestError, "-1"),
                ([1], SamplingParams(logit_bias={999: 1.0}), InvalidRequestError, "999"),
            ]:
                with pytest.raises(error, match=text):
                    engine.add("refused", prompt, params=params, sink=Collector())
            whole = add(engine, "whole", [1] * 255, SamplingParams(temperature=0.0, ignore_eos=True))
            await ended(whole)
            assert len(whole.token_ids[0]) == 1
            assert whole.finish_reasons == [FinishReason.LENGTH]

    asyncio.run(scenario())


def test_drain_lets_requests_end_and_admits_no_more(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running_engine(tiny_model, device=CpuDevice(1)) as engine:
            running = add(engine, "running", [1, 2, 3], GREEDY)
            draining = asyncio.ensure_future(engine.drain(30))
            await asyncio.sleep(0)
            with pytest.raises(EngineUnavailableError, match="shutting down"):
                engine.add("late", [1], params=GREEDY, sink=Collector())
            assert await draining
            assert running.finish_reasons == [FinishReason.LENGTH]

    asyncio.run(scenario())


def test_stop_ends_open_requests_with_an_error(tiny_model: Path) -> None:
    async def scenario() -> None:
        params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
        async with running_engine(tiny_model, device=CpuDevice(1)) as engine:
            cut = add(engine, "cut", [1, 2, 3], params)
        assert isinstance(cut.error, EngineUnavailableError)
        assert engine.state is EngineState.STOPPED

    asyncio.run(scenario())


def test_model_that_cannot_load_is_reported_by_the_engine(tmp_path: Path) -> None:
    async def scenario() -> None:
        from graphllm.config import EngineConfig

        engine = Engine(EngineConfig(model=str(tmp_path / "nowhere")), device=InlineDevice())
        with pytest.raises(CheckpointError, match="nowhere"):
            await engine.start()
        assert engine.state is EngineState.FAILED

    asyncio.run(scenario())


def test_metrics_count_what_happened(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running_engine(tiny_model) as engine:
            collectors = [add(engine, f"r{i}", [1, 2, 3], GREEDY) for i in range(3)]
            await ended(*collectors)
            lines = dict(
                line.rsplit(" ", 1)
                for line in engine.metrics.render().decode().splitlines()
                if not line.startswith("#")
            )
            assert float(lines["graphllm_requests_total"]) == 3
            assert float(lines["graphllm_prompt_tokens_total"]) == 9
            assert float(lines['graphllm_sequences_finished_total{reason="length"}']) >= 3
            assert float(lines["graphllm_running_sequences"]) == 0
            assert float(lines["graphllm_kv_blocks_held"]) == 0

    asyncio.run(scenario())
