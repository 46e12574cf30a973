"""A prompt that is cut keeps the tokens that the whole has there, whatever its length, at a bounded cost."""

from __future__ import annotations

import time
from typing import Any

import pytest

from graphllm.errors import InvalidRequestError
from graphllm.server.generation.prompts import Truncation, encode_truncated, encoded_prompts, truncation
from graphllm.tokenizer.tokenizer import Tokenizer
from tests.server.posting import byte_tokenizer
from tests.tokenizer.small_tokenizers import tokenizer_of, train_byte_level


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return tokenizer_of(train_byte_level())


@pytest.mark.parametrize("num_words", [1, 5, 40, 1000])
@pytest.mark.parametrize("keeps_first", [False, True])
def test_what_is_kept_is_what_the_whole_has_there(
    words: Tokenizer, num_words: int, keeps_first: bool
) -> None:
    text = " ".join(f"the quick brown fox {number} jumps" for number in range(num_words))
    whole = words.encode(text)
    for num_kept in (1, 7, 100):
        kept = encode_truncated(
            text, words, truncated=Truncation(num_kept, keeps_first), add_special_tokens=True
        )
        assert kept == (whole[:num_kept] if keeps_first else whole[-num_kept:])


def test_texts_of_long_tokens_are_looked_at_again(words: Tokenizer) -> None:
    # Far more characters for a token than one look is made for.
    tokenizer = byte_tokenizer(special=("~" * 50,))
    text = "ab" + "~" * 50 * 400
    kept = encode_truncated(text, tokenizer, truncated=Truncation(300), add_special_tokens=False)
    assert kept == [tokenizer.added_tokens["~" * 50]] * 300
    kept = encode_truncated(text, tokenizer, truncated=Truncation(402), add_special_tokens=False)
    assert kept == tokenizer.encode(text, add_special_tokens=False)


def test_special_tokens_stand_at_the_beginning_only_where_it_is_kept() -> None:
    tokenizer = byte_tokenizer(adds_start=True)
    start = tokenizer.added_tokens["<|im_start|>"]
    long = "abcdefgh" * 200

    def kept(text: str, truncated: Truncation) -> list[int]:
        return encode_truncated(text, tokenizer, truncated=truncated, add_special_tokens=True)

    assert kept("ab", Truncation(5))[0] == start
    assert kept(long, Truncation(5, keeps_first=True))[0] == start
    assert start not in kept(long, Truncation(5))
    assert start not in encode_truncated("ab", tokenizer, truncated=Truncation(5), add_special_tokens=False)


def test_cutting_a_huge_text_costs_what_its_kept_tokens_cost(words: Tokenizer) -> None:
    def seconds(num_copies: int) -> float:
        text = "the quick brown fox jumps over the lazy dog " * num_copies
        times = []
        for _ in range(3):
            started = time.perf_counter()
            encode_truncated(text, words, truncated=Truncation(100), add_special_tokens=True)
            times.append(time.perf_counter() - started)
        return min(times)

    # 4 MB and 40 KB.
    assert seconds(100_000) < 20 * seconds(1000) + 0.01


def test_prompts_of_ids_are_cut_too() -> None:
    tokenizer = byte_tokenizer()

    def prompts(prompt: Any, truncated: Truncation) -> list[list[int]]:
        return list(encoded_prompts(prompt, tokenizer, max_model_len=10, truncated=truncated))

    assert prompts([1, 2, 3], Truncation(2)) == [[2, 3]]
    assert prompts([[1, 2, 3], [4]], Truncation(2, keeps_first=True)) == [[1, 2], [4]]
    # More than the context, which is why it is cut.
    assert prompts([1] * 100, Truncation(5)) == [[1] * 5]


@pytest.mark.parametrize(
    ("num_kept", "side", "expected"),
    [
        (None, None, None),
        (7, None, Truncation(7)),
        (7, "left", Truncation(7)),
        (7, "right", Truncation(7, keeps_first=True)),
        (-1, None, Truncation(90)),
    ],
)
def test_fields_become_a_truncation(num_kept: int | None, side: str | None, expected: Any) -> None:
    assert truncation(num_kept, side, max_model_len=100, max_tokens=10) == expected


@pytest.mark.parametrize(
    ("num_kept", "side", "param"),
    [
        (0, None, "truncate_prompt_tokens"),
        (-2, None, "truncate_prompt_tokens"),
        (101, None, "truncate_prompt_tokens"),
        (7, "middle", "truncation_side"),
        (None, "left", "truncation_side"),
    ],
)
def test_a_truncation_that_cannot_be_is_refused(num_kept: int | None, side: str | None, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        truncation(num_kept, side, max_model_len=100, max_tokens=10)
    assert caught.value.param == param
