"""Output that is free until a marker such as "</think>" has appeared, and follows a grammar behind it.

Owns the watch for the marker and the exact hand-over to the grammar. A token may hold the marker's end and
text behind it, so the tokens that would bring text there which the grammar forbids are not allowed to end
the marker. Between marker and grammar a blank line is free, because models that reason write one.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from graphllm.errors import ConstraintViolation
from graphllm.structured.compiled import CompiledGrammar
from graphllm.structured.grammar_constraint import GrammarConstraint
from graphllm.structured.vocabulary import GrammarVocabulary

# What may stand between the marker and the grammar's text, whatever the grammar says.
GAPS = (b"\n", b"\n\n")
_LONGEST_GAP = max(map(len, GAPS))
# Tokens of a request that are tried behind its markers, a few microseconds each.
_MAX_TESTED_TOKENS = 200


class StartMarkers:
    """The markers of one request, and what each token means for them; shared by its sequences."""

    __slots__ = (
        "_forbidden_at",
        "_free_mask",
        "_fresh",
        "_num_tests_left",
        "end_token_ids",
        "gap_token_ids",
        "markers",
        "vocabulary",
    )

    def __init__(self, grammar: CompiledGrammar, texts: Iterable[str]) -> None:
        self.vocabulary: GrammarVocabulary = grammar.vocabulary
        self.markers = tuple(text.encode() for text in texts)
        self.end_token_ids = np.asarray(self.vocabulary.library.eos_tokens, np.int64)
        self.gap_token_ids = {i: gap for gap in GAPS for i in self.vocabulary.ids_of(gap)}
        self._fresh = GrammarConstraint(grammar)
        self._num_tests_left = _MAX_TESTED_TOKENS
        self._forbidden_at: dict[tuple[int, int], NDArray[np.int64]] = {}
        inside = [np.zeros(0, np.int64)]
        for number, marker in enumerate(self.markers):
            # No token holds more of a marker than it has bytes.
            for length in range(max(1, len(marker) - self.vocabulary.max_token_length), len(marker)):
                token_ids = self.vocabulary.starting_with(marker[length:])
                if not len(token_ids):
                    continue
                ends = np.full(len(token_ids), len(marker) - length, np.int64)
                if len(forbidden := self._forbidden(token_ids, ends)):
                    self._forbidden_at[number, length] = forbidden
            inside.append(self._forbidden(*self.vocabulary.containing(marker)))
        always = np.concatenate([self.end_token_ids, *inside])
        self._free_mask = np.full(self.vocabulary.num_words, -1, np.int32)
        clear_bits(self._free_mask, always)

    def restrict_free(self, row: NDArray[np.int32], tail: bytes) -> None:
        """Forbid the end, and tokens that complete a marker after `tail` and go on as the grammar must not.

        row: [num_words] int32.
        """
        row &= self._free_mask[: len(row)]
        for (number, length), token_ids in self._forbidden_at.items():
            if tail.endswith(self.markers[number][:length]):
                clear_bits(row, token_ids)

    def end_of_first(self, text: bytes) -> int:
        """Where the marker that is complete first ends in `text`; -1 where there is none."""
        ends = [found + len(marker) for marker in self.markers if (found := text.find(marker)) >= 0]
        return min(ends, default=-1)

    def _forbidden(self, token_ids: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of the tokens whose bytes behind `ends` may not open what follows the marker.  # [n] int64"""
        is_allowed = self.vocabulary.rests_equal(token_ids, ends, b"")
        if self._num_tests_left >= len(token_ids):
            self._num_tests_left -= len(token_ids)
            for place in np.flatnonzero(~is_allowed).tolist():
                token = self.vocabulary.token_bytes[token_ids[place]]
                is_allowed[place] = self._opens_grammar(token[ends[place] :])
        else:
            # A marker as short as "e" is crossed by every tenth token: it has to end where a token ends.
            for gap in GAPS:
                is_allowed |= self.vocabulary.rests_equal(token_ids, ends, gap)
        forbidden: NDArray[np.int64] = token_ids[~is_allowed]
        return forbidden

    def _opens_grammar(self, rest: bytes) -> bool:
        return any(can_follow(self._fresh, text, self.vocabulary) for text in without_gap(rest))


