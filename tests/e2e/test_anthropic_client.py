"""Anthropic's official client uses this server as it uses Anthropic's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import pytest
from pydantic import BaseModel

from tests.e2e.serving import ServerProcess

COUNT: list[Any] = [{"role": "user", "content": "Count from 1 to 10."}]
COUNTED = "1. 1\n2. 2\n3. 3\n4. 4\n5. 5\n6. 6\n7."
SUM: list[Any] = [{"role": "user", "content": "What is 2+3?"}]
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}


@pytest.fixture
def claude(server: ServerProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=120) as client:
        yield client


# The client has no argument for it any more; the API has.
GREEDY: dict[str, Any] = {"extra_body": {"temperature": 0}}


def create(client: anthropic.Anthropic, messages: list[Any] = COUNT, **fields: Any) -> Any:
    return client.messages.create(model="demo", messages=messages, **{"max_tokens": 32, **GREEDY, **fields})


def test_a_message_is_answered_whole(claude: anthropic.Anthropic) -> None:
    message = create(claude)
    assert (message.type, message.role, message.model) == ("message", "assistant", "demo")
    assert [block.text for block in message.content] == [COUNTED]
    assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
    usage = message.usage
    assert usage.output_tokens == 32
    assert usage.input_tokens + usage.cache_read_input_tokens > 10
    assert message._request_id.startswith("req_")
    assert create(claude, SUM).stop_reason == "end_turn"


def test_stream_says_the_same_piece_by_piece(claude: anthropic.Anthropic) -> None:
    events = list(create(claude, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"} and len(kinds) > 20
    assert "".join(event.delta.text for event in events if event.type == "content_block_delta") == COUNTED
    assert events[-2].delta.stop_reason == "max_tokens" and events[-2].usage.output_tokens == 32


def test_stream_helper_puts_the_message_together(claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(model="demo", messages=COUNT, max_tokens=32, **GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == COUNTED == final.content[0].text  # type: ignore[union-attr]
    assert final.usage.output_tokens == 32 and final.stop_reason == "max_tokens"


def test_async_streams_run_beside_each_other(claude: anthropic.Anthropic, server: ServerProcess) -> None:
    async def stream(client: anthropic.AsyncAnthropic) -> str:
        async with client.messages.stream(model="demo", messages=COUNT, max_tokens=32, **GREEDY) as stream:
            return "".join([text async for text in stream.text_stream])

    async def stream_all() -> list[str]:
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(stream(client) for _ in range(3)))

    assert asyncio.run(stream_all()) == [COUNTED] * 3


def test_stop_sequence_ends_the_message_and_is_named(claude: anthropic.Anthropic) -> None:
    message = create(claude, stop_sequences=["4. 4", "never"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "4. 4")
    assert message.content[0].text == "1. 1\n2. 2\n3. 3\n"


def test_prefilled_message_is_continued(claude: anthropic.Anthropic) -> None:
    message = create(claude, [*COUNT, {"role": "assistant", "content": "1. 1\n2. 2\n3."}], max_tokens=8)
    assert message.content[0].text.startswith(" 3\n4. 4")


def test_system_prompt_is_read_and_cached(claude: anthropic.Anthropic) -> None:
    words = " ".join(f"word{number}" for number in range(100))
    mark: Any = {"type": "ephemeral"}
    system: Any = [{"type": "text", "text": f"Remember: {words}", "cache_control": mark}]
    first = create(claude, SUM, system=system).usage
    second = create(claude, SUM, system=system).usage
    total = first.input_tokens + first.cache_read_input_tokens
    assert second.input_tokens + second.cache_read_input_tokens == total > 200
    assert second.cache_read_input_tokens > total - 20
    counted = claude.messages.count_tokens(model="demo", messages=SUM, system=system)
    assert counted.input_tokens == total


def test_limit_beyond_the_context_is_no_error(claude: anthropic.Anthropic) -> None:
    assert create(claude, SUM, max_tokens=64_000).stop_reason == "end_turn"


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_call_that_is_asked_for_is_made(claude: anthropic.Anthropic, choice: Any) -> None:
    question: list[Any] = [{"role": "user", "content": "What is the weather in Rome in celsius?"}]
    choice = {**choice, "disable_parallel_tool_use": True}
    fields: dict[str, Any] = {"tools": [WEATHER], "max_tokens": 200}
    message = create(claude, question, tool_choice=choice, **fields)
    (call,) = (block for block in message.content if block.type == "tool_use")
    assert message.stop_reason == "tool_use" and call.name == "get_weather"
    assert set(call.input) == {"city", "unit"} and call.input["unit"] in ("celsius", "fahrenheit")
    with claude.messages.stream(
        model="demo", messages=question, tool_choice=choice, **GREEDY, **fields
    ) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        (streamed,) = (block for block in stream.get_final_message().content if block.type == "tool_use")
    assert streamed.input == call.input and len(pieces) > 1
    # And its result, with which the conversation goes on.
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny, 30 degrees."}
    answer = create(
        claude,
        [
            *question,
            {"role": "assistant", "content": message.content},
            {"role": "user", "content": [result]},
        ],
        tools=[WEATHER],
        tool_choice={"type": "none"},
    )
    assert answer.content[0].text


class Answer(BaseModel):
    """Small, so that a small model comes to its end."""

    colour: Literal["red", "green", "blue"]
    is_warm: bool


def test_answer_is_parsed_into_a_model(claude: anthropic.Anthropic) -> None:
    question: list[Any] = [{"role": "user", "content": "Name a colour. Answer in JSON."}]
    parsed = claude.messages.parse(model="demo", messages=question, max_tokens=100, output_format=Answer)
    assert isinstance(parsed.parsed_output, Answer)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"extra_body": {"temperature": -1}}, "temperature"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        ({"thinking": {"type": "enabled", "budget_tokens": 10}}, "thinking.budget_tokens"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
    ],
)
def test_what_is_wrong_is_named(claude: anthropic.Anthropic, fields: Any, named: str) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        create(claude, **fields)
    body: Any = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert named in body["error"]["message"]
    assert caught.value.request_id == body["request_id"]


def test_another_model_is_not_found(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="claude", messages=SUM, max_tokens=8)


def test_client_that_leaves_a_stream_stops_it(claude: anthropic.Anthropic, server: ServerProcess) -> None:
    with create(claude, stream=True, max_tokens=4000) as stream:
        for _ in range(6):
            next(stream)
    server.wait_until_idle()
