"""One event loop on the main thread does everything but the device's arithmetic."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import threading
import warnings
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import uvloop

from graphllm.config import EngineConfig, ServerConfig
from graphllm.engine.engine import EngineState
from graphllm.engine.publisher import Publisher
from graphllm.models.decoder import Decoder
from graphllm.scheduler.scheduler import Scheduler
from graphllm.server.app import ServingProcess
from graphllm.server.connection import HttpConnection
from graphllm.server.generation.replies import StreamedReply
from graphllm.server.openai.chat_completions import ChatCompletions

MESSAGES: Any = [{"role": "user", "content": "Hi"}]
ENDLESS = {"ignore_eos": True}


@pytest.fixture(autouse=True)
def garbage_of_other_tests() -> None:
    """A server that is ready collects what is dead in this process, and libraries of clients that ran here
    before leave sockets to the collector. That they were not closed is no fault of the server's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@contextlib.asynccontextmanager
async def serving(model: Path) -> AsyncIterator[tuple[ServingProcess, asyncio.Task[int], openai.AsyncOpenAI]]:
    """The real server on this thread's loop, ended by a real signal if it has not ended before."""
    process = ServingProcess(
        EngineConfig(model=str(model), kv_cache_memory_bytes=64_000_000, cpu_threads=1),
        ServerConfig(port=0, served_model_name="tiny"),
    )
    running = asyncio.create_task(process.run())
    await asyncio.sleep(0)
    while process.engine.state is EngineState.LOADING:
        await asyncio.sleep(0.01)
    async with openai.AsyncOpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=0) as client:
        yield process, running, client
    if not running.done():
        os.kill(os.getpid(), signal.SIGINT)
        assert await running == 0


def test_accepting_scheduling_publishing_and_writing_happen_on_the_main_thread(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[int]] = defaultdict(set)

    def watch(owner: type, name: str) -> None:
        method: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            seen[f"{owner.__name__}.{name}"].add(threading.get_ident())
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    host_work = (
        (HttpConnection, "connection_made"),
        (HttpConnection, "data_received"),
        (HttpConnection, "write"),
        (ChatCompletions, "create"),
        (Scheduler, "schedule"),
        (Scheduler, "apply"),
        (Publisher, "publish_slice"),
        (StreamedReply, "flush"),
    )
    for owner, name in (*host_work, (Decoder, "forward_in_slices")):
        watch(owner, name)

    async def test() -> None:
        async with serving(tiny_model) as (_, _, client):

            async def stream() -> int:
                chunks = await client.chat.completions.create(
                    model="tiny", messages=MESSAGES, max_tokens=20, stream=True, extra_body=ENDLESS
                )
                return len([chunk async for chunk in chunks])

            assert min(await asyncio.gather(*(stream() for _ in range(4)))) > 2

    uvloop.run(test())
    main = threading.main_thread().ident
    assert seen == {
        **{f"{owner.__name__}.{name}": {main} for owner, name in host_work},
        "Decoder.forward_in_slices": seen["Decoder.forward_in_slices"],
    }
    # The recording does tell threads apart: arithmetic is the device's.
    assert seen["Decoder.forward_in_slices"] and main not in seen["Decoder.forward_in_slices"]


class FailingForward:
    """A decoder's forward that raises while `is_failing`."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward
        self.is_failing = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_failing:
            raise RuntimeError("injected device fault")
        return self._forward(*args, **kwargs)


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> FailingForward:
    fault = FailingForward(Decoder.forward_in_slices)
    monkeypatch.setattr(Decoder, "forward_in_slices", lambda *args, **kwargs: fault(*args, **kwargs))
    return fault


def test_a_failed_step_fails_its_requests_and_the_next_one_is_served(
    tiny_model: Path, fault: FailingForward
) -> None:
    async def test() -> None:
        async with serving(tiny_model) as (process, _, client):
            request: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "extra_body": ENDLESS}
            stream = await client.chat.completions.create(**request, max_tokens=5000, stream=True)
            await anext(aiter(stream))
            fault.is_failing = True
            with pytest.raises(openai.APIError) as broken:
                async for _ in stream:
                    pass
            assert broken.value.code == "step_failed"
            fault.is_failing = False
            answer = await client.chat.completions.create(**request, max_tokens=5)
            assert answer.usage is not None and answer.usage.completion_tokens == 5
            # A request that has sent nothing yet gets a status, and is not to be tried again.
            fault.is_failing = True
            with pytest.raises(openai.InternalServerError) as refused:
                await client.chat.completions.create(**request, max_tokens=5)
            assert refused.value.code == "step_failed"
            assert refused.value.response.headers["x-should-retry"] == "false"
            fault.is_failing = False
            assert (await client.chat.completions.create(**request, max_tokens=5)).usage == answer.usage
            assert process.engine.num_unfinished_requests == 0

    uvloop.run(test())


def test_a_broken_device_is_said_on_health_and_the_process_exits_non_zero(
    tiny_model: Path, fault: FailingForward
) -> None:
    async def test() -> None:
        async with serving(tiny_model) as (process, running, client):
            fault.is_failing = True
            requests = [
                client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=5)
                for _ in range(8)
            ]
            while process.engine.state is not EngineState.FAILED:
                outcomes = await asyncio.gather(*requests, return_exceptions=True)
                assert all(isinstance(outcome, openai.InternalServerError) for outcome in outcomes)
                requests = [client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=5)]
            for request in requests:
                request.close()
            health = await client._client.get(f"{process.url}/health")
            assert health.status_code == 503
            assert health.json()["status"] == "failed" and "injected device fault" in health.json()["reason"]
            assert await running == 1

    uvloop.run(test())
