"""POST /v1/responses: what reaches the engine, what comes back, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from openai.types.responses import Response as ApiResponse

from graphllm.errors import ContextLengthError, StepFailedError
from graphllm.outputs import FinishReason
from graphllm.sampling_params import SamplingParams
from graphllm.server.openai.responses.known_fields import RESPONSES_FIELDS
from graphllm.server.openai.responses.protocol import ResponsesRequest
from tests.server.dialect_server import Asked, DialectServer

TOOL = {
    "type": "function",
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}
WRITTEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
BASE = {"model": "tiny", "input": "Hi"}


def create(dialects: DialectServer, **fields: Any) -> Asked:
    return dialects.ask("POST", "/v1/responses", {**BASE, **fields})


def answered(
    dialects: DialectServer, *texts: str, end: FinishReason = FinishReason.STOP, **fields: Any
) -> Any:
    """The response to a request that the model answers with these texts."""
    asked = create(dialects, **fields)
    assert asked.channel.writes == [], asked.channel.received
    dialects.say(*(texts or ("Hello",)), end=end)
    ApiResponse.model_validate(asked.json)
    return asked.json


def refused(asked: Asked) -> dict[str, Any]:
    assert asked.status == 400, asked.channel.received
    error: dict[str, Any] = asked.json["error"]
    assert error["type"] == "invalid_request_error"
    return error


def test_input_and_instructions_are_rendered_as_a_chat(dialects: DialectServer) -> None:
    answered(dialects, instructions="Be kind.", input=[{"role": "user", "content": "Hi"}])
    assert dialects.prompt == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_conversation_goes_on_from_what_was_said(dialects: DialectServer) -> None:
    first = answered(dialects, "Hel", "lo", instructions="Be kind.")
    began = dialects.prompt
    second = answered(
        dialects, "Fine", input="How are you?", previous_response_id=first["id"], instructions="Be kind."
    )
    # The prompt of the second turn begins with all that the first had, so its prefix is cached.
    assert dialects.prompt == (
        f"{began}Hello<|im_end|>\n<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert second["previous_response_id"] == first["id"]
    answered(dialects, input="Bye", previous_response_id=second["id"])
    # Instructions are not carried over.
    assert dialects.prompt == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\nFine<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )


def test_call_and_its_output_go_on_as_a_conversation(dialects: DialectServer) -> None:
    first = answered(dialects, f"<think>\nAsk.\n</think>\n{WRITTEN_CALL}", tools=[TOOL])
    assert [item["type"] for item in first["output"]] == ["reasoning", "function_call"]
    call = first["output"][1]
    assert (call["name"], call["arguments"]) == ("weather", '{"city": "Rome"}')
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}
    answered(dialects, "Sunny.", tools=[TOOL], input=[output], previous_response_id=first["id"])
    assert "<think>\nAsk." in dialects.prompt and '{"city": "Rome"}' in dialects.prompt
    assert dialects.prompt.endswith("<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>assistant\n")
    # Without the store, a client sends the items back: the same chat, the same tokens.
    continued = dialects.submitted.prompt_token_ids
    answered(dialects, tools=[TOOL], input=[{"role": "user", "content": "Hi"}, *first["output"], output])
    assert dialects.submitted.prompt_token_ids == continued


@pytest.mark.parametrize("stream", [True, False])
def test_stored_response_is_the_one_that_was_sent(dialects: DialectServer, stream: bool) -> None:
    asked = create(dialects, stream=stream)
    dialects.say("Hello", "!")
    sent = asked.events[-1][1]["response"] if stream else asked.json
    assert dialects.ask("GET", f"/v1/responses/{sent['id']}").json == sent
    assert f"x-request-id: {sent['id']}" in asked.head


def test_response_is_stored_unless_the_client_says_otherwise(dialects: DialectServer) -> None:
    assert answered(dialects)["store"] is True
    assert answered(dialects, store=True)["store"] is True and len(dialects.store) == 2
    kept_not = answered(dialects, store=False)
    assert kept_not["store"] is False and len(dialects.store) == 2
    assert dialects.ask("GET", f"/v1/responses/{kept_not['id']}").status == 404
    asked = create(dialects, previous_response_id=kept_not["id"])
    assert asked.status == 404 and asked.json["error"]["param"] == "previous_response_id"
    assert "not stored" in asked.json["error"]["message"]


def test_evicted_response_cannot_be_continued_and_the_error_says_why(tiny_tokenizer: Any) -> None:
    dialects = DialectServer(tiny_tokenizer, max_responses=1)
    first, _ = answered(dialects), answered(dialects)
    asked = create(dialects, previous_response_id=first["id"])
    assert asked.status == 404
    assert "make room" in asked.json["error"]["message"]


def test_client_that_leaves_leaves_nothing_stored(dialects: DialectServer) -> None:
    asked = create(dialects)
    assert asked.request.on_disconnect is not None
    asked.request.on_disconnect()
    assert dialects.engine.aborted == [dialects.submitted.request_id] and len(dialects.store) == 0


def test_store_that_is_off_keeps_nothing_and_says_so(tiny_tokenizer: Any) -> None:
    dialects = DialectServer(tiny_tokenizer, max_responses=0)
    assert answered(dialects)["store"] is False
    assert [warning["field"] for warning in answered(dialects, store=True)["warnings"]] == ["store"]
    assert len(dialects.store) == 0
    assert refused(create(dialects, background=True))["param"] == "background"


def test_response_repeats_its_request(dialects: DialectServer) -> None:
    fields: dict[str, Any] = {
        "instructions": "Be kind.",
        "max_output_tokens": 100,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "temperature": 0.5,
        "text": {"format": {"type": "json_object"}},
        "tool_choice": "none",
        "tools": [TOOL],
        "top_logprobs": 3,
        "top_p": 0.9,
        "truncation": "auto",
        "user": "u",
        "reasoning": {"effort": "low", "summary": "auto"},
    }
    response = answered(dialects, **fields)
    assert {name: response[name] for name in fields} == fields
    assert response["object"] == "response" and response["id"].startswith("resp_")
    assert "warnings" not in answered(dialects)


HONOURED: dict[str, tuple[Any, str, Any]] = {
    "max_output_tokens": (7, "max_tokens", 7),
    "temperature": (0.25, "temperature", 0.25),
    "top_p": (0.5, "top_p", 0.5),
    "top_logprobs": (4, "logprobs", 4),
    "include": (["message.output_text.logprobs"], "logprobs", 0),
    "top_k": (5, "top_k", 5),
    "min_p": (0.1, "min_p", 0.1),
    "seed": (9, "seed", 9),
    "min_tokens": (3, "min_tokens", 3),
    "repetition_penalty": (1.2, "repetition_penalty", 1.2),
    "presence_penalty": (0.5, "presence_penalty", 0.5),
    "frequency_penalty": (0.5, "frequency_penalty", 0.5),
    "logit_bias": ({"3": -5}, "logit_bias", {3: -5}),
    "stop": ("END", "stop", ("END",)),
    "stop_token_ids": ([3], "stop_token_ids", (3,)),
    "ignore_eos": (True, "ignore_eos", True),
    "skip_special_tokens": (False, "skip_special_tokens", False),
    "include_stop_str_in_output": (True, "include_stop_str_in_output", True),
}


@pytest.mark.parametrize(("name", "value", "param", "expected"), [(k, *v) for k, v in HONOURED.items()])
def test_sampling_field_reaches_the_engine(
    dialects: DialectServer, name: str, value: Any, param: str, expected: Any
) -> None:
    answered(dialects, **{name: value})
    assert getattr(dialects.submitted.params, param) == expected
    answered(dialects)
    default = SamplingParams()
    assert getattr(dialects.submitted.params, param) == getattr(default, param) != expected


def test_priority_and_salt_reach_the_engine(dialects: DialectServer) -> None:
    answered(dialects, priority=3, cache_salt="mine")
    assert (dialects.submitted.priority, dialects.submitted.cache_salt) == (3, "mine")


def test_json_schema_constrains_the_answer(dialects: DialectServer) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    text = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    assert answered(dialects, text=text)["text"] == text
    structured = dialects.submitted.params.structured_outputs
    assert structured is not None and structured.json is not None and '"integer"' in structured.json
    answered(dialects, text={"format": {"type": "json_object"}})
    structured = dialects.submitted.params.structured_outputs
    assert structured is not None and structured.json_object
    answered(dialects, text={"format": {"type": "text"}})
    assert dialects.submitted.params.structured_outputs is None


@pytest.mark.parametrize(
    ("choice", "is_enforced"),
    [
        ("auto", False),
        ("none", False),
        ("required", True),
        ({"type": "function", "name": "weather"}, True),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]},
            True,
        ),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]},
            False,
        ),
    ],
)
def test_tool_choice_is_enforced_where_it_asks_for_a_call(
    dialects: DialectServer, choice: Any, is_enforced: bool
) -> None:
    other = {"type": "function", "name": "other"}
    response = answered(dialects, tools=[TOOL, other], tool_choice=choice)
    assert response["tool_choice"] == choice
    structured = dialects.submitted.params.structured_outputs
    assert (structured is not None) == is_enforced
    if isinstance(choice, dict) and is_enforced:
        assert structured is not None and structured.grammar is not None
        assert "weather" in structured.grammar and "other" not in structured.grammar


def test_reasoning_effort_none_turns_thinking_off(dialects: DialectServer) -> None:
    answered(dialects, reasoning={"effort": "none"})
    assert dialects.prompt.endswith("<think>\n\n</think>\n\n")


def test_truncation_drops_the_oldest_and_without_it_the_request_is_refused(tiny_tokenizer: Any) -> None:
    dialects = DialectServer(tiny_tokenizer, max_model_len=200)
    items = [
        {"role": role, "content": f"{number}" * 20} for number in range(5) for role in ("user", "assistant")
    ][:-1]
    error = refused(create(dialects, input=items))
    assert (error["param"], error["code"]) == ("input", "context_length_exceeded")
    answered(dialects, input=items, truncation="auto", instructions="Keep.", max_output_tokens=20)
    assert dialects.prompt.startswith("<|im_start|>system\nKeep.<|im_end|>\n<|im_start|>user\n2222")
    assert len(dialects.submitted.prompt_token_ids) <= 180


WARNED: dict[str, tuple[Any, str]] = {
    "include": (["reasoning.encrypted_content"], "include"),
    "reasoning": ({"summary": "detailed"}, "reasoning.summary"),
    "text": ({"verbosity": "high"}, "text.verbosity"),
    "stream_options": ({"include_obfuscation": True}, "stream_options.include_obfuscation"),
    "service_tier": ("flex", "service_tier"),
    "max_tool_calls": (3, "max_tool_calls"),
    "prompt_cache_retention": ("24h", "prompt_cache_retention"),
    "chat_template_kwargs": ({"colour": "red"}, "chat_template_kwargs.colour"),
}


@pytest.mark.parametrize(("name", "value", "field"), [(name, *value) for name, value in WARNED.items()])
def test_what_cannot_be_honoured_is_said(dialects: DialectServer, name: str, value: Any, field: str) -> None:
    asked = create(dialects, stream=True, **{name: value})
    dialects.say("Hello")
    response = asked.events[-1][1]["response"]
    assert [warning["field"] for warning in response["warnings"]] == [field]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a conversation": ({"conversation": "conv_1"}, "conversation"),
    "a prompt": ({"prompt": {"id": "p"}}, "prompt"),
    "an unknown field": ({"temprature": 1}, "temprature"),
    "an unknown field inside": ({"reasoning": {"efort": "low"}}, "reasoning.efort"),
    "no items": ({"input": []}, "input"),
    "no tokens": ({"max_output_tokens": 0}, "max_output_tokens"),
    "more tokens than the context": ({"max_output_tokens": 10**9, "min_tokens": 10**10}, "min_tokens"),
    "too many logprobs": ({"top_logprobs": 21}, "top_logprobs"),
    "an unknown include": ({"include": ["everything"]}, "include[0]"),
    "an empty salt": ({"cache_salt": ""}, "cache_salt"),
    "options of no stream": ({"stream_options": {}}, "stream_options"),
    "background without store": ({"background": True, "store": False}, "background"),
    "too much metadata": ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
    "long metadata": ({"metadata": {"a": "b" * 513}}, "metadata"),
    "an unknown effort": ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
    "a built-in tool": ({"tools": [TOOL, {"type": "web_search"}]}, "tools[1].type"),
    "a tool without a name": ({"tools": [{"type": "function"}]}, "tools[0].name"),
    "two tools of a name": ({"tools": [TOOL, TOOL]}, "tools[1].name"),
    "a tool of another's call": ({"tools": [{**TOOL, "defer_loading": True}]}, "tools[0].defer_loading"),
    "an unknown choice": ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
    "a choice that is no tool": (
        {"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}},
        "tool_choice",
    ),
    "a built-in choice": ({"tools": [TOOL], "tool_choice": {"type": "file_search"}}, "tool_choice.type"),
    "a choice of no type": ({"tools": [TOOL], "tool_choice": {"name": "weather"}}, "tool_choice"),
    "a call without tools": ({"tool_choice": "required"}, "tool_choice"),
    "a schema of none": ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    "an unknown format": ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
}


@pytest.mark.parametrize(("fields", "param"), REFUSED.values(), ids=REFUSED)
def test_wrong_request_is_refused_by_name(dialects: DialectServer, fields: Any, param: str) -> None:
    error = refused(create(dialects, **fields))
    assert error["param"] == param
    assert dialects.engine.submitted == [] and len(dialects.store) == 0


@pytest.mark.parametrize("name", RESPONSES_FIELDS)
def test_known_field_is_refused_or_warned_of_unless_it_asks_for_nothing(
    dialects: DialectServer, name: str
) -> None:
    known = RESPONSES_FIELDS[name]
    for value in (None, *known.neutral):
        assert "warnings" not in answered(dialects, **{name: value})
    if known.is_tolerated:
        assert answered(dialects, **{name: "something"})["warnings"] == [
            {"field": name, "message": known.note}
        ]
    else:
        error = refused(create(dialects, **{name: "something"}))
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")


def test_every_field_is_covered_by_a_claim() -> None:
    """A field that is added needs a test that it does something."""
    elsewhere = {
        *("model", "input", "instructions", "previous_response_id", "store", "background", "stream", "tools"),
        *("tool_choice", "parallel_tool_calls", "truncation", "metadata", "user", "safety_identifier"),
        *("prompt_cache_key", "cache_salt", "priority"),
    }
    assert set(ResponsesRequest.__struct_fields__) == {*HONOURED, *WARNED, *elsewhere} - {
        name for name in WARNED if name in RESPONSES_FIELDS
    }


def test_one_call_at_a_time_where_parallel_calls_are_off(dialects: DialectServer) -> None:
    written = f"{WRITTEN_CALL}\n{WRITTEN_CALL}"
    assert len(answered(dialects, written, tools=[TOOL])["output"]) == 2
    assert len(answered(dialects, written, tools=[TOOL], parallel_tool_calls=False)["output"]) == 1


def test_background_response_runs_and_can_be_cancelled(dialects: DialectServer) -> None:
    asked = create(dialects, background=True)
    response_id = asked.json["id"]
    assert asked.json["status"] == "queued" and asked.channel.is_ended
    dialects.say("Hel", end=None)
    assert dialects.ask("GET", f"/v1/responses/{response_id}").json["status"] == "in_progress"
    assert refused(create(dialects, previous_response_id=response_id))["param"] == "previous_response_id"
    cancelled = dialects.ask("POST", f"/v1/responses/{response_id}/cancel").json
    assert cancelled["status"] == "cancelled"
    assert dialects.engine.aborted == [response_id]
    assert dialects.ask("GET", f"/v1/responses/{response_id}").json == cancelled


def test_background_stream_outlives_its_first_client_and_is_taken_up_again(dialects: DialectServer) -> None:
    asked = create(dialects, background=True, stream=True)
    dialects.say("Hel", end=None)
    response_id = asked.events[0][1]["response"]["id"]
    assert asked.request.on_disconnect is None  # nothing ends when it leaves
    number = asked.events[-1][1]["sequence_number"]
    again = dialects.ask("GET", f"/v1/responses/{response_id}?stream=true&starting_after={number}")
    dialects.say("lo")
    assert asked.events[: number + 1] + again.events == asked.events
    assert again.events[-1][0] == "response.completed"
    assert f"x-request-id: {response_id}" in again.head


def test_store_full_of_running_responses_refuses_another(tiny_tokenizer: Any) -> None:
    dialects = DialectServer(tiny_tokenizer, max_responses=1)
    create(dialects, background=True)
    asked = create(dialects, background=True)
    assert asked.status == 429 and asked.json["error"]["param"] == "background"
    assert len(dialects.engine.submitted) == 1


def test_background_request_that_the_engine_refuses_is_not_stored(dialects: DialectServer) -> None:
    dialects.engine.refusal = ContextLengthError("too long", param="prompt")
    assert refused(create(dialects, background=True))["param"] == "input"
    assert len(dialects.store) == 0


def test_background_failure_is_in_the_response(dialects: DialectServer) -> None:
    response_id = create(dialects, background=True).json["id"]
    dialects.submitted.sink.fail(StepFailedError("The step failed."))
    failed = dialects.ask("GET", f"/v1/responses/{response_id}").json
    assert failed["status"] == "failed" and failed["error"]["code"] == "server_error"


def test_unknown_fields_are_warned_of_where_the_server_is_lenient(tiny_tokenizer: Any) -> None:
    dialects = DialectServer(tiny_tokenizer, lenient=True)
    item = {"role": "user", "content": [{"type": "input_text", "text": "Hi", "colour": 1}], "mood": "good"}
    response = answered(dialects, input=[item], tools=[{**TOOL, "strict": False, "shape": {}}], temprature=1)
    assert [warning["field"] for warning in response["warnings"]] == [
        "temprature",
        "input[0].mood",
        "input[0].content[0].colour",
        "tools[0].shape",
    ]
    assert dialects.prompt.startswith("[tools]weather;<|im_start|>user\nHi<|im_end|>")


def test_conversation_far_longer_than_the_context_is_not_read(tiny_tokenizer: Any) -> None:
    dialects = DialectServer(tiny_tokenizer, max_model_len=64)
    response_id = None
    for _ in range(10):
        fields = {"input": "a" * 20, "truncation": "auto", "previous_response_id": response_id}
        response_id = answered(dialects, "b" * 10_000, **fields)["id"]
    error = refused(create(dialects, previous_response_id=response_id))
    assert (error["param"], error["code"]) == ("previous_response_id", "context_length_exceeded")
    answered(dialects, previous_response_id=response_id, truncation="auto")
    assert dialects.prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_sampling_params_are_complete() -> None:
    """Parameters of the engine that this API has no field for are named here, so that none is forgotten."""
    reached = {param for _, param, _ in HONOURED.values()}
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    assert names - reached == {
        *("n", "prompt_logprobs", "allowed_token_ids", "bad_words", "structured_outputs"),
        "shown_special_token_ids",
    }
