"""A model's tokens as llguidance wants them: a trie over their bytes, with special tokens set apart.

Owns the library's tokenizer object and the few look-ups by bytes that the rest of this package needs. Knows
tokenizers by the protocol `TokenizerLike` only, so any kind that has bytes for its tokens will do.

Building it takes 0.13 s and 14 MB for a vocabulary of 49,152 tokens, 0.45 s and 55 MB for 131,072, 1.0 s and
83 MB for 262,144, on one core: it belongs where the model is loaded, not on a serving loop.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import llguidance
import numpy as np
from numpy.typing import NDArray

from graphllm.constraint import num_mask_words

# Forced text is tokenized as the model's tokenizer does it, so that the model sees what it was trained on.
# Only the first token of it is used at a time, so no more than this many characters have to be looked at.
_CANONICAL_CHARACTERS = 96
# Parts of tokens that were searched for: the same few markers come with most requests.
_MAX_KNOWN_PARTS = 32


class TokenizerLike(Protocol):
    """What is needed of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def special_token_ids(self) -> frozenset[int]: ...
    @property
    def eos_token_ids(self) -> frozenset[int]: ...
    def token_bytes(self, token_id: int, /) -> bytes: ...
    def encode(self, text: str, /, *, add_special_tokens: bool) -> list[int]: ...


