"""From an engine's deltas to the bytes of an answer, streamed and whole, well and badly ended."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import time
import weakref
from array import array
from itertools import pairwise
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from graphllm.errors import ContextLengthError, EngineUnavailableError, StepFailedError
from graphllm.outputs import FinishReason, PromptLogprobs, PromptScores, SequenceDelta, TokenLogprob
from graphllm.sampling_params import SamplingParams
from graphllm.server.generation.replies import PromptSink, StreamedReply, WholeReply
from graphllm.server.generation.request import GenerationRequest
from graphllm.server.generation.wire import Choice, Usage
from graphllm.server.http import Headers, Request, Response
from graphllm.server.openai.chat_wire import ChatWire
from graphllm.server.openai.choice_wire import WireOptions
from graphllm.server.openai.completion_wire import CompletionWire
from tests.fakes import FakeEngine, FakeTokenizer, RecordingChannel

# Token 3 and 4 are the halves of one character; token 5 ends the text.
TOKENS = [b"Hello", b" world", b"!", b"\xc3", b"\xa9", b"<end>"]


class Exchange:
    """One reply with the engine on one side and the connection on the other."""

    def __init__(
        self,
        *,
        stream: bool,
        chat: bool = True,
        prompts: int = 1,
        n: int = 1,
        include_usage: bool = False,
        logprobs: int | None = None,
        engine: FakeEngine | None = None,
        cache_salt: str | None = None,
    ) -> None:
        self.engine = engine or FakeEngine()
        self.channel = RecordingChannel()
        self.request = Request(
            method="POST",
            raw_path=b"/v1/x",
            query=b"",
            http_version="1.1",
            headers=Headers(),
            body=b"",
            keep_alive=True,
        )
        response = Response(self.channel, method="POST", http_version="1.1", keep_alive=True)
        options = WireOptions(
            model="org/model",
            include_usage=include_usage,
            logprobs=logprobs is not None,
            skip_special_tokens=True,
        )
        tokenizer: Any = FakeTokenizer(TOKENS, special=frozenset({5}))
        wire = ChatWire(tokenizer, options) if chat else CompletionWire(tokenizer, options)
        kind = StreamedReply if stream else WholeReply
        self.reply = kind(self.engine, wire, request=self.request, response=response)
        params = SamplingParams(n=n, logprobs=logprobs)
        self.reply.submit(
            GenerationRequest(prompts=[[1, 2, 3]] * prompts, params=params, cache_salt=cache_salt)
        )

    def sink(self, prompt: int = 0) -> PromptSink:
        sink = self.engine.submitted[prompt].sink
        assert isinstance(sink, PromptSink)
        return sink

    def step(self, *deltas: SequenceDelta, prompt: int = 0) -> None:
        for delta in deltas:
            self.sink(prompt).write(delta)
        self.sink(prompt).flush()

    @property
    def body(self) -> bytes:
        """The answer's body; a chunked one put together."""
        head, _, body = self.channel.received.partition(b"\r\n\r\n")
        if b"Transfer-Encoding: chunked" not in head:
            return body
        whole = b""
        while match := re.match(rb"([0-9a-f]+)\r\n", body):
            size = int(match[1], 16)
            whole += body[match.end() : match.end() + size]
            body = body[match.end() + size + 2 :]
        return whole

    @property
    def events(self) -> list[Any]:
        """The JSON of every event but the last, which must be [DONE]."""
        *events, done, rest = self.body.split(b"\n\n")
        assert (done, rest) == (b"data: [DONE]", b"")
        return [json.loads(event.removeprefix(b"data: ")) for event in events]


def delta(
    text: str,
    *token_ids: int,
    index: int = 0,
    finish: FinishReason | None = None,
    stop: str | int | None = None,
    logprobs: bool = False,
    cached: int = 0,
) -> SequenceDelta:
    entries = tuple(TokenLogprob(token_id, -0.5, ((token_id, -0.5), (2, -2.0))) for token_id in token_ids)
    return SequenceDelta(index, text, token_ids, entries if logprobs else None, finish, stop, cached)


