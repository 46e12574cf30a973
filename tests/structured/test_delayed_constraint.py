"""Output that is free until a marker, and constrained from exactly there."""

from __future__ import annotations

import json

import pytest

from graphllm.errors import ConstraintViolation, InvalidRequestError
from graphllm.structured.limits import GrammarLimits
from graphllm.structured_outputs import StructuredOutputs
from tests.structured.conftest import Bench
from tests.structured.walks import Walk

THINK = "</think>"
SHORT_MARKERS = GrammarLimits(min_marker_length=1)
DIGITS = StructuredOutputs(regex="[0-9]{3}", starts_after=(THINK,))


def write(walk: Walk, bench: Bench, text: str) -> None:
    for byte in text.encode():
        allowed = walk.allowed().tolist()
        walk.take(next(i for i in allowed if bench.tokenizer.token_bytes(i) == bytes([byte])))


def test_everything_but_the_end_is_free_before_the_marker(bench: Bench) -> None:
    walk = bench.walk(DIGITS)
    everything = set(range(bench.vocab_size)) - bench.end_token_ids
    assert set(walk.allowed().tolist()) == everything
    write(walk, bench, "thinking </thin")
    assert set(walk.allowed().tolist()) == everything


def test_only_the_grammar_is_allowed_behind_the_marker(bench: Bench) -> None:
    walk = bench.walk(DIGITS)
    write(walk, bench, "let me see" + THINK)
    texts = {bench.tokenizer.token_bytes(i) for i in walk.allowed().tolist()}
    assert {b"1", b"9", b"\n"} <= texts
    assert all(text.isdigit() or not text.strip(b"\n") for text in texts)
    write(walk, bench, "123")
    assert walk.is_over


def test_one_blank_line_may_stand_between(bench: Bench) -> None:
    walk = bench.walk(DIGITS)
    write(walk, bench, THINK + "\n\n")
    texts = {bench.tokenizer.token_bytes(i) for i in walk.allowed().tolist()}
    assert all(text.isdigit() for text in texts)
    write(walk, bench, "123")
    assert walk.is_over


def test_blank_line_that_the_grammar_wants_is_the_grammar_s(bench: Bench) -> None:
    walk = bench.walk(StructuredOutputs(regex="\n?[0-9]", starts_after=(THINK,)))
    write(walk, bench, THINK + "\n7")
    assert walk.is_over


def test_first_of_several_markers_counts(bench: Bench) -> None:
    structured = StructuredOutputs(choice=("yes",), starts_after=("<b>", "<a>"))
    walk = bench.walk(structured)
    write(walk, bench, "b> <a <a>yes")
    assert walk.is_over


def test_marker_that_overlaps_with_itself_is_found(bench: Bench) -> None:
    walk = bench.walk(StructuredOutputs(choice=("c",), starts_after=("aab",)))
    write(walk, bench, "aaabc")
    assert walk.is_over


def test_a_special_token_may_be_the_marker(byte_level: Bench) -> None:
    walk = byte_level.walk(StructuredOutputs(regex="[0-9]", starts_after=("<s>",)))
    walk.allowed()
    walk.take(byte_level.id_of("<s>"))
    assert all(
        byte_level.tokenizer.token_bytes(i).strip(b"\n").isdigit() or i for i in walk.allowed().tolist()
    )
    write(walk, byte_level, "4")
    assert walk.is_over


def test_token_across_the_marker_s_end_is_allowed_where_the_grammar_takes_its_rest(byte_level: Bench) -> None:
    # " the" is one token; the marker ends within it.
    whole = byte_level.id_of("Ġthe".replace("Ġ", " "))
    takes = StructuredOutputs(regex="e[0-9]", starts_after=(" th",))
    walk = byte_level.walk(takes)
    assert whole in walk.allowed().tolist()
    walk.take(whole)
    write(walk, byte_level, "5")
    assert walk.is_over

    refuses = StructuredOutputs(regex="x[0-9]", starts_after=(" th",))
    assert whole not in byte_level.walk(refuses).allowed().tolist()


def test_token_that_completes_the_marker_across_two_tokens_is_judged_too(byte_level: Bench) -> None:
    longer = byte_level.id_of("the")
    refuses = StructuredOutputs(regex="x[0-9]", starts_after=("!th",))
    walk = byte_level.walk(refuses)
    assert longer in walk.allowed().tolist()
    write(walk, byte_level, "!")
    assert longer not in walk.allowed().tolist()
    with pytest.raises(ConstraintViolation):
        walk.take(longer)


def test_marker_of_less_than_three_letters_is_refused(byte_level: Bench) -> None:
    with pytest.raises(InvalidRequestError, match="at least 3 characters"):
        byte_level.compiler.compile(StructuredOutputs(regex="[0-9]", starts_after=("</think>", "ab")))


def test_short_marker_has_to_end_where_a_token_ends(byte_level: Bench) -> None:
    short = Bench.of(byte_level.tokenizer, byte_level.end_token_ids, SHORT_MARKERS)
    walk = short.walk(StructuredOutputs(regex="[a-z ]{5}", starts_after=("e", "t", "o", " ")))
    for _ in range(30):
        token = walk.draw.choice(walk.allowed().tolist())
        walk.take(token)
        if walk.is_over:
            break


def test_random_outputs_are_valid_behind_the_marker(bench: Bench) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    # Of three letters, none would be met by chance.
    bench = Bench.of(bench.tokenizer, bench.end_token_ids, SHORT_MARKERS)
    structured = StructuredOutputs(json=schema, starts_after=("e", "th"))
    for seed in range(30):
        walk = bench.walk(structured, seed)
        walk.run(150)
        walk.complete()
        ends = [walk.output.find(m) + len(m) for m in (b"e", b"th") if m in walk.output]
        value = json.loads(walk.output[min(ends) :].decode())
        assert isinstance(value["a"], int)
