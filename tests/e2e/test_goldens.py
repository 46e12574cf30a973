"""The demo model says through HTTP what it is known to say, alone and in company."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import openai
import pytest

from graphllm.models.checkpoint import open_checkpoint
from graphllm.models.demo import demo_model_path
from graphllm.tokenizer.tokenizer import Tokenizer
from tests.e2e.serving import ServerProcess


@dataclass(frozen=True)
class Golden:
    question: str
    token_ids: tuple[int, ...]
    finish_reason: str


def ids(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split()))


GOLDENS = (
    Golden(
        "Count from 1 to 10.",
        ids(
            "33 30 216 33 198 34 30 216 34 198 35 30 216 35 198 36 "
            "30 216 36 198 37 30 216 37 198 38 30 216 38 198 39 30"
        ),
        "length",
    ),
    Golden("What is the capital of France?", ids("504 3575 282 4649 314 7042 30 2"), "stop"),
    Golden("What is 2+3?", ids("34 1232 216 35 446 216 37 2"), "stop"),
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return open_checkpoint(demo_model_path()).load_tokenizer()


async def ask(client: openai.AsyncOpenAI, golden: Golden, *, stream: bool) -> tuple[str, str | None, int]:
    """(text, finish reason, completion tokens) of the greedy answer, at most as long as the golden."""
    request = {
        "model": "demo",
        "messages": [{"role": "user", "content": golden.question}],
        "temperature": 0,
        "max_tokens": len(golden.token_ids),
    }
    if not stream:
        answer = await client.chat.completions.create(**request)
        assert answer.usage is not None
        choice = answer.choices[0]
        return choice.message.content or "", choice.finish_reason, answer.usage.completion_tokens
    text, finish_reason, completion_tokens = "", None, 0
    chunks = await client.chat.completions.create(
        **request, stream=True, stream_options={"include_usage": True}
    )
    async for chunk in chunks:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish_reason = choice.finish_reason or finish_reason
        if chunk.usage is not None:
            completion_tokens = chunk.usage.completion_tokens
    return text, finish_reason, completion_tokens


@pytest.mark.parametrize("num_in_flight", [1, 16])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_goldens(server: ServerProcess, tokenizer: Tokenizer, num_in_flight: int, stream: bool) -> None:
    async def ask_all() -> list[tuple[Golden, tuple[str, str | None, int]]]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120
        ) as client:
            if num_in_flight == 1:
                return [(golden, await ask(client, golden, stream=stream)) for golden in GOLDENS]
            asked = [GOLDENS[i % len(GOLDENS)] for i in range(num_in_flight)]
            answers = await asyncio.gather(*(ask(client, golden, stream=stream) for golden in asked))
            return list(zip(asked, answers, strict=True))

    for golden, answer in asyncio.run(ask_all()):
        text = tokenizer.decode(list(golden.token_ids))
        assert answer == (text, golden.finish_reason, len(golden.token_ids))


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden.question)
def test_the_sampled_tokens_are_the_goldens_token_for_token(
    client: openai.OpenAI, tokenizer: Tokenizer, golden: Golden
) -> None:
    answer = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": golden.question}],
        temperature=0,
        max_tokens=len(golden.token_ids),
        logprobs=True,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    sampled = [bytes(entry.bytes or ()) for entry in logprobs.content]
    assert sampled == [tokenizer.token_bytes(token_id) for token_id in golden.token_ids]
