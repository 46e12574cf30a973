"""The bytes that each token stands for, read from a tokenizer's vocabulary and decoder.

Owns the one rule by which all text leaves the engine: a token is a byte string, a text is the
tokens' bytes joined and read as UTF-8. It understands the two kinds of decoders that language
models have, byte-level (GPT-2, Llama 3, Qwen) and SentencePiece-like (Llama 2, Mistral, Gemma), and
refuses others. Streaming on top of it is in `detokenizer.py`.

Equal to the `tokenizers` library's own decoding, with one exception: when a run of SentencePiece
byte tokens is not valid UTF-8, the library replaces the whole run, valid characters included, and
so cannot be streamed; here only the invalid bytes are replaced.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from graphllm.errors import CheckpointError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_level_alphabet() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2, 2019).

    Printable Latin-1 characters stand for themselves, the other bytes for U+0100 onwards, in order.
    """
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


class LeadingSpace(Enum):
    """What becomes of the space that opens a text (not: a continuation of one)."""

    KEEP = auto()
    STRIP_ONE = auto()
    STRIP_TOKEN = auto()  # every space mark of the first token, as the Metaspace decoder does


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderRules:
    """How a vocabulary entry is spelled. `space_marks` are the characters that mean a space."""

    byte_level: bool
    space_marks: frozenset[str] = frozenset()
    byte_fallback: bool = False
    leading_space: LeadingSpace = LeadingSpace.KEEP


def read_decoder_rules(decoder: Mapping[str, Any] | None) -> DecoderRules:
    """Understand the "decoder" object of a tokenizer.json.

    Raises CheckpointError, naming the decoder, for one that does not map tokens to bytes one by one.
    """
    if decoder is None:
        raise CheckpointError("The tokenizer has no decoder, so tokens cannot be turned into text.")
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return DecoderRules(byte_level=True)
    space_marks: set[str] = set()
    byte_fallback = False
    is_fused = False
    leading_space = LeadingSpace.KEEP
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(mark)}, "content": " "} if len(mark) == 1:
                space_marks.add(mark)
            case {"type": "Metaspace", "replacement": str(mark)}:
                space_marks.add(mark)
                if step.get("prepend_scheme", "always") != "never":
                    leading_space = LeadingSpace.STRIP_TOKEN
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                is_fused = True
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0} if is_fused:
                leading_space = LeadingSpace.STRIP_ONE
            case _:
                raise CheckpointError(
                    f"The tokenizer's decoder has a step {step['type']!r} ({step}), which is not supported "
                    "here; supported are byte-level and SentencePiece-like decoders."
                )
    return DecoderRules(
        byte_level=False,
        space_marks=frozenset(space_marks),
        byte_fallback=byte_fallback,
        leading_space=leading_space,
    )


class ByteTable(dict[int, bytes]):
    """Token id to bytes; ids outside the vocabulary (a model may have padding rows) mean no bytes."""

    def __missing__(self, token_id: int) -> bytes:
        return b""


class TokenBytes:
    """The byte table of one vocabulary, with and without its special tokens."""

    __slots__ = ("_rules", "_spellings", "all", "visible")

    def __init__(
        self, spellings: Mapping[int, str], *, rules: DecoderRules, special_token_ids: Iterable[int]
    ) -> None:
        """spellings: token id to the vocabulary's own spelling of the token ("Ġthe", "▁the")."""
        self._rules = rules
        self._spellings = spellings
        spell = _byte_level_bytes(spellings) if rules.byte_level else _sentencepiece_bytes(spellings, rules)
        self.all = ByteTable(spell)
        self.visible = ByteTable(self.all)
        for token_id in special_token_ids:
            self.visible[token_id] = b""

    def table(self, *, skip_special_tokens: bool) -> ByteTable:
        """The bytes of each token; empty for special tokens if they are skipped."""
        return self.visible if skip_special_tokens else self.all

    @property
    def strips_leading_space(self) -> bool:
        """Whether a token reads differently when no visible token stands before it."""
        return self._rules.leading_space is not LeadingSpace.KEEP

    def leading_bytes(self, token_id: int) -> bytes:
        """The token's bytes when it is the first visible token of a text."""
        token_bytes = self.all[token_id]
        match self._rules.leading_space:
            case LeadingSpace.KEEP:
                return token_bytes
            case LeadingSpace.STRIP_ONE:
                return token_bytes.removeprefix(b" ")
            case LeadingSpace.STRIP_TOKEN:
                spelling = self._spellings.get(token_id, "")
                if not self._rules.space_marks.isdisjoint(spelling):
                    return "".join(c for c in spelling if c not in self._rules.space_marks).encode()
                return token_bytes

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool) -> str:
        """A whole text, opened by the first of `token_ids`; invalid UTF-8 becomes U+FFFD."""
        table = self.table(skip_special_tokens=skip_special_tokens)
        if not self.strips_leading_space:
            return b"".join([table[token_id] for token_id in token_ids]).decode("utf-8", "replace")
        visible = [token_id for token_id in token_ids if table[token_id]]
        if not visible:
            return ""
        pieces = [self.leading_bytes(visible[0]), *(table[token_id] for token_id in visible[1:])]
        return b"".join(pieces).decode("utf-8", "replace")


def _byte_level_bytes(spellings: Mapping[int, str]) -> dict[int, bytes]:
    characters = byte_level_alphabet()
    alphabet = frozenset(characters.values())
    to_latin1 = {ord(character): byte for byte, character in characters.items()}
    return {
        # An added token may be spelled outside the alphabet; the library then takes it as plain text.
        token_id: spelling.translate(to_latin1).encode("latin-1")
        if alphabet.issuperset(spelling)
        else spelling.encode()
        for token_id, spelling in spellings.items()
    }


def _sentencepiece_bytes(spellings: Mapping[int, str], rules: DecoderRules) -> dict[int, bytes]:
    to_space = {ord(mark): " " for mark in rules.space_marks}
    table = {}
    for token_id, spelling in spellings.items():
        byte_token = _BYTE_TOKEN.fullmatch(spelling) if rules.byte_fallback else None
        if byte_token is not None:
            table[token_id] = bytes([int(byte_token[1], 16)])
        else:
            table[token_id] = spelling.translate(to_space).encode()
    return table
