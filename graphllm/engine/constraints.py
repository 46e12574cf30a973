"""What a request's parameters forbid, as one constraint for each of its sequences.

Owns lists of allowed tokens, forbidden words, min_tokens of constrained sequences, and how several
constraints act together. Grammars are compiled by `structured/`; when masks are made is `held_rows.py`'s.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from graphllm.constraint import MASK_WORD_BITS, ConstraintFactory, TokenConstraint, num_mask_words
from graphllm.errors import ConstraintViolation, InvalidRequestError
from graphllm.sampling_params import SamplingParams
from graphllm.structured_outputs import StructuredOutputs

Mask = npt.NDArray[np.int32]
_MAX_CACHED_WORD_LISTS = 64


class StructuredCompiler(Protocol):
    """Turns a wish for structure into constraints; see `structured/`."""

    def start(self, structured: StructuredOutputs) -> ConstraintFactory | asyncio.Future[ConstraintFactory]:
        """The factory, or a future of it where compiling would hold the event loop up.

        Either way InvalidRequestError, param "structured_outputs", for what cannot be enforced. The future
        may be that of other requests too. Raises EngineUnavailableError when too many wait already.
        """

    def close(self) -> None:
        """Nobody waits for futures any more."""


class TextEncoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def encode(self, text: str, *, add_special_tokens: bool, param: str) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class PendingConstraints:
    """compilation: shared with other requests, so that nobody cancels it. complete: makes what it results in
    the factory of one request.
    """

    compilation: asyncio.Future[ConstraintFactory]
    complete: Callable[[ConstraintFactory], ConstraintFactory]


class ConstraintBuilder:
    """Makes constraints for one model; without a `compiler` structured outputs are refused.

    vocab_size: the width of the model's logits. eos_token_ids: the tokens that end a text.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        compiler: StructuredCompiler | None = None,
    ) -> None:
        self._encoder = encoder
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._compiler = compiler
        self._all_tokens = mask_of(range(vocab_size), vocab_size)
        self._word_lists: OrderedDict[tuple[str, ...], _WordList] = OrderedDict()

    def build(self, params: SamplingParams) -> ConstraintFactory | PendingConstraints | None:
        """What makes the constraint of each sequence of a request; None for most requests.

        Pending where a grammar takes long to compile. Raises InvalidRequestError for bad words that are no
        text and for structure that cannot be enforced, EngineUnavailableError when too many are pending.
        """
        if not params.is_constrained:
            return None
        parts: list[ConstraintFactory] = []
        if params.allowed_token_ids is not None:
            allowed = mask_of(params.allowed_token_ids, self._vocab_size)
            parts.append(lambda: AllowedTokens(allowed))
        if params.bad_words:
            words = self._word_list(params.bad_words)
            parts.append(lambda: BadWords(words))
        if params.structured_outputs is None:
            return self._joined(parts, params)
        structure = self._start(params.structured_outputs)
        if isinstance(structure, asyncio.Future):
            return PendingConstraints(structure, partial(self._joined_behind, parts, params))
        return self._joined_behind(parts, params, structure)

    def close(self) -> None:
        if self._compiler is not None:
            self._compiler.close()

    def _start(self, structured: StructuredOutputs) -> ConstraintFactory | asyncio.Future[ConstraintFactory]:
        if self._compiler is None:
            raise InvalidRequestError(
                "structured_outputs cannot be honoured: the package llguidance is not installed here.",
                param="structured_outputs",
            )
        return self._compiler.start(structured)

    def _joined_behind(
        self, parts: list[ConstraintFactory], params: SamplingParams, structure: ConstraintFactory
    ) -> ConstraintFactory:
        return self._joined([structure, *parts], params)

    def _joined(self, parts: list[ConstraintFactory], params: SamplingParams) -> ConstraintFactory:
        factory = parts[0] if len(parts) == 1 else _combined(parts)
        return self._with_min_tokens(factory, params) if params.min_tokens else factory

    def _with_min_tokens(self, factory: ConstraintFactory, params: SamplingParams) -> ConstraintFactory:
        stops = set(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos_token_ids)
        going_on = ~mask_of(stops, self._vocab_size) & self._all_tokens
        yields = params.structured_outputs is not None
        min_tokens = params.min_tokens
        return lambda: MinTokens(factory(), going_on, min_tokens=min_tokens, yields=yields)

    def _word_list(self, words: tuple[str, ...]) -> _WordList:
        """Clients send the same list with every request, and tokenizing a long one takes milliseconds."""
        known = self._word_lists.pop(words, None)
        if known is None:
            known = _WordList.of(self._spellings(words), self._vocab_size)
            if len(self._word_lists) >= _MAX_CACHED_WORD_LISTS:
                self._word_lists.popitem(last=False)
        self._word_lists[words] = known
        return known

    def _spellings(self, words: tuple[str, ...]) -> set[tuple[int, ...]]:
        """The token sequences of the words, at the beginning of a word and within one."""
        spellings = set()
        for word in words:
            bare = word.lstrip(" ")
            for text in (bare, " " + bare):
                token_ids = self._encoder.encode(text, add_special_tokens=False, param="bad_words")
                if token_ids and max(token_ids) < self._vocab_size:
                    spellings.add(tuple(token_ids))
        return spellings


