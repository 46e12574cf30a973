"""Token lists, bad words and min_tokens as constraints, each against a plain statement of what it means."""

from __future__ import annotations

import random

import numpy as np
import pytest

from graphllm.constraint import TokenConstraint, num_mask_words
from graphllm.engine.constraints import ConstraintBuilder, mask_of
from graphllm.errors import ConstraintViolation, InvalidRequestError
from graphllm.sampling_params import SamplingParams
from graphllm.structured_outputs import StructuredOutputs
from tests.engine.languages import LanguageCompiler

VOCAB_SIZE = 259
END = 256
STRUCTURED = StructuredOutputs(choice=("ab",))


class Letters:
    """An encoder whose tokens are letters, and pairs of them that begin a word: " ab" is one token."""

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def encode(self, text: str, *, add_special_tokens: bool, param: str) -> list[int]:
        assert not add_special_tokens and param == "bad_words"
        self.encoded.append(text)
        return [200] if text == " ab" else [ord(letter) for letter in text]


def builder(**values: object) -> ConstraintBuilder:
    return ConstraintBuilder(
        Letters(),
        vocab_size=VOCAB_SIZE,
        eos_token_ids=frozenset({END}),
        **values,  # type: ignore[arg-type]
    )


def make(**values: object) -> TokenConstraint:
    factory = builder(compiler=LanguageCompiler(3)).build(SamplingParams(**values))  # type: ignore[arg-type]
    assert factory is not None
    return factory()


def allowed_by(constraint: TokenConstraint) -> set[int]:
    """The tokens that a constraint leaves of all."""
    row = np.full(num_mask_words(VOCAB_SIZE), -1, dtype=np.int32)
    constraint.restrict(row.data)
    bits = np.unpackbits(row.view(np.uint8), bitorder="little")[:VOCAB_SIZE]
    return set(np.flatnonzero(bits).tolist())


ALL = set(range(VOCAB_SIZE))


def test_request_without_constraints_has_none() -> None:
    assert builder().build(SamplingParams(min_tokens=5, stop_token_ids=(3,))) is None


@pytest.mark.parametrize("size", [1, 31, 32, 33, 259])
def test_mask_has_the_bits_of_its_tokens_and_no_others(size: int) -> None:
    rng = random.Random(size)
    for _ in range(20):
        chosen = {token for token in range(size) if rng.random() < 0.3}
        mask = mask_of(chosen, size)
        assert mask.dtype == np.int32 and mask.shape == (num_mask_words(size),)
        # As the kernels read it.
        assert {t for t in range(size) if mask[t // 32] >> (t % 32) & 1} == chosen
        assert mask_of(range(size), size)[-1] == (-1 if size % 32 == 0 else (1 << size % 32) - 1)


def test_only_allowed_tokens_are_left_and_accepted() -> None:
    constraint = make(allowed_token_ids=(0, 31, 32, 63, 258))
    for _ in range(3):
        assert allowed_by(constraint) == {0, 31, 32, 63, 258}
        constraint.accept(31)
    with pytest.raises(ConstraintViolation, match="33"):
        constraint.accept(33)
    assert not constraint.is_finished


def completes(output: list[int], token: int, sequences: list[list[int]]) -> bool:
    """What bad words forbid, said plainly."""
    return any([*output, token][-len(each) :] == each for each in sequences)


def test_bad_words_forbid_exactly_what_would_complete_one() -> None:
    bad = ("ab", "aab", "c", "baab", "bb")
    sequences = [[ord(letter) for letter in f"{blank}{word}"] for word in bad for blank in ("", " ")]
    sequences.remove([ord(" "), ord("a"), ord("b")])
    sequences.append([200])
    alphabet = [*map(ord, "abc "), 200]
    rng = random.Random(0)
    num_forbidden = 0
    for _ in range(30):
        constraint, output = make(bad_words=bad), []
        for _ in range(30):
            forbidden = {token for token in ALL if completes(output, token, sequences)}
            assert allowed_by(constraint) == ALL - forbidden
            num_forbidden += len(forbidden)
            token = rng.choice([each for each in alphabet if each not in forbidden])
            constraint.accept(token)
            output.append(token)
    assert num_forbidden > 30 * 30 * 2, "more than the words of one token"


def test_bad_word_of_the_highest_bits_of_a_mask_word() -> None:
    constraint = make(bad_words=("a" + chr(31), "a" + chr(63)))
    constraint.accept(ord("a"))
    assert allowed_by(constraint) == ALL - {31, 63}


def test_completed_bad_word_is_a_violation() -> None:
    constraint = make(bad_words=("ab", "c"))
    constraint.accept(ord("a"))
    for token in (ord("b"), ord("c")):
        with pytest.raises(ConstraintViolation):
            constraint.accept(token)


def test_word_list_is_tokenized_once_and_few_are_kept() -> None:
    built = builder()
    encoder = built._encoder
    assert isinstance(encoder, Letters)
    for _ in range(3):
        built.build(SamplingParams(bad_words=("  word", "other")))
    assert encoder.encoded == ["word", " word", "other", " other"]
    for number in range(100):
        built.build(SamplingParams(bad_words=(f"word {number}",)))
    assert len(built._word_lists) == 64


def test_min_tokens_holds_ends_back_for_so_many_tokens() -> None:
    constraint = make(bad_words=("c",), min_tokens=3, stop_token_ids=(7,))
    for _ in range(3):
        assert allowed_by(constraint) == ALL - {ord("c"), 7, END}
        constraint.accept(1)
    assert allowed_by(constraint) == ALL - {ord("c")}
    ignoring = make(bad_words=("c",), min_tokens=3, ignore_eos=True)
    assert allowed_by(ignoring) == ALL - {ord("c")}


def test_min_tokens_leaves_nothing_where_only_an_end_is_allowed_but_yields_to_a_grammar() -> None:
    assert allowed_by(make(allowed_token_ids=(END,), min_tokens=3)) == set()
    constraint = make(
        structured_outputs=STRUCTURED, min_tokens=10, allowed_token_ids=(END, *range(256)), bad_words=("ba",)
    )
    while not constraint.is_finished:
        (token,) = allowed_by(constraint) & ALL
        constraint.accept(token)


def test_constraints_of_one_request_act_together() -> None:
    a, b = LanguageCompiler(1).compile(STRUCTURED)().words[0]
    factory = builder(compiler=LanguageCompiler(2)).build(
        SamplingParams(
            structured_outputs=STRUCTURED, allowed_token_ids=(a, b, END), bad_words=(chr(a) + "x",)
        )
    )
    assert factory is not None
    one, other = factory(), factory()
    assert allowed_by(one) == {a}
    one.accept(a)
    assert (allowed_by(one), allowed_by(other)) == ({b}, {a}), "each sequence has its own state"
    one.accept(b)
    assert allowed_by(one) == {a, END}
    assert not one.is_finished
    with pytest.raises(ConstraintViolation):
        one.accept(b)


def test_structure_is_refused_without_its_library() -> None:
    with pytest.raises(InvalidRequestError, match="llguidance") as caught:
        builder().build(SamplingParams(structured_outputs=STRUCTURED))
    assert caught.value.param == "structured_outputs"
