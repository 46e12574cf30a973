"""The tokenizer that a GGUF file's metadata describes, rebuilt with the `tokenizers` library.

Owns what the `tokenizer.ggml.*` fields mean: byte-level BPE ("gpt2") with the pre-tokenizers of
`gguf_pre_tokenizers.py`, and SentencePiece BPE ("llama") with merges recovered from the scores. What a
file does not say is never guessed: an unknown pre-tokenizer is refused by name.
Field names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import IntEnum
from itertools import groupby
from typing import Any

from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from graphllm.errors import CheckpointError
from graphllm.tokenizer.gguf_pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from graphllm.tokenizer.source import TokenizerSource

_SPACE_MARK = "▁"


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_SPECIAL_TOKEN_FIELDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_PHI3_MARKER = re.compile(r"<\|(?!endoftext)\w+\|>|</s>")
# A chat model ends its turn, or a message to a tool, with tokens of their own.
_END_FIELDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def read_gguf_tokenizer(fields: Mapping[str, Any]) -> TokenizerSource:
    """Build the tokenizer from metadata fields, given as plain Python values by their GGUF names.

    Raises CheckpointError, naming the field, for what is missing, inconsistent or not supported.
    """
    vocabulary = _Vocabulary(fields)
    match vocabulary.model:
        case "gpt2":
            backend, adds_bos = _byte_level_backend(vocabulary), _pre_tokenizer(vocabulary).adds_bos
        case "llama":
            backend, adds_bos = _sentencepiece_backend(vocabulary), True
        case model:
            raise CheckpointError(
                f"tokenizer.ggml.model is {model!r}; supported are 'gpt2' (byte-level BPE) and 'llama' "
                "(SentencePiece BPE)."
            )
    special_tokens = {
        name: vocabulary.tokens[token_id]
        for name, field in _SPECIAL_TOKEN_FIELDS.items()
        if (token_id := vocabulary.token_id(field)) is not None
    }
    end_ids = frozenset(
        token_id for field in _END_FIELDS if (token_id := vocabulary.token_id(field)) is not None
    )
    bos_token_id = vocabulary.token_id("bos_token_id")
    _add_tokens(backend, vocabulary, always_special={*end_ids, bos_token_id})
    _add_post_processor(backend, vocabulary, adds_bos=adds_bos)
    return TokenizerSource(
        backend=backend,
        special_tokens=special_tokens,
        bos_token_id=bos_token_id,
        eos_token_ids=end_ids,
        chat_templates=_chat_templates(fields),
    )


class _Vocabulary:
    """The checked lists of the metadata, and its scalars by their short names."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields
        self.model: str = self._require("model", str)
        self.tokens: list[str] = self._require("tokens", list)
        self.ids = {token: token_id for token_id, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            repeated = next(t for i, t in enumerate(self.tokens) if self.ids[t] != i)
            raise CheckpointError(f"tokenizer.ggml.tokens has the token {repeated!r} twice.")
        self.types: list[int] = self._aligned("token_type", default=TokenType.NORMAL)
        self.architecture = str(fields.get("general.architecture", ""))

    def get(self, name: str, default: Any = None) -> Any:
        return self._fields.get(f"tokenizer.ggml.{name}", default)

    def token_id(self, name: str) -> int | None:
        """A token id field, or None. Raises CheckpointError when no such token exists."""
        token_id = self.get(name)
        if token_id is None:
            return None
        if not isinstance(token_id, int) or not 0 <= token_id < len(self.tokens):
            raise CheckpointError(
                f"tokenizer.ggml.{name} is {token_id!r}, but the vocabulary has {len(self.tokens)} tokens."
            )
        return token_id

    def merges(self) -> list[tuple[str, str]] | None:
        """The merges in the file's order, or None if it lists none."""
        lines = self.get("merges")
        if lines is None:
            return None
        merges = []
        for line in lines:
            left, separator, right = line.partition(" ")
            if not separator or left not in self.ids or right not in self.ids or left + right not in self.ids:
                raise CheckpointError(
                    f"tokenizer.ggml.merges has {line!r}, which does not join two tokens into a third."
                )
            merges.append((left, right))
        return merges

    def scores(self) -> list[float]:
        self._require("scores", list)
        return self._aligned("scores", default=0.0)

    def _require(self, name: str, kind: type) -> Any:
        value = self.get(name)
        if not isinstance(value, kind) or not value:
            what = "missing" if value is None else f"not a {kind.__name__} of any length"
            raise CheckpointError(f"tokenizer.ggml.{name} is {what}.")
        return value

    def _aligned(self, name: str, *, default: Any) -> list[Any]:
        values = self.get(name)
        if values is None:
            return [default] * len(self.tokens)
        if len(values) != len(self.tokens):
            raise CheckpointError(
                f"tokenizer.ggml.{name} has {len(values)} entries for {len(self.tokens)} tokens."
            )
        return list(values)


def _pre_tokenizer(vocabulary: _Vocabulary) -> PreTokenizer:
    name = vocabulary.get("pre")
    if name is None:
        raise CheckpointError(
            "tokenizer.ggml.pre is missing, so how text is split before BPE is unknown; the file was made by "
            "an old converter, convert the model again."
        )
    if name not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"tokenizer.ggml.pre is {name!r}, a pre-tokenizer that is not supported; supported are "
            f"{', '.join(sorted(PRE_TOKENIZERS))}."
        )
    return PRE_TOKENIZERS[name]


