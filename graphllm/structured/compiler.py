"""From what a request asks its output to look like to the constraints of its sequences.

Owns the translation into the library's grammar texts and the cache of compiled ones. Runs on the event loop:
the caps of `limits.py` keep one compilation within a few milliseconds, and the cache makes most free.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import llguidance

from graphllm.constraint import ConstraintFactory, TokenConstraint
from graphllm.structured.compiled import CompiledGrammar, grammar_error
from graphllm.structured.delayed_constraint import DelayedConstraint, StartMarkers
from graphllm.structured.gbnf import gbnf_to_lark, is_gbnf
from graphllm.structured.grammar_constraint import GrammarConstraint
from graphllm.structured.json_schema import WHITESPACE, check_text_size, prepare_schema, read_json
from graphllm.structured.lark_text import lark_literal, prepare_lark
from graphllm.structured.limits import GrammarLimits
from graphllm.structured.patterns import check_pattern, whitespace_pattern
from graphllm.structured.vocabulary import GrammarVocabulary, TokenizerLike
from graphllm.structured.work_budget import ENUM_VALUE, WorkBudget
from graphllm.structured_outputs import StructuredOutputs


@dataclass(frozen=True, slots=True)
class GrammarConstraintFactory:
    """Makes the constraints of one request's sequences. Implements ConstraintFactory."""

    grammar: CompiledGrammar
    markers: StartMarkers | None

    def __call__(self) -> TokenConstraint:
        if self.markers is None:
            return GrammarConstraint(self.grammar)
        return DelayedConstraint(self.grammar, self.markers)


class GrammarCompiler:
    """The compiler of one model's grammars, with a cache; used from the event loop only."""

    __slots__ = ("_cache", "_cached_bytes", "_limits", "_vocabulary")

    def __init__(
        self,
        tokenizer: TokenizerLike,
        *,
        vocab_size: int,
        eos_token_ids: Iterable[int] | None = None,
        limits: GrammarLimits | None = None,
    ) -> None:
        """Takes 0.1 to 1 s, see `vocabulary.py`: make it where the model is loaded.

        vocab_size: of the model's logits. eos_token_ids: tokens that end a generation; None for the
        tokenizer's.
        """
        self._vocabulary = GrammarVocabulary(tokenizer, vocab_size=vocab_size, eos_token_ids=eos_token_ids)
        self._limits = GrammarLimits() if limits is None else limits
        # From what was asked to its factory and the bytes that it is counted with; the oldest use first.
        self._cache: OrderedDict[StructuredOutputs, tuple[GrammarConstraintFactory, int]] = OrderedDict()
        self._cached_bytes = 0

    @property
    def num_cached(self) -> int:
        return len(self._cache)

    @property
    def cached_bytes(self) -> int:
        """Bytes of the texts that the cached grammars were compiled from."""
        return self._cached_bytes

    def compile(self, structured: StructuredOutputs) -> ConstraintFactory:
        """A factory of constraints, one for each sequence of the request.

        Raises InvalidRequestError with param "structured_outputs" that says what is wrong or too large.
        """
        if (cached := self._cache.get(structured)) is not None:
            self._cache.move_to_end(structured)
            return cached[0]
        text = self._grammar_text(structured)
        try:
            grammar = CompiledGrammar(
                self._vocabulary, text, limits=self._limits, is_ambiguous=structured.grammar is not None
            )
            markers = StartMarkers(grammar, structured.starts_after) if structured.starts_after else None
        except Exception:
            raise
        except BaseException as error:
            # The library's own defects come as a class of their own, which derives from no other.
            if type(error).__name__ != "PanicException":
                raise
            raise grammar_error(f"the grammar library failed on it: {error!s:.200}") from error
        factory = GrammarConstraintFactory(grammar, markers)
        self._keep(structured, factory, len(text.encode()))
        return factory

    def _keep(self, structured: StructuredOutputs, factory: GrammarConstraintFactory, num_bytes: int) -> None:
        self._cache[structured] = (factory, num_bytes)
        self._cached_bytes += num_bytes
        while self._cache and (
            len(self._cache) > self._limits.max_cache_entries
            or self._cached_bytes > self._limits.max_cache_bytes
        ):
            _, (_, freed) = self._cache.popitem(last=False)
            self._cached_bytes -= freed

    def _grammar_text(self, structured: StructuredOutputs) -> str:
        budget = WorkBudget(self._limits)
        whitespace = (
            WHITESPACE
            if structured.whitespace_pattern is None
            else whitespace_pattern(structured.whitespace_pattern)
        )
        if structured.json is not None:
            schema = read_json(structured.json, "json", limits=self._limits)
            text = prepare_schema(schema, "json", limits=self._limits, budget=budget, whitespace=whitespace)
            return f'{{"grammars":[{{"json_schema":{text}}}]}}'
        if structured.json_object:
            text = prepare_schema(
                {"type": "object"}, "json_object", limits=self._limits, budget=budget, whitespace=whitespace
            )
            return f'{{"grammars":[{{"json_schema":{text}}}]}}'
        if structured.regex is not None:
            check_text_size(structured.regex, "regex", limits=self._limits)
            check_pattern(structured.regex, "regex", limits=self._limits, budget=budget)
            return llguidance.LLMatcher.grammar_from_regex(structured.regex)
        if structured.choice is not None:
            return _lark_grammar(self._choice_text(structured.choice, budget))
        assert structured.grammar is not None
        check_text_size(structured.grammar, "grammar", limits=self._limits)
        grammar = gbnf_to_lark(structured.grammar) if is_gbnf(structured.grammar) else structured.grammar
        return _lark_grammar(
            prepare_lark(
                grammar,
                special_tokens=self._vocabulary.special_tokens,
                limits=self._limits,
                budget=budget,
                whitespace=whitespace,
            )
        )

    def _choice_text(self, choices: tuple[str, ...], budget: WorkBudget) -> str:
        if len(choices) > self._limits.max_enum_values:
            raise grammar_error(
                f"choice has {len(choices)} texts; at most {self._limits.max_enum_values} are allowed."
            )
        check_text_size("".join(choices), "choice", limits=self._limits)
        for choice in choices:
            if not choice:
                raise grammar_error("choice has an empty text, which is no output.")
            if len(choice.encode()) > self._limits.max_literal_bytes:
                raise grammar_error(f"choice has a text of more than {self._limits.max_literal_bytes} bytes.")
        budget.spend(ENUM_VALUE * len(choices))
        # One terminal: as rules, a thousand choices would be a thousand things that the lexer looks for.
        return "start: CHOICE\nCHOICE: " + " | ".join(map(lark_literal, dict.fromkeys(choices)))


def _lark_grammar(text: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": text}]}, ensure_ascii=False)
