"""The events and objects of a response are what the client library's types say, to the byte."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from graphllm.errors import StepFailedError
from graphllm.outputs import FinishReason, TokenLogprob
from graphllm.server.openai.responses.envelope import Envelope
from graphllm.server.openai.responses.store import body_with_output
from graphllm.server.openai.responses.wire import ResponseOptions, ResponsesWire
from tests.fakes import FakeTokenizer
from tests.server.dialect_exchange import DialectExchange

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
ECHO: dict[str, Any] = {
    "background": False,
    "metadata": {"note": "\u2028"},
    "model": "org/model",
    "parallel_tool_calls": True,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
}
TOKENIZER: Any = FakeTokenizer([b"Hello", b" world", b"<end>"])


class Exchange(DialectExchange):
    def __init__(self, *, stream: bool, **options: bool) -> None:
        self.records: list[tuple[bytes, bytes]] = []
        wire = ResponsesWire(
            "resp_1",
            Envelope("resp_1", ECHO),
            tokenizer=TOKENIZER,
            options=ResponseOptions(**options),
            record=lambda head, output: self.records.append((head, output)),
        )
        super().__init__(wire, stream=stream)

    @property
    def response(self) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.body)
        Response.model_validate(body)
        return body

    @property
    def stored(self) -> dict[str, Any]:
        ((head, output),) = self.records
        stored: dict[str, Any] = json.loads(body_with_output(head, output))
        return stored

    def typed_events(self) -> list[Any]:
        """Each event, read by the client library's types; numbers without a gap."""
        typed = []
        for position, (name, payload) in enumerate(self.events):
            assert payload["type"] == name
            assert payload["sequence_number"] == position
            event = EVENT.validate_python(payload)
            assert event.type == name
            typed.append(event)
        return typed

    def normalised(self) -> list[str]:
        """The stream's events in short: ids numbered, response objects by their status."""
        ids: dict[str, str] = {}

        def number(match: re.Match[str]) -> str:
            kind = match[1]
            count = sum(1 for known in ids if known.startswith(kind + "_"))
            return ids.setdefault(match[0], f"{kind}_{count}")

        lines = []
        for name, payload in self.events:
            del payload["type"], payload["sequence_number"]
            if "response" in payload:
                response = payload["response"]
                payload = {"status": response["status"], "num_items": len(response["output"])}
            text = json.dumps(payload, separators=(",", ":"))
            lines.append(f"{name} {re.sub(r'(rs|msg|fc|call)_[0-9a-f]{24,32}', number, text)}")
        return lines


def logprob(token_id: int) -> TokenLogprob:
    return TokenLogprob(token_id, -0.5, ((token_id, -0.5), (2, -1.5)))


def test_text_streams_as_one_message() -> None:
    exchange = Exchange(stream=True)
    exchange.say("=Hello", "= world", "=!")
    exchange.typed_events()
    place = '"item_id":"msg_0","output_index":0,"content_index":0'
    done = '{"type":"output_text","text":"Hello world!","annotations":[]}'
    assert exchange.normalised() == [
        'response.created {"status":"in_progress","num_items":0}',
        'response.in_progress {"status":"in_progress","num_items":0}',
        'response.output_item.added {"output_index":0,"item":{"id":"msg_0","status":"in_progress",'
        '"type":"message","role":"assistant","content":[]}}',
        f'response.content_part.added {{{place},"part":{{"type":"output_text","text":"","annotations":[]}}}}',
        f'response.output_text.delta {{{place},"logprobs":[],"delta":"Hello"}}',
        f'response.output_text.delta {{{place},"logprobs":[],"delta":" world"}}',
        f'response.output_text.delta {{{place},"logprobs":[],"delta":"!"}}',
        f'response.output_text.done {{{place},"text":"Hello world!","logprobs":[]}}',
        f'response.content_part.done {{{place},"part":{done}}}',
        'response.output_item.done {"output_index":0,"item":{"id":"msg_0","status":"completed",'
        f'"type":"message","role":"assistant","content":[{done}]}}}}',
        'response.completed {"status":"completed","num_items":1}',
    ]


