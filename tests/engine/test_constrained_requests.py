"""What a constraint does to its own request: how it ends, what its text is, and what goes wrong alone."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from graphllm.errors import ConstraintViolation, GraphLLMError, InvalidRequestError, NoAllowedTokenError
from graphllm.outputs import FinishReason
from graphllm.runner.device import CpuDevice
from graphllm.sampling_params import SamplingParams
from graphllm.structured_outputs import StructuredOutputs
from tests.engine.harness import Collector, add, assert_nothing_held, ended, running_engine, settle
from tests.engine.languages import (
    END,
    TRAFFIC,
    LanguageCompiler,
    WordConstraint,
    add_all,
    one_by_one,
    tokens,
    tokens_of,
    words,
)


async def _fails_alone(
    model: Path,
    params: SamplingParams,
    error: type[GraphLLMError],
    match: str,
    *,
    compiler: LanguageCompiler | None = None,
) -> Collector:
    """Run a request that must fail beside others that must not notice."""
    expected = await one_by_one(model, TRAFFIC[:2])
    async with running_engine(model, device=CpuDevice(1), max_num_seqs=8, debug_kv=True) as engine:
        (compiler or LanguageCompiler()).install(engine)
        neighbours = add_all(engine, TRAFFIC[:2])
        broken = add(engine, "broken", [3, 2, 1], params)
        await ended(broken, *neighbours)
        assert type(broken.error) is error and match in str(broken.error), broken.error
        assert tokens_of(neighbours) == expected
        await settle(engine)
        assert_nothing_held(engine)
        return broken


def test_request_whose_constraints_leave_no_token_ends_with_an_error_that_says_so(tiny_model: Path) -> None:
    async def scenario() -> None:
        params = words("ab", allowed_token_ids=(*tokens("a"), *tokens("c")))
        broken = await _fails_alone(tiny_model, params, NoAllowedTokenError, "No token may come next")
        assert broken.error is not None and broken.error.body()["error"]["code"] == "no_allowed_token"
        only_the_end = SamplingParams(allowed_token_ids=(END,), min_tokens=2)
        broken = await _fails_alone(tiny_model, only_the_end, NoAllowedTokenError, "No token may come next")
        assert broken.token_ids == [[]]

    asyncio.run(scenario())


def test_siblings_end_with_the_one_that_has_no_token_left(tiny_model: Path) -> None:
    async def scenario() -> None:
        params = words("ab", "cb", n=3, allowed_token_ids=(*tokens("a"), *tokens("c")))
        await _fails_alone(tiny_model, params, NoAllowedTokenError, "No token may come next")

    asyncio.run(scenario())


class OddCompiler(LanguageCompiler):
    """Makes the first constraint of the language ("odd",) one of another class."""

    def __init__(self, odd: type[WordConstraint]) -> None:
        super().__init__()
        self._odd: type[WordConstraint] | None = odd

    def compile(self, structured: StructuredOutputs) -> Callable[[], WordConstraint]:
        usual = super().compile(structured)

        def make() -> WordConstraint:
            made = usual()
            if structured.choice == ("odd",) and self._odd is not None:
                made.__class__, self._odd = self._odd, None
            return made

        return make


class OnlyPadding(WordConstraint):
    """Allows what stands behind the vocabulary's end in a mask's last word, and no token."""

    def restrict(self, mask: memoryview) -> None:
        for token_id in range(259):
            mask[token_id // 32] &= ~(1 << token_id % 32) if token_id % 32 < 31 else 2**31 - 1


class Exploding(WordConstraint):
    def restrict(self, mask: memoryview) -> None:
        super().restrict(mask)
        if self.num_restricts == 3:
            raise ZeroDivisionError("a defect")


class Lenient(WordConstraint):
    """Lets the second token be any, and does not accept it."""

    def restrict(self, mask: memoryview) -> None:
        if self.output:
            return
        super().restrict(mask)


class DefectiveAccept(WordConstraint):
    def accept(self, token_id: int) -> None:
        super().accept(token_id)
        if len(self.output) == 3:
            raise ZeroDivisionError("a defect")


class TooComplex(WordConstraint):
    def accept(self, token_id: int) -> None:
        super().accept(token_id)
        if len(self.output) == 2:
            raise InvalidRequestError("too complex at this place", param="structured_outputs")


@pytest.mark.parametrize(
    ("odd", "error", "match"),
    [
        (DefectiveAccept, GraphLLMError, "a defect"),
        (TooComplex, InvalidRequestError, "too complex at this place"),
        (OnlyPadding, NoAllowedTokenError, "No token may come next"),
        (Exploding, GraphLLMError, "a defect"),
        (Lenient, ConstraintViolation, "behind"),
    ],
)
def test_defective_constraint_ends_its_own_request(
    tiny_model: Path, odd: type[WordConstraint], error: type[GraphLLMError], match: str
) -> None:
    async def scenario() -> None:
        params = words("odd", n=3, max_tokens=20, min_tokens=20)
        await _fails_alone(tiny_model, params, error, match, compiler=OddCompiler(odd))

    asyncio.run(scenario())


async def _run(
    model: Path, *requests: SamplingParams, num_words: int = 6, prompt: int = 3
) -> list[Collector]:
    async with running_engine(model, device=CpuDevice(1), max_num_seqs=8) as engine:
        LanguageCompiler(num_words).install(engine)
        collectors = [add(engine, f"r{i}", [prompt, 2, 1], params) for i, params in enumerate(requests)]
        await ended(*collectors)
        assert [collector.error for collector in collectors] == [None] * len(requests)
        await settle(engine)
        assert_nothing_held(engine)
        return collectors


def test_last_token_of_a_complete_text_is_part_of_it_and_the_end_token_is_not(tiny_model: Path) -> None:
    async def scenario() -> None:
        complete, ended_early, ignoring, spelled = await _run(
            tiny_model,
            words("ab", min_tokens=12),
            words("ab", logit_bias={END: 100.0}),
            words("ab", logit_bias={END: 100.0}, ignore_eos=True),
            words("ab", logit_bias={END: 100.0}, ignore_eos=True, skip_special_tokens=False),
        )
        assert complete.texts == ["ab" * 6] and complete.token_ids == [tokens("ab" * 6)]
        assert ended_early.texts == ignoring.texts == spelled.texts == ["ab"]
        assert ended_early.token_ids == ignoring.token_ids == [[*tokens("ab"), END]]
        for each in (complete, ended_early, ignoring):
            assert (each.finish_reasons, each.stop_reasons) == ([FinishReason.STOP], [None])

    asyncio.run(scenario())


def test_text_that_is_complete_with_its_last_token_is_not_called_cut(tiny_model: Path) -> None:
    async def scenario() -> None:
        exact, cut = await _run(
            tiny_model, words("ab", max_tokens=4), words("ab", max_tokens=3, min_tokens=3), num_words=2
        )
        assert (exact.texts[0], exact.finish_reasons[0]) in (
            ("abab", FinishReason.STOP),
            ("ab", FinishReason.STOP),
        )
        assert (cut.texts[0], cut.finish_reasons[0]) == ("aba", FinishReason.LENGTH)

    asyncio.run(scenario())


def test_min_tokens_holds_the_end_back_until_nothing_else_is_left(tiny_model: Path) -> None:
    async def scenario() -> None:
        bias = {END: 100.0}
        patient, forced, only_the_end = await _run(
            tiny_model,
            words("ab", min_tokens=7, logit_bias=bias),
            words("ab", min_tokens=30, logit_bias=bias),
            words("ab", min_tokens=30, bad_words=("ba",)),
        )
        assert only_the_end.token_ids == [[*tokens("ab"), END]], (
            "what may end must end where nothing else may come"
        )
        assert patient.token_ids == [[*tokens("abababab"), END]], "the first end behind seven tokens"
        assert forced.texts == ["ab" * 6] and forced.finish_reasons == [FinishReason.STOP]

    asyncio.run(scenario())


def test_stop_token_ids_and_stop_strings_end_constrained_text_too(tiny_model: Path) -> None:
    async def scenario() -> None:
        by_id, by_string = await _run(
            tiny_model,
            words("ab", stop_token_ids=tuple(tokens("b"))),
            words("ab", "cd", stop=("bc", "ba", "dc", "da"), logit_bias={END: -100.0}),
        )
        assert (by_id.texts, by_id.stop_reasons) == (["a"], tokens("b"))
        assert len(by_string.texts[0]) == 1 and by_string.finish_reasons == [FinishReason.STOP]

    asyncio.run(scenario())


def test_logprobs_of_constrained_tokens_are_those_of_the_model(tiny_model: Path) -> None:
    async def scenario() -> None:
        constrained, free = await _run(
            tiny_model,
            words("ab", logprobs=5, temperature=0.0),
            SamplingParams(temperature=0.0, max_tokens=1, logprobs=5),
        )
        first, reference = constrained.logprobs[0][0], free.logprobs[0][0]
        assert [first.token_id] == tokens("a")
        assert [token for token, _ in first.top] == [token for token, _ in reference.top]
        assert first.top == tuple((token, pytest.approx(value)) for token, value in reference.top)
        assert first.logprob < reference.logprob

    asyncio.run(scenario())


def test_allowed_tokens_and_bad_words_act_in_the_engine(tiny_model: Path) -> None:
    async def scenario() -> None:
        letters = tuple(tokens("abc "))
        allowed = SamplingParams(allowed_token_ids=letters, max_tokens=200, ignore_eos=True, seed=5)
        clean = SamplingParams(
            allowed_token_ids=letters, bad_words=("ab", "c"), max_tokens=200, ignore_eos=True, seed=5
        )
        free, restricted = await _run(tiny_model, allowed, clean)
        assert set(free.texts[0]) == set("abc ") and "ab" in free.texts[0]
        assert set(restricted.texts[0]) == set("ab ") and "ab" not in restricted.texts[0]
        assert "ba" in restricted.texts[0]

    asyncio.run(scenario())


def test_engine_enforces_schemas_and_patterns_with_its_own_compiler(tiny_model: Path) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"enum": ["x", "yy"]},
            "count": {"type": "integer", "maximum": 99, "minimum": 0},
        },
        "required": ["name", "count"],
        "additionalProperties": False,
    }

    async def scenario() -> None:
        async with running_engine(tiny_model, device=CpuDevice(1), max_num_seqs=8) as engine:
            by_schema = StructuredOutputs(json=json.dumps(schema))
            params = SamplingParams(n=3, seed=1, structured_outputs=by_schema)
            objects = add(engine, "objects", [1, 2, 3], params)
            pattern = StructuredOutputs(regex="[a-c]{3,9}!")
            matches = add(engine, "matches", [1, 2], SamplingParams(n=3, seed=2, structured_outputs=pattern))
            with pytest.raises(InvalidRequestError) as caught:
                add(engine, "wrong", [1], SamplingParams(structured_outputs=StructuredOutputs(regex="(")))
            assert caught.value.param == "structured_outputs"
            await ended(objects, matches)
            for text in objects.texts:
                value = json.loads(text)
                assert value["name"] in ("x", "yy") and 0 <= value["count"] <= 99 and len(value) == 2
            assert all(re.fullmatch("[a-c]{3,9}!", text) for text in matches.texts)
            assert set(objects.finish_reasons + matches.finish_reasons) == {FinishReason.STOP}

    asyncio.run(scenario())


def test_request_with_a_wrong_constraint_is_refused_and_nothing_is_lost(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running_engine(tiny_model) as engine:
            engine._loaded.model.constraints._compiler = None
            with pytest.raises(InvalidRequestError, match="structured_outputs"):
                add(engine, "r0", [1], words())
            with pytest.raises(InvalidRequestError, match="allowed_token_ids names token 259"):
                add(engine, "r1", [1], SamplingParams(allowed_token_ids=(1, 259)))
            with pytest.raises(InvalidRequestError, match="surrogate"):
                add(engine, "r2", [1], SamplingParams(bad_words=("\ud800",)))
            assert_nothing_held(engine)

    asyncio.run(scenario())


def test_constrained_tokens_and_mask_time_are_counted(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running_engine(tiny_model) as engine:
            LanguageCompiler().install(engine)
            collector = add(engine, "r0", [1], words("ab"))
            await ended(collector)
            lines = dict(line.rsplit(" ", 1) for line in engine.metrics.render().decode().splitlines())
            assert float(lines["graphllm_constrained_tokens_total"]) == len(collector.token_ids[0])
            assert float(lines["graphllm_mask_seconds_total"]) > 0

    asyncio.run(scenario())


def test_better_priority_runs_earlier(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running_engine(tiny_model, max_num_seqs=1) as engine:
            order: list[str] = []
            collectors = []
            for name, priority in [("first", 3), ("late", 5), ("early", -1), ("usual", 0), ("usual too", 0)]:
                collector = Collector()
                collector.on_write = lambda delta, name=name: order.append(name)
                params = SamplingParams(max_tokens=2, ignore_eos=True, seed=0)
                engine.add(name, [1, 2], params=params, sink=collector, priority=priority)
                collectors.append(collector)
                if name == "first":
                    while not order:
                        await asyncio.sleep(0)
            await ended(*collectors)
            assert list(dict.fromkeys(order)) == ["first", "early", "usual", "usual too", "late"]

    asyncio.run(scenario())
