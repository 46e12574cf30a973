"""Events as bytes, read back by a reader that follows the standard."""

from __future__ import annotations

import json
import re

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphllm.server.sse import DONE, TEXT_SLOT, ChunkTemplate, encode_json, encode_text, frame, named_frame

TEXTS = [
    "",
    "plain",
    "a\nb\r\nc\rd",
    'quo"te \\',
    "\x00\x1f\x7f",
    "\x85\u2028\u2029",
    "héllo 日本 \U0001f600",
    "</s>",
]


def read_events(stream: bytes) -> list[str]:
    """The data of each event, by the rules of the WHATWG standard, and as strictly as one can."""
    events, data = [], []
    lines = re.split(r"\r\n|\r|\n", stream.decode())
    assert lines.pop() == ""
    for line in lines:
        if line:
            field, _, value = line.partition(": ")
            assert field == "data"
            data.append(value)
        else:
            events.append("\n".join(data))
            data = []
    assert data == []
    return events


def template() -> ChunkTemplate:
    return ChunkTemplate.from_payload(
        {"id": "x", "choices": [{"index": 0, "delta": {"content": TEXT_SLOT}, "finish_reason": None}]}
    )


@pytest.mark.parametrize("text", TEXTS)
def test_rendered_chunk_carries_exactly_its_text(text: str) -> None:
    (event,) = read_events(template().render(text))
    assert json.loads(event) == {
        "id": "x",
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}],
    }


@given(st.text())
def test_any_text_is_one_line_to_any_line_reader(text: str) -> None:
    encoded = encode_text(text)
    assert orjson.loads(encoded) == text
    assert len(encoded.decode().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\ud800b", "a\ufffdb"),
        ("\udc00", "\ufffd"),
        ("\ud83d\ude00", "\U0001f600"),
        ("é\udfff\u2028", "é\ufffd\u2028"),
    ],
)
def test_surrogates_become_text_and_never_an_error(text: str, expected: str) -> None:
    assert orjson.loads(encode_text(text)) == expected


def test_several_chunks_and_done_are_separate_events() -> None:
    chunk = template()
    stream = chunk.render("a") + chunk.render("b") + frame(b'{"usage":1}') + DONE
    events = read_events(stream)
    assert len(events) == 4
    assert events[2:] == ['{"usage":1}', "[DONE]"]


@pytest.mark.parametrize("data", [b"a\nb", b"a\r\nb", b"a\rb", b"a\n\ndata: [DONE]\n\nb"])
def test_data_with_line_ends_stays_one_event(data: bytes) -> None:
    (event,) = read_events(frame(data))
    assert event == re.sub(r"\r\n|\r", "\n", data.decode())


def test_payload_strings_cannot_be_taken_for_the_slot() -> None:
    chunk = ChunkTemplate.from_payload({"model": "\x00", "text": TEXT_SLOT})
    (event,) = read_events(chunk.render("t"))
    assert json.loads(event) == {"model": "\x00", "text": "t"}


@pytest.mark.parametrize("payload", [{"a": 1}, {"a": TEXT_SLOT, "b": TEXT_SLOT}])
def test_payload_without_exactly_one_slot_is_refused(payload: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="once"):
        ChunkTemplate.from_payload(payload)


@pytest.mark.parametrize("text", TEXTS)
def test_json_for_an_event_is_one_line_and_reads_back(text: str) -> None:
    value = {"text": text, "more": [text, 1, None]}
    encoded = encode_json(value)
    assert json.loads(encoded) == value
    assert len(encoded.decode().splitlines()) == 1


def test_json_of_a_lone_surrogate_is_ascii() -> None:
    encoded = encode_json({"name": "\ud800 é"})
    assert encoded.isascii() and json.loads(encoded) == {"name": "\ud800 é"}


def test_named_event_is_two_lines() -> None:
    assert named_frame("ping", b"{}") == b"event: ping\ndata: {}\n\n"