class DelayedConstraint:
    """Free until one of the markers has appeared in the output; a grammar's text from there on.

    Before that only the end is forbidden: an output that never comes to its grammar would satisfy nothing.
    Implements TokenConstraint.
    """

    __slots__ = ("_constraint", "_gap", "_has_begun", "_is_found", "_markers", "_tail", "_tail_length")

    def __init__(self, grammar: CompiledGrammar, markers: StartMarkers) -> None:
        self._constraint = GrammarConstraint(grammar)
        self._markers = markers
        self._tail = b""
        self._tail_length = max(map(len, markers.markers)) - 1
        self._is_found = False
        self._has_begun = False
        self._gap = 0  # bytes of the blank line behind the marker so far

    def restrict(self, mask: memoryview) -> None:
        if self._has_begun:
            self._constraint.restrict(mask)
            return
        row = np.frombuffer(mask, np.int32)  # [ceil(vocab_size / 32)] int32
        if self._is_found:
            allowed = self._constraint.next_mask()
            for token_id, gap in self._markers.gap_token_ids.items():
                if self._gap + len(gap) <= _LONGEST_GAP:
                    allowed.view(np.uint32)[token_id // 32] |= np.uint32(1 << (token_id % 32))
            row &= allowed[: len(row)]
            return
        self._markers.restrict_free(row, self._tail)

    def accept(self, token_id: int) -> None:
        """Raises ConstraintViolation for a token that is not allowed."""
        if self._has_begun:
            self._constraint.accept(token_id)
        elif not self._is_found:
            self._watch(self._markers.vocabulary.token_bytes[token_id])
        elif token_id in self._markers.gap_token_ids and not self._constraint.allows([token_id]):
            self._gap += len(self._markers.gap_token_ids[token_id])
        else:
            self._has_begun = True
            self._constraint.accept(token_id)

    @property
    def is_finished(self) -> bool:
        return self._has_begun and self._constraint.is_finished

    def _watch(self, token: bytes) -> None:
        text = self._tail + token
        end = self._markers.end_of_first(text)
        if end < 0:
            self._tail = text[-self._tail_length :] if self._tail_length else b""
            return
        self._is_found = True
        for rest in without_gap(text[end:]):
            if can_follow(self._constraint, rest, self._markers.vocabulary):
                break
        else:
            raise ConstraintViolation(
                f"{text[end:]!r} behind the marker cannot open what the grammar allows."
            )
        self._gap = len(text) - end - len(rest)
        self._has_begun = bool(rest)
        if rest:
            self._constraint.accept_all(self._markers.vocabulary.spell(rest))


def can_follow(constraint: GrammarConstraint, text: bytes, vocabulary: GrammarVocabulary) -> bool:
    """Whether the constraint allows these bytes next, in whatever tokens."""
    token_ids = vocabulary.spell(text)
    return not text or (bool(token_ids) and constraint.allows(token_ids))


def without_gap(text: bytes) -> list[bytes]:
    """The text, and what is left of it when its beginning is taken for the blank line."""
    return [text, *(text[len(gap) :] for gap in GAPS if text.startswith(gap))]


def clear_bits(row: NDArray[np.int32], token_ids: NDArray[np.int64]) -> None:
    """Forbid these tokens.  row: [num_words] int32; token_ids: [n] int64; beyond the row none."""
    token_ids = token_ids[token_ids < 32 * len(row)]
    bits = np.left_shift(np.uint32(1), (token_ids % 32).astype(np.uint32))
    np.bitwise_and.at(row.view(np.uint32), token_ids // 32, ~bits)
