"""The server on a card, with a random model of a real shape: the wire, streams, disconnects, one thread."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
import uvloop

from benchmarks.gpu.engines import END_TO_END
from benchmarks.gpu.floors import shape_path
from benchmarks.gpu.http_load import chat_body, digits
from benchmarks.sse_client import Endpoint
from benchmarks.workload import Round, run_round
from graphllm.config import EngineConfig, ServerConfig
from graphllm.engine.engine import EngineState
from graphllm.engine.publisher import Publisher
from graphllm.runner.model_runner import ModelRunner, StepHandle
from graphllm.scheduler.scheduler import Scheduler
from graphllm.server.app import ServingProcess
from graphllm.server.connection import HttpConnection
from graphllm.server.generation.replies import StreamedReply
from tests.e2e.serving import ServerProcess, running_server

pytestmark = pytest.mark.gpu

MODEL = str(shape_path(END_TO_END.shape))
FLAGS = (
    *("--model", MODEL, "--load-format", "dummy", "--device", "cuda", "--served-model-name", "model"),
    *(*END_TO_END.flags(), "--kv-cache-memory-bytes", "8GiB"),
)
# Shorter than a KV block, so that nothing of it ever comes from the cache of prefixes: a prompt that is
# computed in part takes another bucket, whose products may differ in the last bit, and random weights make
# near ties of that. Answers that are compared are answers to it.
SHORT_PROMPT = "0123456789"
CHAT: dict[str, Any] = {
    "model": "model",
    "messages": [{"role": "user", "content": "0123456789"}],
    "max_tokens": 24,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running_server(tmp_path_factory.mktemp("gpu-server"), *FLAGS) as server:
        yield server


@pytest.fixture
def server(process: ServerProcess) -> Iterator[ServerProcess]:
    """Whatever a test did to it, it holds nothing afterwards."""
    yield process
    process.wait_until_idle()
    assert process.get("/health").status == 200


def chat(server: ServerProcess, **fields: Any) -> dict[str, Any]:
    answer = server.post("/v1/chat/completions", {**CHAT, **fields})
    assert answer.status == 200, answer.body
    body: dict[str, Any] = answer.json()
    return body


def text_of(body: dict[str, Any]) -> str:
    text: str = body["choices"][0]["message"]["content"]
    return text


async def stream_many(url: str, *, num_streams: int, max_tokens: int, prompt_tokens: int = 40) -> Round:
    bodies = [
        chat_body("model", digits(prompt_tokens + 17 * index, seed=index), max_tokens=max_tokens)
        for index in range(num_streams)
    ]
    return await run_round(Endpoint.parse(url, "/v1/chat/completions"), bodies, concurrency=num_streams)


def test_a_completion_has_the_tokens_that_were_asked_for(server: ServerProcess) -> None:
    body = chat(server, temperature=0)
    assert body["usage"]["completion_tokens"] == 24
    assert body["choices"][0]["finish_reason"] == "length"
    assert text_of(body)
    assert [model["id"] for model in server.get("/v1/models").json()["data"]] == ["model"]


def complete(server: ServerProcess, prompt: str = SHORT_PROMPT, **fields: Any) -> dict[str, Any]:
    body = {"model": "model", "prompt": prompt, "max_tokens": 24, "ignore_eos": True, **fields}
    answer = server.post("/v1/completions", body)
    assert answer.status == 200, answer.body
    answered: dict[str, Any] = answer.json()
    return answered


def num_cached_tokens(body: dict[str, Any]) -> int:
    number: int = body["usage"]["prompt_tokens_details"]["cached_tokens"]
    return number


def completed_text(server: ServerProcess, **fields: Any) -> str:
    """The answer to the short prompt, which was computed as a whole."""
    body = complete(server, **fields)
    assert num_cached_tokens(body) == 0
    text: str = body["choices"][0]["text"]
    return text


def test_the_same_request_has_the_same_answer_eager_and_replayed(server: ServerProcess) -> None:
    # The first ones run kernel by kernel until their graphs are captured.
    answers = {completed_text(server, temperature=0)}
    for _ in range(30):
        answers.add(completed_text(server, temperature=0))
        if server.metric("graphllm_graphs_captured") > 0 and not server.metric("graphllm_graphs_wanted"):
            break
    else:
        pytest.fail("what was wanted was not captured")
    misses = server.metric("graphllm_graph_misses_total")
    answers |= {completed_text(server, temperature=0) for _ in range(3)}
    assert len(answers) == 1
    assert server.metric("graphllm_graph_misses_total") - misses < 3 * 24
    assert server.metric("graphllm_capture_allocations") == 0


def test_a_prompt_that_was_seen_is_taken_from_the_cache(server: ServerProcess) -> None:
    prompt = digits(200, seed="seen")
    first, again = complete(server, prompt), complete(server, prompt)
    assert num_cached_tokens(first) == 0
    assert 0 < num_cached_tokens(again) < again["usage"]["prompt_tokens"]
    assert again["usage"]["completion_tokens"] == 24


def test_a_seed_decides_a_sampled_answer(server: ServerProcess) -> None:
    sampled = {"temperature": 1.0, "top_p": 0.95}
    first, again, other = (completed_text(server, seed=seed, **sampled) for seed in (1, 1, 2))
    assert first == again != other


def test_logprobs_come_with_their_alternatives(server: ServerProcess) -> None:
    body = chat(server, temperature=0, logprobs=True, top_logprobs=5)
    entries = body["choices"][0]["logprobs"]["content"]
    assert len(entries) == 24
    for entry in entries:
        alternatives = [alternative["logprob"] for alternative in entry["top_logprobs"]]
        assert len(alternatives) == 5 and alternatives == sorted(alternatives, reverse=True)
        assert entry["logprob"] == pytest.approx(alternatives[0])


def test_streams_side_by_side_bring_every_token(server: ServerProcess) -> None:
    done = uvloop.run(stream_many(server.url, num_streams=24, max_tokens=80))
    assert done.errors == ()
    assert [completion.num_tokens for completion in done.completions] == [80] * 24


def test_a_prompt_longer_than_a_step_is_computed_in_chunks(server: ServerProcess) -> None:
    done = uvloop.run(stream_many(server.url, num_streams=2, max_tokens=10, prompt_tokens=3500))
    assert done.errors == ()
    assert min(completion.num_prompt_tokens for completion in done.completions) > 3500


def test_a_client_that_goes_away_frees_what_it_held(server: ServerProcess) -> None:
    parts = urlsplit(server.url)
    body = json.dumps({**CHAT, "max_tokens": 3000, "stream": True}).encode()
    request = Endpoint.parse(server.url, "/v1/chat/completions").request(body)
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as connection:
        connection.sendall(request)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        assert server.metric("graphllm_running_sequences") == 1
    server.wait_until_idle()


def test_a_request_that_cannot_be_served_is_refused_and_harms_nobody(server: ServerProcess) -> None:
    answer = server.post("/v1/chat/completions", {**CHAT, "max_tokens": 100_000})
    assert answer.status == 400
    assert text_of(chat(server, temperature=0))


def test_one_thread_serves_and_never_waits_for_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole server on this thread's loop, under torch's check for synchronizing calls."""
    seen: dict[str, set[int]] = defaultdict(set)

    def watch(owner: type, name: str) -> None:
        method: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            seen[f"{owner.__name__}.{name}"].add(threading.get_ident())
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    host_work = (
        (HttpConnection, "data_received"),
        (HttpConnection, "write"),
        (Scheduler, "schedule"),
        (Scheduler, "apply"),
        (ModelRunner, "launch"),
        (StepHandle, "result"),
        (Publisher, "publish_slice"),
        (StreamedReply, "flush"),
    )
    for owner, name in host_work:
        watch(owner, name)

    async def test() -> Round:
        engine = EngineConfig(
            model=MODEL,
            load_format="dummy",
            device="cuda",
            kv_cache_memory_bytes=4 << 30,
            swap_space=0.0,
            **END_TO_END.options(),
        )
        process = ServingProcess(engine, ServerConfig(port=0, served_model_name="model"))
        running = asyncio.create_task(process.run())
        await asyncio.sleep(0)
        while process.engine.state is EngineState.LOADING:
            await asyncio.sleep(0.01)
        torch.cuda.set_sync_debug_mode("error")
        try:
            done = await stream_many(process.url, num_streams=8, max_tokens=100)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        os.kill(os.getpid(), signal.SIGINT)
        assert await running == 0
        return done

    done = uvloop.run(test())
    assert done.errors == ()
    assert [completion.num_tokens for completion in done.completions] == [100] * 8
    assert seen == {f"{owner.__name__}.{name}": {threading.get_ident()} for owner, name in host_work}


def test_an_interrupt_drains_and_ends_well(tmp_path: Path) -> None:
    with running_server(tmp_path, *FLAGS, "--enforce-eager") as server:
        assert chat(server, temperature=0)["usage"]["completion_tokens"] == 24
        server.interrupt()
        assert server.process.wait(timeout=30) == 0
