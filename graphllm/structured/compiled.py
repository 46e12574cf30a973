"""A compiled grammar, from which every sequence's matcher begins.

Owns the translation of the library's complaints into errors, and the renewal of what matchers of one grammar
share. Does not know where grammar texts come from, nor how they are cached.
"""

from __future__ import annotations

import logging

import llguidance
import numpy as np

from graphllm.errors import GraphLLMError, InvalidRequestError
from graphllm.structured.limits import GrammarLimits
from graphllm.structured.vocabulary import GrammarVocabulary

logger = logging.getLogger(__name__)

PARAM = "structured_outputs"
_MAX_MESSAGE_LENGTH = 500


def grammar_error(message: str) -> InvalidRequestError:
    """A mistake in what the client asked its output to look like."""
    return InvalidRequestError(f"structured_outputs: {message}", param=PARAM)


class CompiledGrammar:
    """One grammar for one vocabulary.

    Matchers share their lexer's states, which are found as they are needed and kept: that is what makes most
    masks take microseconds. It is also what one sequence can fill up for all, so a matcher that meets a limit
    is allowed to ask for fresh ones (`renewed`) before it gives up.
    """

    __slots__ = ("_generation", "_limits", "_prototype", "_text", "vocabulary")

    def __init__(
        self, vocabulary: GrammarVocabulary, text: str, *, limits: GrammarLimits, is_ambiguous: bool = False
    ) -> None:
        """text: Lark, or llguidance's JSON. Raises InvalidRequestError saying what is wrong with it.

        is_ambiguous: it was written by a client, so there may be any number of ways to read one text.
        """
        self.vocabulary = vocabulary
        self._text = text
        self._limits = llguidance.LLParserLimits(
            max_items_in_row=limits.max_ambiguous_items if is_ambiguous else limits.max_items_in_row,
            initial_lexer_fuel=limits.initial_lexer_fuel,
            step_lexer_fuel=limits.step_lexer_fuel,
            step_max_items=limits.max_ambiguous_step_items if is_ambiguous else limits.step_max_items,
            max_lexer_states=limits.max_lexer_states,
            max_grammar_size=limits.max_grammar_size,
            verbose_errors=False,
        )
        self._generation = 0
        self._prototype = self._compile()
        self._check_beginning()

    @property
    def generation(self) -> int:
        """How often the shared states were thrown away."""
        return self._generation

    def matcher(self) -> llguidance.LLMatcher:
        """A matcher at the grammar's beginning; takes a few microseconds."""
        return self._prototype.deep_copy()

    def renewed(self, generation: int) -> llguidance.LLMatcher:
        """The same, sharing nothing with the matchers of `generation` and before; compiles if need be."""
        if generation == self._generation:
            self._prototype = self._compile()
            self._generation += 1
        return self._prototype.deep_copy()

    def _compile(self) -> llguidance.LLMatcher:
        matcher = llguidance.LLMatcher(self.vocabulary.library, self._text, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise complaint(matcher)
        return matcher

    def _check_beginning(self) -> None:
        """Refuse at once what could not give a single token."""
        matcher = self.matcher()
        mask = self.vocabulary.empty_mask()
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if is_dead_end(matcher):
            raise grammar_error("no text of this model's tokens can satisfy it.")
        if matcher.is_error():
            raise complaint(matcher)
        is_optional = matcher.is_accepting()
        ends = self.vocabulary.library.eos_tokens
        if is_optional and int(np.bitwise_count(mask.view(np.uint32)).sum()) <= len(ends):
            raise grammar_error("it allows no text but the empty one.")


def is_dead_end(matcher: llguidance.LLMatcher) -> bool:
    """Whether a mask came out empty: the text is not complete, and no token can follow."""
    return matcher.is_error() and matcher.get_error().startswith("NoExtensionBias")


def complaint(matcher: llguidance.LLMatcher, about: str = "") -> GraphLLMError:
    """What a matcher's error is for the client: its own mistake, or ours where the library broke."""
    if matcher.get_error().startswith("panic"):
        return library_failure(matcher.get_error())
    return grammar_error(about + explain(matcher))


def library_failure(details: str) -> GraphLLMError:
    """An error that says that the library broke. What broke is for the log: it names our files."""
    logger.error("the grammar library broke: %s", details)
    return GraphLLMError("The grammar library failed on this request's schema or grammar.")


def explain(matcher: llguidance.LLMatcher) -> str:
    """The library's complaint in one paragraph, without its state."""
    message = matcher.get_error()
    for mark in ("<state>", "<backtrace>", "<non-verbose/>"):
        message = message.split(mark)[0]
    message = message.strip()
    message = message or matcher.stop_reason()
    return message if len(message) <= _MAX_MESSAGE_LENGTH else message[:_MAX_MESSAGE_LENGTH] + "..."
