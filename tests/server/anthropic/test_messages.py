"""Anthropic's messages become the messages of a chat; what cannot be read is refused by its path."""

from __future__ import annotations

import time
from typing import Any

import pytest

from graphllm.errors import InvalidRequestError, UnsupportedFieldError
from graphllm.server.anthropic.messages import Conversation, read_conversation
from graphllm.server.generation.decoding import NestedReader

USE = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome"}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "sunny"}
CALL = {
    "id": "toolu_1",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Rome"}},
}


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def text(value: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **more}


def read(*messages: dict[str, Any], system: Any = None) -> Conversation:
    return read_conversation(list(messages), system, reader=NestedReader())


def test_system_and_plain_texts_are_messages() -> None:
    conversation = read({"role": "user", "content": "Hi"}, system="Be kind.")
    assert conversation.messages == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
    ]
    assert not conversation.ends_with_assistant


def test_system_may_be_blocks_and_may_come_later() -> None:
    system = [text("Be kind."), text("Be short.", cache_control={"type": "ephemeral", "ttl": "1h"})]
    later = {"role": "system", "content": [text("Be quick.")]}
    roles = [message["role"] for message in read(user(text("Hi")), later, system=system).messages]
    assert roles == ["system", "user", "system"]
    assert read(user(text("Hi")), system=system).messages[0]["content"] == "Be kind.\nBe short."


def test_thinking_text_and_calls_are_one_message_and_results_their_own() -> None:
    conversation = read(
        user(text("Weather?")),
        assistant({"type": "thinking", "thinking": "Ask.", "signature": "s"}, text("One moment."), USE),
        user(RESULT, text("Well?")),
    )
    assert conversation.messages == [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "One moment.",
            "reasoning_content": "Ask.",
            "tool_calls": [CALL],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "name": "weather", "content": "sunny"},
        {"role": "user", "content": "Well?"},
    ]


def test_messages_of_one_role_in_a_row_are_one_turn() -> None:
    conversation = read(user(text("a")), user(text("b")), assistant(text("c")), assistant(text("d")))
    assert [message["content"] for message in conversation.messages] == ["a\nb", "c\nd"]
    assert conversation.ends_with_assistant


def test_result_may_be_empty_blocks_or_an_error() -> None:
    def result(**fields: Any) -> str:
        block = {"type": "tool_result", "tool_use_id": "toolu_1", **fields}
        return str(read(user(text("a")), assistant(USE), user(block)).messages[-1]["content"])

    assert result() == ""
    assert result(content=[text("a"), text("b")]) == "a\nb"
    assert result(content="no such city", is_error=True) == "Error: no such city"


def test_redacted_thinking_is_left_out_with_a_warning() -> None:
    conversation = read(
        user(text("a")), assistant({"type": "redacted_thinking", "data": "x"}, text("b")), user(text("c"))
    )
    assert conversation.messages[1] == {"role": "assistant", "content": "b"}
    assert [warning.field for warning in conversation.warnings] == ["messages[1].content[0]"]


CITED = {"type": "char_location"}
REFUSED: dict[str, tuple[list[Any], str]] = {
    "nothing": ([], "messages"),
    "no role": ([{"content": "a"}], "messages[0].role"),
    "an unknown role": ([{"role": "tool", "content": "a"}], "messages[0].role"),
    "no content": ([{"role": "user"}], "messages[0].content"),
    "content of a wrong type": ([{"role": "user", "content": 3}], "messages[0].content"),
    "an unknown key": ([{"role": "user", "content": "a", "name": "b"}], "messages[0].name"),
    "no blocks": ([user()], "messages[0].content"),
    "a block that is no object": ([user("a")], "messages[0].content[0]"),
    "a block without a type": ([user({"text": "a"})], "messages[0].content[0].type"),
    "an image": ([user({"type": "image", "source": {}})], "messages[0].content[0].type"),
    "a document": ([user(text("a"), {"type": "document"})], "messages[0].content[1].type"),
    "a call of the user": ([user(USE)], "messages[0].content[0].type"),
    "a result of the assistant": ([assistant(RESULT)], "messages[0].content[0].type"),
    "a server's tool": ([assistant({"type": "server_tool_use"})], "messages[0].content[0].type"),
    "text that is none": ([user({"type": "text", "text": None})], "messages[0].content[0].text"),
    "an unknown key in a block": ([user(text("a", texts="b"))], "messages[0].content[0].texts"),
    "citations": ([assistant(text("a", citations=[CITED]))], "messages[0].content[0].citations"),
    "a cache mark of a wrong type": (
        [user(text("a", cache_control={"type": "forever"}))],
        "messages[0].content[0].cache_control.type",
    ),
    "a result without its call": ([user(RESULT)], "messages[0].content[0].tool_use_id"),
    "an image in a result": (
        [user(text("a")), assistant(USE), user({**RESULT, "content": [{"type": "image"}]})],
        "messages[2].content[0].content[0].type",
    ),
    "a call without an input": (
        [assistant({"type": "tool_use", "id": "a", "name": "b"})],
        "messages[0].content[0].input",
    ),
    "a call's input of a wrong type": (
        [assistant({**USE, "input": "{}"})],
        "messages[0].content[0].input",
    ),
    "a caller": ([assistant({**USE, "caller": {"type": "x"}})], "messages[0].content[0].caller"),
    "a toolset": ([assistant({**USE, "toolset_name": "x"})], "messages[0].content[0].toolset_name"),
    "a last call without a result": ([user(text("a")), assistant(USE)], "messages[1].content"),
}


@pytest.mark.parametrize(("messages", "param"), REFUSED.values(), ids=REFUSED)
def test_wrong_message_is_refused_by_its_path(messages: list[Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read(*messages)
    assert caught.value.param == param and param in caught.value.message


def test_wrong_system_block_is_refused_by_its_path() -> None:
    with pytest.raises(UnsupportedFieldError) as caught:
        read(user(text("a")), system=[text("a"), {"type": "image"}])
    assert caught.value.param == "system[1].type"


def test_a_message_of_very_many_blocks_is_joined_once() -> None:
    blocks = [{"type": "text", "text": "x" * 100}] * 30_000
    thinking = [{"type": "thinking", "thinking": "y" * 100}] * 30_000
    begin = time.thread_time()
    conversation = read_conversation(
        [{"role": "user", "content": blocks}, {"role": "assistant", "content": [*thinking, *blocks]}],
        blocks,
        reader=NestedReader(),
    )
    assert time.thread_time() - begin < 10.0  # block by block it takes minutes
    texts = [message["content"] for message in conversation.messages]
    assert texts == ["\n".join(["x" * 100] * 30_000)] * 3
    assert conversation.messages[-1]["reasoning_content"] == "\n".join(["y" * 100] * 30_000)


def test_empty_blocks_before_a_text_leave_no_blank_lines() -> None:
    blocks = [{"type": "text", "text": text} for text in ("", "a", "", "b")]
    conversation = read_conversation([{"role": "user", "content": blocks}], None, reader=NestedReader())
    assert conversation.messages == [{"role": "user", "content": "a\n\nb"}]
