"""The tokenizer that a GGUF file's metadata describes, rebuilt with the `tokenizers` library.

Owns what the `tokenizer.ggml.*` fields mean: byte-level BPE ("gpt2") with the pre-tokenizers that
are named here, and SentencePiece BPE ("llama") with merges recovered from the scores. What a file
does not say is never guessed: an unknown pre-tokenizer is refused by name, because a wrong one
gives plausible text of lower quality. Field names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from graphllm.errors import CheckpointError
from graphllm.tokenizer.source import TokenizerSource

_SPACE_MARK = "▁"
# Splits of Llama 3 and Qwen 2; they differ in how many digits make a group.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


class TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenizer:
    """What comes before byte-level BPE.

    split: None is GPT-2's own pattern. ignore_merges: a word that is itself a token is not built
    from merges. adds_bos: what holds when the file does not say (`tokenizer.ggml.add_bos_token`).
    """

    individual_digits: bool = False
    split: str | None = None
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


_GPT2 = PreTokenizer()
_LLAMA3 = PreTokenizer(split=_LLAMA3_SPLIT, ignore_merges=True, adds_bos=True)
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "gpt2": _GPT2,
    "smollm": PreTokenizer(individual_digits=True),
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "qwen2": PreTokenizer(split=_QWEN2_SPLIT, nfc=True),
}
"""By the value of `tokenizer.ggml.pre`."""

# SentencePiece models whose rules the metadata does not carry.
_FOREIGN_SENTENCEPIECE = ("gemma", "phi3", "t5")
_SPECIAL_TOKEN_FIELDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
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
    steps: list[pre_tokenizers.PreTokenizer] = []
    if rules.individual_digits:
        # Every Unicode digit by itself; ByteLevel alone would keep digits outside ASCII together.
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if rules.split is not None:
        steps.append(pre_tokenizers.Split(Regex(rules.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rules.split is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_backend(vocabulary: _Vocabulary) -> Backend:
    """SentencePiece BPE with byte fallback, converted as transformers converts a Llama 2 tokenizer.

    The space mark is prepended to the text's start only, not after special tokens.
    """
    if vocabulary.architecture.startswith(_FOREIGN_SENTENCEPIECE):
        raise CheckpointError(
            f"The SentencePiece tokenizer of architecture {vocabulary.architecture!r} has rules that GGUF "
            "metadata does not carry; it is not supported."
        )
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
    normal = {token for token, token_id in ids.items() if token_types[token_id] == TokenType.NORMAL}
    ranked = []
    for token in normal:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in normal and right in normal:
                token_id = ids[token]
                rank = (-scores[token_id], -len(left), -len(right), token_id, ids[left], ids[right])
                ranked.append((rank, left, right))
    ranked.sort()
    return [(left, right) for _, left, right in ranked]


def _add_tokens(backend: Backend, vocabulary: _Vocabulary, *, always_special: set[int | None]) -> None:
    """Control tokens are special, user-defined ones are matched whole in text but are ordinary text."""
    special_types = (TokenType.CONTROL, TokenType.UNKNOWN)
    special, ordinary = [], []
    for token_id, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind in special_types or token_id in always_special:
            special.append(AddedToken(token, special=True, normalized=False))
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
