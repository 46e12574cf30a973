"""Grammars that make a model call tools, in exactly the format that the parser reads.

Owns the way from a format's description and the tools' schemas to Lark text, in llguidance's dialect.
`%json` (a schema) is llguidance's; `%marker "text"`, the special token of that text or else the text, is
`structured`'s, which compiles the grammars.
https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence

from graphllm.output_formats.argument_values import argument_kinds, is_only_string
from graphllm.output_formats.markers import Markers
from graphllm.output_formats.output import Tools
from graphllm.output_formats.syntax import (
    CallSyntax,
    JsonCall,
    MessageSyntax,
    NamedJsonCall,
    ParameterCall,
)

MAX_CALLS = 16
"""Most calls of a reply that a grammar allows."""

Schema = Mapping[str, object]

# What a schema may say for its properties to be written one by one; the rest needs one JSON object.
_PLAIN_OBJECT_KEYS = frozenset(
    {"type", "properties", "required", "additionalProperties", "title", "description", "$defs", "definitions"}
    | {"$schema", "$id", "strict", "examples", "default"}
)
_PLAIN_STRING_KEYS = frozenset({"type", "title", "description", "default", "examples", "enum", "const"})
_DEFINITIONS = ("$defs", "definitions")
_MAX_SCHEMA_DEPTH = 40
_TOO_DEEP = object()
# A string whose schema says one of these is left as it is.
_STRING_BOUNDS = frozenset({"enum", "const", "pattern", "format"})


def required_grammar(
    calls: tuple[CallSyntax, ...],
    tools: Tools,
    *,
    names: Sequence[str],
    parallel: bool,
    starts_in_reasoning: bool,
    messages: MessageSyntax | None,
    marker_texts: Iterable[str],
) -> str | None:
    """Lark text of replies that consist of one call, or with `parallel` of up to MAX_CALLS.

    names: the tools that may be called, all of them among `tools`. starts_in_reasoning: the grammar is for
    what follows the reasoning, and allows blanks before the first call. Reasoning itself is not in it: the
    constraint begins behind it. The exception are formats whose replies consist of messages, where it is
    allowed. None where a tool's schema says what this format cannot be held to.
    """
    writer = _Writer(Markers(marker_texts))
    if messages is not None:
        return writer.messages(messages, tools, names)
    syntax = calls[0]
    alternatives = [writer.call(syntax, name, tools[name]) for name in names]
    if not names or any(alternative is None for alternative in alternatives):
        return None
    call = writer.rule("call", " | ".join(filter(None, alternatives)))
    between = writer.literal(syntax.written_between)
    more = f" ({between} {call}){{0,{MAX_CALLS - 1}}}" if parallel else ""
    envelope = syntax.envelopes[0]
    opening = writer.literal(envelope.begin + syntax.written_begin + "[" * syntax.writes_list)
    closing = writer.literal("]" * syntax.writes_list + syntax.written_end + envelope.end)
    if syntax.is_repeated:
        whole = writer.rule("whole", f"{opening} {call} {closing}")
        start = f"{whole} ({between} {whole}){{0,{MAX_CALLS - 1}}}" if parallel else whole
    else:
        start = f"{opening} {call}{more} {closing}"
    blanks = r"/[ \n]{0,4}/ " if starts_in_reasoning else ""
    return writer.text(f"{blanks}{start}")


class _Writer:
    """Collects the rules of one grammar."""

    def __init__(self, markers: Markers) -> None:
        self._markers = markers
        self._rules: list[str] = []
        self._num_rules: dict[str, int] = {}

    def text(self, start: str) -> str:
        """The whole grammar."""
        return "\n".join([f"start: {_tidy(start)}", *self._rules]) + "\n"

    def rule(self, kind: str, body: str) -> str:
        """Adds a rule; gives its name."""
        number = self._num_rules.get(kind, 0)
        self._num_rules[kind] = number + 1
        self._rules.append(f"{kind}_{number}: {_tidy(body)}")
        return f"{kind}_{number}"

    def terminal(self, kind: str, expression: str) -> str:
        escaped = expression.replace("/", r"\/")
        return self.rule(kind.upper(), f"/{escaped}/")

    def literal(self, text: str) -> str:
        """A fixed text, its markers as what they are in the vocabulary; "" for none."""
        parts = []
        position = 0
        while position < len(text):
            start, found = self._markers.search(text, position, is_last=True)
            if start > position:
                parts.append(json.dumps(text[position:start], ensure_ascii=False))
            if found:
                parts.append(f"%marker {json.dumps(found, ensure_ascii=False)}")
            position = start + len(found)
        return " ".join(parts)

    def call(self, syntax: CallSyntax, name: str, schema: Schema | None) -> str | None:
        """One call of the tool `name`, with what is written before and behind each call."""
        body = syntax.body
        closers = "".join(syntax.closers)
        if isinstance(body, JsonCall):
            head = f"{json.dumps(body.name_keys[0])}: {json.dumps(name, ensure_ascii=False)}"
            opening = f"{{{head}, {json.dumps(body.arguments_keys[0])}: "
            parts = [
                self.literal(syntax.begin + opening),
                _json(_object(schema)),
                self.literal("}" + closers),
            ]
        elif isinstance(body, NamedJsonCall):
            lead = body.name.leads[0] if body.name.writes_lead else ""
            number = f"{json.dumps(body.name.number_mark)} /[0-9]{{1,3}}/" if body.name.number_mark else ""
            opening = self.literal(syntax.begin + lead + name)
            end = self.literal(body.name.ends[0])
            parts = [opening, number, end, _json(_object(schema)), self.literal(closers)]
        elif isinstance(body, ParameterCall):
            arguments = self._parameters(body, schema)
            if arguments is None or not name.isprintable():
                return None
            opening = self.literal(syntax.begin + name + body.name.ends[0])
            # Where a body's end is also the envelope's, the envelope writes it.
            parts = [opening, arguments, self.literal(closers)]
        else:
            keywords = self._keywords(schema)
            if keywords is None or not name.replace(".", "_").isidentifier():
                return None
            parts = [self.literal(f"{name}("), keywords, self.literal(")")]
        return self.rule("tool", " ".join(parts))

    def messages(self, messages: MessageSyntax, tools: Tools, names: Sequence[str]) -> str | None:
        """A call as a message of its own, behind reasoning or not. Its end is the reply's."""
        if not names:
            return None
        calls = []
        for name in names:
            opening = self.literal(messages.written_call.replace("{name}", name))
            calls.append(self.rule("tool", f"{opening} {_json(_object(tools[name]))}"))
        before, behind = (self.literal(text) for text in messages.written_reasoning)
        reasoning = self.rule("reasoning", f"{before} {self.terminal('text', '(?s:.*)')} {behind}")
        return self.text(f"{reasoning}? ({' | '.join(calls)})")

    def _parameters(self, body: ParameterCall, schema: Schema | None) -> str | None:
        properties = _properties(schema)
        if properties is None:
            return None
        rules = []
        for key, part in properties.items():
            if not key or key != key.strip() or body.key_end in key or not key.isprintable():
                return None
            value = self._parameter_value(body, key, part, schema or {})
            if value is None:
                return None
            gap = body.written_gap
            line = "\n" if body.trims_line else ""
            opening = body.key_begin + key + body.key_end
            opening += (gap + body.value_begin if body.value_begin else "") + line
            rule = self.rule(
                "argument", f"{self.literal(opening)} {value} {self.literal(body.value_end + gap)}"
            )
            rules.append(rule if key in _required(schema) else f"{rule}?")
        return " ".join(rules)

    def _parameter_value(self, body: ParameterCall, key: str, part: object, schema: Schema) -> str | None:
        """The grammar of one value, or None."""
        line = self.literal("\n") if body.trims_line else ""
        if not is_only_string(argument_kinds(schema, key)):
            bounded = _with_bounded_strings(
                _with_definitions(part, schema), body.value_end[:2], _MAX_SCHEMA_DEPTH
            )
            return None if bounded is _TOO_DEEP else f"{_json(bounded)} {line}"
        if not isinstance(part, Mapping) or not part.keys() <= _PLAIN_STRING_KEYS:
            return None
        values = part.get("enum", [part["const"]] if "const" in part else None)
        if values is None:
            return self._free_text(body.value_end)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            return None
        if not values or any(body.value_end in value or value != value.strip() for value in values):
            return None
        choices = " | ".join(json.dumps(value, ensure_ascii=False) for value in values)
        return f"({choices}) {line}"

    def _free_text(self, end: str) -> str:
        """Any text in which `end` does not begin, whether that is a token or a text.

        Lexemes are matched greedily and never given back. So a piece of text that begins like `end` must have
        left it before it is one.
        """
        first = end[0]
        tail = ""
        for char in reversed(end[1:]):
            other = f"[^{_in_class(char)}{_in_class(first)}]"
            tail = f"({other}|{re.escape(char)}{tail})" if tail else other
        plain = self.terminal("plain", f"[^{_in_class(first)}]+")
        like_end = self.terminal("like_end", f"{re.escape(first)}{tail}")
        return f"({plain} | {like_end})*"

    def _keywords(self, schema: Schema | None) -> str | None:
        properties = _properties(schema)
        if properties is None or not all(key.isidentifier() for key in properties):
            return None
        required = _required(schema)
        rules = {}
        for key, part in properties.items():
            is_truth = argument_kinds(schema, key) == {"boolean"} and "enum" not in _as_schema(part)
            value = '("True" | "False")' if is_truth else _json(_with_definitions(part, schema or {}))
            rules[key] = self.rule("keyword", f"{self.literal(key + '=')} {value}")
        first = [rules[key] for key in properties if key in required]
        others = [rules[key] for key in properties if key not in required]
        # "more" is what may come behind an argument, "any" what may come where none was.
        more, anything = "", ""
        for rule in reversed(others):
            if not first:
                anything = self.rule("any", f"{rule} {more} | {anything}" if anything else f"{rule} {more}")
            more = self.rule("more", f'(", " {rule})? {more}')
        if first:
            return ' ", " '.join(first) + f" {more}"
        return f"{anything}?" if anything else ""


