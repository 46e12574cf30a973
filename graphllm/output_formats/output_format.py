"""How one model family writes replies: its tool calls, its reasoning, and what follows from both.

Owns the joining of a description to its parser and its grammars. Which formats there are is `registry.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphllm.output_formats.envelope_reader import Plan
from graphllm.output_formats.events import OutputParser
from graphllm.output_formats.grammars import required_grammar
from graphllm.output_formats.output import Tools
from graphllm.output_formats.parser import StreamingParser, reading_of
from graphllm.output_formats.syntax import (
    CallSyntax,
    MessageSyntax,
    NamedJsonCall,
    ParameterCall,
    ReasoningSyntax,
)


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """A format. calls: the ways to write calls that are read, the first is the one that is written.

    reasoning: None where the models have none that is set apart. messages: for replies that consist of
    messages with headers, which then say what is a call and what is reasoning.
    """

    name: str
    calls: tuple[CallSyntax, ...]
    reasoning: ReasoningSyntax | None = None
    messages: MessageSyntax | None = None

    @property
    def marker_texts(self) -> frozenset[str]:
        """Texts that the parser looks for, which must not be hidden where they are special tokens."""
        found: set[str] = set()
        for syntax in self.calls:
            for envelope in syntax.envelopes:
                found.update(Plan(syntax, envelope).opening_texts, (envelope.begin, envelope.end))
            found.update((syntax.begin, *(closer.strip() for closer in syntax.closers)))
            found.update(_body_markers(syntax))
        if self.reasoning is not None:
            found.update(self.reasoning.begins, self.reasoning.ends, self.reasoning.stops)
        if self.messages is not None:
            found.update(self.messages.header_begins, self.messages.body_ends)
            found.update((self.messages.header_end, self.messages.channel_mark, "<|constrain|>"))
        # A single character is no token that anyone would hide.
        return frozenset(text for text in found if len(text) > 1)

    @property
    def reasoning_ends(self) -> tuple[str, ...]:
        """Texts behind which the answer begins; empty where there is no reasoning."""
        if self.messages is not None:
            return (f"{self.messages.channel_mark}final{self.messages.header_end}",)
        return () if self.reasoning is None else self.reasoning.ends

    def opens_reasoning(self, prompt: str) -> bool:
        """Whether a prompt, or its end, leaves the model inside reasoning: its template opened it."""
        if self.reasoning is None:
            return False
        # Templates open it last; what they open and close is for models that are not to think.
        return prompt.rstrip(" \t\r\n").endswith(self.reasoning.begins)

    def parser(
        self,
        *,
        parses_tools: bool,
        tools: Tools | None = None,
        parses_reasoning: bool,
        starts_in_reasoning: bool = False,
    ) -> OutputParser:
        """A reader of one reply.

        parses_tools: whether calls are looked for. tools: names that may be called, to the JSON schemas of
        their arguments (None for any object); None where every name may be. parses_reasoning: whether
        reasoning is told apart from the answer; otherwise it is text, with its markers. starts_in_reasoning:
        the prompt ends inside reasoning, see `opens_reasoning`.
        """
        reading = reading_of(
            self.calls,
            self.reasoning,
            messages=self.messages,
            parses_tools=parses_tools,
            parses_reasoning=parses_reasoning,
        )
        return StreamingParser(reading, tools, starts_in_reasoning=starts_in_reasoning)

    def required_grammar(
        self,
        tools: Tools,
        *,
        names: Sequence[str] | None = None,
        parallel: bool = True,
        starts_in_reasoning: bool = False,
    ) -> str | None:
        """Lark text, in llguidance's dialect, of replies that call tools; see `grammars.required_grammar`."""
        return required_grammar(
            self.calls,
            tools,
            names=tuple(tools) if names is None else tuple(names),
            parallel=parallel,
            starts_in_reasoning=starts_in_reasoning,
            messages=self.messages,
            marker_texts=self.marker_texts,
        )


def _body_markers(syntax: CallSyntax) -> tuple[str, ...]:
    body = syntax.body
    if isinstance(body, NamedJsonCall):
        return (*body.name.ends, body.name.id_mark)
    if isinstance(body, ParameterCall):
        markers = (body.key_begin, body.key_end, body.value_begin, body.value_end, body.end)
        return (*body.name.ends, *body.name.stops, *markers)
    return ()
