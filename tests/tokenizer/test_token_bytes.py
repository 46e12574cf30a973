"""A token is a byte string, a text is the tokens' bytes read as UTF-8."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as Backend

from graphllm.errors import CheckpointError
from graphllm.tokenizer.token_bytes import byte_level_alphabet, read_decoder_rules
from graphllm.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.small_tokenizers import tokenizer_of, train_byte_level


def test_byte_alphabet_is_the_librarys() -> None:
    alphabet = byte_level_alphabet()
    assert sorted(alphabet) == list(range(256))
    assert sorted(alphabet.values()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert (alphabet[ord(" ")], alphabet[ord("\n")], alphabet[ord("A")]) == ("Ġ", "Ċ", "A")


@settings(deadline=None)
@given(token_ids=st.lists(st.integers(0, 49_151), max_size=40), skip=st.booleans())
def test_byte_level_decoding_equals_the_librarys(
    demo: Tokenizer, demo_backend: Backend, token_ids: list[int], skip: bool
) -> None:
    expected = demo_backend.decode(token_ids, skip_special_tokens=skip)
    assert demo.decode(token_ids, skip_special_tokens=skip) == expected


def test_invalid_utf8_decodes_as_the_library_does() -> None:
    backend = train_byte_level()
    tokenizer = tokenizer_of(backend)
    ids = {byte: backend.token_to_id(char) for byte, char in byte_level_alphabet().items()}

    @settings(deadline=None, max_examples=300)
    @given(data=st.lists(st.integers(0x80, 0xFF) | st.integers(0, 255), max_size=16))
    def check(data: list[int]) -> None:
        token_ids = [ids[byte] for byte in data]
        assert tokenizer.decode(token_ids) == backend.decode(token_ids)

    check()


def test_added_tokens_outside_the_byte_alphabet_are_plain_text(small_backend: Backend) -> None:
    texts = ["two words", "漢字", "<é>", "Ġ x", "\n\n"]
    small_backend.add_tokens([AddedToken(text, normalized=False) for text in texts])
    tokenizer = tokenizer_of(small_backend)
    ids = [small_backend.token_to_id(text) for text in texts]
    for token_id in ids:
        assert tokenizer.decode([token_id]) == small_backend.decode([token_id])
    assert tokenizer.decode(ids) == small_backend.decode(ids)
    assert tokenizer.token_bytes(ids[1]) == "漢字".encode()


@settings(deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_sentencepiece_decoding_equals_the_librarys_where_bytes_are_valid(
    sentencepiece: Tokenizer, sentencepiece_backend: Backend, data: st.DataObject, skip: bool
) -> None:
    # A run of byte tokens spells whole characters; other tokens, special ones included, at random.
    spelt = st.characters(codec="utf-8").map(lambda char: [3 + byte for byte in char.encode()])
    other = st.integers(0, sentencepiece.vocab_size - 1).filter(lambda i: not 3 <= i < 259)
    runs = data.draw(st.lists(spelt | other.map(lambda token_id: [token_id]), max_size=20))
    ids = [token_id for run in runs for token_id in run]
    expected = sentencepiece_backend.decode(ids, skip_special_tokens=skip)
    assert sentencepiece.decode(ids, skip_special_tokens=skip) == expected


@pytest.mark.parametrize("spelling", ["▁▁▁▁", "▁▁", "▁the", "<0x20>"])
def test_one_opening_space_is_dropped_and_no_more(
    sentencepiece: Tokenizer, sentencepiece_backend: Backend, spelling: str
) -> None:
    token_id = sentencepiece_backend.token_to_id(spelling)
    text = sentencepiece.token_text(token_id)
    assert text.startswith(" ")
    assert sentencepiece.decode([1, token_id]) == text[1:] == sentencepiece_backend.decode([1, token_id])
    assert (
        sentencepiece.decode([token_id] * 3) == (text * 3)[1:] == sentencepiece_backend.decode([token_id] * 3)
    )


def test_only_the_invalid_bytes_of_a_sentencepiece_run_are_replaced(
    sentencepiece: Tokenizer, sentencepiece_backend: Backend
) -> None:
    ids = [3 + byte for byte in "你".encode() + b"\xff"]
    assert sentencepiece.decode(ids) == "你\ufffd"
    assert sentencepiece_backend.decode(ids) == "\ufffd" * 4  # what cannot be streamed


@settings(deadline=None)
@given(data=st.data(), scheme=st.sampled_from(["always", "first", "never"]))
def test_metaspace_decoding_equals_the_librarys(
    sentencepiece_backend: Backend, data: st.DataObject, scheme: str
) -> None:
    backend = Backend.from_str(sentencepiece_backend.to_str())
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer = tokenizer_of(backend)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=10))
    assert tokenizer.decode(ids) == backend.decode(ids)


def test_ids_outside_the_vocabulary_have_no_text(demo: Tokenizer, demo_backend: Backend) -> None:
    hello = demo.encode("Hello")
    for stray in (demo.vocab_size, 2**31, -1):
        assert demo.decode([stray, *hello, stray]) == "Hello"
        assert demo.token_bytes(stray) == b""
        assert demo.token_text(stray) == ""
    assert demo_backend.decode([demo.vocab_size, *hello]) == "Hello"


@pytest.mark.parametrize(
    ("decoder", "name"),
    [
        (decoders.WordPiece(), "WordPiece"),
        (decoders.CTC(), "CTC"),
        (decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]), "Strip"),
        (decoders.Sequence([decoders.Replace("▁", "_"), decoders.Fuse()]), "Replace"),
        (decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]), "ByteLevel"),
    ],
)
def test_decoder_that_is_no_byte_table_is_refused_by_name(decoder: decoders.Decoder, name: str) -> None:
    with pytest.raises(CheckpointError, match=name):
        read_decoder_rules(json.loads(decoder.__getstate__()))


def test_tokenizer_without_a_decoder_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no decoder"):
        read_decoder_rules(None)
