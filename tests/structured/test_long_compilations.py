"""Grammars that take long are compiled beside the event loop, once for all who ask."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from graphllm.constraint import ConstraintFactory
from graphllm.errors import EngineUnavailableError, InvalidRequestError
from graphllm.structured.compiler import GrammarCompiler
from graphllm.structured.limits import GrammarLimits
from graphllm.structured.worker import CompilationWorker
from graphllm.structured_outputs import StructuredOutputs
from tests.structured.conftest import Bench
from tests.structured.hostile import hostile_requests

SHORT = StructuredOutputs(choice=("yes", "no"))


def long(number: int = 0) -> StructuredOutputs:
    """Sixty integers with bounds: about 8 ms."""
    names = {f"p{number}_{i}": {"type": "integer", "minimum": i, "maximum": 1_000} for i in range(60)}
    return StructuredOutputs(json={"properties": names})  # type: ignore[arg-type]


WRONG = StructuredOutputs(grammar="start: " + " ".join(f'"a{i}"' for i in range(300)) + " undefined")


@contextmanager
def compiler(bench: Bench, **limits: int) -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(
        bench.tokenizer,
        vocab_size=bench.vocab_size,
        eos_token_ids=bench.end_token_ids,
        limits=GrammarLimits(**limits),
    )
    try:
        yield made
    finally:
        made.close()


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scenario())


async def finished(started: ConstraintFactory | asyncio.Future[ConstraintFactory]) -> ConstraintFactory:
    assert isinstance(started, asyncio.Future), "compiled on the loop"
    return await started


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("grammars")}


def test_short_grammar_is_there_at_once_and_starts_no_thread(byte_level: Bench) -> None:
    async def scenario() -> None:
        with compiler(byte_level) as made:
            before = threads()
            assert not isinstance(made.start(SHORT), asyncio.Future)
            assert threads() == before and made.num_cached == 1

    run(scenario)


def test_long_grammar_is_compiled_beside_the_loop_and_kept(byte_level: Bench) -> None:
    async def scenario() -> None:
        with compiler(byte_level) as made:
            started = made.start(long())
            assert made.num_under_way == 1 and made.num_cached == 0
            factory = await finished(started)
            assert made.num_under_way == 0 and made.num_cached == 1 and made.cached_bytes > 0
            assert made.start(long()) is factory and made.compile(long()) is factory
            row = memoryview(bytearray(4 * ((byte_level.vocab_size + 31) // 32))).cast("i")
            for index in range(len(row)):
                row[index] = -1
            factory().restrict(row)
            brace = byte_level.id_of("{")
            assert row[brace // 32] >> brace % 32 & 1

    run(scenario)


def test_requests_for_one_grammar_share_its_compilation(byte_level: Bench) -> None:
    async def scenario() -> None:
        with compiler(byte_level) as made:
            first, second, other = made.start(long()), made.start(long()), made.start(long(1))
            assert first is second and first is not other and made.num_under_way == 2
            assert await finished(first) is not await finished(other)

    run(scenario)


def test_what_is_wrong_is_said_by_the_future_or_at_once(byte_level: Bench) -> None:
    async def scenario() -> None:
        with compiler(byte_level) as made:
            with pytest.raises(InvalidRequestError, match="unclosed"):
                made.start(StructuredOutputs(regex="("))
            with pytest.raises(InvalidRequestError, match="undefined") as caught:
                await finished(made.start(WRONG))
            assert caught.value.param == "structured_outputs"
            assert made.num_cached == 0 and made.num_under_way == 0

    run(scenario)


def test_no_more_than_the_limit_wait(byte_level: Bench) -> None:
    async def scenario() -> None:
        with compiler(byte_level, max_waiting=3) as made:
            waiting = [made.start(long(number)) for number in range(3)]
            with pytest.raises(EngineUnavailableError, match="3 schemas and grammars") as caught:
                made.start(long(3))
            assert caught.value.status == 503 and caught.value.code == "too_many_compilations"
            assert made.start(long(1)) is waiting[1], "one of them is waited for, not added"
            assert not isinstance(made.start(SHORT), asyncio.Future)
            await asyncio.gather(*map(finished, waiting))
            await finished(made.start(long(3)))

    run(scenario)


def test_closing_cancels_what_has_not_begun(byte_level: Bench) -> None:
    async def scenario() -> None:
        gate = threading.Event()
        worker = CompilationWorker()
        running, waiting = worker.run(gate.wait), worker.run(lambda: "never")
        await asyncio.sleep(0.05)
        worker.close()
        worker.close()
        gate.set()
        assert await running is True
        with pytest.raises(asyncio.CancelledError):
            await waiting

    run(scenario)


def test_the_loop_goes_on_while_a_grammar_is_compiled(byte_level: Bench) -> None:
    async def scenario() -> None:
        with compiler(byte_level) as made:
            started = [made.start(long(number)) for number in range(8)]
            num_passes = 0
            while made.num_under_way:
                num_passes += 1
                await asyncio.sleep(0)
            assert num_passes > 100, "the interpreter lock was not let go"
            await asyncio.gather(*map(finished, started))

    run(scenario)


def test_every_hostile_request_that_takes_long_is_expected_to(byte_level: Bench) -> None:
    """Those that were measured above 4 ms; the rest may be compiled on the loop."""
    slow = (
        "schema: enum of long words",
        "schema: enum of one long prefix",
        "schema: enum of objects",
        "schema: optional properties",
        "schema: ranges",
        "schema: formats",
        "schema: patterns",
        "schema: anyOf",
        "schema: divisor",
        "schema: long constant",
        "regex: letters",
        "regex: letters and marks",
        "regex: words",
        "grammar: doubled terminals",
        "grammar: repeated rules",
        "grammar: many rules",
        "grammar: intersections",
        "grammar: substrings",
        "grammar: many schemas",
        "choice: many",
        "choice: one long prefix",
        "choice: prefixes",
        "start: long",
    )
    requests = hostile_requests()
    with compiler(byte_level) as made:
        expected = {name: made._source(requests[name]).budget.expected for name in slow}
    on_the_loop = [name for name, cost in expected.items() if cost <= GrammarLimits().max_loop_cost]
    assert on_the_loop == []