def test_bytes_of_a_text_delta() -> None:
    exchange = Exchange(stream=True)
    exchange.say('=a "b" \u2028 é')
    (delta,) = (frame for frame in exchange.body.split(b"\n\n") if b"output_text.delta" in frame)
    assert re.sub(rb"msg_\w+", b"msg_0", delta) == (
        b"event: response.output_text.delta\n"
        b'data: {"type":"response.output_text.delta","item_id":"msg_0","output_index":0,"content_index":0,'
        b'"logprobs":[],"sequence_number":4,"delta":"a \\"b\\" \\u2028 \xc3\xa9"}'
    )
    # The line separators that clients stumble over are escaped in every event, the request's own too.
    assert "\u2028" not in exchange.body.decode()
    assert exchange.events[0][1]["response"]["metadata"] == ECHO["metadata"]


def test_reasoning_text_and_calls_are_items_in_order() -> None:
    exchange = Exchange(stream=True)
    exchange.say("~Hm", "~.", "=Let me look.", "(look_up", ':{"a":', ":1}", ")", "(other\0:{}\0)")
    exchange.typed_events()
    reasoning = '"item_id":"rs_0","output_index":0,"content_index":0'
    call = '"item_id":"fc_0","output_index":2'
    lines = exchange.normalised()
    assert lines[2:10] == [
        'response.output_item.added {"output_index":0,"item":{"id":"rs_0","status":"in_progress",'
        '"type":"reasoning","summary":[],"content":[]}}',
        f'response.content_part.added {{{reasoning},"part":{{"type":"reasoning_text","text":""}}}}',
        f'response.reasoning_text.delta {{{reasoning},"delta":"Hm"}}',
        f'response.reasoning_text.delta {{{reasoning},"delta":"."}}',
        f'response.reasoning_text.done {{{reasoning},"text":"Hm."}}',
        f'response.content_part.done {{{reasoning},"part":{{"type":"reasoning_text","text":"Hm."}}}}',
        'response.output_item.done {"output_index":0,"item":{"id":"rs_0","status":"completed",'
        '"type":"reasoning","summary":[],"content":[{"type":"reasoning_text","text":"Hm."}]}}',
        'response.output_item.added {"output_index":1,"item":{"id":"msg_0","status":"in_progress",'
        '"type":"message","role":"assistant","content":[]}}',
    ]
    assert lines[15:20] == [
        'response.output_item.added {"output_index":2,"item":{"id":"fc_0","status":"in_progress",'
        '"type":"function_call","call_id":"call_0","name":"look_up","arguments":""}}',
        f'response.function_call_arguments.delta {{{call},"delta":"{{\\"a\\":"}}',
        f'response.function_call_arguments.delta {{{call},"delta":"1}}"}}',
        f'response.function_call_arguments.done {{{call},"arguments":"{{\\"a\\":1}}"}}',
        'response.output_item.done {"output_index":2,"item":{"id":"fc_0","status":"completed",'
        '"type":"function_call","call_id":"call_0","name":"look_up","arguments":"{\\"a\\":1}"}}',
    ]
    final = exchange.events[-1][1]["response"]
    assert [item["type"] for item in final["output"]] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    assert final["output"][3]["arguments"] == "{}"
    assert final == exchange.stored


def test_summary_is_sent_where_one_is_asked_for() -> None:
    exchange = Exchange(stream=True, is_summarized=True)
    exchange.say("~Hm", "=Yes")
    names = Counter(event.type for event in exchange.typed_events())
    assert names["response.reasoning_summary_part.added"] == 1
    assert names["response.reasoning_summary_text.delta"] == 1
    assert names["response.reasoning_summary_text.done"] == 1
    assert names["response.reasoning_summary_part.done"] == 1
    assert not any("reasoning_text" in name for name in names)
    item = exchange.stored["output"][0]
    assert item["summary"] == [{"type": "summary_text", "text": "Hm"}] and "content" not in item


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("is_summarized", [True, False])
def test_streamed_and_whole_answers_are_the_same(stream: bool, is_summarized: bool) -> None:
    exchange = Exchange(stream=stream, is_summarized=is_summarized)
    exchange.say("~Hm", "=Yes", "= so", "(f", ':{"a":1}', ")", token_ids=(0, 1))
    response = exchange.events[-1][1]["response"] if stream else exchange.response
    assert response == exchange.stored
    for item in response["output"]:
        item["id"] = ""
        item.pop("call_id", None)
    reasoning: dict[str, Any] = {"summary": [{"type": "summary_text", "text": "Hm"}]}
    if not is_summarized:
        reasoning = {"summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]}
    text = {"type": "output_text", "text": "Yes so", "annotations": []}
    assert response["output"] == [
        {"id": "", "type": "reasoning", "status": "completed", **reasoning},
        {"id": "", "type": "message", "status": "completed", "role": "assistant", "content": [text]},
        {"id": "", "type": "function_call", "status": "completed", "name": "f", "arguments": '{"a":1}'},
    ]
    assert response["usage"] == {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 1},
        "total_tokens": 17,
    }
    assert response["status"] == "completed" and response["completed_at"] >= response["created_at"]
    assert response["metadata"] == ECHO["metadata"]