def test_a_streamed_chat_is_what_the_official_models_expect() -> None:
    exchange = Exchange(stream=True, include_usage=True)
    exchange.step(delta("Hello", 0))
    exchange.step(delta(' "world"\n', 1))
    exchange.step(delta("!", 2, 5, finish=FinishReason.STOP))
    exchange.sink().finish()
    chunks = [ChatCompletionChunk.model_validate(event, strict=True) for event in exchange.events]
    deltas = [(chunk.choices[0].delta.role, chunk.choices[0].delta.content) for chunk in chunks[:-1]]
    assert deltas == [("assistant", ""), (None, "Hello"), (None, ' "world"\n'), (None, "!"), (None, None)]
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons == [None, None, None, None, "stop"]
    assert exchange.events[-2]["choices"][0]["delta"] == {}
    assert [event["usage"] for event in exchange.events[:-1]] == [None] * 5
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (3, 4)
    assert chunks[-1].usage.total_tokens == 7
    assert {(chunk.model, chunk.object) for chunk in chunks} == {("org/model", "chat.completion.chunk")}
    assert len({(chunk.id, chunk.created, chunk.system_fingerprint) for chunk in chunks}) == 1
    assert exchange.channel.is_ended and exchange.engine.aborted == []


def test_the_connection_is_written_once_a_step() -> None:
    exchange = Exchange(stream=True, n=2)
    exchange.step(delta("Hello", 0), delta("Hello", 0, index=1))
    num_writes = len(exchange.channel.writes)
    exchange.step(delta(" world", 1), delta(" world", 1, index=1))
    assert len(exchange.channel.writes) == num_writes + 1
    assert exchange.channel.writes[-1].count(b"data: ") == 2


def test_a_step_without_text_writes_nothing() -> None:
    exchange = Exchange(stream=True)
    exchange.step(delta("Hello", 0))
    num_writes = len(exchange.channel.writes)
    exchange.step(delta("", 3))
    assert len(exchange.channel.writes) == num_writes


def test_usage_is_not_mentioned_unless_asked_for() -> None:
    exchange = Exchange(stream=True)
    exchange.step(delta("Hello", 0, finish=FinishReason.LENGTH))
    exchange.sink().finish()
    assert b"usage" not in exchange.body


def test_a_whole_chat_is_what_the_official_models_expect() -> None:
    exchange = Exchange(stream=False, n=2)
    exchange.step(delta("Hello", 0), delta("Bye", 1, index=1, finish=FinishReason.LENGTH))
    assert exchange.channel.writes == []
    exchange.step(delta("!", 2, 5, finish=FinishReason.STOP, stop="\n"))
    exchange.sink().finish()
    answer = ChatCompletion.model_validate(json.loads(exchange.body), strict=True)
    assert [choice.message.content for choice in answer.choices] == ["Hello!", "Bye"]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "length"]
    assert answer.choices[0].model_extra == {"stop_reason": "\n", "matched_stop": "\n"}
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 4)
    assert len(exchange.channel.writes) == 1


def test_a_batch_numbers_choices_across_prompts_and_ends_with_the_last() -> None:
    for stream in (False, True):
        exchange = Exchange(stream=stream, chat=False, prompts=2, n=2)
        for prompt in (1, 0):
            for index in range(2):
                exchange.step(
                    delta(f"{prompt}{index}", 0, index=index, finish=FinishReason.STOP), prompt=prompt
                )
            assert not exchange.channel.is_ended
            exchange.sink(prompt).finish()
        assert exchange.channel.is_ended
        bodies = exchange.events if stream else [json.loads(exchange.body)]
        choices = [choice for body in bodies for choice in body["choices"] if choice["text"]]
        assert sorted((choice["index"], choice["text"]) for choice in choices) == [
            (0, "00"),
            (1, "01"),
            (2, "10"),
            (3, "11"),
        ]
        if not stream:
            usage = Completion.model_validate(bodies[0], strict=True).usage
            assert usage is not None and (usage.prompt_tokens, usage.completion_tokens) == (6, 4)


def test_request_ids_of_a_batch_are_unique() -> None:
    exchange = Exchange(stream=True, chat=False, prompts=3)
    assert len({entry.request_id for entry in exchange.engine.submitted}) == 3


def test_a_request_that_fails_before_its_first_token_gets_a_status() -> None:
    for stream in (False, True):
        exchange = Exchange(stream=stream, prompts=2, chat=False)
        exchange.sink(1).fail(StepFailedError("The step failed."))
        head = exchange.channel.received.partition(b"\r\n\r\n")[0]
        assert head.startswith(b"HTTP/1.1 500 ") and b"x-should-retry: false" in head
        assert json.loads(exchange.body)["error"]["code"] == "step_failed"
        # The other prompt's tokens have nowhere to go.
        assert exchange.engine.submitted[0].request_id in exchange.engine.aborted
        exchange.step(delta("late", 0))
        exchange.sink(0).finish()
        assert len(exchange.channel.writes) == 1


