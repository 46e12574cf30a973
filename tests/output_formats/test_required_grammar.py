"""What a grammar lets through is what the parser reads: calls with arguments that the schemas allow."""

from __future__ import annotations

import random
from collections.abc import Iterable

import jsonschema
import numpy as np
import pytest

from graphllm.output_formats import OutputFormat, find_format
from graphllm.structured.compiler import GrammarCompiler
from graphllm.structured.grammar_constraint import GrammarConstraint
from graphllm.structured_outputs import StructuredOutputs
from tests.output_formats.replies import Reply, read
from tests.output_formats.samples import SAMPLES

FORMATS = sorted(SAMPLES)
TOOLS = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "unit": {"type": "string", "enum": ["C", "F"]},
            "metric": {"type": "boolean"},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        },
        "required": ["city", "days"],
    },
    "get_time": {"type": "object", "properties": {}, "additionalProperties": False},
    "find": {
        "type": "object",
        "properties": {
            "place": {"$ref": "#/$defs/place"},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "$defs": {
            "place": {
                "type": "object",
                "properties": {"x": {"type": "number"}},
                "required": ["x"],
                "additionalProperties": False,
            }
        },
        "additionalProperties": False,
    },
    "anything": None,
}


class MarkerTokenizer:
    """Bytes, some pieces of text, and a format's markers, as special tokens or not."""

    def __init__(self, markers: Iterable[str], *, are_special: bool) -> None:
        markers = sorted(markers)
        pieces = [
            "get_",
            "weather",
            "time",
            '{"',
            '": ',
            '"}',
            '", "',
            "city",
            "days",
            "true",
            "\n\n",
            "é",
            "</",
            "<a",
        ]
        texts = [text.encode() for text in (*pieces, *markers)]
        self._tokens = [*(bytes([byte]) for byte in range(256)), *texts, b"<end>"]
        num_special = len(markers) + 1 if are_special else 1
        self.vocab_size = len(self._tokens)
        self.special_token_ids = frozenset(range(self.vocab_size - num_special, self.vocab_size))
        self.end = self.vocab_size - 1
        self.eos_token_ids = frozenset({self.end})

    def token_bytes(self, token_id: int, /) -> bytes:
        return self._tokens[token_id]

    def encode(self, text: str, /, *, add_special_tokens: bool) -> list[int]:
        return list(text.encode())


def compiled(grammar: str, tokenizer: MarkerTokenizer) -> GrammarConstraint:
    factory = GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size).compile(
        StructuredOutputs(grammar=grammar)
    )
    constraint = factory()
    assert isinstance(constraint, GrammarConstraint)
    return constraint


