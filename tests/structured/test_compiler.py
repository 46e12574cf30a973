"""What a compilation may cost, what is kept of it, and that nothing hostile does harm."""

from __future__ import annotations

import time

import pytest

from graphllm.errors import GraphLLMError, InvalidRequestError
from graphllm.structured.compiler import GrammarCompiler
from graphllm.structured.limits import GrammarLimits
from graphllm.structured_outputs import StructuredOutputs
from tests.structured.conftest import Bench
from tests.structured.hostile import hostile_requests

HOSTILE = hostile_requests()
# Two orders above what the limits allow on an idle core: a hang, not a slow box.
MAX_SECONDS = 3.0


@pytest.mark.parametrize("structured", HOSTILE.values(), ids=HOSTILE)
def test_hostile_request_is_refused_or_served_and_never_hangs(
    structured: StructuredOutputs, bench: Bench
) -> None:
    started = time.thread_time()
    try:
        bench.compiler.compile(structured)
        for seed in range(3):
            walk = bench.walk(structured, seed)
            walk.run(60, is_long=seed > 0)
    except InvalidRequestError as error:
        assert error.param == "structured_outputs"
        assert len(error.message) < 700
    assert time.thread_time() - started < MAX_SECONDS


def test_the_same_request_is_compiled_once(byte_level: Bench) -> None:
    compiler = _compiler(byte_level)
    first = compiler.compile(StructuredOutputs(json={"type": "object"}))
    assert compiler.compile(StructuredOutputs(json='{"type":"object"}')) is first
    assert compiler.compile(StructuredOutputs(json={"type": "object"}, starts_after=("xyz",))) is not first
    assert compiler.num_cached == 2


def test_refused_request_is_not_kept(byte_level: Bench) -> None:
    compiler = _compiler(byte_level)
    with pytest.raises(InvalidRequestError):
        compiler.compile(StructuredOutputs(regex="("))
    assert compiler.num_cached == 0 and compiler.cached_bytes == 0


def test_cache_keeps_the_entries_used_last(byte_level: Bench) -> None:
    compiler = _compiler(byte_level, max_cache_entries=3)
    kept = [StructuredOutputs(regex=f"[a-{letter}]x") for letter in "bcd"]
    factories = [compiler.compile(structured) for structured in kept]
    compiler.compile(kept[0])
    compiler.compile(StructuredOutputs(regex="new"))
    assert compiler.num_cached == 3
    assert compiler.compile(kept[0]) is factories[0]
    assert compiler.compile(kept[2]) is factories[2]
    assert compiler.compile(kept[1]) is not factories[1]


def test_cache_is_bounded_in_bytes(byte_level: Bench) -> None:
    compiler = _compiler(byte_level, max_cache_bytes=2_000_000)
    for number in range(20):
        compiler.compile(StructuredOutputs(regex=f"{number}" + "a" * 1_000))
        assert 0 < compiler.cached_bytes <= 2_000_000
    assert 2 <= compiler.num_cached <= 7
    compiler.compile(StructuredOutputs(regex="[a-z]{2,200}"))
    assert compiler.num_cached == 0 and compiler.cached_bytes == 0, "it may grow to more than that by itself"


def test_sequences_outlive_their_cache_entry(byte_level: Bench) -> None:
    bench = Bench.of(byte_level.tokenizer, byte_level.end_token_ids, GrammarLimits(max_cache_entries=1))
    walk = bench.walk(StructuredOutputs(choice=("abc",)))
    walk.take(bench.id_of("a"))
    bench.compiler.compile(StructuredOutputs(choice=("x",)))
    walk.run(5)
    assert walk.output == b"abc"


class Breaking:
    """A tokenizer that fails, once it is told to, when forced text is to be cut into tokens."""

    def __init__(self, bench: Bench) -> None:
        self._tokenizer = bench.tokenizer
        self.vocab_size = bench.tokenizer.vocab_size
        self.special_token_ids = bench.tokenizer.special_token_ids
        self.eos_token_ids = bench.end_token_ids
        self.is_broken = False

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if self.is_broken:
            raise OSError("no tokens today")
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)


def test_a_defect_of_the_library_is_ours_and_shows_only_in_the_log(
    byte_level: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = Breaking(byte_level)
    compiler = GrammarCompiler(tokenizer, vocab_size=500)
    factory = compiler.compile(StructuredOutputs(regex="(ab|cd) and text that is forced"))
    constraint, other = factory(), factory()
    row = memoryview(bytearray(4 * 16)).cast("i")
    constraint.restrict(row)
    constraint.accept(byte_level.id_of("a"))
    tokenizer.is_broken = True
    for fail in (
        lambda: compiler.compile(StructuredOutputs(choice=("forced",))),
        lambda: constraint.restrict(row),
    ):
        caplog.clear()
        with pytest.raises(GraphLLMError, match="library failed") as caught:
            fail()
        assert caught.value.status == 500 and "no tokens" not in caught.value.message
        assert "no tokens today" in caplog.text
    tokenizer.is_broken = False
    other.restrict(row)
    other.accept(byte_level.id_of("c"))


def _compiler(bench: Bench, **limits: int) -> GrammarCompiler:
    return GrammarCompiler(
        bench.tokenizer,
        vocab_size=bench.vocab_size,
        eos_token_ids=bench.end_token_ids,
        limits=GrammarLimits(**limits),
    )
