"""A conversation's items become the messages that a chat of the same content would have."""

from __future__ import annotations

from typing import Any

from graphllm.server import sse
from graphllm.server.generation.decoding import NestedReader
from graphllm.server.openai.responses.conversation import call_ids, messages_of, stored_items
from graphllm.server.openai.responses.input_items import checked_items
from graphllm.server.openai.responses.store import Turn

USER = {"role": "user", "content": "What is the weather?"}
REASONING = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Ask."}]}
SAID = {"role": "assistant", "content": [{"type": "output_text", "text": "One moment."}]}
CALL = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"city":"Rome"}'}
RESULT = {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}


def messages(*items: dict[str, Any]) -> list[dict[str, Any]]:
    return messages_of(checked_items(list(items), known_call_ids=(), reader=NestedReader()))


def tool_call(call_id: str = "call_1") -> dict[str, Any]:
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": "weather", "arguments": {"city": "Rome"}},
    }


def test_reasoning_text_and_calls_are_one_message() -> None:
    assert messages(USER, REASONING, SAID, CALL, {**CALL, "call_id": "call_2"}, RESULT) == [
        USER,
        {
            "role": "assistant",
            "content": "One moment.",
            "reasoning_content": "Ask.",
            "tool_calls": [tool_call(), tool_call("call_2")],
        },
        {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": "sunny"},
    ]


def test_call_without_text_has_empty_content() -> None:
    assert messages(USER, CALL)[1] == {"role": "assistant", "content": "", "tool_calls": [tool_call()]}


def test_text_behind_a_call_begins_a_message_of_its_own() -> None:
    assert [message["role"] for message in messages(CALL, SAID)] == ["assistant", "assistant"]
    assert [message["role"] for message in messages(SAID, SAID)] == ["assistant", "assistant"]
    assert [message["role"] for message in messages(REASONING, REASONING)] == ["assistant", "assistant"]


def test_what_is_between_two_answers_parts_them() -> None:
    roles = [message["role"] for message in messages(REASONING, USER, SAID, CALL, RESULT, SAID)]
    assert roles == ["assistant", "user", "assistant", "tool", "assistant"]


def test_summary_stands_for_reasoning_whose_content_was_not_sent() -> None:
    summarized = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Ask."}]}
    assert messages(summarized, SAID)[0]["reasoning_content"] == "Ask."


def test_call_that_was_cut_is_left_out() -> None:
    cut = {**CALL, "arguments": '{"ci', "status": "incomplete"}
    assert messages(USER, cut) == [USER]
    assert messages(USER, SAID, cut)[1] == {"role": "assistant", "content": "One moment."}


def test_parts_are_joined_by_a_newline() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    assert messages({"role": "user", "content": parts})[0]["content"] == "a\nb"


def test_stored_turns_come_in_order_with_their_output() -> None:
    first = Turn(
        None, input_items=sse.encode_json(checked_items([USER], known_call_ids=(), reader=NestedReader()))
    )
    first.output_items = sse.encode_json(
        checked_items([REASONING, CALL], known_call_ids=(), reader=NestedReader())
    )
    second = Turn(
        first,
        input_items=sse.encode_json(
            checked_items([RESULT], known_call_ids={"call_1"}, reader=NestedReader())
        ),
    )
    items, is_whole = stored_items(second, max_bytes=10**6)
    assert is_whole
    assert [item["type"] for item in items] == [
        "message",
        "reasoning",
        "function_call",
        "function_call_output",
    ]
    assert call_ids(items) == {"call_1"}
    assert stored_items(None, max_bytes=0) == ([], True)
    # Continued or sent in full, it is the same chat, and so the same tokens.
    assert messages_of(items) == messages(USER, REASONING, CALL, RESULT)


def test_only_the_newest_turns_of_a_long_conversation_are_read() -> None:
    turn: Turn | None = None
    for number in range(10):
        message = {"role": "user", "content": f"{number}" * 1000}
        turn = Turn(
            turn,
            input_items=sse.encode_json(checked_items([message], known_call_ids=(), reader=NestedReader())),
        )
    items, is_whole = stored_items(turn, max_bytes=3500)
    assert [message["content"][0] for message in messages_of(items)] == ["7", "8", "9"]
    assert not is_whole
    items, is_whole = stored_items(turn, max_bytes=1)
    assert len(items) == 1 and not is_whole


def test_a_call_without_arguments_is_made_unless_it_was_cut() -> None:
    empty = {**CALL, "arguments": ""}
    (message,) = messages(empty)
    assert message["tool_calls"][0]["function"] == {"name": "weather", "arguments": {}}
    assert messages({**empty, "status": "incomplete"}) == []
