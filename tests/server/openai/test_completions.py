"""A batch of prompts becomes as many engine requests, or one error and none."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from graphllm.server.generation.served_model import ServedModel
from graphllm.server.http import Headers, Request, Response
from graphllm.server.openai.completions import Completions
from tests.fakes import FakeEngine, FakeTokenizer, RecordingChannel


class Posted:
    """A body posted to the endpoint, and what came of it."""

    def __init__(self, prompt: Any, seconds_per_text: float = 0.0) -> None:
        tokenizer = FakeTokenizer([b"a"] * 10, seconds_per_text=seconds_per_text)
        self.engine = FakeEngine(tokenizer=tokenizer)
        engine: Any = self.engine
        self.channel = RecordingChannel()
        body = json.dumps({"model": "m", "prompt": prompt, "n": 2}).encode()
        self.request = Request(
            method="POST",
            raw_path=b"/v1/completions",
            query=b"",
            http_version="1.1",
            headers=Headers(),
            body=body,
            keep_alive=True,
        )
        response = Response(self.channel, method="POST", http_version="1.1", keep_alive=True)
        Completions(ServedModel(engine, "m")).create(self.request, response)

    @property
    def prompts(self) -> list[list[int]]:
        return [entry.prompt_token_ids for entry in self.engine.submitted]

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.channel.received.partition(b"\r\n\r\n")[2])["error"]
        return error


def settled(prompt: Any) -> Posted:
    """A post whose prompts have been submitted, or answered with an error."""

    async def post() -> Posted:
        posted = Posted(prompt)
        while not posted.prompts and not posted.channel.writes:
            await asyncio.sleep(0)
        return posted

    return asyncio.run(post())


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("abc", [[1, 1, 1]]),
        (["a", "bc"], [[1], [1, 1]]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
        ([[0, 9] * 50], [[0, 9] * 50]),
    ],
)
def test_every_form_of_a_prompt_is_understood(prompt: Any, prompts: list[list[int]]) -> None:
    assert settled(prompt).prompts == prompts


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        [],
        [""],
        ["a", ""],
        [[]],
        [[1], []],
        ["a", [1]],
        [[1], "a"],
        [1, "a"],
        [1, [2]],
        [10],
        [-1],
        [[1], [10]],
        "a" * 101,
        ["a", "a" * 101],
        [1] * 101,
        [[1], [1] * 101],
        ["a"] * 1025,
        [[1]] * 1025,
    ],
    ids=lambda prompt: str(prompt)[:20],
)
def test_a_prompt_that_cannot_be_used_is_refused_and_its_batch_with_it(prompt: Any) -> None:
    posted = settled(prompt)
    assert posted.channel.received.startswith(b"HTTP/1.1 400 ")
    assert posted.error["param"] == "prompt"
    assert posted.prompts == []


def test_a_large_batch_lets_the_loop_go_on_between_its_prompts() -> None:
    async def test() -> None:
        posted = Posted(["a"] * 20, seconds_per_text=0.005)
        assert posted.prompts == []
        longest = 0.0
        while not posted.prompts:
            started = time.perf_counter()
            await asyncio.sleep(0)
            longest = max(longest, time.perf_counter() - started)
        assert len(posted.prompts) == 20
        # One prompt's time, not the batch's.
        assert longest < 0.05

    asyncio.run(test())


def test_a_batch_whose_client_left_while_it_was_tokenized_is_dropped() -> None:
    async def test() -> None:
        posted = Posted(["a"] * 5, seconds_per_text=0.002)
        posted.request.disconnected = True
        await asyncio.sleep(0.05)
        assert posted.prompts == []
        assert posted.channel.writes == []

    asyncio.run(test())


def test_an_error_late_in_a_batch_is_answered() -> None:
    async def test() -> None:
        posted = Posted(["a"] * 5 + [""], seconds_per_text=0.002)
        while not posted.channel.writes:
            await asyncio.sleep(0)
        assert posted.channel.received.startswith(b"HTTP/1.1 400 ")
        assert "prompt[5]" in posted.error["message"]
        assert posted.prompts == []

    asyncio.run(test())
