"""A background response runs without a client, and its events wait for those who come back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.responses import Response as ApiResponse

from graphllm.errors import InvalidRequestError, NotFoundError, StepFailedError
from graphllm.outputs import FinishReason
from graphllm.server.openai.responses.background import (
    BackgroundReply,
    BackgroundTask,
    EventLog,
    StoreEntry,
)
from graphllm.server.openai.responses.envelope import Envelope, ResponseStatus
from graphllm.server.openai.responses.store import ResponseStore, StoredResponse, StoreLimits, Turn
from graphllm.server.openai.responses.wire import ResponseOptions, ResponsesWire
from tests.fakes import FakeEngine, FakeTokenizer, RecordingChannel
from tests.server.dialect_exchange import (
    body_of,
    events_of,
    new_response,
    scripted_delta,
    scripted_generation,
)

ECHO: dict[str, Any] = {
    "background": True,
    "model": "m",
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
}


class Background:
    """A background response in a store, driven as the engine would."""

    def __init__(self, *, stream: bool, max_log_bytes: int = 2**20, **limits: Any) -> None:
        self.engine = FakeEngine()
        self.store = ResponseStore(StoreLimits(**limits))
        envelope = Envelope("resp_1", ECHO)
        stored = StoredResponse("resp_1", Turn(None, b"[]"), envelope.head(ResponseStatus.QUEUED))
        entry = StoreEntry(self.store, stored, begun=envelope.head(ResponseStatus.IN_PROGRESS))
        tokenizer: Any = FakeTokenizer([b"a"])
        wire = ResponsesWire(
            "resp_1", envelope, tokenizer=tokenizer, options=ResponseOptions(), record=entry.record
        )
        self.task = BackgroundTask(EventLog(max_bytes=max_log_bytes) if stream else None)
        self.task.reply = BackgroundReply(self.engine, wire, task=self.task, entry=entry)
        self.task.reply.submit(scripted_generation())
        stored.background = self.task
        self.store.add(stored)

    @property
    def response(self) -> ApiResponse:
        return ApiResponse.model_validate(json.loads(self.store.get("resp_1").body))

    def step(self, text: str, *, end: FinishReason | None = None) -> None:
        sink = self.engine.submitted[0].sink
        sink.write(scripted_delta(text, finish_reason=end))
        sink.flush()
        if end is not None:
            sink.finish()

    def follow(self, *, starting_after: int = -1) -> RecordingChannel:
        channel = RecordingChannel()
        assert self.task.log is not None
        self.task.log.follow(new_response(channel), starting_after=starting_after, headers=())
        return channel


@pytest.mark.parametrize("stream", [True, False])
def test_response_goes_from_queued_to_completed(stream: bool) -> None:
    background = Background(stream=stream)
    assert background.response.status == "queued"
    background.step("=Hel")
    assert background.response.status == "in_progress" and background.response.output == []
    background.step("=lo", end=FinishReason.STOP)
    assert background.response.status == "completed"
    assert background.response.output_text == "Hello"
    assert background.response.usage is not None and background.response.usage.output_tokens == 2
    assert not background.task.is_running
    # Nothing of its making stays in memory beside what the store counts.
    assert background.task.reply is None


@pytest.mark.parametrize("stream", [True, False])
def test_cancelled_response_stops_and_keeps_what_it_had(stream: bool) -> None:
    background = Background(stream=stream)
    background.step("=Hel")
    background.task.cancel()
    assert background.engine.aborted == ["resp_1"]
    assert background.response.status == "cancelled"
    assert background.response.output_text == "Hel"
    assert background.response.output[0].status == "incomplete"  # type: ignore[union-attr]
    # What was on its way is not written, and a second cancellation changes nothing.
    body = background.store.get("resp_1").body
    background.step("=lo", end=FinishReason.STOP)
    background.task.cancel()
    assert background.store.get("resp_1").body == body


@pytest.mark.parametrize("stream", [True, False])
def test_response_cancelled_before_its_first_token_is_empty(stream: bool) -> None:
    background = Background(stream=stream)
    background.task.cancel()
    assert background.response.status == "cancelled" and background.response.output == []


@pytest.mark.parametrize("stream", [True, False])
def test_failed_response_says_so(stream: bool) -> None:
    background = Background(stream=stream)
    background.step("=Hel")
    background.engine.submitted[0].sink.fail(StepFailedError("The step failed."))
    response = background.response
    assert response.status == "failed"
    assert response.error is not None and response.error.message == "The step failed."


@pytest.mark.parametrize("stream", [True, False])
def test_cancelling_after_the_end_changes_nothing(stream: bool) -> None:
    background = Background(stream=stream)
    background.step("=Hello", end=FinishReason.STOP)
    background.task.cancel()
    assert background.response.status == "completed" and background.engine.aborted == []


def test_follower_sees_all_events_whenever_it_comes() -> None:
    background = Background(stream=True)
    early = background.follow()
    background.step("=Hel")
    middle = background.follow()
    background.step("=lo", end=FinishReason.STOP)
    late = background.follow()
    events = events_of(body_of(early))
    assert [payload["sequence_number"] for _, payload in events] == list(range(len(events)))
    assert events[-1][0] == "response.completed"
    assert body_of(early) == body_of(middle) == body_of(late)
    assert early.is_ended and middle.is_ended and late.is_ended


@pytest.mark.parametrize("starting_after", [0, 3, 4, 5, 9, 10, 11, 500])
def test_follower_gets_only_events_behind_the_one_it_names(starting_after: int) -> None:
    background = Background(stream=True)
    everything = background.follow()
    background.step("=Hel")
    live = background.follow(starting_after=starting_after)
    background.step("=lo")
    background.step("=!", end=FinishReason.STOP)
    late = background.follow(starting_after=starting_after)
    wanted = [
        event for event in events_of(body_of(everything)) if event[1]["sequence_number"] > starting_after
    ]
    assert events_of(body_of(live)) == events_of(body_of(late)) == wanted
    assert late.is_ended


def test_follower_that_leaves_stops_nothing() -> None:
    background = Background(stream=True)
    channel = RecordingChannel()
    response = new_response(channel)
    assert background.task.log is not None
    background.task.log.follow(response, starting_after=-1, headers=())
    response.detach()
    background.step("=Hello", end=FinishReason.STOP)
    assert background.response.status == "completed" and background.engine.aborted == []


def test_cancelled_stream_ends_with_the_cancelled_response() -> None:
    background = Background(stream=True)
    channel = background.follow()
    background.step("=Hel")
    background.task.cancel()
    events = events_of(body_of(channel))
    assert events[-1][0] == "response.incomplete"
    assert events[-1][1]["response"]["status"] == "cancelled"
    assert [payload["sequence_number"] for _, payload in events] == list(range(len(events)))
    assert channel.is_ended


def test_deleted_response_stops_and_cuts_its_followers() -> None:
    background = Background(stream=True)
    channel = background.follow()
    background.step("=Hel")
    stored = background.store.delete("resp_1")
    assert stored.background is background.task
    background.task.discard()
    assert background.engine.aborted == ["resp_1"] and channel.is_cut
    assert background.store.num_bytes == 0
    with pytest.raises(NotFoundError):
        background.store.get("resp_1")


def test_log_counts_in_the_store_and_goes_with_its_response() -> None:
    background = Background(stream=True)
    background.step("=Hel")
    before = background.store.num_bytes
    for _ in range(10):
        background.step("=lo")
    assert background.store.num_bytes - before > 10 * 100
    background.step("=!", end=FinishReason.STOP)
    background.store.delete("resp_1")
    assert background.store.num_bytes == 0


def test_log_that_grows_too_long_is_dropped_and_the_response_is_not() -> None:
    background = Background(stream=True, max_log_bytes=3000)
    live = background.follow()
    for _ in range(30):
        background.step("=lo")
    assert background.task.num_log_bytes == 0
    with pytest.raises(InvalidRequestError) as caught:
        background.follow()
    assert caught.value.param == "stream"
    background.step("=!", end=FinishReason.STOP)
    assert background.response.output_text == "lo" * 30 + "!"
    assert events_of(body_of(live))[-1][0] == "response.completed"
