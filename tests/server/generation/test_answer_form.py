"""An answer that may call tools and must have a form is either: tried against the compiled grammar."""

from __future__ import annotations

from typing import Any

import pytest

from graphllm.structured.compiler import GrammarCompiler
from graphllm.structured_outputs import StructuredOutputs
from tests.server.posting import RICH_TEMPLATE, Posted, byte_tokenizer

RICH = byte_tokenizer(RICH_TEMPLATE)
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
COMPILER = GrammarCompiler(RICH, vocab_size=RICH.vocab_size, eos_token_ids=RICH.eos_token_ids)


def is_allowed(structured: StructuredOutputs | None, text: str) -> bool:
    """Whether the constraint lets a model write this and end there."""
    assert structured is not None
    constraint = COMPILER.compile(structured)()
    end = max(RICH.eos_token_ids)
    for token_id in RICH.encode(text, add_special_tokens=False):
        if constraint.is_finished or not _may_follow(constraint, token_id):
            return False
        constraint.accept(token_id)
    return constraint.is_finished or _may_follow(constraint, end)


def _may_follow(constraint: Any, token_id: int) -> bool:
    words = bytearray(b"\xff" * (4 * -(-RICH.vocab_size // 32)))
    constraint.restrict(memoryview(words).cast("i"))
    return bool(words[token_id // 8] >> (token_id % 8) & 1)


def asked(**fields: Any) -> StructuredOutputs | None:
    posted = Posted("chat", tokenizer=RICH, reasoning_effort="none", **fields)
    return posted.params.structured_outputs


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            '{"a": 1}',
            '{"b": 1}',
        ),
        ({"response_format": {"type": "json_object"}}, '{"b": [1]}', "[1]"),
        ({"guided_choice": ["yes", 'a "no"']}, 'a "no"', "maybe"),
        ({"guided_regex": "[a-c]+/[0-9]\\/x"}, "ab/5/x", "ab5"),
    ],
)
def test_an_answer_is_a_call_or_has_the_form(form: dict[str, Any], good: str, bad: str) -> None:
    alone, both = asked(**form), asked(**form, tools=[TOOL])
    for structured in (alone, both):
        assert is_allowed(structured, good) and not is_allowed(structured, bad)
    assert is_allowed(both, CALL) and is_allowed(both, CALL + "\n" + CALL)
    assert not is_allowed(alone, CALL) and not is_allowed(both, CALL.replace("city", "town"))


def test_a_required_call_is_a_call_and_nothing_else() -> None:
    structured = asked(tools=[TOOL], tool_choice="required")
    assert is_allowed(structured, CALL) and is_allowed(structured, CALL + "\n" + CALL)
    assert not is_allowed(structured, "Let me see.") and not is_allowed(structured, '{"a": 1}')
    one = asked(tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
    assert is_allowed(one, CALL) and not is_allowed(one, CALL + "\n" + CALL)


def test_whitespace_and_further_properties_can_be_chosen() -> None:
    form = {"json": SCHEMA}
    assert is_allowed(asked(structured_outputs=form), '{"a": 1}')
    none = asked(structured_outputs={**form, "disable_any_whitespace": True})
    assert is_allowed(none, '{"a":1}') and not is_allowed(none, '{"a": 1}')
    is_open = asked(structured_outputs={**form, "disable_additional_properties": False})
    assert is_allowed(is_open, '{"a": 1,"b":2}') and not is_allowed(none, '{"a":1,"b":2}')
    with_tools = asked(structured_outputs={**form, "disable_additional_properties": False}, tools=[TOOL])
    assert is_allowed(with_tools, '{"a": 1,"b":2}')
    two = asked(guided_json=SCHEMA, guided_whitespace_pattern=" {0,2}")
    assert is_allowed(two, '{"a":  1}') and not is_allowed(two, '{"a":   1}')
