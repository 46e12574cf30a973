"""Server-sent events as bytes: framing, and templates for events that differ in one text only.

Owns the wire form of an event stream. Knows nothing of what the events mean, and writes nowhere.

A streamed token is one event whose JSON is the same every time but for one string. Encoding the
whole object costs several times what encoding the string does, so the bytes around it are made
once a request and each event is three pieces put together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import orjson

CONTENT_TYPE = "text/event-stream; charset=utf-8"
DONE = b"data: [DONE]\n\n"

# Stands for the text in `ChunkTemplate.from_payload`. JSON escapes control characters, so a raw NUL
# marks the place beyond doubt, whatever strings the payload carries.
_SLOT_BYTES = b"\x00"
TEXT_SLOT = orjson.Fragment(_SLOT_BYTES)

_LINE_END = re.compile(rb"\r\n|\r|\n")


def frame(data: bytes) -> bytes:
    """One event that carries `data`. JSON has no line ends; other data gets one field a line."""
    if b"\n" in data or b"\r" in data:
        data = _LINE_END.sub(b"\ndata: ", data)
    return b"data: " + data + b"\n\n"


def named_frame(event: str, data: bytes) -> bytes:
    """One event with a name, for APIs whose clients tell events apart by it. `data` is JSON, in one line."""
    return b"event: " + event.encode() + b"\ndata: " + data + b"\n\n"


def encode_json(value: Any) -> bytes:
    """JSON that is safe to put into an event, whatever text a model wrote into it (see `encode_text`)."""
    try:
        encoded = orjson.dumps(value)
    except TypeError:
        # A lone surrogate, which only ASCII escapes can carry.
        encoded = json.dumps(value).encode()
    return encoded if encoded.isascii() else _escape_line_separators(encoded)


def encode_text(text: str) -> bytes:
    """`text` as a JSON string, safe to put into an event.

    Escapes the three line separators outside ASCII, which JSON and SSE allow but many clients'
    line readers split at. A lone surrogate, which UTF-8 cannot carry, becomes U+FFFD.
    """
    try:
        encoded = orjson.dumps(text)
    except TypeError:
        encoded = orjson.dumps(text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"))
    return encoded if text.isascii() else _escape_line_separators(encoded)


def _escape_line_separators(encoded: bytes) -> bytes:
    return (
        encoded.replace(b"\xc2\x85", b"\\u0085")
        .replace(b"\xe2\x80\xa8", b"\\u2028")
        .replace(b"\xe2\x80\xa9", b"\\u2029")
    )


class ChunkTemplate:
    """An event with one place for a text: `prefix`, the text as a JSON string, `suffix`."""

    __slots__ = ("prefix", "suffix")

    def __init__(self, prefix: bytes, suffix: bytes) -> None:
        self.prefix = prefix
        self.suffix = suffix

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> ChunkTemplate:
        """The template of an event with this JSON, where one value is `TEXT_SLOT`."""
        prefix, *rest = frame(orjson.dumps(payload)).split(_SLOT_BYTES)
        if len(rest) != 1:
            raise ValueError(f"the payload must hold TEXT_SLOT once, not {len(rest)} times")
        return cls(prefix, rest[0])

    def render(self, text: str) -> bytes:
        return self.prefix + encode_text(text) + self.suffix
