"""Streams through HTTP at a running server, and what its metrics say while they run.

Owns prompts of an exact number of tokens, the window in which all streams decode, and the arithmetic from
what client and metrics saw to times a step and a token. Starts no server.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import re
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import uvloop

from benchmarks.sse_client import Completion, Endpoint, LoadError, connect
from benchmarks.workload import Round, run_round

T = TypeVar("T")

_POLL = 0.05  # seconds
_SETTLE = 0.1  # seconds after the last stream has begun


@dataclass(frozen=True, slots=True)
class Counts:
    """What /metrics said at some moment of the client's clock. None where a metric does not exist."""

    when: float
    num_running: float
    num_steps: float
    step_seconds: float
    num_tokens: float
    host_seconds: float | None
    num_misses: float | None


@dataclass(frozen=True, slots=True)
class Window:
    """Between two moments in which `num_streams` sequences decoded: means, in seconds.

    inter_token: as the client saw it; step: on the device; idle: of the device between two steps;
    host: of the event loop's work, a token, None where the server does not say.
    """

    num_streams: int
    num_steps: int
    inter_token: float
    step: float
    idle: float
    host: float | None
    tokens_per_second: float
    num_misses: float | None

    @property
    def idle_over_allowed(self) -> float:
        """In units of 2 % of the step or 10 us, whichever is more."""
        return max(0.0, self.idle) / max(0.02 * (self.step + max(0.0, self.idle)), 10e-6)


def digits(num_tokens: int, *, seed: object) -> str:
    """A text of so many tokens for the byte-level tokenizers of random models: they know no numbers."""
    return "".join(random.Random(f"digits/{seed}").choices("0123456789", k=num_tokens))


def chat_body(model: str, text: str, *, max_tokens: int) -> bytes:
    """The JSON body of a greedy streamed chat of a given length."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    return json.dumps(body).encode()


def parse_counts(text: str, *, when: float) -> Counts:
    """From Prometheus' text format. Raises LoadError where a metric that is needed is missing."""

    def find(name: str) -> float | None:
        match = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
        return None if match is None else float(match[1])

    def need(name: str) -> float:
        value = find(name)
        if value is None:
            raise LoadError(f"the server's metrics have no {name}")
        return value

    return Counts(
        when=when,
        num_running=need("graphllm_running_sequences"),
        num_steps=need("graphllm_step_seconds_count"),
        step_seconds=need("graphllm_step_seconds_sum"),
        num_tokens=need("graphllm_generated_tokens_total"),
        host_seconds=find("graphllm_host_seconds_total"),
        num_misses=find("graphllm_graph_misses_total"),
    )


def run_load(load: Coroutine[Any, Any, T]) -> T:
    """Run a client on a loop of its own, without collections: one takes longer than a hundred tokens."""
    gc.collect()
    gc.disable()
    try:
        return uvloop.run(load)
    finally:
        gc.enable()


async def read_counts(url: str) -> Counts:
    connection = await connect(Endpoint.parse(url, "/metrics"))
    try:
        exchange = await connection.send(Endpoint.parse(url, "/metrics").request())
    finally:
        connection.close()
    return parse_counts(exchange.body.decode(), when=exchange.pieces[0][0])


async def run_window(
    url: str, *, model: str, num_streams: int, max_tokens: int, seconds: float, prompt_tokens: int = 64
) -> tuple[Window, Round]:
    """Start streams, and look at `seconds` of the time in which all of them decode.

    Raises LoadError when a stream failed, or when they ended before the window did.
    """
    endpoint = Endpoint.parse(url, "/v1/chat/completions")
    # Prompts of this window's own: the server keeps the KV of those that it has seen.
    window = time.time_ns()
    bodies = [
        chat_body(model, digits(prompt_tokens, seed=(window, index)), max_tokens=max_tokens)
        for index in range(num_streams)
    ]
    load = asyncio.create_task(run_round(endpoint, bodies, concurrency=num_streams))
    try:
        start = await _all_decode(url, num_streams, load)
        await asyncio.sleep(seconds)
        end = await read_counts(url)
        done = await load
    finally:
        load.cancel()
    if done.errors:
        raise LoadError(f"{len(done.errors)} of {num_streams} streams failed, the first: {done.errors[0]}")
    if end.num_running != num_streams:
        raise LoadError(
            f"the streams ended before {seconds:g} s were over: only {end.num_running:g} still ran"
        )
    return window_of(start, end, done.completions), done


