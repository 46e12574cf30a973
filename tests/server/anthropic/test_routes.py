"""POST /v1/messages and its count: what reaches the engine, what comes back, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from anthropic.types import Message

from graphllm.outputs import FinishReason
from graphllm.sampling_params import SamplingParams
from graphllm.server.anthropic.known_fields import COUNT_FIELDS, MESSAGES_FIELDS
from graphllm.server.anthropic.protocol import CountTokensRequest, MessagesRequest
from tests.server.dialect_server import Asked, DialectServer

TOOL = {
    "name": "weather",
    "description": "The weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
WRITTEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
MESSAGES = [{"role": "user", "content": "Hi"}]
BASE = {"model": "tiny", "max_tokens": 100, "messages": MESSAGES}


def create(dialects: DialectServer, **fields: Any) -> Asked:
    return dialects.ask("POST", "/v1/messages", {**BASE, **fields})


def answered(dialects: DialectServer, *texts: str, stop_reason: Any = None, **fields: Any) -> Any:
    asked = create(dialects, **fields)
    assert asked.channel.writes == [], asked.channel.received
    dialects.say(*(texts or ("Hello",)), stop_reason=stop_reason)
    Message.model_validate(asked.json)
    return asked.json


def refused(asked: Asked) -> str:
    assert asked.status == 400, asked.channel.received
    body = asked.json
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert body["request_id"] in asked.head
    param: str = body["error"]["param"]
    return param


def test_messages_are_rendered_as_a_chat(dialects: DialectServer) -> None:
    message = answered(dialects, system="Be kind.")
    assert dialects.prompt == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert message["content"] == [{"type": "text", "text": "Hello"}]
    assert message["model"] == "tiny" and "warnings" not in message


def test_last_message_of_the_assistant_is_continued(dialects: DialectServer) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "The answer is ("}]
    answered(dialects, "B)", messages=messages)
    assert dialects.prompt.endswith("<|im_start|>assistant\nThe answer is (")


def test_call_and_result_go_on_as_a_conversation(dialects: DialectServer) -> None:
    first = answered(dialects, f"<think>\nAsk.\n</think>\n{WRITTEN_CALL}", tools=[TOOL])
    assert [block["type"] for block in first["content"]] == ["thinking", "tool_use"]
    assert first["stop_reason"] == "tool_use"
    call = first["content"][1]
    assert (call["name"], call["input"]) == ("weather", {"city": "Rome"})
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": "sunny"}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": first["content"]},
        {"role": "user", "content": [result]},
    ]
    answered(dialects, "Sunny.", messages=messages, tools=[TOOL])
    assert "<think>\nAsk." in dialects.prompt and '{"city": "Rome"}' in dialects.prompt
    assert dialects.prompt.endswith("<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("choice", "is_enforced"),
    [
        ({"type": "auto"}, False),
        ({"type": "none"}, False),
        ({"type": "any"}, True),
        ({"type": "tool", "name": "weather"}, True),
    ],
)
def test_tool_choice_is_enforced_where_it_asks_for_a_call(
    dialects: DialectServer, choice: Any, is_enforced: bool
) -> None:
    other = {"name": "other", "input_schema": {"type": "object"}, "type": "custom"}
    answered(dialects, tools=[TOOL, other], tool_choice=choice)
    structured = dialects.submitted.params.structured_outputs
    assert (structured is not None) == is_enforced
    if choice["type"] == "tool":
        assert structured is not None and structured.grammar is not None
        assert "weather" in structured.grammar and "other" not in structured.grammar


def test_one_call_at_a_time_where_parallel_calls_are_off(dialects: DialectServer) -> None:
    written = f"{WRITTEN_CALL}\n{WRITTEN_CALL}"
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    assert len(answered(dialects, written, tools=[TOOL])["content"]) == 2
    assert len(answered(dialects, written, tools=[TOOL], tool_choice=choice)["content"]) == 1


def test_thinking_can_be_turned_off_and_hidden(dialects: DialectServer) -> None:
    answered(dialects, thinking={"type": "disabled"})
    assert dialects.prompt.endswith("<think>\n\n</think>\n\n")
    thinking = {"type": "enabled", "budget_tokens": 1024}
    message = answered(dialects, "<think>Hm</think>Yes", thinking=thinking, max_tokens=2000)
    assert dialects.prompt.endswith("<|im_start|>assistant\n")
    assert message["content"][0]["thinking"] == "Hm"
    assert [warning["field"] for warning in message["warnings"]] == ["thinking.budget_tokens"]
    hidden = answered(dialects, "<think>Hm</think>Yes", thinking={"type": "adaptive", "display": "omitted"})
    assert hidden["content"][0]["thinking"] == "" and hidden["content"][1]["text"] == "Yes"


def test_stop_sequence_is_named(dialects: DialectServer) -> None:
    message = answered(dialects, "One", stop_reason="END", stop_sequences=["END"])
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "END")
    assert dialects.submitted.params.stop == ("END",)


@pytest.mark.parametrize("name", ["output_config", "output_format"])
def test_json_schema_constrains_the_answer(dialects: DialectServer, name: str) -> None:
    wanted: Any = {
        "type": "json_schema",
        "schema": {"type": "object", "properties": {"a": {"type": "integer"}}},
    }
    answered(dialects, **{name: {"format": wanted} if name == "output_config" else wanted})
    structured = dialects.submitted.params.structured_outputs
    assert structured is not None and structured.json is not None and '"integer"' in structured.json


def test_limit_beyond_the_context_is_cut_and_the_message_says_so(dialects: DialectServer) -> None:
    asked = create(dialects, max_tokens=10**6)
    params = dialects.submitted.params
    assert params.max_tokens == 4096 - len(dialects.submitted.prompt_token_ids)
    dialects.say("Hello", end=FinishReason.LENGTH)
    assert asked.json["stop_reason"] == "model_context_window_exceeded"
    asked = create(dialects)
    dialects.say("Hello", end=FinishReason.LENGTH)
    assert asked.json["stop_reason"] == "max_tokens"


HONOURED: dict[str, tuple[Any, str, Any]] = {
    "max_tokens": (7, "max_tokens", 7),
    "temperature": (0.25, "temperature", 0.25),
    "top_k": (5, "top_k", 5),
    "top_p": (0.5, "top_p", 0.5),
    "stop_sequences": (["END"], "stop", ("END",)),
    "seed": (9, "seed", 9),
    "min_p": (0.1, "min_p", 0.1),
    "repetition_penalty": (1.2, "repetition_penalty", 1.2),
}


@pytest.mark.parametrize(("name", "value", "param", "expected"), [(k, *v) for k, v in HONOURED.items()])
def test_sampling_field_reaches_the_engine(
    dialects: DialectServer, name: str, value: Any, param: str, expected: Any
) -> None:
    answered(dialects, **{name: value})
    assert getattr(dialects.submitted.params, param) == expected != getattr(SamplingParams(), param)


def test_priority_and_salt_reach_the_engine(dialects: DialectServer) -> None:
    answered(dialects, priority=3, cache_salt="mine")
    assert (dialects.submitted.priority, dialects.submitted.cache_salt) == (3, "mine")


def test_marks_for_a_cache_change_nothing(dialects: DialectServer) -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    answered(dialects, system="Be kind.", tools=[TOOL])
    plain = dialects.submitted.prompt_token_ids
    message = answered(
        dialects,
        system=[{"type": "text", "text": "Be kind.", **mark}],
        tools=[{**TOOL, **mark}],
        messages=[{"role": "user", "content": [{"type": "text", "text": "Hi", **mark}]}],
        **mark,
    )
    assert dialects.submitted.prompt_token_ids == plain and "warnings" not in message


def test_label_goes_to_the_log(dialects: DialectServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", "graphllm.server.anthropic"):
        message = answered(dialects, metadata={"user_id": "someone"})
    assert f"{message['id']} is for user 'someone'" in caplog.text


def test_count_is_the_length_of_the_prompt(dialects: DialectServer) -> None:
    fields: dict[str, Any] = {"messages": MESSAGES, "system": "Be kind.", "tools": [TOOL]}
    answered(dialects, **fields)
    asked = dialects.ask("POST", "/v1/messages/count_tokens", {"model": "tiny", **fields})
    assert asked.json == {"input_tokens": len(dialects.submitted.prompt_token_ids)}
    assert len(dialects.engine.submitted) == 1


WARNED: dict[str, tuple[Any, str]] = {
    "thinking": ({"type": "adaptive", "display": "summarized"}, "thinking.display"),
    "tools": ([{**TOOL, "input_examples": [{}]}], "tools"),
    "chat_template_kwargs": ({"colour": "red"}, "chat_template_kwargs.colour"),
}


@pytest.mark.parametrize(("name", "value", "field"), [(name, *value) for name, value in WARNED.items()])
@pytest.mark.parametrize("stream", [True, False])
def test_what_cannot_be_honoured_is_said(
    dialects: DialectServer, name: str, value: Any, field: str, stream: bool
) -> None:
    asked = create(dialects, stream=stream, **{name: value})
    dialects.say("Hello")
    message = asked.events[0][1]["message"] if stream else asked.json
    assert [warning["field"] for warning in message["warnings"]] == [field]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown field": ({"temprature": 1}, "temprature"),
    "a negative limit": ({"max_tokens": -1}, "max_tokens"),
    "an empty stop sequence": ({"stop_sequences": [""]}, "stop_sequences"),
    "a hot temperature": ({"temperature": 1000}, "temperature"),
    "thinking without a budget": ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
    "a budget without thinking": (
        {"thinking": {"type": "disabled", "budget_tokens": 2000}},
        "thinking.budget_tokens",
    ),
    "too small a budget": ({"thinking": {"type": "enabled", "budget_tokens": 1}}, "thinking.budget_tokens"),
    "a budget above the limit": (
        {"thinking": {"type": "enabled", "budget_tokens": 2000}},
        "thinking.budget_tokens",
    ),
    "an unknown way to think": ({"thinking": {"type": "maybe"}}, "thinking.type"),
    "a server's tool": ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    "a tool without a schema": ({"tools": [{"name": "x"}]}, "tools[0].input_schema"),
    "two tools of a name": ({"tools": [TOOL, TOOL]}, "tools[1].name"),
    "a tool that code calls": (
        {"tools": [{**TOOL, "allowed_callers": ["code_execution_20250825"]}]},
        "tools[0].allowed_callers",
    ),
    "a call without tools": ({"tool_choice": {"type": "any"}}, "tool_choice"),
    "a choice without a name": ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    "a choice that is no tool": (
        {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}},
        "tool_choice.name",
    ),
    "a name without a choice": (
        {"tools": [TOOL], "tool_choice": {"type": "auto", "name": "weather"}},
        "tool_choice.name",
    ),
    "two formats": (
        {
            "output_config": {"format": {"type": "json_schema", "schema": {}}},
            "output_format": {"type": "json_schema", "schema": {}},
        },
        "output_format",
    ),
    "an empty salt": ({"cache_salt": ""}, "cache_salt"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        "messages[0].content[0].type",
    ),
}


@pytest.mark.parametrize(("fields", "param"), REFUSED.values(), ids=REFUSED)
def test_wrong_request_is_refused_by_name(dialects: DialectServer, fields: Any, param: str) -> None:
    assert refused(create(dialects, **fields)) == param
    assert dialects.engine.submitted == []


def test_chat_that_does_not_fit_is_refused(tiny_tokenizer: Any) -> None:
    dialects = DialectServer(tiny_tokenizer, max_model_len=100)
    assert refused(create(dialects, system="x" * 200)) == "messages"
    assert refused(create(dialects, messages=MESSAGES * 200)) == "messages"


def test_unknown_fields_are_warned_of_where_the_server_is_lenient(tiny_tokenizer: Any) -> None:
    dialects = DialectServer(tiny_tokenizer, lenient=True)
    block = {"type": "text", "text": "Hi", "colour": 1}
    message = answered(
        dialects, messages=[{"role": "user", "content": [block], "mood": "good"}], temprature=1
    )
    assert [warning["field"] for warning in message["warnings"]] == [
        "temprature",
        "messages[0].mood",
        "messages[0].content[0].colour",
    ]


def test_another_model_is_not_found(dialects: DialectServer) -> None:
    asked = create(dialects, model="claude")
    assert asked.status == 404 and asked.json["error"]["type"] == "not_found_error"


@pytest.mark.parametrize("name", MESSAGES_FIELDS)
def test_known_field_is_refused_or_warned_of_unless_it_asks_for_nothing(
    dialects: DialectServer, name: str
) -> None:
    known = MESSAGES_FIELDS[name]
    for value in (None, *known.neutral):
        assert "warnings" not in answered(dialects, **{name: value})
    if known.is_tolerated:
        assert answered(dialects, **{name: "x"})["warnings"] == [{"field": name, "message": known.note}]
    else:
        assert refused(create(dialects, **{name: "x"})) == name


def test_every_field_is_covered_by_a_claim() -> None:
    """A field that is added needs a test that it does something."""
    elsewhere = {
        *("model", "messages", "system", "tool_choice", "output_config", "output_format", "cache_control"),
        *("stream", "metadata", "cache_salt", "priority"),
    }
    assert set(MessagesRequest.__struct_fields__) == {*HONOURED, *WARNED, *elsewhere}
    assert set(CountTokensRequest.__struct_fields__) < set(MessagesRequest.__struct_fields__)
    assert set(COUNT_FIELDS) < set(MESSAGES_FIELDS)