def mask_of(token_ids: Iterable[int], vocab_size: int) -> Mask:
    """[ceil(vocab_size / 32)] int32 with the bits of these tokens set, and no others."""
    bits = np.zeros(num_mask_words(vocab_size) * MASK_WORD_BITS, dtype=np.bool_)
    bits[np.fromiter(token_ids, dtype=np.int64)] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


def _is_set(mask: Mask, token_id: int) -> bool:
    return bool(mask[token_id // MASK_WORD_BITS] >> (token_id % MASK_WORD_BITS) & 1)


class AllowedTokens:
    """Only the tokens of one mask, always."""

    __slots__ = ("_allowed",)

    is_finished = False

    def __init__(self, allowed: Mask) -> None:
        self._allowed = allowed

    def restrict(self, mask: memoryview) -> None:
        row = np.frombuffer(mask, dtype=np.int32)
        row &= self._allowed

    def accept(self, token_id: int) -> None:
        if not _is_set(self._allowed, token_id):
            raise ConstraintViolation(f"Token {token_id} is not one of allowed_token_ids.")


@dataclass(frozen=True, slots=True)
class _WordList:
    """Token sequences that must not be produced.

    allowed: everything but the words that are one token. by_last: for the others, the token before their last
    one, to what comes up to it and that last one. longest: most tokens before a last one.
    """

    allowed: Mask
    by_last: dict[int, list[tuple[list[int], int]]]
    longest: int

    @staticmethod
    def of(spellings: set[tuple[int, ...]], vocab_size: int) -> _WordList:
        allowed = mask_of((spelling[0] for spelling in spellings if len(spelling) == 1), vocab_size)
        np.invert(allowed, out=allowed)
        by_last: dict[int, list[tuple[list[int], int]]] = {}
        for *before, last in spellings:
            if before:
                by_last.setdefault(before[-1], []).append((before, last))
        return _WordList(allowed, by_last, max((len(each) - 1 for each in spellings), default=0))


class BadWords:
    """No token that would complete one of the sequences of a list within the output.

    As in vLLM: a word may still be produced from other tokens than the tokenizer makes of it.
    """

    __slots__ = ("_recent", "_words")

    is_finished = False

    def __init__(self, words: _WordList) -> None:
        self._words = words
        self._recent: list[int] = []

    def restrict(self, mask: memoryview) -> None:
        row = np.frombuffer(mask, dtype=np.int32)
        row &= self._words.allowed
        for token_id in self._completing():
            mask[token_id // MASK_WORD_BITS] &= ~_bit(token_id)

    def accept(self, token_id: int) -> None:
        if not _is_set(self._words.allowed, token_id) or token_id in self._completing():
            raise ConstraintViolation(f"Token {token_id} completes one of bad_words.")
        self._recent.append(token_id)
        del self._recent[: max(0, len(self._recent) - self._words.longest)]

    def _completing(self) -> list[int]:
        recent = self._recent
        if not recent:
            return []
        candidates = self._words.by_last.get(recent[-1], ())
        return [last for before, last in candidates if recent[-len(before) :] == before]


def _bit(token_id: int) -> int:
    """The token's bit of its word, as a signed 32-bit number."""
    position = token_id % MASK_WORD_BITS
    return -(1 << position) if position == MASK_WORD_BITS - 1 else 1 << position


class MinTokens:
    """Another constraint, without the tokens of a stop until `min_tokens` have been produced.

    going_on: the mask of all other tokens. yields: where nothing else may come next, a stop may.
    """

    __slots__ = ("_going_on", "_inner", "_min_tokens", "_num_accepted", "_yields")

    def __init__(self, inner: TokenConstraint, going_on: Mask, *, min_tokens: int, yields: bool) -> None:
        self._inner = inner
        self._going_on = going_on
        self._min_tokens = min_tokens
        self._yields = yields
        self._num_accepted = 0

    def restrict(self, mask: memoryview) -> None:
        self._inner.restrict(mask)
        if self._num_accepted >= self._min_tokens:
            return
        row = np.frombuffer(mask, dtype=np.int32)
        rest = row & self._going_on
        if rest.any() or not self._yields:
            row[:] = rest

    def accept(self, token_id: int) -> None:
        self._inner.accept(token_id)
        self._num_accepted += 1

    @property
    def is_finished(self) -> bool:
        return self._inner.is_finished


class CombinedConstraint:
    """Several constraints at once: what all of them allow, until one of them is finished."""

    __slots__ = ("_parts",)

    def __init__(self, parts: SequenceOf[TokenConstraint]) -> None:
        self._parts = tuple(parts)

    def restrict(self, mask: memoryview) -> None:
        for part in self._parts:
            part.restrict(mask)

    def accept(self, token_id: int) -> None:
        for part in self._parts:
            part.accept(token_id)

    @property
    def is_finished(self) -> bool:
        return any(part.is_finished for part in self._parts)


def _combined(factories: list[ConstraintFactory]) -> ConstraintFactory:
    return lambda: CombinedConstraint([factory() for factory in factories])
