"""Streamed text is whole characters, equals decoding all at once, and stops where it should."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graphllm.errors import InvalidRequestError
from graphllm.tokenizer.detokenizer import MAX_STOP_CHARS, IncrementalDetokenizer, StopStrings
from graphllm.tokenizer.tokenizer import Tokenizer

SPECIAL_ID = 1  # <|im_start|> in the demo model, <s> in the SentencePiece one


def detokenizer(
    tokenizer: Tokenizer,
    prompt: Iterable[int] = (),
    *,
    stop: tuple[str, ...] | StopStrings = (),
    skip: bool = True,
    include: bool = False,
    min_tokens: int = 0,
) -> IncrementalDetokenizer:
    return IncrementalDetokenizer(
        tokenizer,
        list(prompt),
        stop=stop,
        skip_special_tokens=skip,
        include_stop_str_in_output=include,
        min_tokens=min_tokens,
    )


def groups(token_ids: list[int], sizes: list[int]) -> Iterator[list[int]]:
    """Cut into steps of the given sizes, then single tokens: what speculation would append."""
    start = 0
    for size in sizes:
        yield token_ids[start : start + size]
        start += size
    yield from ([token_id] for token_id in token_ids[start:])


def byte_ids(small: Tokenizer, data: bytes) -> list[int]:
    """One token for each byte; a byte-level vocabulary begins with its alphabet."""
    ids = {small.token_bytes(token_id): token_id for token_id in range(256)}
    return [ids[bytes([byte])] for byte in data]


def stream(tokenizer: Tokenizer, pieces: list[str], **options: object) -> tuple[list[str], str | None]:
    """What each step gives when every piece is one step; the end of the text is the last entry."""
    stream = detokenizer(tokenizer, **options)  # type: ignore[arg-type]
    shown = []
    for piece in pieces:
        text, matched = stream.append(tokenizer.encode(piece, add_special_tokens=False))
        shown.append(text)
        if matched is not None:
            return shown, matched
    return [*shown, stream.finish()], None


@settings(deadline=None, max_examples=150)
@given(
    token_ids=st.lists(st.integers(0, 255) | st.integers(0, 410), max_size=40),
    sizes=st.lists(st.integers(1, 4), max_size=6),
    skip=st.booleans(),
)
def test_streamed_text_equals_decoding_all_at_once(
    small: Tokenizer, token_ids: list[int], sizes: list[int], skip: bool
) -> None:
    stream = detokenizer(small, skip=skip)
    shown = [stream.append(step)[0] for step in groups(token_ids, sizes)]
    text = "".join(shown) + stream.finish()
    assert text == stream.text == small.decode(token_ids, skip_special_tokens=skip)


@settings(deadline=None, max_examples=150)
@given(data=st.data(), skip=st.booleans())
def test_sentencepiece_text_continues_its_prompt(
    sentencepiece: Tokenizer, data: st.DataObject, skip: bool
) -> None:
    any_id = st.integers(0, sentencepiece.vocab_size - 1)
    # Prompts end at a character's end: bytes of an unfinished one are the prompt's own.
    prompt = data.draw(st.lists(any_id.filter(lambda i: not 3 <= i < 259) | st.just(SPECIAL_ID), max_size=4))
    output = data.draw(st.lists(any_id | st.integers(259, 330), max_size=20))
    stream = detokenizer(sentencepiece, prompt, skip=skip)
    text = "".join(stream.append([token_id])[0] for token_id in output) + stream.finish()
    before = sentencepiece.decode(prompt, skip_special_tokens=skip)
    assert before + text == sentencepiece.decode(prompt + output, skip_special_tokens=skip)


def test_leading_space_stays_after_a_prompt_and_goes_without_one(sentencepiece: Tokenizer) -> None:
    the = sentencepiece.encode("the", add_special_tokens=False)
    assert sentencepiece.token_bytes(the[0]).startswith(b" ")
    assert detokenizer(sentencepiece, sentencepiece.encode("said")).append(the)[0] == " the"
    # A prompt of special tokens only shows nothing, unless special tokens are shown.
    assert detokenizer(sentencepiece, [SPECIAL_ID]).append(the)[0] == "the"
    assert detokenizer(sentencepiece, [SPECIAL_ID], skip=False).append(the)[0] == " the"


@settings(deadline=None)
@given(text=st.text(max_size=12), junk=st.binary(max_size=6))
def test_no_step_shows_half_a_character(small: Tokenizer, text: str, junk: bytes) -> None:
    stream = detokenizer(small)
    shown = ""
    for byte in text.encode():
        shown += stream.append(byte_ids(small, bytes([byte])))[0]
        assert text.startswith(shown)  # in particular no U+FFFD that is not the text's own
    assert shown == text
    for token_id in byte_ids(small, junk):
        shown += stream.append([token_id])[0]
    assert shown + stream.finish() == (text.encode() + junk).decode("utf-8", "replace")


def test_invalid_bytes_hold_nothing_back(small: Tokenizer) -> None:
    stream = detokenizer(small)
    for byte in (b"\xff", b"\x80", b"\xc0"):
        assert stream.append(byte_ids(small, byte))[0] == "\ufffd"
    assert stream.append(byte_ids(small, b"\xe4"))[0] == ""
    assert stream.append(byte_ids(small, b"\xbd"))[0] == ""
    assert stream.append(byte_ids(small, b"a"))[0] == "\ufffda"
    assert stream.append(byte_ids(small, b"\xf0\x9f"))[0] == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_special_tokens_are_skipped_or_spelt(demo: Tokenizer) -> None:
    ids = demo.encode("a<|im_end|>b")
    assert len(ids) == 3
    assert detokenizer(demo).append(ids)[0] == "ab"
    assert detokenizer(demo, skip=False).append(ids)[0] == "a<|im_end|>b"
    assert detokenizer(demo, skip=False, stop=("<|im_end|>",)).append(ids) == ("a", "<|im_end|>")
    assert detokenizer(demo, skip=True, stop=("<|im_end|>",)).append(ids) == ("ab", None)


def test_stop_string_across_tokens_is_held_back_and_cut(demo: Tokenizer) -> None:
    shown, matched = stream(demo, ["one ", "two", " th", "ree", " four"], stop=("two three",))
    assert (shown, matched) == (["one ", "", "", ""], "two three")


def test_beginning_of_a_stop_string_is_shown_once_it_cannot_match(demo: Tokenizer) -> None:
    shown, matched = stream(demo, ["ab", "ab", "ax", "ab"], stop=("ababab",))
    assert (shown, matched) == (["", "", "ababax", "", "ab"], None)


def test_only_what_a_stop_string_could_need_is_held(demo: Tokenizer) -> None:
    shown, _ = stream(demo, ["xxaab", "aa", "c"], stop=("aabaax",))
    assert shown == ["xx", "", "aabaac", ""]
    shown, _ = stream(demo, ["aaaa", "a", "a"], stop=("aab",))
    assert shown == ["aa", "a", "a", "aa"]


def test_stop_string_inside_one_token_cuts_the_token(demo: Tokenizer) -> None:
    ids = demo.encode(" something")
    assert len(ids) == 1
    assert detokenizer(demo, stop=("met",)).append(ids) == (" so", "met")
    assert detokenizer(demo, stop=("met",), include=True).append(ids) == (" somet", "met")


def test_first_completed_match_wins_and_then_the_longest(demo: Tokenizer) -> None:
    ids = demo.encode("xabcd")
    assert detokenizer(demo, stop=("abcd", "bc")).append(ids) == ("xa", "bc")
    assert detokenizer(demo, stop=("c", "abc", "bc")).append(ids) == ("x", "abc")
    assert detokenizer(demo, stop=("d", "xab")).append(ids) == ("", "xab")


def test_tokens_after_a_match_are_not_taken(demo: Tokenizer) -> None:
    stream = detokenizer(demo, stop=("b",))
    assert stream.append(demo.encode("a b c d")) == ("a ", "b")
    assert (stream.num_tokens, stream.stop_string, stream.finish(), stream.text) == (2, "b", "", "a ")


def test_matches_completed_within_min_tokens_do_not_count(demo: Tokenizer) -> None:
    x = demo.encode("x")
    assert len(x) == 1
    for min_tokens, taken in ((0, 1), (1, 2), (3, 4)):
        stream = detokenizer(demo, stop=("x",), min_tokens=min_tokens)
        texts = []
        while stream.stop_string is None:
            texts.append(stream.append(x)[0])
        assert stream.num_tokens == taken
        assert texts == ["x"] * (taken - 1) + [""]  # and hold nothing back
    # It may begin within them.
    stream = detokenizer(demo, stop=("xx",), min_tokens=1)
    assert [stream.append(x) for _ in range(2)] == [("", None), ("", "xx")]
    # One step may cross the border.
    assert detokenizer(demo, stop=("x",), min_tokens=2).append(x * 5) == ("xx", "x")


def test_stop_string_may_end_in_a_character_of_several_tokens(small: Tokenizer) -> None:
    stream = detokenizer(small, stop=("é!",))
    data = byte_ids(small, "aé!".encode())
    assert [stream.append([token_id]) for token_id in data] == [
        ("a", None),
        ("", None),
        ("", None),
        ("", "é!"),
    ]


def expected_stop(text: str, stops: list[str]) -> tuple[str, str] | None:
    """By the definition: the first position at which any stop string ends, the longest one there."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            longest = max(matches, key=len)
            return text[: end - len(longest)], longest
    return None


