"""Masks and steps of one sequence: what is never allowed, when the end is, and how failures stay apart."""

from __future__ import annotations

import numpy as np
import pytest

from graphllm.constraint import num_mask_words
from graphllm.errors import ConstraintViolation, InvalidRequestError
from graphllm.structured.compiler import GrammarCompiler
from graphllm.structured.limits import GrammarLimits
from graphllm.structured_outputs import StructuredOutputs
from tests.structured.conftest import Bench
from tests.structured.walks import Walk

ANYTHING = StructuredOutputs(regex="(?s:.)*")


def test_free_text_allows_every_token_but_special_ones_and_padding(bench: Bench) -> None:
    allowed = set(bench.walk(ANYTHING).allowed().tolist())
    special = bench.tokenizer.special_token_ids
    texts = {i for i in range(bench.tokenizer.vocab_size) if bench.tokenizer.token_bytes(i)} - special
    valid_alone = {i for i in texts if _may_begin_utf8(bench.tokenizer.token_bytes(i))}
    assert allowed == valid_alone | bench.end_token_ids


def _may_begin_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True


def test_end_is_allowed_only_where_the_text_may_end(bench: Bench) -> None:
    walk = bench.walk(StructuredOutputs(regex="ab?"))
    assert bench.end_token_ids.isdisjoint(walk.allowed().tolist())
    walk.take(bench.id_of("a"))
    assert not walk.is_over
    assert bench.end_token_ids <= set(walk.allowed().tolist())


def test_every_end_token_ends(byte_level: Bench) -> None:
    assert len(byte_level.end_token_ids) == 2
    for end in byte_level.end_token_ids:
        walk = byte_level.walk(StructuredOutputs(regex="ab?"))
        walk.allowed()
        walk.constraint.accept(byte_level.id_of("a"))
        walk.allowed()
        walk.constraint.accept(end)
        assert walk.constraint.is_finished


def test_nothing_can_follow_means_finished_without_an_end_token(bench: Bench) -> None:
    walk = bench.walk(StructuredOutputs(json={"const": [1]}))
    walk.run(10)
    assert walk.is_over
    assert bench.end_token_ids.isdisjoint(walk.token_ids)
    assert walk.output.endswith(b"]")


def test_special_token_s_text_is_written_in_plain_tokens(bench: Bench) -> None:
    walk = bench.walk(StructuredOutputs(choice=("</s>",)))
    walk.run(10)
    assert walk.output == b"</s>"
    assert bench.tokenizer.special_token_ids.isdisjoint(walk.token_ids)


def test_restrict_only_clears_bits(byte_level: Bench) -> None:
    walk = byte_level.walk(StructuredOutputs(regex="[a-z]+"))
    row = np.zeros(num_mask_words(byte_level.vocab_size), np.int32)
    row[:3] = -1
    before = row.copy()
    walk.constraint.restrict(memoryview(row))
    assert not (row & ~before).any()
    assert row.any()


def test_restrict_again_gives_the_same_mask(byte_level: Bench) -> None:
    walk = byte_level.walk(StructuredOutputs(json_object=True))
    for _ in range(20):
        if walk.is_over:
            break
        assert walk.allowed().tolist() == walk.allowed().tolist()
        walk.step()


def test_forbidden_token_is_a_violation(bench: Bench) -> None:
    walk = bench.walk(StructuredOutputs(regex="[0-9]+"))
    walk.allowed()
    with pytest.raises(ConstraintViolation):
        walk.constraint.accept(bench.id_of("a"))
    walk = bench.walk(StructuredOutputs(regex="[0-9]+"))
    with pytest.raises(ConstraintViolation):
        walk.constraint.accept(next(iter(bench.tokenizer.special_token_ids)))
    walk = bench.walk(StructuredOutputs(regex="[0-9]+"))
    with pytest.raises(ConstraintViolation):
        walk.constraint.accept(bench.vocab_size - 1)


