"""Prefixes that stay: warmed before the first user, kept through any pressure, within a quota."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest

from graphllm.engine.engine import Engine
from graphllm.engine.pinned_prefixes import chat_prefix, read_prefix_file
from graphllm.errors import ConfigError, InvalidRequestError, NotFoundError
from graphllm.runner.device import CpuDevice
from graphllm.sampling_params import SamplingParams
from tests.engine.harness import add, ended, running_engine, settle

SHORT = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
FLAGS: dict[str, Any] = {"block_size": 8, "max_model_len": 128, "max_num_seqs": 4, "debug_kv": True}
# 40 blocks for sequences of at most 16: a quarter may be pinned.
SMALL: dict[str, Any] = {**FLAGS, "kv_cache_memory_bytes": 41 * 8 * 2 * 2 * 2 * 16 * 4}
PREFIX = list(range(200, 245))  # 5 whole blocks of 8, and a rest


async def cached_tokens(engine: Engine, name: str, prompt: list[int]) -> int:
    collector = add(engine, name, prompt, SHORT)
    await ended(collector)
    return collector.num_cached_tokens


async def press(engine: Engine) -> None:
    """Requests of others, enough to evict everything that may be evicted."""
    rng = random.Random(4)
    others = [
        add(engine, f"other-{index}", [rng.randrange(256) for _ in range(100)], SHORT) for index in range(12)
    ]
    await ended(*others)
    await settle(engine)


def test_a_pinned_prefix_survives_what_evicts_an_unpinned_one(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running_engine(tiny_model, device=CpuDevice(1), **SMALL) as engine:
            assert await cached_tokens(engine, "unpinned", PREFIX) == 0
            await press(engine)
            assert await cached_tokens(engine, "evicted", PREFIX) == 0
            pinned = await engine.pin_prefix(PREFIX)
            assert (pinned.num_tokens, pinned.num_blocks) == (40, 5)
            await press(engine)
            assert await cached_tokens(engine, "kept", [*PREFIX, 1]) == 40
            assert engine.pinned_prefixes == [pinned]
            engine.unpin_prefix(pinned.id)
            await press(engine)
            assert await cached_tokens(engine, "let go", PREFIX) == 0
            await settle(engine)
            manager = engine._loaded.model.scheduler.block_manager
            assert manager.num_held_blocks == 0

    asyncio.run(scenario())


def test_what_cannot_be_kept_is_refused_with_the_reason(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running_engine(tiny_model, **SMALL) as engine:
            with pytest.raises(InvalidRequestError, match=r"7 tokens, but needs at least .* of 8"):
                await engine.pin_prefix([1] * 7)
            with pytest.raises(InvalidRequestError, match=r"needs 11 KV blocks.* may take 10"):
                await engine.pin_prefix(list(range(88)))
            first = await engine.pin_prefix(PREFIX)
            with pytest.raises(InvalidRequestError, match=r"needs 6 KV blocks.* of which 5 are taken"):
                await engine.pin_prefix(list(range(50)))
            assert engine.pinned_prefixes == [first]
            # The same once more takes nothing more.
            second = await engine.pin_prefix(PREFIX)
            assert engine._loaded.model.scheduler.num_pinned_blocks == 5
            engine.unpin_prefix(first.id)
            assert await cached_tokens(engine, "still", PREFIX) == 40
            engine.unpin_prefix(second.id)
            with pytest.raises(NotFoundError, match=second.id):
                engine.unpin_prefix(second.id)
            with pytest.raises(InvalidRequestError, match="vocabulary"):
                await engine.pin_prefix([100_000] * 8)
        async with running_engine(tiny_model, **SMALL, enable_prefix_caching=False) as engine:
            with pytest.raises(InvalidRequestError, match="--enable-prefix-caching"):
                await engine.pin_prefix(PREFIX)

    asyncio.run(scenario())


def test_whoever_waits_for_a_pin_hears_of_a_defect_of_ours(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*arguments: Any) -> None:
        raise KeyError("a defect")

    async def scenario() -> None:
        async with running_engine(tiny_model, **SMALL) as engine:
            monkeypatch.setattr(engine._loaded.model.scheduler, "pin", explode)
            with pytest.raises(KeyError, match="a defect"):
                await asyncio.wait_for(engine.pin_prefix(PREFIX), timeout=10)

    asyncio.run(scenario())


def test_a_prefix_belongs_to_its_salt(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running_engine(tiny_model, **SMALL) as engine:
            await engine.pin_prefix(PREFIX, cache_salt="a")
            assert await cached_tokens(engine, "no salt", PREFIX) == 0
            engine.default_cache_salt = "a"
            assert await cached_tokens(engine, "salted", PREFIX) == 40

    asyncio.run(scenario())


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_first_chat_with_a_pinned_file_finds_its_prompt(
    tiny_model: Path, tmp_path: Path, form: str
) -> None:
    system = {"role": "system", "content": "You are a helpful assistant who answers in rhymes."}
    path = tmp_path / ("prompt.txt" if form == "text" else "prompt.json")
    path.write_text(system["content"] if form == "text" else json.dumps([system]))

    async def scenario() -> None:
        async with running_engine(tiny_model, **FLAGS, pin_prefix=(str(path),)) as engine:
            chat = engine.tokenizer.encode_chat([system, {"role": "user", "content": "Hi"}])
            (pinned,) = engine.pinned_prefixes
            prefix = chat_prefix([system], engine.tokenizer)
            assert chat[: len(prefix)] == prefix
            assert pinned.num_tokens == len(prefix) // 8 * 8 > 50
            assert await cached_tokens(engine, "first", chat) == pinned.num_tokens

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("short.txt", None, "No such file"),
        ("bad.json", "{", "bad.json"),
        ("text.json", '"text"', "not a list"),
        ("long.txt", "x" * 100, "--max-pinned-share"),
    ],
)
def test_a_file_that_cannot_be_pinned_is_refused_by_name(
    tiny_model: Path, tmp_path: Path, name: str, content: str | None, reason: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)

    async def scenario() -> None:
        with pytest.raises(ConfigError, match=reason) as refusal:
            async with running_engine(tiny_model, **SMALL, pin_prefix=(str(path),)):
                pass
        assert str(path) in refusal.value.message

    asyncio.run(scenario())


def test_a_prefix_may_end_with_any_role(tiny_model: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_engine(tiny_model, **FLAGS) as engine:
            chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
            whole = engine.tokenizer.encode_chat(chat, add_generation_prompt=False)
            for count in (1, 2):
                prefix = chat_prefix(chat[:count], engine.tokenizer)
                assert len(prefix) > 10
                assert prefix[: len(whole)] == whole[: len(prefix)]
            path = tmp_path / "chat.json"
            path.write_text(json.dumps(chat))
            assert read_prefix_file(str(path), engine.tokenizer) == prefix
            with pytest.raises(InvalidRequestError, match="no messages"):
                chat_prefix([], engine.tokenizer)

    asyncio.run(scenario())
