"""Which chat messages are rendered, and how the others are refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from graphllm.errors import InvalidRequestError, UnsupportedFieldError
from graphllm.server.openai.messages import template_messages
from graphllm.server.openai.protocol import ChatMessage

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}"
)
TOOLS = "{% if message.tool_calls %}{{ tool_call.function.name }}{% endif %}{% if message.role == 'tool' %}"
NAMES = "{{ message.role }} {{ message['name'] }}: {{ message.content }}"


def rendered(*messages: dict[str, Any], template: str = CHATML) -> list[dict[str, Any]]:
    return template_messages(msgspec.convert(list(messages), list[ChatMessage]), template)


def test_text_parts_are_joined_by_newlines() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert rendered({"role": "user", "content": parts}) == [{"role": "user", "content": "a\nb"}]


def test_developer_becomes_system_unless_the_template_knows_it() -> None:
    message = {"role": "developer", "content": "Be brief."}
    assert rendered(message)[0]["role"] == "system"
    assert rendered(message, template="{% if message.role == 'developer' %}")[0]["role"] == "developer"


def test_an_answer_sent_back_as_it_came_is_accepted() -> None:
    answer = {
        "role": "assistant",
        "content": "4",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    assert rendered(answer) == [{"role": "assistant", "content": "4"}]


def test_a_name_is_rendered_only_by_a_template_that_reads_it() -> None:
    message = {"role": "user", "content": "Hi", "name": "ann"}
    assert rendered(message, template=NAMES)[0]["name"] == "ann"
    for template in (CHATML, TOOLS):
        with pytest.raises(UnsupportedFieldError) as caught:
            rendered(message, template=template)
        assert caught.value.param == "messages[0].name"


def test_tool_calls_reach_a_template_that_knows_them_as_objects() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
    ]
    assistant, tool = rendered(*messages, template=TOOLS)
    assert assistant["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert tool == {"role": "tool", "content": "2", "tool_call_id": "c1"}


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "wizard", "content": "Hi"}, "messages[0].role"),
        ({"role": "function", "content": "Hi"}, "messages[0].role"),
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
        ({"role": "assistant", "content": "x", "refusal": "no"}, "messages[0].refusal"),
        ({"role": "assistant", "content": "x", "audio": {"id": "a"}}, "messages[0].audio"),
        ({"role": "user", "content": "x", "tool_call_id": "c"}, "messages[0].tool_call_id"),
        ({"role": "tool", "content": "x", "tool_call_id": "c"}, "messages[0].role"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            "messages[0].tool_calls",
        ),
    ],
)
def test_a_message_that_cannot_be_rendered_is_refused_by_its_path(
    message: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        rendered(message)
    assert caught.value.param == param
    assert param.rpartition(".")[0] in caught.value.message


def test_tool_call_arguments_that_are_no_object_are_refused() -> None:
    for arguments in ("", "5", "{", "[" * 10_000):
        call = {"function": {"name": "f", "arguments": arguments}}
        with pytest.raises(InvalidRequestError) as caught:
            rendered({"role": "assistant", "tool_calls": [call]}, template=TOOLS)
        assert caught.value.param == "messages[0].tool_calls[0].function.arguments"


def test_no_messages_are_refused() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        rendered()
    assert caught.value.param == "messages"