def _byte_level_backend(vocabulary: _Vocabulary) -> Backend:
    rules = _pre_tokenizer(vocabulary)
    merges = vocabulary.merges()
    if merges is None:
        raise CheckpointError("tokenizer.ggml.merges is missing.")
    backend = Backend(BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=rules.ignore_merges))
    if rules.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(rules.steps())
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_backend(vocabulary: _Vocabulary) -> Backend:
    """SentencePiece BPE with byte fallback, converted as transformers converts a Llama 2 tokenizer.

    The space mark is prepended to the text's start only, not after special tokens. User-defined pieces,
    such as Gemma's runs of blanks, are cut out of the text before (`_add_tokens`), the longest first, as
    SentencePiece does.
    """
    missing = next((byte for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary.ids), None)
    if missing is not None:
        raise CheckpointError(
            f"tokenizer.ggml.tokens has no token '<0x{missing:02X}>'; a SentencePiece vocabulary without "
            "byte fallback is not supported."
        )
    merges = vocabulary.merges()
    if merges is None:
        merges = merges_from_scores(vocabulary.ids, vocabulary.scores(), token_types=vocabulary.types)
    backend = Backend(BPE(vocab=vocabulary.ids, merges=merges, fuse_unk=True, byte_fallback=True))
    prepends_space = bool(vocabulary.get("add_space_prefix", True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=_SPACE_MARK, prepend_scheme="first" if prepends_space else "never", split=False
    )
    steps = [decoders.Replace(_SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prepends_space:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    return backend


def merges_from_scores(
    ids: Mapping[str, int], scores: list[float], *, token_types: list[int]
) -> list[tuple[str, str]]:
    """The merges a SentencePiece BPE vocabulary implies: each way to join two tokens into a third.

    The joined token's score decides (higher first), then the longer left half, then the longer
    right half, then the halves' ids, as in transformers' conversion.
    """
    # Other types are never built from parts: they are matched whole, or are bytes.
    normal = {token: token_id for token, token_id in ids.items() if token_types[token_id] == TokenType.NORMAL}
    merges: list[tuple[str, str]] = []
    # Scores seldom tie, so a token's own ways are nearly all there is to sort; there are a million of them.
    by_score = sorted(normal, key=lambda token: -scores[normal[token]])
    for _, tied in groupby(by_score, key=lambda token: scores[normal[token]]):
        ways = [
            (left, right)
            for token in tied
            for cut in range(len(token) - 1, 0, -1)
            if (left := token[:cut]) in normal and (right := token[cut:]) in normal
        ]
        if len(ways) > 1:
            ways.sort(key=lambda way: (-len(way[0]), -len(way[1]), *(ids[t] for t in ("".join(way), *way))))
        merges += ways
    return merges


def _add_tokens(backend: Backend, vocabulary: _Vocabulary, *, always_special: set[int | None]) -> None:
    """Control tokens are special, user-defined ones are matched whole in text but are ordinary text.

    Phi-3's markers swallow blanks and line ends behind them, which no field says.
    """
    is_phi3 = vocabulary.model == "llama" and vocabulary.architecture == "phi3"
    special_types = (TokenType.CONTROL, TokenType.UNKNOWN)
    special, ordinary = [], []
    for token_id, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind in special_types or token_id in always_special:
            swallows = is_phi3 and _PHI3_MARKER.fullmatch(token) is not None
            special.append(AddedToken(token, special=True, normalized=False, rstrip=swallows))
        elif kind == TokenType.USER_DEFINED:
            ordinary.append(AddedToken(token, special=False, normalized=False))
    backend.add_special_tokens(special)
    backend.add_tokens(ordinary)


def _add_post_processor(backend: Backend, vocabulary: _Vocabulary, *, adds_bos: bool) -> None:
    template = ["$A"]
    added = []
    for name, flag, field, default, position in (
        ("BOS", "add_bos_token", "bos_token_id", adds_bos, 0),
        ("EOS", "add_eos_token", "eos_token_id", False, 2),
    ):
        token_id = vocabulary.token_id(field)
        if token_id is not None and vocabulary.get(flag, default):
            template.insert(position, name)
            added.append({"id": name, "ids": [token_id], "tokens": [vocabulary.tokens[token_id]]})
    if added:
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=added)


def _chat_templates(fields: Mapping[str, Any]) -> dict[str, str]:
    """The default template, and the named ones of `tokenizer.chat_templates`."""
    templates = {}
    if isinstance(default := fields.get("tokenizer.chat_template"), str):
        templates["default"] = default
    for name in fields.get("tokenizer.chat_templates") or ():
        template = fields.get(f"tokenizer.chat_template.{name}")
        if not isinstance(template, str):
            raise CheckpointError(f"tokenizer.chat_template.{name} is missing.")
        templates[name] = template
    return templates
