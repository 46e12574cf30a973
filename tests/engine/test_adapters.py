"""Adapters that come and go while others are served: names, memory, fences, and what goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from graphllm.engine.engine import Engine
from graphllm.errors import (
    CheckpointError,
    ConfigError,
    GraphLLMError,
    InvalidRequestError,
    ModelNotFoundError,
    StepFailedError,
)
from graphllm.runner.device import CpuDevice, Device
from graphllm.sampling_params import SamplingParams
from tests.engine.harness import (
    Collector,
    FaultyInlineDevice,
    assert_nothing_held,
    ended,
    running_engine,
    settle,
)
from tests.tiny_adapters import write_tiny_adapter
from tests.tiny_model import write_tiny_model

PROMPT = [5, 6, 7] * 12
FLAGS: dict[str, Any] = {
    "enable_lora": True,
    "max_loras": 1,
    "max_cpu_loras": 2,
    "max_num_seqs": 4,
    "max_model_len": 128,
    "debug_kv": True,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("adapters") / "model")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("folders")
    return [str(write_tiny_adapter(root / str(seed), seed=seed)) for seed in range(3)]


def add(engine: Engine, name: str, lora: str | None, *, max_tokens: int = 8, **values: Any) -> Collector:
    collector = Collector()
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **values)
    engine.add(name, PROMPT, params=params, sink=collector, lora=lora)
    return collector


async def answer(engine: Engine, lora: str | None, *, name: str = "r") -> list[int]:
    collector = add(engine, name, lora)
    await ended(collector)
    assert collector.error is None
    return collector.token_ids[0]


def run(
    scenario: Callable[[Engine], Awaitable[None]],
    model: Path,
    *,
    device: Device | None = None,
    **values: Any,
) -> None:
    async def main() -> None:
        async with running_engine(model, device=device, **{**FLAGS, **values}) as engine:
            await scenario(engine)
            await settle(engine)
            assert_nothing_held(engine)
            assert engine._loaded.model.scheduler.slots.adapters.num_holders == 0

    asyncio.run(main())


def test_an_adapter_is_loaded_and_unloaded_while_others_generate(model: Path, folders: list[str]) -> None:
    async def scenario(engine: Engine) -> None:
        plain = await answer(engine, None)
        long = add(engine, "long", None, max_tokens=80)
        await engine.adapters.load("a", folders[0])
        first = add(engine, "first", "a", max_tokens=40)
        while not first.token_ids[0]:
            await asyncio.sleep(0)
        adapter = engine.adapters.unload("a")
        with pytest.raises(ModelNotFoundError, match="no adapter 'a'"):
            add(engine, "late", "a")
        assert adapter.num_requests == 1 and adapter.image is not None, "the request keeps it"
        await ended(first, long)
        assert adapter.num_requests == 0 and adapter.image is None
        assert long.token_ids[0][:8] == plain
        await engine.adapters.load("a", folders[0])
        assert await answer(engine, "a") == first.token_ids[0][:8] != plain

    run(scenario, model, device=CpuDevice(num_threads=1))


def test_a_name_that_is_loaded_again_shares_no_cached_prefix_with_the_old_one(
    model: Path, folders: list[str]
) -> None:
    async def scenario(engine: Engine) -> None:
        await engine.adapters.load("other", folders[1])
        expected = await answer(engine, "other")
        engine.adapters.unload("other")
        await engine.adapters.load("a", folders[0])
        before = await answer(engine, "a")
        cached = add(engine, "again", "a")
        await ended(cached)
        assert cached.num_cached_tokens > 0 and cached.token_ids[0] == before
        await engine.adapters.load("a", folders[1], replaces=True)
        fresh = add(engine, "fresh", "a")
        await ended(fresh)
        assert fresh.num_cached_tokens == 0 and fresh.token_ids[0] == expected != before
        base = add(engine, "base", None)
        await ended(base)
        assert base.num_cached_tokens == 0

    run(scenario, model)


def test_a_request_waits_for_its_adapter_and_may_be_aborted_meanwhile(
    model: Path, folders: list[str]
) -> None:
    async def scenario(engine: Engine) -> None:
        adapters = [await engine.adapters.load(name, path) for name, path in zip("ab", folders, strict=False)]
        first = add(engine, "first", "a", max_tokens=40)
        while not first.token_ids[0]:
            await asyncio.sleep(0)
        waiting, given_up = add(engine, "waiting", "b"), add(engine, "given up", "b")
        base = add(engine, "base", None)
        await ended(base)
        assert not waiting.token_ids[0] and not first.ended.is_set()
        engine.abort("given up")
        assert adapters[1].num_requests == 1
        await ended(first, waiting)
        assert not given_up.token_ids[0]
        assert [adapter.num_requests for adapter in adapters] == [0, 0]

    run(scenario, model, device=CpuDevice(num_threads=1))


def test_adapters_that_are_unloaded_but_in_use_count(model: Path, folders: list[str]) -> None:
    async def scenario(engine: Engine) -> None:
        await engine.adapters.load("a", folders[0])
        await engine.adapters.load("b", folders[1])
        with pytest.raises(InvalidRequestError, match="2 adapters, as many as --max-cpu-loras"):
            await engine.adapters.load("c", folders[2])
        request = add(engine, "r", "a", max_tokens=40)
        engine.adapters.unload("a")
        with pytest.raises(InvalidRequestError, match="1 of them unloaded but still in use"):
            await engine.adapters.load("c", folders[2])
        await ended(request)
        await engine.adapters.load("c", folders[2])
        assert [adapter.name for adapter in engine.loaded_adapters] == ["b", "c"]

    run(scenario, model)


def test_names_that_are_taken_or_none_are_refused(model: Path, folders: list[str]) -> None:
    async def scenario(engine: Engine) -> None:
        await engine.adapters.load("a", folders[0])
        for name, reason in (
            ("a", "is loaded already"),
            (str(model), "is the base model's name"),
            ("", "1 to 200 printable characters"),
            ("x" * 201, "1 to 200 printable characters"),
        ):
            with pytest.raises(InvalidRequestError, match=reason):
                await engine.adapters.load(name, folders[1])
        with pytest.raises(ModelNotFoundError):
            engine.adapters.unload("b")

    run(scenario, model)


def test_a_bad_adapter_harms_nothing(model: Path, folders: list[str], tmp_path: Path) -> None:
    async def scenario(engine: Engine) -> None:
        await engine.adapters.load("a", folders[0])
        expected = await answer(engine, "a")
        request = add(engine, "request", "a", max_tokens=30)
        bad = write_tiny_adapter(tmp_path / "bad", rank=64)
        for name, replaces in (("bad", False), ("a", True)):
            with pytest.raises(CheckpointError, match="above --max-lora-rank 16"):
                await engine.adapters.load(name, str(bad), replaces=replaces)
        await ended(request)
        assert request.token_ids[0][:8] == expected == await answer(engine, "a")
        assert [adapter.name for adapter in engine.loaded_adapters] == ["a"]

    run(scenario, model, device=CpuDevice(num_threads=1))


def test_modules_of_the_command_line_are_loaded_or_named_in_the_refusal(
    model: Path, folders: list[str], tmp_path: Path
) -> None:
    async def scenario(engine: Engine) -> None:
        assert [adapter.name for adapter in engine.loaded_adapters] == ["a", "b"]
        assert await answer(engine, "a") != await answer(engine, "b")

    run(scenario, model, lora_modules=(f"a={folders[0]}", f"b={folders[1]}"))
    for text, error in ((f"a={tmp_path}", CheckpointError), (f"{model}={folders[0]}", ConfigError)):
        with pytest.raises(error, match=f"--lora-modules {text.partition('=')[0]}: "):
            run(scenario, model, lora_modules=(text,))


def test_a_failed_step_gives_its_adapters_back(model: Path, folders: list[str]) -> None:
    device = FaultyInlineDevice()

    async def scenario(engine: Engine) -> None:
        adapter = await engine.adapters.load("a", folders[0])
        expected = await answer(engine, "a")
        device.arm(2)
        failed = add(engine, "failed", "a", max_tokens=20)
        await ended(failed)
        assert isinstance(failed.error, StepFailedError) and adapter.num_requests == 0
        assert await answer(engine, "a") == expected

    run(scenario, model, device=device)


def test_a_request_that_is_refused_after_all_keeps_no_adapter(model: Path, folders: list[str]) -> None:
    async def scenario(engine: Engine) -> None:
        adapter = await engine.adapters.load("a", folders[0])
        with pytest.raises(GraphLLMError):
            add(engine, "refused", "a", stop=("x" * 100_000,), max_tokens=4)
        assert adapter.num_requests == 0

    run(scenario, model)


def test_vectors_are_the_adapters_too(model: Path, folders: list[str]) -> None:
    async def scenario(engine: Engine) -> None:
        await engine.adapters.load("a", folders[0])
        found = []
        for lora in (None, "a"):
            collector = Collector()
            collector.on_write = lambda delta: found.append(list(delta.pooled or ()))
            params = SamplingParams(max_tokens=0)
            engine.add("v", PROMPT, params=params, sink=collector, pooling=True, lora=lora)
            await ended(collector)
        assert len(found) == 2 and found[0] != found[1]

    run(scenario, model)


def test_without_the_flag_there_are_no_adapters(model: Path, folders: list[str]) -> None:
    async def scenario(engine: Engine) -> None:
        assert not engine.has_adapter("a") and engine.loaded_adapters == []
        with pytest.raises(InvalidRequestError, match="--enable-lora"):
            await engine.adapters.load("a", folders[0])
        with pytest.raises(InvalidRequestError, match="--enable-lora"):
            add(engine, "r", "a")

    run(scenario, model, enable_lora=False)


def test_a_model_that_transformers_computes_has_no_adapters(model: Path) -> None:
    async def scenario(engine: Engine) -> None:
        """It does not start."""

    with pytest.raises(ConfigError, match="--enable-lora needs a model that graphllm computes"):
        run(scenario, model, model_impl="transformers")
