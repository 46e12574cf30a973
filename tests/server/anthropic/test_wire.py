"""The events and objects of a message are what Anthropic's client reads, to the byte."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from graphllm.errors import (
    AuthenticationError,
    EngineUnavailableError,
    InvalidRequestError,
    StepFailedError,
)
from graphllm.outputs import FinishReason
from graphllm.server.anthropic.errors import error_body, is_anthropic, speak_anthropic
from graphllm.server.anthropic.wire import MessageOptions, MessagesWire
from graphllm.server.error_responses import send_error
from graphllm.server.generation.request import RequestWarning
from tests.fakes import RecordingChannel
from tests.server.dialect_exchange import DialectExchange, body_of, new_response

EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


class Exchange(DialectExchange):
    def __init__(self, *, stream: bool, **options: Any) -> None:
        super().__init__(MessagesWire(MessageOptions(model="org/model", **options)), stream=stream)

    @property
    def message(self) -> Message:
        return Message.model_validate(json.loads(self.body))

    def lines(self) -> list[str]:
        """The stream's events as they are, ids apart; the client's types can read each one."""
        for name, payload in self.events:
            assert payload["type"] == name
            if name != "ping":
                EVENT.validate_python(payload)
        frames = self.body.decode().split("\n\n")[:-1]
        return [re.sub(r"(msg|toolu)_[0-9a-f]{24,32}", r"\1", frame).split("\ndata: ")[1] for frame in frames]


USAGE = (
    '"usage":{"input_tokens":6,"cache_creation_input_tokens":0,"cache_read_input_tokens":4,'
    '"output_tokens":%d,"output_tokens_details":{"thinking_tokens":%d}}'
)


def test_text_streams_as_one_block() -> None:
    exchange = Exchange(stream=True)
    exchange.say("=Hello", '= "world"\u2028')
    assert exchange.lines() == [
        '{"type":"message_start","message":{"id":"msg","type":"message","role":"assistant",'
        '"model":"org/model","content":[],"stop_reason":null,"stop_sequence":null,' + USAGE % (1, 0) + "}}",
        '{"type":"ping"}',
        '{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}',
        '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hello"}}',
        '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":" \\"world\\"\\u2028"}}',
        '{"type":"content_block_stop","index":0}',
        '{"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},'
        + USAGE % (2, 0)
        + "}",
        '{"type":"message_stop"}',
    ]


def test_thinking_text_and_calls_are_blocks_in_order() -> None:
    exchange = Exchange(stream=True)
    exchange.say("~Hm", "~.", "=Let me look.", "(look_up", ':{"a":', ":1}", ")", "(other\0:{}\0)")
    lines = exchange.lines()
    signature = re.search(r'"signature":"([0-9a-f]{64})"', lines[5])
    assert signature is not None
    assert lines[2:16] == [
        '{"type":"content_block_start","index":0,"content_block":{"type":"thinking","thinking":"",'
        '"signature":""}}',
        '{"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":"Hm"}}',
        '{"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":"."}}',
        '{"type":"content_block_delta","index":0,"delta":{"type":"signature_delta",'
        f'"signature":"{signature[1]}"}}}}',
        '{"type":"content_block_stop","index":0}',
        '{"type":"content_block_start","index":1,"content_block":{"type":"text","text":""}}',
        '{"type":"content_block_delta","index":1,"delta":{"type":"text_delta","text":"Let me look."}}',
        '{"type":"content_block_stop","index":1}',
        '{"type":"content_block_start","index":2,"content_block":{"type":"tool_use","id":"toolu",'
        '"name":"look_up","input":{}}}',
        '{"type":"content_block_delta","index":2,"delta":{"type":"input_json_delta",'
        '"partial_json":"{\\"a\\":"}}',
        '{"type":"content_block_delta","index":2,"delta":{"type":"input_json_delta","partial_json":"1}"}}',
        '{"type":"content_block_stop","index":2}',
        '{"type":"content_block_start","index":3,"content_block":{"type":"tool_use","id":"toolu",'
        '"name":"other","input":{}}}',
        '{"type":"content_block_delta","index":3,"delta":{"type":"input_json_delta","partial_json":"{}"}}',
    ]
    assert exchange.events[-2][1]["delta"]["stop_reason"] == "tool_use"


def test_whole_message_has_the_same_blocks() -> None:
    exchange = Exchange(stream=False)
    exchange.say("~Hm", "=Let me", "= look.", "(look_up", ':{"a":1}', ")", "(other\0:{}\0)")
    message = exchange.message
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    thinking, text, call, other = (block.model_dump(exclude_none=True) for block in message.content)
    assert thinking["thinking"] == "Hm" and len(thinking["signature"]) == 64
    assert text == {"type": "text", "text": "Let me look."}
    assert (call["name"], call["input"], other["input"]) == ("look_up", {"a": 1}, {})
    assert call["id"].startswith("toolu_") and call["id"] != other["id"]
    assert message.stop_reason == "tool_use"
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (6, 4)
    assert message.usage.output_tokens == 7


@pytest.mark.parametrize("stream", [True, False])
def test_hidden_thinking_leaves_its_block_without_text(stream: bool) -> None:
    exchange = Exchange(stream=stream, hides_thinking=True)
    exchange.say("~Secret", "=Yes")
    assert b"Secret" not in exchange.body
    assert exchange.body.count(b'"type":"thinking"') == 1
    assert b"thinking_delta" not in exchange.body


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("end", "stop_reason", "options", "expected"),
    [
        (FinishReason.STOP, None, {}, ("end_turn", None)),
        (FinishReason.STOP, 7, {}, ("end_turn", None)),
        (FinishReason.STOP, "END", {"stop_sequences": ("x", "END")}, ("stop_sequence", "END")),
        (FinishReason.LENGTH, None, {}, ("max_tokens", None)),
        (FinishReason.LENGTH, None, {"is_clamped": True}, ("model_context_window_exceeded", None)),
    ],
)
def test_message_says_why_it_stopped(
    stream: bool, end: FinishReason, stop_reason: Any, options: Any, expected: tuple[Any, Any]
) -> None:
    exchange = Exchange(stream=stream, **options)
    exchange.say("=Hello", end=end, stop_reason=stop_reason)
    said = exchange.events[-2][1]["delta"] if stream else json.loads(exchange.body)
    assert (said["stop_reason"], said["stop_sequence"]) == expected


def test_call_that_was_cut_has_an_empty_input_and_says_so() -> None:
    exchange = Exchange(stream=False)
    exchange.say("(f", ':{"a":', end=FinishReason.LENGTH)
    assert exchange.message.stop_reason == "max_tokens"
    (call,) = exchange.message.content
    assert call.type == "tool_use" and call.input == {}


@pytest.mark.parametrize("stream", [True, False])
def test_answer_without_a_word_has_no_blocks(stream: bool) -> None:
    exchange = Exchange(stream=stream)
    exchange.say("")
    if stream:
        assert [name for name, _ in exchange.events] == [
            "message_start",
            "ping",
            "message_delta",
            "message_stop",
        ]
    else:
        assert exchange.message.content == []


def test_warnings_are_in_the_message() -> None:
    warning = RequestWarning("thinking", "not known here")
    streamed, whole = (Exchange(stream=stream, warnings=(warning,)) for stream in (True, False))
    streamed.say("=a")
    whole.say("=a")
    assert streamed.events[0][1]["message"]["warnings"] == [warning.as_json()]
    assert json.loads(whole.body)["warnings"] == [warning.as_json()]


def test_failed_stream_ends_with_an_error_and_without_a_clean_end() -> None:
    exchange = Exchange(stream=True)
    exchange.step("=Hello")
    exchange.engine.submitted[0].sink.fail(StepFailedError("The step failed."))
    assert exchange.channel.is_cut
    assert exchange.events[-1] == (
        "error",
        {"type": "error", "error": {"type": "api_error", "message": "The step failed."}},
    )


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InvalidRequestError("a", param="top_k"), 400, "invalid_request_error"),
        (AuthenticationError("a"), 401, "authentication_error"),
        (EngineUnavailableError("a"), 503, "overloaded_error"),
        (StepFailedError("a"), 500, "api_error"),
    ],
)
def test_errors_have_anthropics_form_and_the_request_id(error: Any, status: int, kind: str) -> None:
    channel = RecordingChannel()
    response = new_response(channel)
    speak_anthropic(response)
    send_error(response, error)
    head, body = channel.received.partition(b"\r\n\r\n")[0].decode(), json.loads(body_of(channel))
    assert head.startswith(f"HTTP/1.1 {status}")
    assert body["type"] == "error" and body["error"]["type"] == kind
    assert body["error"].get("param") == error.param
    assert f"request-id: {body['request_id']}" in head and body["request_id"].startswith("req_")
    assert "request_id" not in error_body(error)


def test_only_the_routes_of_messages_speak_anthropic() -> None:
    assert is_anthropic("/v1/messages") and is_anthropic("/v1/messages/count_tokens")
    assert not is_anthropic("/v1/messagesx") and not is_anthropic("/v1/models")