@settings(deadline=None, max_examples=300)
@given(
    text=st.text(alphabet="abc", max_size=30),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 5), max_size=10),
    include=st.booleans(),
)
@example(text="aabaabaac", stops=["aabaac"], sizes=[], include=False)
def test_stop_strings_match_by_definition_whatever_the_steps(
    small: Tokenizer, text: str, stops: list[str], sizes: list[int], include: bool
) -> None:
    stream = detokenizer(small, stop=tuple(stops), include=include)
    expected = expected_stop(text, stops)
    shown, read = "", 0
    beginnings = {stop[:n] for stop in stops for n in range(len(stop))}
    for step in groups(byte_ids(small, text.encode()), sizes):
        new, matched = stream.append(step)
        shown += new
        read += len(step)
        if matched is not None:
            break
        so_far = text[:read]
        # Held back is exactly the longest suffix that begins a stop string.
        held = next(so_far[start:] for start in range(read + 1) if so_far[start:] in beginnings)
        assert shown == so_far.removesuffix(held)
    shown += stream.finish()
    assert stream.text == shown
    if expected is None:
        assert (stream.stop_string, shown) == (None, text)
    else:
        before, match = expected
        assert (stream.stop_string, shown) == (match, before + match if include else before)


def test_sequences_may_share_their_stop_strings(demo: Tokenizer) -> None:
    stop = StopStrings(("ab",))
    first, second = detokenizer(demo, stop=stop), detokenizer(demo, stop=stop)
    assert first.append(demo.encode("a")) == ("", None)
    assert second.append(demo.encode("b")) == ("b", None)
    assert first.append(demo.encode("b")) == ("", "ab")


