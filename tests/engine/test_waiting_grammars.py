"""A request whose grammar is being compiled: it waits, joins, fails or goes, and nothing of it stays."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from graphllm.engine.engine import Engine
from graphllm.errors import EngineUnavailableError, InvalidRequestError
from graphllm.outputs import FinishReason
from graphllm.runner.device import CpuDevice
from graphllm.sampling_params import SamplingParams
from graphllm.structured_outputs import StructuredOutputs
from tests.engine.harness import add, assert_nothing_held, ended, running_engine, settle
from tests.engine.languages import LanguageCompiler, WordConstraint, words


class SlowCompiler(LanguageCompiler):
    """Compiles when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: dict[StructuredOutputs, asyncio.Future[Callable[[], WordConstraint]]] = {}
        self.num_closed = 0

    def start(self, structured: StructuredOutputs) -> asyncio.Future[Callable[[], WordConstraint]]:  # type: ignore[override]
        return self.waiting.setdefault(structured, asyncio.get_running_loop().create_future())

    def finish(self) -> None:
        for structured, future in self.waiting.items():
            future.set_result(self.compile(structured))
        self.waiting.clear()

    def fail(self, error: BaseException) -> None:
        for future in self.waiting.values():
            future.set_exception(error)
        self.waiting.clear()

    def close(self) -> None:
        self.num_closed += 1
        for future in self.waiting.values():
            future.cancel()


def installed(engine: Engine) -> SlowCompiler:
    compiler = SlowCompiler()
    compiler.install(engine)
    return compiler


def counted(engine: Engine, reason: str) -> float:
    lines = dict(line.rsplit(" ", 1) for line in engine.metrics.render().decode().splitlines())
    return float(lines.get(f'graphllm_sequences_finished_total{{reason="{reason}"}}', 0))


def test_request_waits_for_its_grammar_and_others_do_not(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running_engine(tiny_model, device=CpuDevice(1), debug_kv=True) as engine:
            compiler = installed(engine)
            slow = add(engine, "slow", [1, 2, 3], words("ab", n=2, bad_words=("zz",), min_tokens=2))
            free = add(engine, "free", [1, 2], SamplingParams(max_tokens=5, ignore_eos=True))
            await ended(free)
            assert engine.num_unfinished_requests == 1 and not slow.ended.is_set()
            compiler.finish()
            await ended(slow)
            assert slow.error is None and all(set(text) == set("ab") for text in slow.texts)
            await settle(engine)
            assert_nothing_held(engine)

    asyncio.run(scenario())


def test_requests_for_one_grammar_wait_for_one_compilation_and_get_constraints_of_their_own(
    tiny_model: Path,
) -> None:
    async def scenario() -> None:
        async with running_engine(tiny_model, max_num_seqs=8) as engine:
            compiler = installed(engine)
            collectors = [add(engine, f"r{i}", [i, 2], words("ab", seed=i)) for i in range(3)]
            assert len(compiler.waiting) == 1 and engine.num_unfinished_requests == 3
            compiler.finish()
            await ended(*collectors)
            assert len(compiler.made) == 3
            assert all(set(collector.texts[0]) == set("ab") for collector in collectors)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("raised", "expected", "match"),
    [
        (InvalidRequestError("it cannot be", param="structured_outputs"), InvalidRequestError, "it cannot"),
        (ZeroDivisionError("a defect"), None, "Internal error: a defect"),
    ],
)
def test_failed_compilation_ends_the_requests_that_wait_for_it(
    tiny_model: Path, raised: Exception, expected: type[Exception] | None, match: str
) -> None:
    async def scenario() -> None:
        async with running_engine(tiny_model) as engine:
            compiler = installed(engine)
            failed = [add(engine, f"r{i}", [1], words("ab", n=2)) for i in range(2)]
            compiler.fail(raised)
            await ended(*failed)
            first, second = (each.error for each in failed)
            assert first is not None and second is not None and match in str(first)
            assert type(first) is expected if expected is not None else first.status == 500
            assert first is not second, "each is put into its client's words"
            assert first.param == getattr(raised, "param", None)
            assert counted(engine, "error") == 4
            assert_nothing_held(engine)
            other = add(engine, "other", [1], SamplingParams(max_tokens=2, ignore_eos=True))
            await ended(other)
            assert other.error is None

    asyncio.run(scenario())