def walk(constraint: GrammarConstraint, tokenizer: MarkerTokenizer, rng: random.Random) -> str:
    """A text of the grammar: tokens by chance, and after a while those that lead to an end."""
    written: list[int] = []
    num_free = rng.choice([5, 40, 120])
    ends = [token for token in range(256, tokenizer.end) if tokenizer.token_bytes(token)[1:2] in b"/|"]
    closing = [tokenizer.end, *ends, *b'"}])<']
    while not constraint.is_finished:
        assert len(written) < 3000, tokenizer_text(tokenizer, written)
        row = np.full((tokenizer.vocab_size + 31) // 32, -1, np.int32)
        constraint.restrict(memoryview(row))
        bits = np.unpackbits(row.view(np.uint8), bitorder="little")[: tokenizer.vocab_size]
        allowed = np.flatnonzero(bits).tolist()
        assert allowed
        best = [token for token in closing if token in allowed]
        is_closing = len(written) > num_free and rng.random() < 0.7
        chosen = rng.choice(best[: 1 + rng.randrange(3)]) if is_closing and best else rng.choice(allowed)
        if chosen == tokenizer.end:
            break
        constraint.accept(chosen)
        written.append(chosen)
    return tokenizer_text(tokenizer, written)


def tokenizer_text(tokenizer: MarkerTokenizer, tokens: list[int]) -> str:
    return b"".join(map(tokenizer.token_bytes, tokens)).decode()


def assert_calls(reply: Reply, names: Iterable[str]) -> None:
    assert reply.calls
    assert reply.text == ""
    for call in reply.calls:
        assert call.name in names
        jsonschema.validate(call.arguments, TOOLS[call.name] or {"type": "object"})


@pytest.mark.parametrize("are_special", [True, False], ids=["special tokens", "text"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_walk_is_calls_with_valid_arguments(name: str, are_special: bool) -> None:
    output_format = find_format(name)
    if output_format.messages is not None and not are_special:
        pytest.skip("the markers of messages are special tokens in every vocabulary that has them")
    grammar = output_format.required_grammar(TOOLS)
    assert grammar is not None
    tokenizer = MarkerTokenizer(output_format.marker_texts, are_special=are_special)
    rng = random.Random(7)
    called = set()
    for _ in range(25):
        text = walk(compiled(grammar, tokenizer), tokenizer, rng)
        reply = read(output_format, text, tools=TOOLS)
        assert_calls(reply, TOOLS)
        called.update(call.name for call in reply.calls)
    assert len(called) >= 3


@pytest.mark.parametrize("name", FORMATS)
def test_a_named_tool_is_called_once(name: str) -> None:
    output_format = find_format(name)
    grammar = output_format.required_grammar(TOOLS, names=["get_weather"], parallel=False)
    assert grammar is not None
    tokenizer = MarkerTokenizer(output_format.marker_texts, are_special=True)
    rng = random.Random(8)
    for _ in range(8):
        reply = read(output_format, walk(compiled(grammar, tokenizer), tokenizer, rng), tools=TOOLS)
        assert_calls(reply, ["get_weather"])
        assert len(reply.calls) == 1


# Models write Python's quotes at will; the grammar has JSON's.
PYTHON = ("pythonic", "olmo3")
# Where a sample of another title is written as the grammar has it.
TITLES = {
    ("mistral_named", "one call"): "by name",
    ("mistral_named", "parallel calls"): "by name, parallel",
    ("generic", "parallel calls"): "calls on lines",
}


def tokens_of(text: str, tokenizer: MarkerTokenizer, output_format: OutputFormat) -> list[int]:
    """The text in bytes, with its markers as the tokens that they are."""
    by_text = {tokenizer.token_bytes(token): token for token in range(256, tokenizer.vocab_size)}
    markers = sorted((marker.encode() for marker in output_format.marker_texts), key=len, reverse=True)
    found, rest = [], text.encode()
    while rest:
        marker = next((marker for marker in markers if rest.startswith(marker)), None)
        found.append(rest[0] if marker is None else by_text[marker])
        rest = rest[len(marker or b" ") :]
    return found


@pytest.mark.parametrize("are_special", [True, False], ids=["special tokens", "text"])
@pytest.mark.parametrize("title", ["one call", "parallel calls"])
@pytest.mark.parametrize("name", [name for name in FORMATS if name not in PYTHON])
def test_what_templates_write_is_allowed(name: str, title: str, are_special: bool) -> None:
    if title not in SAMPLES[name] or (name, title) == ("gpt_oss", "parallel calls"):
        pytest.skip("one call a reply, or no sample")
    title = TITLES.get((name, title), title)
    output_format = find_format(name)
    tools = {"get_weather": {"properties": {"city": {"type": "string"}}}, "get_time": {"properties": {}}}
    grammar = output_format.required_grammar(tools, starts_in_reasoning=True)
    assert grammar is not None
    tokenizer = MarkerTokenizer(output_format.marker_texts, are_special=are_special)
    # What need not be there, or is the end token of its vocabulary.
    sample = SAMPLES[name][title]
    written = sample.written.removeprefix(sample.text).removeprefix("<|python_tag|>").lstrip("\n")
    written = written.removesuffix("<|call|>").replace("[TOOL_CALLS] [", "[TOOL_CALLS][")
    constraint = compiled(grammar, tokenizer)
    constraint.accept_all(tokens_of(written, tokenizer, output_format))
    assert constraint.is_finished or constraint.is_accepting


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"type": "string", "pattern": "^a+$"}}},
        {"properties": {"a": {"type": "string", "minLength": 2}}},
        {"properties": {"a": {"type": "string", "enum": ["</arg_value>"]}}},
        {"properties": {"a": {"type": "string", "enum": [" a"]}}},
        {"properties": {}, "required": ["a"]},
        {"properties": {"a</arg_key>": {}}},
        {"anyOf": [{"properties": {}}, {}]},
        {"properties": {}, "minProperties": 1},
    ],
)
def test_a_schema_that_a_format_cannot_be_held_to_has_no_grammar(schema: dict[str, object]) -> None:
    assert find_format("glm").required_grammar({"f": schema}) is None
    assert find_format("hermes").required_grammar({"f": schema}) is not None


def test_a_keyword_that_is_no_identifier_has_no_grammar() -> None:
    assert find_format("pythonic").required_grammar({"f": {"properties": {"a-b": {}}}}) is None
    assert find_format("pythonic").required_grammar({"f-g": {"properties": {}}}) is None


def test_no_tools_have_no_grammar() -> None:
    for name in FORMATS:
        assert find_format(name).required_grammar({}) is None


def test_a_deep_schema_has_no_grammar_where_it_must_be_rewritten() -> None:
    deep: dict[str, object] = {"type": "array"}
    for _ in range(100):
        deep = {"type": "array", "items": deep}
    assert find_format("glm").required_grammar({"f": {"properties": {"a": deep}}}) is None


def test_strings_inside_an_argument_do_not_end_it() -> None:
    output_format = find_format("glm")
    schema = {"properties": {"a": {"type": "array", "items": {"type": "string"}}}, "required": ["a"]}
    grammar = output_format.required_grammar({"f": schema})
    assert grammar is not None
    tokenizer = MarkerTokenizer(output_format.marker_texts, are_special=False)
    constraint = compiled(grammar, tokenizer)
    opening = '<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>["a < b <b>'
    constraint.accept_all(list(opening.encode()))
    assert constraint.allows(list(b"<x"))
    assert not constraint.allows(list(b"</"))


def test_arguments_are_an_object_whatever_the_schema_says() -> None:
    output_format = find_format("hermes")
    grammar = output_format.required_grammar({"f": {"type": ["object", "null"]}, "g": {}})
    assert grammar is not None
    tokenizer = MarkerTokenizer(output_format.marker_texts, are_special=False)
    for name in "fg":
        constraint = compiled(grammar, tokenizer)
        constraint.accept_all(list(f'<tool_call>\n{{"name": "{name}", "arguments": '.encode()))
        assert constraint.allows(list(b"{"))
        assert not constraint.allows(list(b"n"))
