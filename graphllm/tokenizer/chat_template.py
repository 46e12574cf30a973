"""Chat templates: from messages to the text that the model continues.

Owns the Jinja environment, set up as transformers sets up its own so that a template renders the
same here, and the errors of rendering. Does not tokenize, and does not judge messages: what a role
or a content may be is the server's business and the template's.

A template comes with the model's weights and is trusted as far: it runs in Jinja's immutable
sandbox (no attribute of the interpreter is in reach, no argument can be changed, `range` gives at
most 100,000 numbers), and rendering stops once its output exceeds `max_chars`. Its running time
is not bounded: a template with nested loops, or with one expression that builds a huge string, is
not stopped. Requests bring messages and keyword values, never templates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from graphllm.errors import CheckpointError, ContextLengthError, InvalidRequestError

_RESERVED_NAMES = frozenset({"messages", "tools", "add_generation_prompt"})


class ChatTemplate:
    """A model's templates, compiled once.

    templates: name to Jinja source; with tools the one called "tool_use" is taken if there is one,
    otherwise "default". special_tokens: what the template sees as `bos_token`, `eos_token` ...
    Raises CheckpointError for a template that is not valid Jinja.
    """

    __slots__ = ("_compiled", "_special_tokens", "source", "sources", "variables")

    def __init__(self, templates: str | Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        sources = {"default": templates} if isinstance(templates, str) else dict(templates)
        environment = _environment()
        self._compiled = {name: _compile(environment, source) for name, source in sources.items()}
        self._special_tokens = dict(special_tokens)
        self.source = sources.get("default") or "".join(sources.values())
        """The default template's Jinja source."""
        self.sources: Mapping[str, str] = sources
        """Every template's Jinja source by its name."""
        self.variables: frozenset[str] = frozenset().union(
            *(meta.find_undeclared_variables(environment.parse(source)) for source in sources.values())
        )
        """The names that the templates take from outside, those that are always given included."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
        max_chars: int | None = None,
    ) -> str:
        """The text of a chat, special tokens spelt out.

        messages: dicts of plain JSON values; keys whose value is None are left out, as transformers
        does. template_kwargs: further names the template may read (`enable_thinking`).
        Raises InvalidRequestError with `param` "messages" and the template's own words when it
        refuses the messages or fails on them, ContextLengthError above `max_chars` characters.
        """
        if not messages:
            raise InvalidRequestError("messages must not be empty.", param="messages")
        reserved = _RESERVED_NAMES.intersection(template_kwargs or ())
        if reserved:
            raise InvalidRequestError(
                f"chat_template_kwargs must not set {', '.join(sorted(reserved))}.",
                param="chat_template_kwargs",
            )
        names = {
            **self._special_tokens,
            **(template_kwargs or {}),
            "messages": [
                {key: value for key, value in message.items() if value is not None} for message in messages
            ],
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        pieces = []
        num_chars = 0
        try:
            for piece in self._select(tools).generate(names):
                pieces.append(piece)
                num_chars += len(piece)
                if max_chars is not None and num_chars > max_chars:
                    break
        except _TemplateRefusal as error:
            raise InvalidRequestError(str(error), param="messages") from error
        except Exception as error:
            # A template is a program run on the user's values: whatever it trips over is in them.
            reason = str(error) if isinstance(error, jinja2.TemplateError) else repr(error)
            raise InvalidRequestError(
                f"The model's chat template cannot render these messages: {reason}", param="messages"
            ) from error
        if max_chars is not None and num_chars > max_chars:
            raise ContextLengthError(
                f"The rendered chat has more than {max_chars} characters, which cannot fit the context.",
                param="messages",
            )
        return "".join(pieces)

    def _select(self, tools: Sequence[Mapping[str, Any]] | None) -> jinja2.Template:
        if tools is not None and "tool_use" in self._compiled:
            return self._compiled["tool_use"]
        if "default" not in self._compiled:
            names = ", ".join(sorted(self._compiled))
            raise InvalidRequestError(
                f"The model has the chat templates {names}, but no default one.", param="messages"
            )
        return self._compiled["default"]


class _TemplateRefusal(jinja2.TemplateError):
    """Raised by a template's own call of `raise_exception`."""


class _GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's text for training; here it is
    a block with its own scope and nothing else."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    # Jinja's placeholder text: no template needs it, and its length is the caller's choice.
    del environment.globals["lipsum"]
    return environment


def _compile(environment: ImmutableSandboxedEnvironment, source: str) -> jinja2.Template:
    try:
        for node in environment.parse(source).find_all(
            (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
        ):
            # There is nothing to load them from, itself included: it would fail on every chat.
            raise CheckpointError(
                f"The chat template refers to another template, line {node.lineno}; it must stand alone."
            )
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(
            f"The chat template is not valid Jinja, line {error.lineno}: {error.message}"
        ) from error
    except (RecursionError, MemoryError) as error:
        raise CheckpointError("The chat template is nested too deeply to be compiled.") from error
    except (
        SyntaxError
    ) as error:  # Python's, of the code that Jinja makes of it: 20 nested loops are its limit
        raise CheckpointError(f"The chat template cannot be compiled: {error.msg}.") from error


def _raise_exception(message: Any) -> NoReturn:
    raise _TemplateRefusal(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML characters, which a prompt must not have escaped."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
