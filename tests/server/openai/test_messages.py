"""Which chat messages the API takes, and how the others are refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from graphllm.errors import InvalidRequestError
from graphllm.server.openai.messages import ChatMessage, plain_messages


def plain(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    return plain_messages(msgspec.convert(list(messages), list[ChatMessage]))


def test_text_parts_are_joined_by_newlines() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert plain({"role": "user", "content": parts}) == [{"role": "user", "content": "a\nb"}]


def test_an_answer_sent_back_as_it_came_is_accepted() -> None:
    answer: dict[str, Any] = {
        "role": "assistant",
        "content": "4",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
        "reasoning": "",
    }
    assert plain(answer) == [{"role": "assistant", "content": "4"}]


def test_arguments_become_objects() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    (assistant,) = plain({"role": "assistant", "content": None, "tool_calls": [call]})
    assert assistant["content"] == ""
    assert assistant["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    ]


def test_the_older_forms_of_calls_and_results_are_the_newer_ones() -> None:
    assistant, result = plain(
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": "{}"}},
        {"role": "function", "name": "add", "content": "2"},
    )
    assert assistant["tool_calls"][0]["function"] == {"name": "add", "arguments": {}}
    assert result == {"role": "tool", "name": "add", "content": "2"}


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content"])
def test_reasoning_comes_under_either_name(key: str) -> None:
    (message,) = plain({"role": "assistant", "content": "4", key: "2+2"})
    assert message["reasoning_content"] == "2+2"


def test_a_refusal_is_what_the_assistant_said() -> None:
    assert plain({"role": "assistant", "content": None, "refusal": "No."})[0]["content"] == "No."
    part = {"type": "refusal", "refusal": "No."}
    assert plain({"role": "assistant", "content": [part]})[0]["content"] == "No."


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user"}, "messages[0].content"),
        ({"role": "assistant", "content": None}, "messages[0].content"),
        ({"role": "user", "content": []}, "messages[0].content"),
        ({"role": "user", "content": [{}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, "messages[0].content[0].text"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]},
            "messages[0].content[0].cache_control",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content[0].type",
        ),
        (
            {"role": "user", "content": [{"type": "refusal", "refusal": "x"}]},
            "messages[0].content[0].type",
        ),
        ({"role": "user", "content": "x", "refusal": "no"}, "messages[0].refusal"),
        ({"role": "user", "content": "x", "reasoning": "no"}, "messages[0].reasoning"),
        ({"role": "assistant", "content": "x", "audio": {"id": "a"}}, "messages[0].audio"),
        (
            {"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            "messages[0].tool_calls",
        ),
        (
            {
                "role": "assistant",
                "tool_calls": [{"type": "custom", "function": {"name": "f", "arguments": ""}}],
            },
            "messages[0].tool_calls[0].type",
        ),
    ],
)
def test_a_message_that_is_none_is_refused_by_its_path(message: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        plain(message)
    assert caught.value.param == param
    assert param.rpartition(".")[0] in caught.value.message


def test_tool_call_arguments_without_a_text_are_none() -> None:
    for arguments in ("", " "):
        call = {"function": {"name": "f", "arguments": arguments}}
        (assistant,) = plain({"role": "assistant", "tool_calls": [call]})
        assert assistant["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


def test_tool_call_arguments_that_are_no_object_are_refused() -> None:
    for arguments in ("5", "{", "[" * 10_000):
        call = {"function": {"name": "f", "arguments": arguments}}
        with pytest.raises(InvalidRequestError) as caught:
            plain({"role": "assistant", "tool_calls": [call]})
        assert caught.value.param == "messages[0].tool_calls[0].function.arguments"
