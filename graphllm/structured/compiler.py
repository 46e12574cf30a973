"""From what a request asks its output to look like to the constraints of its sequences.

Owns the translation into the library's grammar texts, the cache of compiled ones, and the choice of where to
compile: on the event loop what takes a millisecond or two, in the thread of `worker.py` what takes longer.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import llguidance

from graphllm.constraint import ConstraintFactory, TokenConstraint
from graphllm.errors import EngineUnavailableError
from graphllm.structured.compiled import CompiledGrammar, grammar_error, library_failure
from graphllm.structured.delayed_constraint import DelayedConstraint, StartMarkers
from graphllm.structured.gbnf import gbnf_to_lark, is_gbnf
from graphllm.structured.grammar_constraint import GrammarConstraint
from graphllm.structured.json_schema import WHITESPACE, check_text_size, prepare_schema, read_json
from graphllm.structured.lark_text import lark_literal, prepare_lark
from graphllm.structured.limits import GrammarLimits
from graphllm.structured.patterns import check_pattern, whitespace_pattern
from graphllm.structured.vocabulary import GrammarVocabulary, TokenizerLike
from graphllm.structured.work_budget import ENUM_VALUE, LITERAL_BYTES, START_MARKER, WorkBudget
from graphllm.structured.worker import CompilationWorker
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


@dataclass(frozen=True, slots=True)
class _Source:
    """What is left to be done for a request: the library's text of its grammar, and what to expect of it."""

    text: str
    budget: WorkBudget


class GrammarCompiler:
    """The compiler of one model's grammars, with a cache; used from the event loop only."""

    __slots__ = ("_cache", "_cached_bytes", "_limits", "_under_way", "_vocabulary", "_worker")

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
        self._worker = CompilationWorker()
        self._under_way: dict[StructuredOutputs, asyncio.Future[GrammarConstraintFactory]] = {}

    @property
    def num_cached(self) -> int:
        return len(self._cache)

    @property
    def cached_bytes(self) -> int:
        """What the cached grammars may come to occupy, as `WorkBudget.expected_bytes` has it."""
        return self._cached_bytes

    @property
    def num_under_way(self) -> int:
        """Long compilations that have not ended."""
        return len(self._under_way)

    def compile(self, structured: StructuredOutputs) -> ConstraintFactory:
        """A factory of constraints, one for each sequence of the request; at once, however long it takes.

        Raises InvalidRequestError with param "structured_outputs" that says what is wrong or too large.
        """
        if (cached := self._cached(structured)) is not None:
            return cached
        return self._compile_now(structured, self._source(structured))

    def start(self, structured: StructuredOutputs) -> ConstraintFactory | asyncio.Future[ConstraintFactory]:
        """The same where that takes no longer than the loop can wait, and otherwise a future of it.

        Requests for the same grammar get the same future: nobody may cancel it. Its exceptions are those of
        `compile`, shared by all who wait.
        Raises InvalidRequestError for what is seen to be wrong at once, EngineUnavailableError when too many
        compilations wait.
        """
        if (cached := self._cached(structured)) is not None:
            return cached
        if (under_way := self._under_way.get(structured)) is not None:
            return under_way  # type: ignore[return-value]  # futures are invariant
        source = self._source(structured)
        if source.budget.expected <= self._limits.max_loop_cost:
            return self._compile_now(structured, source)
        if len(self._under_way) >= self._limits.max_waiting:
            raise EngineUnavailableError(
                f"{len(self._under_way)} schemas and grammars are waiting to be compiled; try again.",
                param="structured_outputs",
                code="too_many_compilations",
            )
        future = self._worker.run(lambda: self._compiled(structured, source))
        self._under_way[structured] = future
        future.add_done_callback(lambda done: self._ended(structured, source, done))
        return future  # type: ignore[return-value]  # futures are invariant

    def close(self) -> None:
        """Compile nothing more in the thread. What has not begun there is cancelled."""
        self._worker.close()

    def _cached(self, structured: StructuredOutputs) -> GrammarConstraintFactory | None:
        if (cached := self._cache.get(structured)) is None:
            return None
        self._cache.move_to_end(structured)
        return cached[0]

    def _compile_now(self, structured: StructuredOutputs, source: _Source) -> GrammarConstraintFactory:
        factory = self._compiled(structured, source)
        self._keep(structured, factory, source.budget.expected_bytes)
        return factory

    def _ended(
        self,
        structured: StructuredOutputs,
        source: _Source,
        future: asyncio.Future[GrammarConstraintFactory],
    ) -> None:
        del self._under_way[structured]
        if not future.cancelled() and future.exception() is None:
            self._keep(structured, future.result(), source.budget.expected_bytes)

    def _compiled(self, structured: StructuredOutputs, source: _Source) -> GrammarConstraintFactory:
        """Runs on the loop or in the thread: it changes nothing that both know.

        Raises InvalidRequestError, and GraphLLMError where the library breaks.
        """
        is_ambiguous = structured.grammar is not None
        try:
            grammar = CompiledGrammar(
                self._vocabulary, source.text, limits=self._limits, is_ambiguous=is_ambiguous
            )
            markers = StartMarkers(grammar, structured.starts_after) if structured.starts_after else None
        except Exception:
            raise
        except BaseException as error:
            # The library's own defects come as a class of their own, which derives from no other.
            if type(error).__name__ != "PanicException":
                raise
            raise library_failure(str(error)) from error
        return GrammarConstraintFactory(grammar, markers)

    def _keep(self, structured: StructuredOutputs, factory: GrammarConstraintFactory, num_bytes: int) -> None:
        self._cached_bytes -= self._cache.pop(structured, (factory, 0))[1]
        self._cache[structured] = (factory, num_bytes)
        self._cached_bytes += num_bytes
        while self._cache and (
            len(self._cache) > self._limits.max_cache_entries
            or self._cached_bytes > self._limits.max_cache_bytes
        ):
            _, (_, freed) = self._cache.popitem(last=False)
            self._cached_bytes -= freed

    def _source(self, structured: StructuredOutputs) -> _Source:
        budget = WorkBudget(self._limits)
        shortest = min(map(len, structured.starts_after), default=self._limits.min_marker_length)
        if shortest < self._limits.min_marker_length:
            raise grammar_error(
                f"starts_after: each text has at least {self._limits.min_marker_length} characters."
            )
        budget.expect(START_MARKER * len(structured.starts_after))
        return _Source(self._grammar_text(structured, budget), budget)

    def _grammar_text(self, structured: StructuredOutputs, budget: WorkBudget) -> str:
        closes_objects = structured.disable_additional_properties is not False
        whitespace = (
            WHITESPACE
            if structured.whitespace_pattern is None
            else whitespace_pattern(structured.whitespace_pattern)
        )
        if structured.json is not None:
            schema = read_json(structured.json, "json", limits=self._limits)
            text = prepare_schema(
                schema,
                "json",
                limits=self._limits,
                budget=budget,
                whitespace=whitespace,
                closes_objects=closes_objects,
            )
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
                closes_objects=closes_objects,
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
        budget.expect(sum(map(len, choices)) // LITERAL_BYTES)
        # One terminal: as rules, a thousand choices would be a thousand things that the lexer looks for.
        return "start: CHOICE\nCHOICE: " + " | ".join(map(lark_literal, dict.fromkeys(choices)))


def _lark_grammar(text: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": text}]}, ensure_ascii=False)