def test_sequences_of_one_request_go_their_own_ways(bench: Bench) -> None:
    factory = bench.compiler.compile(StructuredOutputs(choice=("aa", "bb")))
    first, second = factory(), factory()
    first.accept(bench.id_of("a"))
    second.accept(bench.id_of("b"))
    first.accept(bench.id_of("a"))
    assert first.is_finished and not second.is_finished


def test_a_vocabulary_without_an_end_still_finishes(byte_level: Bench) -> None:
    bench = Bench.of(byte_level.tokenizer, ())
    walk = bench.walk(StructuredOutputs(regex="ab?"))
    walk.take(bench.id_of("a"))
    assert walk.allowed().tolist() == [bench.id_of("b")]
    walk.take(bench.id_of("b"))
    assert walk.is_over


def test_model_with_fewer_logits_than_tokens(byte_level: Bench) -> None:
    compiler = GrammarCompiler(byte_level.tokenizer, vocab_size=300, eos_token_ids=[299])
    walk = Walk(
        compiler.compile(ANYTHING)(),
        byte_level.tokenizer,
        vocab_size=300,
        end_token_ids=frozenset({299}),
        draw=byte_level.walk(ANYTHING).draw,
    )
    assert max(walk.allowed().tolist()) == 299


# Needs a state of its lexer for every length of the string, and those of both texts are shared.
COUNTED = StructuredOutputs(regex="(a[0-9]{400}|b[0-7]{400})x")


def _follow(walk: Walk, bench: Bench, text: str) -> None:
    for character in text:
        walk.allowed()
        walk.take(bench.id_of(character))


def test_states_used_up_by_others_are_found_anew(byte_level: Bench) -> None:
    bench = Bench.of(byte_level.tokenizer, byte_level.end_token_ids, GrammarLimits(max_lexer_states=700))
    factory = bench.compiler.compile(COUNTED)
    texts = ["a" + "1" * 400 + "x", "b" + "2" * 400 + "x"]
    walks = []
    for text in texts * 3:
        walk = Walk(
            factory(), bench.tokenizer, bench.vocab_size, bench.end_token_ids, byte_level.walk(ANYTHING).draw
        )
        walks.append(walk)
        _follow(walk, bench, text)
    assert all(walk.is_over for walk in walks)
    generations = {walk.constraint._generation for walk in walks}  # type: ignore[attr-defined]
    assert len(generations) > 1, "nothing was used up: the test shows nothing"


def test_a_text_that_needs_too_many_states_alone_is_an_error_by_name(byte_level: Bench) -> None:
    bench = Bench.of(byte_level.tokenizer, byte_level.end_token_ids, GrammarLimits(max_lexer_states=300))
    walk = bench.walk(COUNTED)
    with pytest.raises(InvalidRequestError, match="too complex"):
        _follow(walk, bench, "a" + "1" * 400)
    # Others with the same grammar begin afresh.
    other = bench.walk(COUNTED)
    _follow(other, bench, "b22")


def test_ambiguous_grammar_ends_in_an_error_by_name(byte_level: Bench) -> None:
    walk = byte_level.walk(StructuredOutputs(grammar='start: e\ne: e e | "a" | "b"'))
    with pytest.raises(InvalidRequestError, match="too complex"):
        _follow(walk, byte_level, "a" * 500)


def test_a_place_that_no_token_can_leave_has_an_empty_mask(byte_level: Bench) -> None:
    tokenizer = byte_level.tokenizer
    present = {tokenizer.token_bytes(i).decode("latin-1") for i in range(60)}
    first, missing = sorted(present & set("abcdefABCDEF012345"))[0], sorted(set("xyzXYZ") - present)[0]
    compiler = GrammarCompiler(tokenizer, vocab_size=60, eos_token_ids=[59])
    constraint = compiler.compile(StructuredOutputs(regex=f"{first}({missing}|{missing}{missing}q)"))()
    row = np.full(num_mask_words(60), -1, np.int32)
    constraint.restrict(row.data)
    assert row.any()
    constraint.accept(next(i for i in range(60) if tokenizer.token_bytes(i) == first.encode()))
    row.fill(-1)
    constraint.restrict(row.data)
    assert not row.any()
    assert not constraint.is_finished