async def _all_decode(url: str, num_streams: int, load: asyncio.Task[Round]) -> Counts:
    """The counts shortly after every stream has begun. Raises LoadError when the load ends before."""
    while not load.done():
        counts = await read_counts(url)
        if counts.num_running == num_streams:
            # Running are those that still compute their prompts too.
            await asyncio.sleep(_SETTLE)
            return await read_counts(url)
        await asyncio.sleep(_POLL)
    raise LoadError(f"the load ended before {num_streams} streams ran: {load.result().errors[:1]}")


def window_of(start: Counts, end: Counts, completions: Sequence[Completion]) -> Window:
    """The arithmetic. Raises LoadError where there is nothing to divide by."""
    seconds = end.when - start.when
    num_steps = end.num_steps - start.num_steps
    num_tokens = end.num_tokens - start.num_tokens
    gaps = [
        later - earlier
        for completion in completions
        for earlier, later in pairwise(completion.token_times)
        if start.when <= earlier and later <= end.when
    ]
    if num_steps < 1 or num_tokens < 1 or not gaps:
        raise LoadError(f"{num_steps:g} steps, {num_tokens:g} tokens and {len(gaps)} gaps in {seconds:.2f} s")
    num_events = sum(len(completion.token_times) for completion in completions)
    if num_events != sum(completion.num_tokens for completion in completions):
        raise LoadError("some tokens carried no text, so that times between tokens are not known")
    step = (end.step_seconds - start.step_seconds) / num_steps
    host = None
    if start.host_seconds is not None and end.host_seconds is not None:
        host = (end.host_seconds - start.host_seconds) / num_tokens
    misses = None
    if start.num_misses is not None and end.num_misses is not None:
        misses = end.num_misses - start.num_misses
    return Window(
        num_streams=len(completions),
        num_steps=int(num_steps),
        inter_token=sum(gaps) / len(gaps),
        step=step,
        idle=seconds / num_steps - step,
        host=host,
        tokens_per_second=num_tokens / seconds,
        num_misses=misses,
    )


async def times_to_first_token(
    url: str, *, model: str, num_tokens: int, num_requests: int
) -> tuple[list[float], int]:
    """Seconds from sending each prompt, one after another, to its first text; and the prompts' tokens.

    The server counts the tokens of its template too: prompts are made shorter by as many. Raises LoadError.
    """
    endpoint = Endpoint.parse(url, "/v1/chat/completions")

    async def ask(length: int, seed: object) -> Completion:
        body = chat_body(model, digits(length, seed=seed), max_tokens=2)
        done = await run_round(endpoint, [body], concurrency=1)
        if done.errors:
            raise LoadError(done.errors[0])
        return done.completions[0]

    probe = num_tokens // 2
    template = (await ask(probe, "probe")).num_prompt_tokens - probe
    for index in range(2):
        await ask(num_tokens - template, ("warm", index))
    completions = [await ask(num_tokens - template, index) for index in range(num_requests)]
    seconds = [completion.token_times[0] - completion.start for completion in completions]
    return seconds, completions[-1].num_prompt_tokens


async def first_token(url: str, *, model: str) -> float:
    """The moment of the first text of a short chat. Raises LoadError."""
    body = chat_body(model, digits(16, seed=time.time()), max_tokens=1)
    done = await run_round(Endpoint.parse(url, "/v1/chat/completions"), [body], concurrency=1)
    if done.errors:
        raise LoadError(done.errors[0])
    return done.completions[0].token_times[0]
