"""One sequence's way through a grammar, token by token.

Owns the matcher of a sequence: its masks, its end, and its recovery when the states that it shares with other
sequences are used up. Implements `graphllm.constraint.TokenConstraint`. Text before the grammar begins is
`delayed_constraint.py`'s matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import llguidance
import numpy as np
from numpy.typing import NDArray

from graphllm.errors import ConstraintViolation, GraphLLMError
from graphllm.structured.compiled import CompiledGrammar, complaint, explain, is_dead_end


class GrammarConstraint:
    """The output is a text of the grammar from its first token on.

    Where the grammar accepts, the end tokens are allowed beside what may still follow; where nothing may
    follow, `is_finished` is true without an end token. A position that no token can leave has an empty mask.
    """

    __slots__ = ("_generation", "_grammar", "_is_mask_current", "_mask", "_matcher", "_token_ids")

    def __init__(self, grammar: CompiledGrammar) -> None:
        self._grammar = grammar
        self._matcher = grammar.matcher()
        self._generation = grammar.generation
        self._mask = grammar.vocabulary.empty_mask()
        self._is_mask_current = False
        self._token_ids: list[int] = []  # kept for a recovery

    def restrict(self, mask: memoryview) -> None:
        """Clear the bits of the tokens that may not come next; see TokenConstraint.

        Raises InvalidRequestError when the grammar needs more work at this place than the limits allow,
        GraphLLMError when the library breaks.
        """
        row = np.frombuffer(mask, np.int32)  # [ceil(vocab_size / 32)] int32
        row &= self.next_mask()[: len(row)]

    def next_mask(self) -> NDArray[np.int32]:
        """The tokens that may come next, valid until the next call.  # [>= num_words] int32"""
        matcher = self._matcher
        matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if matcher.is_error() and self._is_recoverable():
            matcher = self._recover()
            matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if matcher.is_error():
            if not is_dead_end(matcher):
                raise self._too_complex()
            # The library then offers the end, although the text is not complete.
            self._mask[:] = 0
        self._is_mask_current = True
        return self._mask

    def accept(self, token_id: int) -> None:
        """Raises ConstraintViolation for a token that the grammar does not allow here."""
        self.accept_all([token_id])

    def accept_all(self, token_ids: Sequence[int]) -> None:
        """The same for several tokens that came at once."""
        was_allowed = self._is_mask_current and _is_set(self._mask, token_ids[0])
        self._is_mask_current = False
        self._token_ids += token_ids
        if self._matcher.consume_tokens(list(token_ids)):
            return
        if self._is_recoverable() or (was_allowed and self._is_rejection()):
            self._recover()
        elif self._is_rejection():
            raise ConstraintViolation(
                f"The grammar does not allow what was sampled: {explain(self._matcher)}"
            )
        else:
            raise self._too_complex()

    def allows(self, token_ids: Sequence[int]) -> bool:
        """Whether these tokens may come next, one after the other; changes nothing."""
        return self._matcher.validate_tokens(list(token_ids)) == len(token_ids)

    @property
    def is_finished(self) -> bool:
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def is_accepting(self) -> bool:
        """Whether the text so far is complete, though more may follow."""
        return self._matcher.is_accepting()

    def _is_recoverable(self) -> bool:
        """Whether what failed may have been used up by others: states and expressions of the shared lexer."""
        return "lexer error: too many" in self._matcher.get_error()

    def _is_rejection(self) -> bool:
        """Whether the library found no way on, which it also reports when its lexer has failed."""
        return "doesn't satisfy the grammar" in self._matcher.get_error()

    def _recover(self) -> llguidance.LLMatcher:
        """A matcher at the same place with fresh states. Raises InvalidRequestError where it fails again."""
        self._matcher = self._grammar.renewed(self._generation)
        self._generation = self._grammar.generation
        if self._token_ids and not self._matcher.consume_tokens(self._token_ids):
            raise self._too_complex()
        return self._matcher

    def _too_complex(self) -> GraphLLMError:
        return complaint(self._matcher, "the grammar is too complex at this place of the output: ")


def _is_set(mask: NDArray[np.int32], token_id: int) -> bool:
    return token_id < 32 * len(mask) and bool(int(mask[token_id // 32]) >> (token_id % 32) & 1)