class GrammarVocabulary:
    """The tokens of one model; it never changes, whatever thread asks.

    vocab_size: of the model's logits, which may be larger than the tokenizer's; the ids in between, and
    tokens without bytes, are never allowed. special_tokens: text to id, of the special tokens only.
    """

    __slots__ = (
        "_blob",
        "_containing",
        "_first_bytes",
        "_ids",
        "_sorted",
        "_start_of_id",
        "_starts",
        "_text",
        "library",
        "max_token_length",
        "num_words",
        "special_tokens",
        "token_bytes",
        "token_lengths",
        "vocab_size",
    )

    def __init__(
        self, tokenizer: TokenizerLike, *, vocab_size: int, eos_token_ids: Iterable[int] | None = None
    ) -> None:
        """eos_token_ids: tokens that end a generation; None for the tokenizer's own."""
        tokens = [
            tokenizer.token_bytes(token_id) for token_id in range(min(vocab_size, tokenizer.vocab_size))
        ]
        tokens += [b""] * (vocab_size - len(tokens))
        end_ids = tokenizer.eos_token_ids if eos_token_ids is None else eos_token_ids
        ends = sorted(token_id for token_id in end_ids if 0 <= token_id < vocab_size)
        special = frozenset(i for i in tokenizer.special_token_ids if i < vocab_size) | frozenset(ends)
        self.vocab_size = vocab_size
        self.num_words = num_mask_words(vocab_size)
        self.token_bytes: Sequence[bytes] = tokens
        self.token_lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))  # [vocab_size] int64
        self.max_token_length = int(self.token_lengths.max(initial=0))  # bytes
        self.special_tokens = {tokens[i].decode("utf-8", "replace"): i for i in sorted(special) if tokens[i]}
        wrapper = _Wrapper(tokenizer, tokens, special=special, end=ends[0] if ends else None)
        self.library = llguidance.LLTokenizer(wrapper, eos_token=ends or None)
        wrapper.greedy = self.library.greedy_tokenize
        by_bytes = sorted((token, i) for i, token in enumerate(tokens) if token and i not in special)
        self._sorted = [token for token, _ in by_bytes]
        self._ids = np.asarray([i for _, i in by_bytes], np.int64)  # [num_tokens] int64, in the same order
        # All tokens in one array, each with a byte behind it that no UTF-8 text has.
        self._text = b"\xff".join([*self._sorted, b""])
        self._blob = np.frombuffer(self._text, np.uint8)
        lengths = np.fromiter(map(len, self._sorted), np.int64, len(self._sorted)) + 1
        self._starts: NDArray[np.int64] = np.cumsum(lengths) - lengths  # [num_tokens] int64, places in _blob
        self._first_bytes: list[int] = self._starts.tolist()  # the same, for single look-ups
        self._containing: dict[bytes, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._start_of_id = np.zeros(vocab_size, np.int64)
        self._start_of_id[self._ids] = self._starts

    def empty_mask(self) -> NDArray[np.int32]:
        """Room for one mask as the library writes it.  # [>= num_words] int32

        Without an end token the library adds one of its own behind the vocabulary, hence the `>=`.
        """
        return np.zeros(num_mask_words(self.library.vocab_size), np.int32)

    def ids_of(self, token: bytes) -> list[int]:
        """Ids of the tokens with exactly these bytes; special tokens are not among them."""
        found = []
        for place in range(bisect_left(self._sorted, token), len(self._sorted)):
            if self._sorted[place] != token:
                break
            found.append(int(self._ids[place]))
        return found

    def starting_with(self, prefix: bytes) -> NDArray[np.int64]:
        """Ids of the tokens that start with `prefix`, special ones excepted.  # [n] int64"""
        first = bisect_left(self._sorted, prefix)
        if first == len(self._sorted) or not self._sorted[first].startswith(prefix):
            return self._ids[:0]
        behind = bisect_right(self._sorted, prefix, first, key=lambda token: token[: len(prefix)])
        return self._ids[first:behind]

    def containing(self, part: bytes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids of the tokens that have `part` in them, special ones excepted, and where it ends for the
        first time.

        Both [n] int64. `part` is not empty and has no byte 255.
        """
        if (known := self._containing.get(part)) is not None:
            return known
        places = []
        place = self._text.find(part)
        while place >= 0:
            places.append(place)
            token = bisect_right(self._first_bytes, place)  # one place in each token is enough
            place = self._text.find(part, self._first_bytes[token]) if token < len(self._first_bytes) else -1
        found = np.asarray(places, np.int64)
        tokens = np.searchsorted(self._starts, found, side="right") - 1
        answer = self._ids[tokens], found + len(part) - self._starts[tokens]
        if len(self._containing) >= _MAX_KNOWN_PARTS:
            self._containing.clear()
        self._containing[part] = answer
        return answer

    def rests_equal(
        self, token_ids: NDArray[np.int64], ends: NDArray[np.int64], text: bytes
    ) -> NDArray[np.bool_]:
        """Whether exactly `text` stands behind `ends` in each of the tokens.  # all [n]; no special tokens"""
        are_equal: NDArray[np.bool_] = self.token_lengths[token_ids] - ends == len(text)
        places = self._start_of_id[token_ids] + ends
        for offset, byte in enumerate(text):
            are_equal &= self._blob[np.minimum(places + offset, len(self._blob) - 1)] == byte
        return are_equal

    def spell(self, text: bytes) -> list[int]:
        """Some tokens that have exactly these bytes, none of them special; empty where there are none."""
        if single := self.ids_of(text):
            return single[:1]
        token_ids: list[int] = self.library.tokenize_bytes(text)
        if b"".join(self.token_bytes[i] for i in token_ids) == text:
            return token_ids
        return []


class _Wrapper(llguidance.TokenizerWrapper):
    """The interface by which the library asks for tokens; nothing of its base is used but the type."""

    def __init__(
        self, tokenizer: TokenizerLike, tokens: list[bytes], *, special: frozenset[int], end: int | None
    ) -> None:
        self.is_tokenizer_wrapper = True
        self.bos_token_id = None
        self.eos_token_id = end  # type: ignore[assignment]  # None is understood, and stands for a new token
        self.tokens = tokens
        self.special_token_ids = sorted(special)
        self.greedy: Callable[[str], list[int]] = _no_tokens
        self._tokenizer = tokenizer
        self._special = special

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        head, tail = text[:_CANONICAL_CHARACTERS], text[_CANONICAL_CHARACTERS:]
        token_ids = self._canonical(head)
        return token_ids + self.greedy(tail) if tail else token_ids

    def _canonical(self, text: str) -> list[int]:
        """The tokenizer's own tokens, or the longest ones that fit.

        The latter where the tokenizer writes more than the text (SentencePiece puts a blank before it) or
        takes it for a special token, which is no text.
        """
        token_ids = self._tokenizer.encode(text, add_special_tokens=False)
        wanted = text.encode()
        spelled = b"".join(self.tokens[i] for i in token_ids if i < len(self.tokens))
        if spelled == b" " + wanted and token_ids:
            token_ids = self._without_leading_blank(token_ids)
            spelled = b"".join(self.tokens[i] for i in token_ids)
        if spelled != wanted or not self._special.isdisjoint(token_ids):
            return self.greedy(text)
        return token_ids

    def _without_leading_blank(self, token_ids: list[int]) -> list[int]:
        first = self.tokens[token_ids[0]]
        rest = self.greedy(first[1:].decode("utf-8", "replace")) if len(first) > 1 else []
        return rest + token_ids[1:]


def _no_tokens(text: str) -> list[int]:
    """Stands in until the library's own exists, which asks nothing while it is built."""
    raise AssertionError(f"asked for tokens of {text!r} while the vocabulary is built")
