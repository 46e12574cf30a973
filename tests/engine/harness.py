"""Runs requests through a real engine and collects what their sinks were told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from graphllm.config import EngineConfig
from graphllm.engine.engine import Engine
from graphllm.errors import GraphLLMError
from graphllm.outputs import FinishReason, SequenceDelta, TokenLogprob
from graphllm.runner.device import CpuDevice, Device, DeviceEvent, InlineDevice, Work
from graphllm.sampling_params import SamplingParams


class Collector:
    """A sink that keeps everything, and says when it has ended."""

    def __init__(self, n: int = 1) -> None:
        self.token_ids: list[list[int]] = [[] for _ in range(n)]
        self.texts = ["" for _ in range(n)]
        self.logprobs: list[list[TokenLogprob]] = [[] for _ in range(n)]
        self.finish_reasons: list[FinishReason | None] = [None] * n
        self.stop_reasons: list[str | int | None] = [None] * n
        self.error: GraphLLMError | None = None
        self.num_cached_tokens = 0
        self.num_writes_since_flush = 0
        self.ended = asyncio.Event()
        self.on_write: Callable[[SequenceDelta], None] = lambda delta: None
        self.on_flush: Callable[[], None] = lambda: None
        self.on_fail: Callable[[], None] = lambda: None

    def write(self, delta: SequenceDelta) -> None:
        assert not self.ended.is_set(), "a call after the end"
        assert self.finish_reasons[delta.index] is None, "a delta after a sequence's end"
        self.num_writes_since_flush += 1
        self.num_cached_tokens = delta.num_cached_tokens
        self.token_ids[delta.index].extend(delta.token_ids)
        self.texts[delta.index] += delta.text
        self.logprobs[delta.index].extend(delta.logprobs or ())
        self.finish_reasons[delta.index] = delta.finish_reason
        self.stop_reasons[delta.index] = delta.stop_reason
        self.on_write(delta)

    def flush(self) -> None:
        assert self.num_writes_since_flush > 0, "a flush of nothing"
        self.num_writes_since_flush = 0
        self.on_flush()

    def finish(self) -> None:
        assert self.num_writes_since_flush == 0, "writes that were never flushed"
        assert None not in self.finish_reasons
        self.ended.set()

    def fail(self, error: GraphLLMError) -> None:
        self.error = error
        self.ended.set()
        self.on_fail()


class FaultyDevice:
    """Mixin: the forwards whose number (from 0, warm-up excluded by `arm`) is in `faults` raise."""

    faults: frozenset[int] = frozenset()
    num_forwards = 0

    def arm(self, *faults: int) -> None:
        self.faults, self.num_forwards = frozenset(faults), 0

    def submit(self, work: Work) -> DeviceEvent:
        if isinstance(work, partial) and work.func.__name__ == "_step":
            if self.num_forwards in self.faults:
                work = _explode
            self.num_forwards += 1
        return super().submit(work)  # type: ignore[misc, no-any-return]


def _explode() -> None:
    raise RuntimeError("injected fault")


class FaultyCpuDevice(FaultyDevice, CpuDevice):
    """Asynchronous, with faults."""


class FaultyInlineDevice(FaultyDevice, InlineDevice):
    """Synchronous, with faults."""


@asynccontextmanager
async def running_engine(model: Path, *, device: Device | None = None, **flags: Any) -> AsyncIterator[Engine]:
    engine = Engine(EngineConfig(model=str(model), **flags), device=device or InlineDevice())
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def add(engine: Engine, name: str, prompt: list[int], params: SamplingParams) -> Collector:
    collector = Collector(params.n)
    engine.add(name, prompt, params=params, sink=collector)
    return collector


async def ended(*collectors: Collector) -> None:
    await asyncio.wait_for(asyncio.gather(*(collector.ended.wait() for collector in collectors)), 60)


async def settle(engine: Engine) -> None:
    """Until no step is in flight, so that every fence has opened."""
    step_loop = engine._loaded
    for _ in range(1_000):
        if not step_loop._in_flight:
            return
        await asyncio.sleep(0.005)
    raise AssertionError("a step never ended")


def assert_nothing_held(engine: Engine) -> None:
    scheduler = engine._loaded.model.scheduler
    manager = scheduler.block_manager
    assert manager.num_free_blocks == manager.num_usable_blocks
    assert scheduler.slots.num_free == scheduler.slots.num_slots
    assert engine.num_unfinished_requests == 0