@pytest.mark.parametrize("stream", [True, False])
def test_answer_cut_by_the_limit_is_incomplete(stream: bool) -> None:
    exchange = Exchange(stream=stream)
    exchange.say("=Hello", "(f", ':{"a":', end=FinishReason.LENGTH)
    if stream:
        assert exchange.events[-1][0] == "response.incomplete"
        exchange.typed_events()
    stored = exchange.stored
    assert stored["status"] == "incomplete" and "completed_at" not in stored
    assert stored["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in stored["output"]] == ["completed", "incomplete"]
    assert stored["output"][1]["arguments"] == '{"a":'


@pytest.mark.parametrize("stream", [True, False])
def test_answer_without_a_word_is_an_empty_message(stream: bool) -> None:
    exchange = Exchange(stream=stream)
    exchange.say("")
    (item,) = exchange.stored["output"]
    assert item["content"] == [{"type": "output_text", "text": "", "annotations": []}]


@pytest.mark.parametrize("stream", [True, False])
def test_logprobs_are_those_of_the_text(stream: bool) -> None:
    exchange = Exchange(stream=stream, logprobs=True)
    exchange.step("~Hm", logprobs=(logprob(2),))
    exchange.step("=Hello", logprobs=(logprob(0),))
    exchange.step("= world", logprobs=(logprob(1),))
    exchange.say("= .", logprobs=(logprob(2),))
    part = exchange.stored["output"][1]["content"][0]
    assert [entry["token"] for entry in part["logprobs"]] == ["Hello", " world", "<end>"]
    assert part["logprobs"][0] == {
        "token": "Hello",
        "logprob": -0.5,
        "bytes": list(b"Hello"),
        "top_logprobs": [
            {"token": "Hello", "logprob": -0.5, "bytes": list(b"Hello")},
            {"token": "<end>", "logprob": -1.5, "bytes": list(b"<end>")},
        ],
    }
    if stream:
        events = exchange.typed_events()
        deltas = [event for event in events if event.type == "response.output_text.delta"]
        assert [[entry.token for entry in delta.logprobs] for delta in deltas] == [
            ["Hello"],
            [" world"],
            ["<end>"],
        ]
        (done,) = (event for event in events if event.type == "response.output_text.done")
        assert [entry.token for entry in done.logprobs] == ["Hello", " world", "<end>"]


def test_failed_stream_ends_with_an_event_and_without_a_clean_end() -> None:
    exchange = Exchange(stream=True)
    exchange.step("=Hello")
    exchange.engine.submitted[0].sink.fail(StepFailedError("The step failed."))
    assert exchange.channel.is_cut
    last = exchange.typed_events()[-1]
    assert last.type == "response.failed"
    assert last.response.error.message == "The step failed."
    assert last.response.output_text == "Hello"
    assert exchange.stored["status"] == "failed"


def test_request_that_fails_before_its_first_token_is_an_error_and_not_recorded() -> None:
    exchange = Exchange(stream=True)
    exchange.engine.submitted[0].sink.fail(StepFailedError("The step failed."))
    assert exchange.head.startswith(b"HTTP/1.1 500")
    assert exchange.records == []


def test_lone_surrogate_of_a_model_breaks_no_stream() -> None:
    exchange = Exchange(stream=True)
    exchange.say("=\ud800", "(\udfff", ":{}", ")")
    assert exchange.events[-1][0] == "response.completed"


def test_client_that_leaves_stops_the_answer_and_nothing_is_recorded() -> None:
    exchange = Exchange(stream=True)
    exchange.step("=Hello")
    assert exchange.request.on_disconnect is not None
    exchange.request.on_disconnect()
    assert exchange.engine.aborted == ["resp_1"] and exchange.records == []
