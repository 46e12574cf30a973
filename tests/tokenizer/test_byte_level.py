"""The tokenizer without a file: every id has text, every text has ids, and a chat can be held."""

from __future__ import annotations

import random

import pytest

from graphllm.errors import CheckpointError
from graphllm.tokenizer.byte_level import END_OF_TEXT, FIRST_WORD_ID, SPECIAL_TOKENS, byte_level_tokenizer
from graphllm.tokenizer.detokenizer import IncrementalDetokenizer
from graphllm.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.texts import TEXTS

VOCAB_SIZE = 3000


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_level_tokenizer(VOCAB_SIZE)


@pytest.mark.parametrize("vocab_size", [FIRST_WORD_ID, FIRST_WORD_ID + 1, FIRST_WORD_ID + 27, VOCAB_SIZE])
def test_vocabulary_has_exactly_the_asked_size_and_every_id_has_text(vocab_size: int) -> None:
    tokenizer = byte_level_tokenizer(vocab_size)
    assert tokenizer.vocab_size == vocab_size
    texts = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
    assert all(texts)
    assert len(set(texts)) == vocab_size
    assert all(tokenizer.decode([token_id], skip_special_tokens=False) for token_id in range(vocab_size))


def test_the_first_256_ids_are_the_bytes(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_bytes(byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]


def test_every_id_but_parts_of_characters_comes_back_from_its_text(tokenizer: Tokenizer) -> None:
    for token_id in (*range(128), *range(256, VOCAB_SIZE)):
        text = tokenizer.decode([token_id], skip_special_tokens=False)
        assert tokenizer.encode(text) == [token_id]


def test_a_prompt_of_words_has_as_many_tokens_as_ids(tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    token_ids = [draw.randrange(FIRST_WORD_ID, VOCAB_SIZE) for _ in range(500)]
    assert tokenizer.encode(tokenizer.decode(token_ids)) == token_ids


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_is_encoded_without_loss(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_random_output_streams_as_text(tokenizer: Tokenizer) -> None:
    draw = random.Random(1)
    token_ids = [draw.randrange(VOCAB_SIZE) for _ in range(300)]
    detokenizer = IncrementalDetokenizer(
        tokenizer, [], stop=(), skip_special_tokens=True, include_stop_str_in_output=False
    )
    streamed = "".join(detokenizer.append([token_id])[0] for token_id in token_ids) + detokenizer.finish()
    assert streamed == tokenizer.decode(token_ids)
    assert len(streamed) > 300


def test_special_tokens_are_no_text_and_end_a_turn(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(text) for text in SPECIAL_TOKENS]
    assert ids == [[256], [257], [258]]
    assert tokenizer.special_token_ids == {256, 257, 258}
    assert tokenizer.eos_token_ids == {256, 258}
    assert tokenizer.bos_token_id is None
    assert tokenizer.decode([65, 256, 258, 66]) == "AB"


def test_a_chat_is_chatml(tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello <|x|>"}]
    assert tokenizer.render_chat(messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello <|x|><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    token_ids = tokenizer.encode_chat(messages)
    assert token_ids.count(257) == 3
    assert token_ids.count(258) == 2


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(CheckpointError, match=f"{FIRST_WORD_ID - 1} tokens is too small.*{FIRST_WORD_ID}"):
        byte_level_tokenizer(FIRST_WORD_ID - 1)
    assert END_OF_TEXT in SPECIAL_TOKENS
