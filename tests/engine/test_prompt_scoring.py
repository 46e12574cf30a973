"""prompt_logprobs: the numbers of transformers, however the prompt is computed and whoever runs beside it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from graphllm.batch import SamplePair, ScheduledBatch, ScheduledRow, ScoredSpan
from graphllm.engine.engine import Engine, _check_prompt_logprobs
from graphllm.engine.measured_rates import MeasuredRates
from graphllm.engine.step_timer import StepTimer
from graphllm.errors import ContextLengthError, InvalidRequestError, StepFailedError
from graphllm.outputs import FinishReason, PromptLogprobs, SequenceDelta, TokenLogprob
from graphllm.runner.device import CpuDevice, Device, InlineDevice
from graphllm.sampling_params import MAX_PROMPT_LOGPROBS, SamplingParams
from graphllm.sequence import Sequence as GeneratedSequence
from graphllm.sequence import SequenceGroup
from tests.engine.harness import (
    Collector,
    FaultyInlineDevice,
    add,
    assert_nothing_held,
    ended,
    running_engine,
    settle,
)
from tests.engine.test_memory_tiers import BLOCK_SIZE, block_bytes, gib, metric

TOLERANCE = 1e-4
CONTEXT = 256
SCORE = SamplingParams(max_tokens=0, prompt_logprobs=5)
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    return model


def prompt(length: int, *, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


def scoring(engine: Engine, name: str, token_ids: list[int], params: SamplingParams = SCORE) -> Scored:
    return Scored(engine, name, token_ids, params)


class Scored(Collector):
    """A sink that keeps the deltas as they came."""

    def __init__(self, engine: Engine, name: str, token_ids: list[int], params: SamplingParams) -> None:
        super().__init__(params.n)
        self.deltas: list[SequenceDelta] = []
        self.on_write = self.deltas.append
        engine.add(name, token_ids, params=params, sink=self)

    @property
    def prompt_logprobs(self) -> PromptLogprobs:
        """Raises unless they came once, whole, with the first delta of sequence 0."""
        of_first = [delta for delta in self.deltas if delta.index == 0]
        (delta,) = [delta for delta in self.deltas if delta.prompt_logprobs is not None]
        assert delta is of_first[0]
        assert delta.prompt_logprobs is not None
        return delta.prompt_logprobs


def assert_equal_to(reference: PreTrainedModel, found: PromptLogprobs, token_ids: Sequence[int]) -> None:
    """Logprobs and alternatives within the tolerance, ranks exact but for near-ties."""
    with torch.inference_mode():
        logits = reference(torch.tensor([token_ids])).logits[0]
    logprobs = logits[:-1].log_softmax(-1)  # of the tokens from the second on
    assert len(found) == len(token_ids) and found[0] is None
    entries = [entry for entry in found[1:] if entry is not None]
    assert [entry.token_id for entry in entries] == list(token_ids[1:])
    own = logprobs.gather(1, torch.tensor(token_ids[1:])[:, None])  # [num_tokens - 1, 1]
    assert_near([entry.logprob for entry in entries], own[:, 0])
    for entry, row, value in zip(entries, logprobs, own, strict=True):
        best = row.topk(found.num_top)
        assert_near([logprob for _, logprob in entry.top], best.values)
        assert_near([float(row[token_id]) for token_id, _ in entry.top], best.values)
        assert entry.rank is not None
        assert 1 + int((row > value + TOLERANCE).sum()) <= entry.rank <= int((row > value - TOLERANCE).sum())


def assert_near(found: list[float], expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0.0, atol=TOLERANCE)


def leader_of(engine: Engine, name: str) -> GeneratedSequence:
    return engine._loaded._requests[name].group.sequences[0]


@pytest.mark.parametrize("chunk", [256, 64, 17, 5])
@pytest.mark.parametrize("open_device", [InlineDevice, lambda: CpuDevice(1)], ids=["inline", "cpu"])
def test_scores_are_those_of_transformers_however_the_prompt_is_cut(
    tiny_model: Path, reference: PreTrainedModel, chunk: int, open_device: Callable[[], Device]
) -> None:
    async def run() -> None:
        flags = {"max_num_batched_tokens": chunk, "max_num_seqs": 4, "debug_kv": True}
        async with running_engine(tiny_model, device=open_device(), **flags) as engine:
            prompts = [prompt(length, seed=length) for length in (1, 2, 70, 131)]
            sinks = [scoring(engine, f"r{index}", each) for index, each in enumerate(prompts)]
            await ended(*sinks)
            for sink, token_ids in zip(sinks, prompts, strict=True):
                assert_equal_to(reference, sink.prompt_logprobs, token_ids)
                (delta,) = sink.deltas
                assert (delta.text, delta.token_ids, delta.logprobs) == ("", (), None)
                assert delta.finish_reason is FinishReason.LENGTH
            assert metric(engine, "generated_tokens_total") == 3, "the warm-up's and nobody else's"
            await settle(engine)
            assert_nothing_held(engine)

    asyncio.run(run())


def test_several_slices_of_lines_are_scored_in_one_step(tiny_model: Path, reference: PreTrainedModel) -> None:
    async def run() -> None:
        async with running_engine(tiny_model, max_num_batched_tokens=256, max_num_seqs=4) as engine:
            assert len(engine._loaded.model.runner.buffers.logits) == 128
            prompts = [prompt(200, seed=1), prompt(56, seed=2)]  # one step of 256 tokens
            num_steps = metric(engine, "steps_total")
            sinks = [scoring(engine, f"r{index}", each) for index, each in enumerate(prompts)]
            await ended(*sinks)
            assert metric(engine, "steps_total") == num_steps + 1
            for sink, token_ids in zip(sinks, prompts, strict=True):
                assert_equal_to(reference, sink.prompt_logprobs, token_ids)

    asyncio.run(run())


@pytest.mark.parametrize("open_device", [InlineDevice, lambda: CpuDevice(1)], ids=["inline", "cpu"])
def test_tokens_are_those_of_a_request_that_is_not_scored(
    tiny_model: Path, reference: PreTrainedModel, open_device: Callable[[], Device]
) -> None:
    params: dict[str, Any] = {"n": 3, "temperature": 1.0, "seed": 4, "max_tokens": 9, "logprobs": 2}

    async def run() -> None:
        flags = {"max_num_batched_tokens": 24, "max_num_seqs": 8, "debug_kv": True}
        async with running_engine(tiny_model, device=open_device(), **flags) as engine:
            token_ids = prompt(60)
            plain = add(engine, "plain", token_ids, SamplingParams(**params))
            await ended(plain)
            scored = scoring(engine, "scored", token_ids, SamplingParams(**params, prompt_logprobs=20))
            await ended(scored)
            assert scored.token_ids == plain.token_ids
            assert scored.logprobs == plain.logprobs
            assert_equal_to(reference, scored.prompt_logprobs, token_ids)

    asyncio.run(run())


def test_neighbours_keep_their_tokens_while_a_prompt_is_scored_in_pieces(
    tiny_model: Path, reference: PreTrainedModel
) -> None:
    long = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, logprobs=1)

    async def run() -> None:
        flags = {"max_num_batched_tokens": 11, "max_num_seqs": 8, "debug_kv": True}
        async with running_engine(tiny_model, device=CpuDevice(1), **flags) as engine:
            prompts = [prompt(5 + index, seed=index) for index in range(4)]
            alone = []
            for index, token_ids in enumerate(prompts):
                sink = add(engine, f"alone-{index}", token_ids, long)
                await ended(sink)
                alone.append(sink.token_ids)
            beside = [add(engine, f"beside-{index}", each, long) for index, each in enumerate(prompts)]
            token_ids = prompt(150, seed=9)
            scored = [scoring(engine, f"scored-{index}", token_ids) for index in range(2)]
            await ended(*beside, *scored)
            assert [sink.token_ids for sink in beside] == alone
            for sink in scored:
                assert_equal_to(reference, sink.prompt_logprobs, token_ids)

    asyncio.run(run())


@pytest.mark.parametrize("num_swap_blocks", [0, 200], ids=["recomputed", "swapped"])
@pytest.mark.parametrize("open_device", [InlineDevice, lambda: CpuDevice(1)], ids=["inline", "cpu"])
def test_a_prompt_that_gives_way_in_the_middle_is_scored_once(
    tiny_model: Path, reference: PreTrainedModel, num_swap_blocks: int, open_device: Callable[[], Device]
) -> None:
    """Twelve that grow, and five tokens a step for a prompt that comes last and so is the victim."""
    flags: dict[str, Any] = {
        "block_size": BLOCK_SIZE,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 17,
        "max_model_len": 128,
        "kv_cache_memory_bytes": 90 * block_bytes(),
        "swap_space": gib(num_swap_blocks),
        "debug_kv": True,
    }
    growing = SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True)

    async def run() -> None:
        async with running_engine(tiny_model, device=open_device(), **flags) as engine:
            unscored_when_preempted: list[int] = []
            preemption = engine._loaded.model.scheduler._preemption
            preempt = preemption.preempt

            def watched(victim: GeneratedSequence) -> None:
                if victim.params.prompt_logprobs is not None:
                    unscored_when_preempted.append(victim.num_unscored_tokens)
                preempt(victim)

            preemption.preempt = watched  # type: ignore[method-assign]
            others = [add(engine, f"r{i}", prompt(10, seed=i), growing) for i in range(12)]
            token_ids = prompt(100, seed=50)
            scored = scoring(engine, "scored", token_ids)
            sampled = SamplingParams(temperature=0.0, max_tokens=4, prompt_logprobs=3)
            generating = scoring(engine, "generating", token_ids, sampled)
            await ended(*others, scored, generating)
            assert any(0 < num_tokens < 99 for num_tokens in unscored_when_preempted), "in the middle"
            for sink in (scored, generating):
                assert_equal_to(reference, sink.prompt_logprobs, token_ids)
            swapped = engine._loaded.model.scheduler.counters.num_swapped_in_blocks
            assert bool(swapped) == bool(num_swap_blocks)
            await settle(engine)
            assert_nothing_held(engine)

    asyncio.run(run())


@pytest.mark.parametrize("open_device", [InlineDevice, lambda: CpuDevice(1)], ids=["inline", "cpu"])
def test_scoring_waits_for_rows_whose_tokens_the_host_restricts(
    tiny_model: Path, reference: PreTrainedModel, open_device: Callable[[], Device]
) -> None:
    """Their logits must outlive the forward, and prompts are scored in the memory of logits."""
    allowed = tuple(range(0, 256, 5))
    restricted = {"temperature": 1.0, "seed": 1, "max_tokens": 8, "allowed_token_ids": allowed, "n": 2}

    async def run() -> None:
        flags = {"max_num_batched_tokens": 32, "max_num_seqs": 8, "debug_kv": True}
        async with running_engine(tiny_model, device=open_device(), **flags) as engine:
            token_ids = prompt(50)
            plain = add(engine, "plain", token_ids, SamplingParams(**restricted))
            await ended(plain)
            assert set(plain.token_ids[0] + plain.token_ids[1]) <= set(allowed)
            scored = scoring(engine, "scored", token_ids, SamplingParams(**restricted, prompt_logprobs=1))
            beside = scoring(engine, "beside", prompt(150, seed=3))
            await ended(scored, beside)
            assert scored.token_ids == plain.token_ids
            assert_equal_to(reference, scored.prompt_logprobs, token_ids)
            assert_equal_to(reference, beside.prompt_logprobs, prompt(150, seed=3))

    asyncio.run(run())


def test_nothing_of_a_scored_prompt_is_taken_from_the_cache(
    tiny_model: Path, reference: PreTrainedModel
) -> None:
    async def run() -> None:
        flags = {"max_num_batched_tokens": 64, "max_num_seqs": 4, "enable_prefix_caching": True}
        async with running_engine(tiny_model, **flags) as engine:
            token_ids = prompt(100)
            for name in ("first", "again"):
                sink = scoring(engine, name, token_ids)
                await ended(sink)
                assert sink.num_cached_tokens == 0
                assert_equal_to(reference, sink.prompt_logprobs, token_ids)
            plain = add(engine, "plain", token_ids, GREEDY)
            await ended(plain)
            assert plain.num_cached_tokens == 96, "its blocks are there for others"

    asyncio.run(run())


def test_a_prompt_that_is_only_computed_may_fill_the_context(
    tiny_model: Path, reference: PreTrainedModel
) -> None:
    async def run() -> None:
        async with running_engine(tiny_model, max_num_seqs=2, debug_kv=True) as engine:
            token_ids = prompt(CONTEXT)
            sink = scoring(engine, "full", token_ids)
            await ended(sink)
            assert_equal_to(reference, sink.prompt_logprobs, token_ids)
            with pytest.raises(ContextLengthError, match="more than the model's context of 256"):
                scoring(engine, "longer", prompt(CONTEXT + 1))
            with pytest.raises(ContextLengthError, match="at least one token of output"):
                scoring(engine, "generating", token_ids, SamplingParams(max_tokens=1, prompt_logprobs=0))

    asyncio.run(run())


@pytest.mark.parametrize("n", [1, 3])
def test_nothing_is_generated_with_max_tokens_0(tiny_model: Path, n: int) -> None:
    """Not even where other parameters have much to say about tokens."""
    params = SamplingParams(n=n, max_tokens=0, logprobs=3, stop=("a",), stop_token_ids=tuple(range(64)))

    async def run() -> None:
        async with running_engine(tiny_model, max_num_seqs=4, debug_kv=True) as engine:
            sink = scoring(engine, "nothing", prompt(40), params)
            await ended(sink)
            assert sink.token_ids == [[]] * n and sink.texts == [""] * n and sink.logprobs == [[]] * n
            assert sink.finish_reasons == [FinishReason.LENGTH] * n
            assert [delta.prompt_logprobs for delta in sink.deltas] == [None] * n
            await settle(engine)
            assert_nothing_held(engine)

    asyncio.run(run())


def test_no_alternatives_are_a_wish_too(tiny_model: Path, reference: PreTrainedModel) -> None:
    async def run() -> None:
        async with running_engine(tiny_model, max_num_seqs=2) as engine:
            token_ids = prompt(30)
            sink = scoring(engine, "none", token_ids, SamplingParams(max_tokens=2, prompt_logprobs=0))
            await ended(sink)
            assert_equal_to(reference, sink.prompt_logprobs, token_ids)
            entry = sink.prompt_logprobs[7]
            assert isinstance(entry, TokenLogprob) and entry.top == ()

    asyncio.run(run())


def test_a_failed_step_ends_a_scored_request_and_no_other(
    tiny_model: Path, reference: PreTrainedModel
) -> None:
    device = FaultyInlineDevice()

    async def run() -> None:
        async with running_engine(
            tiny_model, device=device, max_num_batched_tokens=16, max_num_seqs=4
        ) as engine:
            token_ids = prompt(50)
            device.arm(1)  # the second chunk
            failing = scoring(engine, "failing", token_ids)
            await ended(failing)
            assert isinstance(failing.error, StepFailedError) and not failing.deltas
            sink = scoring(engine, "next", token_ids)
            await ended(sink)
            assert_equal_to(reference, sink.prompt_logprobs, token_ids)
            await settle(engine)
            assert_nothing_held(engine)

    asyncio.run(run())


def test_a_report_that_fails_ends_its_request(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with running_engine(tiny_model, max_num_seqs=4) as engine:
            program = engine._loaded.model.runner.program

            def explode(num_scored: int, *, num_tokens: int, num_top: int) -> None:
                raise RuntimeError("injected fault")

            with monkeypatch.context() as patched:
                patched.setattr(program, "score", explode)
                failing = scoring(engine, "failing", prompt(50))
                await ended(failing)
            assert isinstance(failing.error, StepFailedError)
            sink = add(engine, "next", prompt(50), GREEDY)
            await ended(sink)
            assert sink.error is None and len(sink.token_ids[0]) == 12

    asyncio.run(run())


def test_a_request_may_leave_while_it_is_scored(tiny_model: Path, reference: PreTrainedModel) -> None:
    async def run() -> None:
        flags = {"max_num_batched_tokens": 8, "max_num_seqs": 4, "debug_kv": True}
        async with running_engine(tiny_model, device=CpuDevice(1), **flags) as engine:
            token_ids = prompt(200)
            leaving = scoring(engine, "leaving", token_ids)
            leader = leader_of(engine, "leaving")
            while leader.num_unscored_tokens > 150:
                await asyncio.sleep(0)
            engine.abort("leaving")
            sink = scoring(engine, "staying", token_ids)
            await ended(sink)
            assert not leaving.deltas
            assert_equal_to(reference, sink.prompt_logprobs, token_ids)
            await settle(engine)
            assert_nothing_held(engine)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("num_tokens", "num_top", "advice"),
    [
        (MAX_PROMPT_LOGPROBS // 21 + 1, 20, "at most 19"),
        (MAX_PROMPT_LOGPROBS // 2 + 1, 1, "at most 0"),
        (MAX_PROMPT_LOGPROBS + 1, 0, "none"),
    ],
)
def test_more_numbers_than_a_request_may_bring_back_are_refused(
    num_tokens: int, num_top: int, advice: str
) -> None:
    with pytest.raises(InvalidRequestError, match=advice) as caught:
        _check_prompt_logprobs(num_tokens, SamplingParams(prompt_logprobs=num_top))
    assert caught.value.param == "prompt_logprobs"
    _check_prompt_logprobs(num_tokens - 1, SamplingParams(prompt_logprobs=num_top))
    _check_prompt_logprobs(num_tokens, SamplingParams())


@pytest.mark.parametrize("slow", ["scoring", "held"])
def test_the_time_of_scoring_and_of_masks_is_not_taken_for_that_of_prompts(slow: str) -> None:
    """A prediction that is too long would launch the next step too late."""
    group = SequenceGroup("r", prompt(64), params=SCORE, seed=0, max_total_tokens=65)
    (leader,) = group.sequences
    plain = ScheduledBatch(1, rows=[ScheduledRow(leader, 0, 64)])
    other = ScheduledBatch(2, rows=[ScheduledRow(leader, 0, 64)])
    if slow == "scoring":
        other.spans.append(ScoredSpan(0, leader, 0, 63, 1))
    else:
        other.pairs.append(SamplePair(0, leader, 0, 1, held=True))
    timer, rates = StepTimer(), MeasuredRates(1)
    for batch, seconds in ((plain, 0.010), (other, 1.0)):
        timer.observe_step(batch, seconds)
        rates.observe_step(batch, seconds)
    assert (timer.predict(plain), timer.predict(other)) == (0.010, 1.0)
    assert rates.seconds_to_prefill(64) == pytest.approx(0.010)
