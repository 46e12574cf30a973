"""The official client uses /v1/responses of this server as it uses OpenAI's."""

from __future__ import annotations

import json
import time
from typing import Any, Literal

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from tests.e2e.serving import ServerProcess

COUNT = "Count from 1 to 10."
COUNTED = "1. 1\n2. 2\n3. 3\n4. 4\n5. 5\n6. 6\n7."
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
    "strict": True,
}


def create(client: openai.OpenAI, text: Any = COUNT, **fields: Any) -> Any:
    return client.responses.create(
        model="demo", input=text, **{"temperature": 0, "max_output_tokens": 32, **fields}
    )


def wait_for(client: openai.OpenAI, response_id: str, status: str) -> Response:
    deadline = time.monotonic() + 60
    while True:
        response = client.responses.retrieve(response_id)
        if response.status == status:
            return response
        assert time.monotonic() < deadline, response
        time.sleep(0.02)


def test_a_text_is_answered_whole(client: openai.OpenAI) -> None:
    response = create(client)
    assert response.object == "response" and response.id.startswith("resp_")
    assert response.output_text == COUNTED
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    assert response.usage.output_tokens == 32 and response.usage.total_tokens > 42
    assert response._request_id == response.id
    Response.model_validate(response.to_dict())


def test_stream_has_every_event_in_order_and_ends_with_the_whole_response(client: openai.OpenAI) -> None:
    events = list(create(client, "What is 2+3?", stream=True))
    for number, event in enumerate(events):
        assert event.sequence_number == number
        assert EVENT.validate_python(event.to_dict()).type == event.type
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    final = events[-1].response
    assert text == final.output_text == create(client, "What is 2+3?").output_text
    assert final.status == "completed"
    assert client.responses.retrieve(final.id).to_dict() == final.to_dict()


def test_stream_helper_puts_the_response_together(client: openai.OpenAI) -> None:
    with client.responses.stream(model="demo", input="What is 2+3?", temperature=0) as stream:
        for event in stream:
            if event.type == "response.output_text.delta":
                assert event.snapshot.endswith(event.delta)
        final = stream.get_final_response()
    assert final.output_text == create(client, "What is 2+3?").output_text


def test_conversation_goes_on_and_finds_its_beginning_in_the_cache(client: openai.OpenAI) -> None:
    words = " ".join(f"word{number}" for number in range(100))
    first = create(client, f"Remember these: {words}. What is 2+3?")
    second = create(client, "And what is 3+4?", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    # All full blocks of what was there before: prompt and answer.
    known = first.usage.total_tokens
    assert known - 40 <= second.usage.input_tokens_details.cached_tokens <= known
    # The same chat, sent as items by a client that keeps its own history.
    items = [
        {"role": "user", "content": f"Remember these: {words}. What is 2+3?"},
        *(item.to_dict() for item in first.output),
        {"role": "user", "content": "And what is 3+4?"},
    ]
    assert create(client, items, store=False).usage.input_tokens == second.usage.input_tokens
    roles = [item.role for item in client.responses.input_items.list(second.id, order="asc")]  # type: ignore[union-attr]
    assert roles == ["user", "assistant", "user"]


def test_deleted_response_can_neither_be_read_nor_continued(client: openai.OpenAI) -> None:
    response = create(client)
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError, match="was deleted"):
        client.responses.retrieve(response.id)
    with pytest.raises(openai.NotFoundError, match="was deleted"):
        create(client, previous_response_id=response.id)
    private = create(client, store=False)
    with pytest.raises(openai.NotFoundError, match="not stored"):
        client.responses.retrieve(private.id)


def test_background_response_is_made_without_a_connection(client: openai.OpenAI) -> None:
    response = create(client, background=True)
    assert response.status == "queued" and response.output == []
    assert wait_for(client, response.id, "incomplete").output_text == COUNTED


def test_background_response_is_cancelled(client: openai.OpenAI, server: ServerProcess) -> None:
    response = create(client, background=True, max_output_tokens=4000, extra_body={"ignore_eos": True})
    wait_for(client, response.id, "in_progress")
    cancelled = client.responses.cancel(response.id)
    assert cancelled.status == "cancelled"
    server.wait_until_idle()
    assert client.responses.retrieve(response.id).to_dict() == cancelled.to_dict()
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(create(client).id)


def test_background_stream_is_taken_up_where_it_was_left(client: openai.OpenAI) -> None:
    with create(client, background=True, stream=True, max_output_tokens=100) as stream:
        seen = [next(stream) for _ in range(8)]
    response_id = seen[0].response.id
    rest = list(client.responses.retrieve(response_id, stream=True, starting_after=7))
    numbers = [event.sequence_number for event in seen + rest]
    assert numbers == list(range(len(numbers)))
    text = "".join(event.delta for event in seen + rest if event.type == "response.output_text.delta")
    assert text == rest[-1].response.output_text  # type: ignore[union-attr]
    assert client.responses.retrieve(response_id).output_text == text


def test_client_that_leaves_a_stream_stops_it(client: openai.OpenAI, server: ServerProcess) -> None:
    with create(client, stream=True, max_output_tokens=4000, extra_body={"ignore_eos": True}) as stream:
        seen = [next(stream) for _ in range(8)]
    server.wait_until_idle()
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(seen[0].response.id)


def test_logprobs_come_with_the_text(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = create(client, **fields).output[0].content[0].logprobs
    assert "".join(entry.token for entry in whole).startswith(COUNTED)
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in whole)
    streamed = [
        entry.token
        for event in create(client, stream=True, **fields)
        if event.type == "response.output_text.delta"
        for entry in event.logprobs
    ]
    assert streamed == [entry.token for entry in whole]


class Answer(BaseModel):
    """Small, so that a small model comes to its end."""

    colour: Literal["red", "green", "blue"]
    is_warm: bool


def test_answer_is_parsed_into_a_model(client: openai.OpenAI) -> None:
    question = "Name a colour. Answer in JSON."
    parsed = client.responses.parse(model="demo", input=question, text_format=Answer, max_output_tokens=100)
    assert isinstance(parsed.output_parsed, Answer)
    with client.responses.stream(model="demo", input=question, text_format=Answer) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Answer)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_call_that_is_asked_for_is_made(client: openai.OpenAI, choice: Any) -> None:
    fields: dict[str, Any] = {"tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False}
    question = "What is the weather in Rome in celsius?"
    response = create(client, question, max_output_tokens=200, **fields)
    (call,) = (item for item in response.output if item.type == "function_call")
    arguments = json.loads(call.arguments)
    assert call.name == "get_weather" and set(arguments) == {"city", "unit"}
    assert arguments["unit"] in ("celsius", "fahrenheit")
    # The same call as a stream, its arguments piece by piece.
    events = list(create(client, question, max_output_tokens=200, stream=True, **fields))
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(pieces) == call.arguments and len(pieces) > 1
    # And its result, with which the conversation goes on.
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny, 30 degrees."}
    answer = create(client, [output], previous_response_id=response.id, tools=[WEATHER], tool_choice="none")
    assert answer.output_text
    kinds = [item.type for item in client.responses.input_items.list(answer.id, order="asc")]
    assert kinds[0] == "message" and kinds[-2:] == ["function_call", "function_call_output"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        ({"max_output_tokens": 100_000}, "max_output_tokens"),
    ],
)
def test_what_is_wrong_is_named(client: openai.OpenAI, fields: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, **fields)
    assert caught.value.param == param
