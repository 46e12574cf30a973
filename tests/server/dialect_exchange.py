"""One reply of a dialect's wire, with a scripted model on one side and a recorded connection on the other."""

from __future__ import annotations

import json
import re
from typing import Any

from graphllm.output_formats.events import (
    OutputEvent,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from graphllm.outputs import FinishReason, SequenceDelta, TokenLogprob
from graphllm.sampling_params import SamplingParams
from graphllm.server.generation.replies import StreamedReply, WholeReply
from graphllm.server.generation.request import GenerationRequest
from graphllm.server.generation.wire import Wire
from graphllm.server.http import Headers, Request, Response
from tests.fakes import FakeEngine, RecordingChannel


class ScriptedParser:
    """Reads what the tests write for a model: a sign and a text, one a delta.

    `=text`, `~reasoning`, `(name` begins a call, `:arguments`, `)` ends it. Several are parted by a NUL.
    """

    def __init__(self) -> None:
        self._num_calls = 0

    def append(self, text: str) -> list[OutputEvent]:
        return [self._event(piece[0], piece[1:]) for piece in text.split("\0")]

    def finish(self) -> list[OutputEvent]:
        return []

    def _event(self, sign: str, text: str) -> OutputEvent:
        match sign:
            case "=":
                return TextDelta(text)
            case "~":
                return ReasoningDelta(text)
            case "(":
                self._num_calls += 1
                return ToolCallStart(self._num_calls - 1, text, None)
            case ":":
                return ToolCallArguments(self._num_calls - 1, text)
            case ")":
                return ToolCallEnd(self._num_calls - 1)
        raise AssertionError(f"not a script: {sign}{text}")


class DialectExchange:
    """A request of ten prompt tokens, four of them cached, being answered by `wire`."""

    def __init__(self, wire: Wire, *, stream: bool) -> None:
        self.engine = FakeEngine()
        self.channel = RecordingChannel()
        self.request = new_request()
        kind = StreamedReply if stream else WholeReply
        self.reply = kind(self.engine, wire, request=self.request, response=new_response(self.channel))
        self.reply.submit(scripted_generation())

    def say(self, *texts: str, end: FinishReason | None = FinishReason.STOP, **last: Any) -> None:
        """One step a text; the last one ends the answer."""
        for position, text in enumerate(texts):
            is_last = position == len(texts) - 1
            self.step(text, finish_reason=end if is_last else None, **(last if is_last else {}))
        if end is not None:
            self.engine.submitted[0].sink.finish()

    def step(self, text: str, **fields: Any) -> None:
        sink = self.engine.submitted[0].sink
        sink.write(scripted_delta(text, **fields))
        sink.flush()

    @property
    def head(self) -> bytes:
        return self.channel.received.partition(b"\r\n\r\n")[0]

    @property
    def body(self) -> bytes:
        return body_of(self.channel)

    @property
    def events(self) -> list[tuple[str, dict[str, Any]]]:
        return events_of(self.body)


def new_request(path: bytes = b"/v1/x", *, query: bytes = b"", body: bytes = b"") -> Request:
    return Request(
        method="POST",
        raw_path=path,
        query=query,
        http_version="1.1",
        headers=Headers(),
        body=body,
        keep_alive=True,
    )


def new_response(channel: RecordingChannel) -> Response:
    return Response(channel, method="POST", http_version="1.1", keep_alive=True)


def scripted_generation() -> GenerationRequest:
    return GenerationRequest(prompts=[[1] * 10], params=SamplingParams(), new_parser=ScriptedParser)


def scripted_delta(
    text: str,
    *,
    finish_reason: FinishReason | None = None,
    stop_reason: str | int | None = None,
    token_ids: tuple[int, ...] = (0,),
    logprobs: tuple[TokenLogprob, ...] | None = None,
) -> SequenceDelta:
    return SequenceDelta(
        index=0,
        text=text,
        token_ids=token_ids,
        logprobs=logprobs,
        finish_reason=finish_reason,
        stop_reason=stop_reason,
        num_cached_tokens=4,
    )


def body_of(channel: RecordingChannel) -> bytes:
    """The answer's body; a chunked one put together."""
    head, _, body = channel.received.partition(b"\r\n\r\n")
    if b"Transfer-Encoding: chunked" not in head:
        return body
    whole = b""
    while match := re.match(rb"([0-9a-f]+)\r\n", body):
        size = int(match[1], 16)
        whole += body[match.end() : match.end() + size]
        body = body[match.end() + size + 2 :]
    return whole


def events_of(body: bytes) -> list[tuple[str, dict[str, Any]]]:
    """(name, payload) of each event; every one has both, in two lines."""
    events = []
    for frame in body.decode().split("\n\n")[:-1]:
        match = re.fullmatch(r"event: (\S+)\ndata: (.*)", frame)
        assert match is not None, frame
        events.append((match[1], json.loads(match[2])))
    return events
