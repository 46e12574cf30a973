"""A thousand clients that go away under load, at every stage, leave nothing behind and memory flat."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.e2e.serving import ServerProcess, running_server

NUM_DISCONNECTS = 1000
NUM_AT_ONCE = 24
# Memory that Python's and torch's allocators may still grow by once every path has been taken.
MAX_GROWTH_BYTES = 12 * 1024**2


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[ServerProcess]:
    """KV for a few of the clients only, so that there are swaps, with every invariant checked."""
    arguments = ("--served-model-name", "tiny", "--max-num-seqs", "16", "--max-model-len", "1024")
    memory = ("--kv-cache-memory-bytes", "700KB", "--swap-space", "0.001", "--kv-offloading-size", "0.001")
    folder = tmp_path_factory.mktemp("disconnects")
    with running_server(folder, "--model", str(tiny_model), *arguments, *memory, "--debug-kv") as server:
        yield server


def resident_bytes(server: ServerProcess) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    match = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) * 1024


async def go_away(server: ServerProcess, rng: random.Random) -> None:
    """One request, cut at a moment of its own."""
    parts = urlsplit(server.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    shared = "A system prompt that many of the clients share. " * 4
    body = json.dumps(
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": shared * rng.randrange(3) + str(rng.random())}],
            "max_tokens": rng.choice((1, 20, 300)),
            "n": rng.choice((1, 1, 1, 3)),
            "stream": rng.random() < 0.7,
            "ignore_eos": True,
        }
    ).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    data = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    if rng.random() < 0.1:
        data = data[: rng.randrange(len(data))]
    writer.write(data)
    # Some stay until their sequences have outgrown the memory that they were admitted with.
    patience = 1.5 if rng.random() < 0.2 else 0.2
    if rng.random() < 0.5:
        await asyncio.sleep(rng.random() * patience)
    else:
        with contextlib.suppress(TimeoutError, asyncio.IncompleteReadError):
            await asyncio.wait_for(reader.readexactly(rng.randrange(1, 20_000)), patience)
    if rng.random() < 0.5:
        writer.transport.abort()
    else:
        writer.close()


async def disconnects(server: ServerProcess, count: int, seed: int) -> None:
    numbers = iter(range(count))

    async def client() -> None:
        for number in numbers:
            await go_away(server, random.Random(1000 * seed + number))

    await asyncio.gather(*(client() for _ in range(NUM_AT_ONCE)))


@pytest.mark.slow
def test_a_thousand_disconnects_leave_nothing_and_memory_is_flat(server: ServerProcess) -> None:
    asyncio.run(disconnects(server, NUM_DISCONNECTS // 2, seed=1))
    server.wait_until_idle(timeout=20)
    before = resident_bytes(server)
    asyncio.run(disconnects(server, NUM_DISCONNECTS // 2, seed=2))
    server.wait_until_idle(timeout=20)
    assert resident_bytes(server) - before < MAX_GROWTH_BYTES
    assert server.metric("graphllm_preemptions_total") > 0, "there was no pressure"
    assert server.metric("graphllm_host_blocks_held") == 0
    assert server.metric("graphllm_swapped_sequences") == 0
    assert server.get("/health").status == 200
    # The connection that asks, and no other.
    assert server.metric("graphllm_http_connections_open") == 1
    answer = server.post(
        "/v1/chat/completions",
        {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3},
    )
    assert answer.status == 200
