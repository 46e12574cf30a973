"""The official client's structured outputs, tools and embeddings work with this server as with OpenAI's."""

from __future__ import annotations

import json
import math
import re
from enum import StrEnum
from typing import Annotated, Any

import openai
import pytest
from pydantic import BaseModel, Field

from tests.e2e.serving import ServerProcess

QUESTION: Any = [{"role": "user", "content": "How warm is it in Paris?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "unit": {"enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
NOW: Any = {"type": "function", "function": {"name": "now"}}


class Mood(StrEnum):
    GOOD = "good"
    BAD = "bad"


class Person(BaseModel):
    name: str = Field(max_length=16)
    age: int = Field(ge=0, le=150)
    mood: Mood
    tags: list[Annotated[str, Field(max_length=8)]] = Field(max_length=2)


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    fields = {"messages": QUESTION, "max_tokens": 96, "temperature": 1, "seed": 7, **fields}
    return client.chat.completions.create(model="demo", **fields)


def check_weather(arguments: str) -> None:
    parsed = json.loads(arguments)
    assert parsed.keys() == {"city", "unit"} and parsed["unit"] in ("celsius", "fahrenheit")
    assert len(parsed["city"]) <= 12


def test_parse_gives_an_object_of_the_class(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="demo",
        messages=[{"role": "user", "content": "Invent a person."}],
        response_format=Person,
        max_tokens=160,
        seed=1,
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_several_choices_are_all_valid_and_differ(client: openai.OpenAI) -> None:
    schema = {"name": "person", "strict": True, "schema": Person.model_json_schema()}
    answer = chat(client, n=4, max_tokens=160, response_format={"type": "json_schema", "json_schema": schema})
    texts = [choice.message.content for choice in answer.choices]
    assert len({Person.model_validate_json(text).model_dump_json() for text in texts}) > 1
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}


def test_a_streamed_object_is_the_object(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="demo",
        messages=[{"role": "user", "content": "Invent a person."}],
        response_format=Person,
        max_tokens=160,
        seed=2,
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        answer = stream.get_final_completion()
    assert isinstance(answer.choices[0].message.parsed, Person)
    assert "".join(deltas) == answer.choices[0].message.content and len(deltas) > 3


def test_any_json_object_is_an_object(client: openai.OpenAI) -> None:
    answer = chat(client, response_format={"type": "json_object"}, max_tokens=200)
    choice = answer.choices[0]
    assert choice.message.content.startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"regex": r"[A-Z][a-z]{2,8} \d{2}:\d{2}"}, r"[A-Z][a-z]{2,8} \d{2}:\d{2}"),
        ({"choice": ["yes", "no", "it depends"]}, "yes|no|it depends"),
        ({"grammar": 'start: "<" WORD ">"\nWORD: /[a-z]{1,6}/'}, "<[a-z]{1,6}>"),
    ],
)
def test_structured_outputs_beyond_json_match(
    client: openai.OpenAI, wanted: dict[str, Any], pattern: str
) -> None:
    answer = chat(client, n=3, extra_body={"structured_outputs": wanted})
    for choice in answer.choices:
        assert re.fullmatch(pattern, choice.message.content), choice.message.content
        assert choice.finish_reason == "stop"


def test_a_stop_string_still_stops_a_structured_answer(client: openai.OpenAI) -> None:
    answer = chat(client, stop=["-"], extra_body={"structured_outputs": {"regex": "[a-z]{3}-[a-z]{3}"}})
    assert re.fullmatch("[a-z]{3}", answer.choices[0].message.content)
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].stop_reason == "-"


@pytest.mark.parametrize("stream", [False, True])
def test_a_required_call_is_a_call(client: openai.OpenAI, stream: bool) -> None:
    fields: Any = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    if not stream:
        (choice,) = chat(client, **fields).choices
        (call,) = choice.message.tool_calls
        assert (choice.finish_reason, call.type, call.function.name) == (
            "tool_calls",
            "function",
            "get_weather",
        )
        check_weather(call.function.arguments)
        return
    with client.chat.completions.stream(
        model="demo", messages=QUESTION, max_tokens=96, seed=7, **fields
    ) as events:
        pieces = [
            event.arguments_delta for event in events if event.type == "tool_calls.function.arguments.delta"
        ]
        (choice,) = events.get_final_completion().choices
    (call,) = choice.message.tool_calls or ()
    assert choice.finish_reason == "tool_calls" and call.function.name == "get_weather"
    check_weather(call.function.arguments)
    assert "".join(pieces) == call.function.arguments and len([piece for piece in pieces if piece]) > 2


def test_a_named_tool_is_the_one_that_is_called(client: openai.OpenAI) -> None:
    choice_of_now = {"type": "function", "function": {"name": "now"}}
    (choice,) = chat(client, tools=[WEATHER, NOW], tool_choice=choice_of_now).choices
    assert {call.function.name for call in choice.message.tool_calls} == {"now"}
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {}


def test_no_tool_is_called_when_none_may_be(client: openai.OpenAI) -> None:
    (choice,) = chat(client, tools=[WEATHER], tool_choice="none", max_tokens=16).choices
    assert choice.message.tool_calls is None and choice.message.content


def test_a_conversation_with_calls_and_results_goes_on(client: openai.OpenAI) -> None:
    fields: Any = {"tools": [WEATHER], "temperature": 0}
    (choice,) = chat(client, **fields, tool_choice="required").choices
    message = choice.message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"} for call in message.tool_calls
    ]
    messages = [*QUESTION, message.model_dump(exclude_none=True), *results]
    assert chat(client, **{**fields, "messages": messages, "max_tokens": 8}).choices[0].finish_reason


def test_a_schema_that_cannot_be_enforced_is_refused_by_name(client: openai.OpenAI) -> None:
    schema = {"name": "odd", "strict": True, "schema": {"type": "elephant"}}
    with pytest.raises(openai.BadRequestError, match="elephant") as refused:
        chat(client, response_format={"type": "json_schema", "json_schema": schema})
    assert refused.value.param is not None and refused.value.param.startswith("response_format")
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, extra_body={"structured_outputs": {"regex": "(["}})
    assert refused.value.param is not None and refused.value.param.startswith("structured_outputs")


def test_embeddings_are_the_same_as_numbers_and_as_base64(client: openai.OpenAI) -> None:
    texts = ["a cat", "a dog", "a cat"]
    # The client asks for base64 by itself unless it is told otherwise.
    packed = client.embeddings.create(model="demo", input=texts)
    plain = client.embeddings.create(model="demo", input=texts, encoding_format="float")
    assert [entry.index for entry in packed.data] == [0, 1, 2]
    for one, other in zip(packed.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-5)
        assert math.hypot(*one.embedding) == pytest.approx(1, abs=1e-5)
    assert plain.data[0].embedding == pytest.approx(plain.data[2].embedding, abs=1e-5)
    assert plain.usage.prompt_tokens == plain.usage.total_tokens > 3


def test_an_embedding_knows_of_all_its_tokens(client: openai.OpenAI, server: ServerProcess) -> None:
    tokens = server.post("/tokenize", {"prompt": "red green blue"}).json()["tokens"]
    whole, other = (
        client.embeddings.create(model="demo", input=ids, encoding_format="float").data[0].embedding
        for ids in (tokens, tokens[1:])
    )
    assert whole != pytest.approx(other, abs=1e-3)
    by_text = client.embeddings.create(model="demo", input="red green blue", encoding_format="float")
    assert by_text.data[0].embedding == pytest.approx(whole, abs=1e-5)