def test_a_stream_that_breaks_says_so_and_never_ends_cleanly() -> None:
    exchange = Exchange(stream=True)
    exchange.step(delta("Hello", 0))
    exchange.sink().write(delta(" world", 1))
    exchange.sink().fail(StepFailedError("The step failed."))
    *events, error, rest = exchange.body.split(b"\n\n")
    assert json.loads(error.removeprefix(b"data: "))["error"]["message"] == "The step failed."
    assert rest == b"" and b"[DONE]" not in exchange.body
    assert b" world" in events[-1]
    assert exchange.channel.is_cut and not exchange.channel.is_ended
    assert not exchange.channel.received.endswith(b"0\r\n\r\n")


def test_an_aborted_sequence_is_no_finished_answer() -> None:
    exchange = Exchange(stream=False)
    exchange.step(delta("Hello", 0, finish=FinishReason.ABORT))
    assert exchange.channel.received.startswith(b"HTTP/1.1 503 ")


def test_a_client_that_leaves_aborts_every_request_once() -> None:
    for stream in (False, True):
        exchange = Exchange(stream=stream, chat=False, prompts=2)
        exchange.step(delta("Hello", 0))
        on_disconnect = exchange.request.on_disconnect
        assert on_disconnect is not None
        on_disconnect()
        on_disconnect()
        assert exchange.engine.aborted == [entry.request_id for entry in exchange.engine.submitted]
        num_writes = len(exchange.channel.writes)
        exchange.step(delta("late", 0))
        assert len(exchange.channel.writes) == num_writes


def test_a_refused_prompt_takes_its_batch_back() -> None:
    engine = FakeEngine(refusal=ContextLengthError("too long"), refuse_at=2)
    with pytest.raises(ContextLengthError):
        Exchange(stream=True, chat=False, prompts=3, engine=engine)
    assert engine.aborted == [entry.request_id for entry in engine.submitted]
    assert len(engine.aborted) == 2


def test_an_answer_cut_short_by_the_server_is_retriable() -> None:
    exchange = Exchange(stream=True)
    exchange.sink().fail(EngineUnavailableError("The server is shutting down."))
    assert b"retry-after: 1" in exchange.channel.received


