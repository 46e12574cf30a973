"""The requests of a serving benchmark, and putting them on a server so many at a time.

Owns prompts, request bodies and the closed loop of workers. Knows nothing of what is reported.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.sse_client import (
    Completion,
    Connection,
    Endpoint,
    Exchange,
    LoadError,
    connect,
    read_completion,
)

TOPICS = (
    "how bread rises",
    "why the sky is blue",
    "what a bicycle's gears do",
    "how to learn a song by heart",
    "the difference between a frog and a toad",
    "how tides work",
    "what makes glass transparent",
    "how to plan a small garden",
    "why cats purr",
    "how a lock and key fit together",
    "what a compiler does",
    "how maps are drawn",
    "why leaves change colour in autumn",
    "how to make a paper boat",
    "what an echo is",
    "how bees find flowers",
)
STYLES = (
    "to a child",
    "to a busy friend",
    "in plain words",
    "with an example from daily life",
    "as if on a walk",
    "step by step",
    "without any jargon",
)


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked of the server. `prompt_words` adds so many words of context, give or take half."""

    model: str
    max_tokens: int = 96
    prompt_words: int = 0
    ignore_eos: bool = True
    seed: int = 0

    def messages(self, index: int) -> list[dict[str, str]]:
        """The chat of request `index`: the same for the same index and seed, and no two alike."""
        draw = random.Random(f"{self.seed}/{index}")
        text = f"Question {index + 1}: explain {draw.choice(TOPICS)} {draw.choice(STYLES)}."
        if self.prompt_words:
            num_words = round(self.prompt_words * draw.uniform(0.5, 1.5))
            words = [word for topic in TOPICS for word in topic.split()]
            text += " Keep in mind: " + " ".join(draw.choices(words, k=num_words)) + "."
        return [{"role": "user", "content": text}]

    def body(self, index: int) -> bytes:
        """The JSON body of request `index`."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": self.messages(index),
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            # Not OpenAI's, but known to most open servers.
            body["ignore_eos"] = True
        return json.dumps(body).encode()


@dataclass(frozen=True, slots=True)
class Round:
    """The completions of one stretch of load. `seconds` from the first request to the last answer."""

    completions: tuple[Completion, ...]
    errors: tuple[str, ...]
    seconds: float

    @property
    def num_tokens(self) -> int:
        return sum(completion.num_tokens for completion in self.completions)


async def run_round(
    endpoint: Endpoint, bodies: Sequence[bytes], *, concurrency: int, timeout: float = 600.0
) -> Round:
    """Send every body, `concurrency` at a time, each worker on its own keep-alive connection."""
    waiting = iter(bodies)
    exchanges: list[Exchange] = []
    errors: list[str] = []

    async def work() -> None:
        connection: Connection | None = None
        for body in waiting:
            try:
                if connection is None or not connection.is_open:
                    connection = await connect(endpoint)
                async with asyncio.timeout(timeout):
                    exchanges.append(await connection.send(endpoint.request(body)))
            except (LoadError, OSError, TimeoutError) as error:
                errors.append(str(error) or f"no answer within {timeout:g} s")
                if connection is not None:
                    connection.close()
        if connection is not None:
            connection.close()

    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(min(concurrency, len(bodies)))))
    seconds = time.perf_counter() - start
    completions = []
    for exchange in exchanges:
        try:
            completions.append(read_completion(exchange))
        except LoadError as error:
            errors.append(str(error))
    return Round(tuple(completions), tuple(errors), seconds)


async def get_json(endpoint: Endpoint) -> Any:
    """The JSON that a GET answers. Raises OSError, LoadError, or ValueError when it is no JSON."""
    connection = await connect(endpoint)
    try:
        exchange = await connection.send(endpoint.request())
    finally:
        connection.close()
    if exchange.status != 200:
        raise LoadError(f"HTTP {exchange.status} from {endpoint.path}")
    return json.loads(exchange.body)
