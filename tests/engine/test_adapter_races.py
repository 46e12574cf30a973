"""Loads, unloads and requests that meet: who named an adapter gets what it was then, and nothing is lost."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from graphllm.engine.engine import Engine
from graphllm.errors import CheckpointError, InvalidRequestError, ModelNotFoundError
from graphllm.runner.device import CpuDevice
from tests.engine.harness import Collector, assert_nothing_held, ended, running_engine, settle
from tests.engine.languages import words
from tests.engine.test_adapters import FLAGS, add, answer
from tests.engine.test_waiting_grammars import SlowCompiler
from tests.tiny_adapters import write_tiny_adapter
from tests.tiny_model import HIDDEN, write_tiny_model

LAST = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("races") / "model")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("folders")
    return [str(write_tiny_adapter(root / str(seed), seed=seed)) for seed in range(3)]


@pytest.fixture(scope="module")
def expected(model: Path, folders: list[str]) -> list[list[int]]:
    """Eight tokens of each folder's adapter."""

    async def scenario() -> list[list[int]]:
        async with running_engine(model, **{**FLAGS, "max_cpu_loras": 3}) as engine:
            found = []
            for path in folders:
                await engine.adapters.load(path, path)
                found.append(await answer(engine, path))
            return found

    found = asyncio.run(scenario())
    assert len(set(map(str, found))) == len(folders)
    return found


def run(scenario: Any, model: Path, **values: Any) -> None:
    async def main() -> None:
        device = CpuDevice(num_threads=1)
        async with running_engine(model, device=device, **{**FLAGS, **values}) as engine:
            await scenario(engine)
            await settle(engine)
            assert_nothing_held(engine)
            assert_nothing_lost(engine)

    asyncio.run(main())


def assert_nothing_lost(engine: Engine) -> None:
    """No request holds an adapter, and there is no more host memory than the flag allows."""
    registry = engine.adapters
    assert all(adapter.num_requests == 0 for adapter in registry.adapters + registry._retired)
    assert all(adapter.image is None for adapter in registry._retired)
    images = [adapter.image for adapter in registry.adapters] + registry._spare_images
    assert len({image.data_ptr() for image in images}) == len(images) <= registry._max_adapters


def test_of_two_loads_of_one_name_at_once_the_first_is_served(
    model: Path, folders: list[str], expected: list[list[int]]
) -> None:
    async def scenario(engine: Engine) -> None:
        loads = [engine.adapters.load("a", path) for path in folders[:2]]
        first, second = await asyncio.gather(*loads, return_exceptions=True)
        assert not isinstance(first, BaseException)
        assert isinstance(second, InvalidRequestError) and "is loaded already" in second.message
        assert await answer(engine, "a") == expected[0]

    run(scenario, model)


def test_a_queued_request_keeps_the_adapter_that_it_named(
    model: Path, folders: list[str], expected: list[list[int]]
) -> None:
    async def scenario(engine: Engine) -> None:
        await engine.adapters.load("a", folders[0])
        running = add(engine, "running", None, max_tokens=60)
        queued, given_up = add(engine, "queued", "a"), add(engine, "given up", "a")
        old = engine.adapters.unload("a")
        assert old.num_requests == 2
        await engine.adapters.load("a", folders[1])
        late = add(engine, "late", "a")
        engine.abort("given up")
        assert old.num_requests == 1 and not queued.token_ids[0] and not running.ended.is_set()
        await ended(running, queued, late)
        assert (queued.token_ids[0], late.token_ids[0]) == (expected[0], expected[1])
        assert old.image is None and not given_up.token_ids[0]

    run(scenario, model, max_num_seqs=1)


def test_a_request_that_gives_up_before_its_grammar_is_compiled_keeps_no_adapter(
    model: Path, folders: list[str]
) -> None:
    async def scenario(engine: Engine) -> None:
        compiler = SlowCompiler()
        compiler.install(engine)
        adapter = await engine.adapters.load("a", folders[0])
        params = words("ab")
        failed = Collector()
        for name, sink in (("given up", Collector()), ("failed", failed)):
            engine.add(name, [1, 2], params=params, sink=sink, lora="a")
        assert adapter.num_requests == 2
        engine.abort("given up")
        assert adapter.num_requests == 1
        compiler.fail(InvalidRequestError("it cannot be"))
        await ended(failed)
        assert failed.error is not None and adapter.num_requests == 0

    run(scenario, model)


def test_an_unload_while_the_name_is_being_loaded_finds_nothing(model: Path, folders: list[str]) -> None:
    async def scenario(engine: Engine) -> None:
        load = asyncio.ensure_future(engine.adapters.load("a", folders[0]))
        await asyncio.sleep(0)
        with pytest.raises(ModelNotFoundError):
            engine.adapters.unload("a")
        assert (await load).name == "a" and engine.has_adapter("a")

    run(scenario, model)


def test_loads_that_fail_half_way_use_up_no_memory(
    model: Path, folders: list[str], expected: list[list[int]], tmp_path: Path
) -> None:
    bad = write_tiny_adapter(tmp_path / "bad", tensors={LAST: torch.full((HIDDEN, 4), torch.nan)})

    async def scenario(engine: Engine) -> None:
        for _ in range(4):
            with pytest.raises(CheckpointError, match="values that are no numbers"):
                await engine.adapters.load("a", str(bad))
        assert len(engine.adapters._spare_images) == 1
        await engine.adapters.load("a", folders[0])
        assert await answer(engine, "a") == expected[0], "nothing is left of the bad one"

    run(scenario, model)


@pytest.mark.parametrize("seed", range(3))
def test_every_request_of_a_storm_gets_the_adapter_that_it_named(
    seed: int, model: Path, folders: list[str], expected: list[list[int]]
) -> None:
    """Two names in one place on the device, whose contents change all the time, and requests that give up."""
    rng = random.Random(seed)

    async def scenario(engine: Engine) -> None:
        contents: dict[str, int] = {}
        asked: dict[str, tuple[Collector, int]] = {}

        async def load(name: str) -> None:
            content = rng.randrange(3)
            try:
                await engine.adapters.load(name, folders[content], replaces=True)
            except InvalidRequestError as error:
                assert "--max-cpu-loras" in error.message
            else:
                contents[name] = content

        for step in map(str, range(60)):
            name = rng.choice("ab")
            match rng.choice(("load", "unload", "ask", "ask", "ask", "abort", "wait")):
                case "load":
                    await load(name)
                case "unload" if name in contents:
                    engine.adapters.unload(name)
                    del contents[name]
                case "ask" if name in contents:
                    asked[step] = add(engine, step, name), contents[name]
                case "abort" if asked:
                    request = rng.choice(list(asked))
                    if not asked[request][0].ended.is_set():
                        engine.abort(request)
                        del asked[request]
                case _:
                    for _ in range(rng.randrange(30)):
                        await asyncio.sleep(0.0002)
        assert asked, "nobody asked"
        await ended(*(collector for collector, _ in asked.values()))
        for collector, content in asked.values():
            assert collector.error is None and collector.token_ids[0] == expected[content]

    run(scenario, model, max_cpu_loras=3, max_num_seqs=3)