def test_streamed_logprobs_wait_for_the_chunk_with_their_text() -> None:
    exchange = Exchange(stream=True, logprobs=2)
    exchange.step(delta("", 3, logprobs=True))
    exchange.step(delta("é", 4, logprobs=True))
    exchange.step(delta("", 5, logprobs=True, finish=FinishReason.STOP))
    exchange.sink().finish()
    _, text, closing = exchange.events
    content = text["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [r"bytes:\xc3", r"bytes:\xa9"]
    assert bytes(content[0]["bytes"] + content[1]["bytes"]).decode() == "é"
    assert content[0]["top_logprobs"][1] == {"token": "!", "logprob": -2.0, "bytes": [33]}
    (end,) = closing["choices"][0]["logprobs"]["content"]
    assert end["token"] == "<end>"
    for event in exchange.events:
        ChatCompletionChunk.model_validate(event, strict=True)


def test_completion_offsets_count_characters_over_all_chunks() -> None:
    exchange = Exchange(stream=True, chat=False, logprobs=1)
    exchange.step(delta("Hello", 0, logprobs=True))
    exchange.step(delta("", 3, logprobs=True))
    exchange.step(delta("é", 4, logprobs=True))
    exchange.step(delta("!", 2, 5, logprobs=True, finish=FinishReason.STOP))
    exchange.sink().finish()
    found = [event["choices"][0]["logprobs"] for event in exchange.events]
    assert [offset for entry in found if entry for offset in entry["text_offset"]] == [0, 5, 5, 6, 7]
    assert [token for entry in found if entry for token in entry["tokens"]] == [
        "Hello",
        r"bytes:\xc3",
        r"bytes:\xa9",
        "!",
        "<end>",
    ]


def test_an_impossible_token_has_a_finite_logprob() -> None:
    exchange = Exchange(stream=False, logprobs=1)
    impossible = TokenLogprob(0, -0.1, ((0, -0.1), (1, float("-inf"))))
    exchange.step(SequenceDelta(0, "Hello", (0,), (impossible,), FinishReason.LENGTH, None))
    exchange.sink().finish()
    answer = ChatCompletion.model_validate(json.loads(exchange.body), strict=True)
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.content is not None
    assert answer.choices[0].logprobs.content[0].top_logprobs[1].logprob == -9999.0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_usage_says_how_many_prompt_tokens_were_cached(stream: bool, chat: bool) -> None:
    # Two prompts of two choices each: a prompt's cached tokens count once.
    exchange = Exchange(stream=stream, chat=chat, prompts=2, n=2, include_usage=True)
    for prompt, cached in ((0, 2), (1, 1)):
        for index in range(2):
            exchange.step(
                delta("Hello", 0, index=index, finish=FinishReason.LENGTH, cached=cached), prompt=prompt
            )
        exchange.sink(prompt).finish()
    answer = exchange.events[-1] if stream else json.loads(exchange.body)
    assert answer["usage"]["prompt_tokens"] == 6
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    official: Any = (ChatCompletionChunk if chat else Completion) if stream else None
    official = official or (ChatCompletion if chat else Completion)
    assert official.model_validate(answer).usage.prompt_tokens_details.cached_tokens == 3


def test_the_salt_goes_to_every_prompt() -> None:
    exchange = Exchange(stream=True, prompts=2, cache_salt="mine")
    assert [submitted.cache_salt for submitted in exchange.engine.submitted] == ["mine", "mine"]


def test_a_long_answer_is_put_together_in_slices() -> None:
    async def test() -> float:
        exchange = Exchange(stream=False, chat=False, logprobs=1)
        for _ in range(50):
            exchange.step(delta("Hello", *[0] * 200, logprobs=True))
        exchange.step(delta("!", 2, logprobs=True, finish=FinishReason.STOP))
        exchange.sink().finish()
        assert not exchange.channel.writes, "ten thousand entries take more than a slice"
        longest = 0.0
        while not exchange.channel.writes:
            started = time.perf_counter()
            await asyncio.sleep(0)
            longest = max(longest, time.perf_counter() - started)
        logprobs = json.loads(exchange.body)["choices"][0]["logprobs"]
        assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == 10_001
        return longest

    # The best of three: others use the machine too. All of it takes 50 ms and more.
    assert min(asyncio.run(test()) for _ in range(3)) < 0.02


class CountedLogprobs(PromptLogprobs):
    """Counts the entries that were made of it."""

    num_made = 0

    def __getitem__(self, index: Any) -> Any:
        self.num_made += 1
        return super().__getitem__(index)


def test_scores_of_an_echoed_prompt_are_made_a_few_at_a_time() -> None:
    token_ids = [0, 1, 2] * 1000
    scores = CountedLogprobs(token_ids, 1)
    num_scored = len(token_ids) - 1
    numbers, ids = array("f", [-1.0]) * num_scored, array("i", [1]) * num_scored
    scores.append(PromptScores(numbers, ids, ids, numbers))
    tokenizer: Any = FakeTokenizer(TOKENS)
    echo = "Hello world!" * 1000
    options = WireOptions(model="test", logprobs=True, prompts=[token_ids], echoes=[echo])
    wire = CompletionWire(tokenizer, options)
    choice = Choice(0, prompt_logprobs=scores, logprobs=[TokenLogprob(2, -0.5, ((2, -0.5),))])
    made = [scores.num_made for _ in wire.preparation([choice])]
    assert made[0] < 50 and made[-1] >= len(token_ids)
    assert max(after - before for before, after in pairwise(made)) < 50
    logprobs = json.loads(wire.whole([choice], Usage(prompt_tokens=3000, completion_tokens=1)))["choices"][0][
        "logprobs"
    ]
    assert logprobs["tokens"] == ["Hello", " world", "!"] * 1000 + ["!"]
    assert logprobs["token_logprobs"] == [None, *[-1.0] * num_scored, -0.5]


def test_an_answer_that_cannot_be_written_is_a_500(monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = Exchange(stream=False)
    monkeypatch.setattr(ChatWire, "whole", lambda *_: 1 / 0)
    exchange.step(delta("Hello", 0, finish=FinishReason.STOP))
    exchange.sink().finish()
    assert exchange.channel.received.startswith(b"HTTP/1.1 500 ")


def test_the_client_that_left_while_its_answer_was_put_together_gets_nothing() -> None:
    exchange = Exchange(stream=False)
    exchange.step(delta("Hello", 0, finish=FinishReason.STOP))
    exchange.request.disconnected = True
    exchange.sink().finish()
    assert exchange.channel.writes == []


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("ending", ["finish", "fail", "disconnect"])
def test_an_ended_reply_is_freed_without_a_collection(stream: bool, ending: str) -> None:
    exchange = Exchange(stream=stream, include_usage=True)
    exchange.step(delta("Hello", 0, cached=2))
    reply = weakref.ref(exchange.reply)
    if ending == "finish":
        exchange.step(delta("", 5, finish=FinishReason.STOP))
        exchange.sink().finish()
    elif ending == "fail":
        exchange.sink().fail(StepFailedError("A step failed."))
    else:
        assert exchange.request.on_disconnect is not None
        exchange.request.on_disconnect()
    # What the connection and the engine do themselves with a request that has ended.
    exchange.request.on_disconnect = None
    exchange.engine.submitted.clear()
    gc.disable()
    try:
        del exchange
        assert reply() is None
    finally:
        gc.enable()