def _tidy(text: str) -> str:
    """Without the gaps of parts that are empty."""
    return text.strip()


def _in_class(char: str) -> str:
    """A character as it stands in a regular expression's brackets."""
    return f"\\{char}" if char in "\\]^-[" else char


def _json(schema: object) -> str:
    return f"%json {json.dumps(schema, ensure_ascii=False)}"


def _object(schema: Schema | None) -> dict[str, object]:
    """A schema for arguments: they are an object, whatever it says."""
    return {**(schema or {}), "type": "object"}


def _as_schema(part: object) -> Schema:
    return part if isinstance(part, Mapping) else {}


def _properties(schema: Schema | None) -> Schema | None:
    """The properties of a schema that says nothing else of its object; None for other schemas."""
    if schema is None:
        return {}
    properties = schema.get("properties", {})
    if not isinstance(properties, Mapping) or not schema.keys() <= _PLAIN_OBJECT_KEYS:
        return None
    return properties if _required(schema) <= properties.keys() else None


def _required(schema: Schema | None) -> set[str]:
    required = (schema or {}).get("required")
    return set(required) if isinstance(required, list) else set()


def _with_definitions(part: object, schema: Schema) -> object:
    """A property's schema by itself, with the definitions that it may refer to."""
    found = {key: schema[key] for key in _DEFINITIONS if key in schema}
    return {**found, **part} if isinstance(part, Mapping) and found else part


def _with_bounded_strings(part: object, end: str, depth: int) -> object:
    """A schema whose strings don't hold `end`, two characters by which the text around would end early.

    Strings of values that the schema leaves open are not reached. _TOO_DEEP for schemas deeper than `depth`.
    """
    if not isinstance(part, Mapping | list):
        return part
    if depth == 0:
        return _TOO_DEEP
    if isinstance(part, list):
        items = [_with_bounded_strings(item, end, depth - 1) for item in part]
        return _TOO_DEEP if any(item is _TOO_DEEP for item in items) else items
    bounded = {
        key: value if key in _STRING_BOUNDS else _with_bounded_strings(value, end, depth - 1)
        for key, value in part.items()
    }
    if any(value is _TOO_DEEP for value in bounded.values()):
        return _TOO_DEEP
    kinds = part.get("type")
    if (
        kinds == "string" or (isinstance(kinds, list) and "string" in kinds)
    ) and not part.keys() & _STRING_BOUNDS:
        first, second = (_in_class(char) for char in end)
        bounded["pattern"] = f"^([^{first}]|{first}+[^{first}{second}])*{first}*$"
    return bounded