def test_stop_strings_that_would_take_long_to_prepare_are_refused(demo: Tokenizer) -> None:
    detokenizer(demo, stop=("x" * MAX_STOP_CHARS,))
    with pytest.raises(InvalidRequestError) as caught:
        detokenizer(demo, stop=("x" * MAX_STOP_CHARS, "y"))
    assert caught.value.param == "stop"


def test_work_is_linear_even_when_much_is_held(demo: Tokenizer) -> None:
    """Text that keeps a 1,000-character stop string on the brink costs a small multiple of plain text."""
    a = demo.encode("a")

    def seconds(num_tokens: int) -> float:
        stream = detokenizer(demo, stop=("a" * 1000 + "b",))
        start = time.process_time()
        for _ in range(num_tokens):
            stream.append(a)
        return time.process_time() - start

    assert min(seconds(20_000) for _ in range(3)) < 1.0


def test_a_special_token_that_is_to_be_shown_is_text_and_others_are_not(demo: Tokenizer) -> None:
    other_id = next(token_id for token_id in sorted(demo.special_token_ids) if token_id != SPECIAL_ID)
    stream = IncrementalDetokenizer(
        demo,
        [],
        stop=("im_start",),
        skip_special_tokens=True,
        include_stop_str_in_output=False,
        shown_special_token_ids=frozenset({SPECIAL_ID}),
    )
    assert stream.append([other_id]) == ("", None)
    # It takes part in stop strings as any text does.
    assert stream.append([SPECIAL_ID]) == ("<|", "im_start")


def test_added_tokens_are_found_by_their_text(demo: Tokenizer) -> None:
    assert demo.added_tokens["<|im_start|>"] == SPECIAL_ID
    assert set(demo.added_tokens.values()) >= demo.special_token_ids