def test_a_request_that_cannot_join_after_its_grammar_is_told_so(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running_engine(tiny_model) as engine:
            compiler = installed(engine)
            refused = add(engine, "refused", [1], words("ab", stop=("x" * 2000,)))
            compiler.finish()
            await ended(refused)
            assert isinstance(refused.error, InvalidRequestError) and refused.error.param == "stop"
            assert engine.num_unfinished_requests == 0
            await settle(engine)
            assert_nothing_held(engine)

    asyncio.run(scenario())


def test_request_that_is_aborted_while_it_waits_is_forgotten(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running_engine(tiny_model) as engine:
            compiler = installed(engine)
            gone, stays = add(engine, "gone", [1], words("ab")), add(engine, "stays", [1], words("ab"))
            engine.abort("gone")
            engine.abort("gone")
            assert engine.num_unfinished_requests == 1 and counted(engine, "abort") == 1
            compiler.finish()
            await ended(stays)
            assert stays.error is None and not gone.ended.is_set() and len(compiler.made) == 1
            # The name is free again, and the old compilation is not the new request's.
            again = add(engine, "gone", [1], words("ab"))
            compiler.finish()
            await ended(again)
            assert again.finish_reasons == [FinishReason.STOP]

    asyncio.run(scenario())


def test_a_sink_that_aborts_its_siblings_when_it_fails_is_told_once(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running_engine(tiny_model) as engine:
            compiler = installed(engine)
            first, second = add(engine, "r0", [1], words("ab")), add(engine, "r1", [1], words("ab"))
            first.on_fail = lambda: engine.abort("r1")
            compiler.fail(InvalidRequestError("no"))
            await ended(first)
            await asyncio.sleep(0)
            assert not second.ended.is_set() and engine.num_unfinished_requests == 0

    asyncio.run(scenario())


def test_draining_waits_for_grammars_too(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running_engine(tiny_model) as engine:
            compiler = installed(engine)
            waiting = add(engine, "r0", [1], words("ab"))
            assert not await engine.drain(0.05)
            asyncio.get_running_loop().call_later(0.02, compiler.finish)
            assert await engine.drain(30)
            assert waiting.finish_reasons == [FinishReason.STOP]

    asyncio.run(scenario())


def test_stopping_fails_what_waits_and_closes_the_compiler(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running_engine(tiny_model) as engine:
            compiler = installed(engine)
            waiting = add(engine, "r0", [1], words("ab"))
        assert isinstance(waiting.error, EngineUnavailableError) and compiler.num_closed == 1
        assert engine.num_unfinished_requests == 0

    asyncio.run(scenario())


def test_a_failed_engine_fails_what_waits(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running_engine(tiny_model) as engine:
            compiler = installed(engine)
            waiting = add(engine, "r0", [1], words("ab"))
            engine._loop_failed("broken")
            assert isinstance(waiting.error, EngineUnavailableError)
            compiler.finish()
            await asyncio.sleep(0)
            assert engine.num_unfinished_requests == 0

    asyncio.run(scenario())


def test_long_schema_is_compiled_beside_the_loop_and_obeyed(tiny_model: Path) -> None:
    names = [f"p{i}" for i in range(60)]
    schema = {
        "type": "object",
        "properties": {
            name: {"type": "integer", "minimum": 3, "maximum": 1_000 + i} for i, name in enumerate(names)
        },
        "required": names[:2],
    }

    async def scenario() -> None:
        async with running_engine(tiny_model, device=CpuDevice(1)) as engine:
            wish = StructuredOutputs(json=json.dumps(schema))
            params = SamplingParams(seed=1, structured_outputs=wish, max_tokens=200, min_tokens=10)
            first = add(engine, "first", [1], params)
            assert len(engine._compiling) == 1
            await ended(first)
            second = add(engine, "second", [1], params)
            assert len(engine._compiling) == 0, "it is cached"
            await ended(second)
            assert first.texts == second.texts and first.error is None
            value = json.loads(first.texts[0])
            assert {"p0", "p1"} <= value.keys() <= set(names) and min(value.values()) >= 3

    asyncio.run(scenario())
