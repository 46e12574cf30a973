"""What other streams notice while grammars compile: gaps between their tokens, same run, same server.

    python -m benchmarks.structured_stall [--rounds 6] [--streams 8] [--vocabulary 128256] [--output]

Streams of plain text run while one client sends short requests one after another. In turns those are plain
too, or each brings a JSON schema that the server has never seen: an ordinary one, or ("hostile") one that is
just within what the server accepts. The model is small, so that a step takes
about as long as on a card and a stall of a few milliseconds shows. Owns the comparison; the client is
`sse_client.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.processes import ProcessError, graphllm_server, usable_cores
from benchmarks.sse_client import Endpoint, LoadError, connect, read_completion

RESULTS = Path(__file__).resolve().parent / "results" / "structured_stall.jsonl"
STREAM_TOKENS = 256
# A decoder of Llama's kind, small enough for milliseconds a step on a CPU.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def schema(draw: random.Random) -> dict[str, Any]:
    """An object with a dozen members of all kinds, nested twice; no two alike."""

    def member(depth: int) -> dict[str, Any]:
        kind = draw.randrange(6 if depth else 4)
        if kind == 0:
            return {"type": "string", "pattern": f"^[a-z]{{{draw.randint(1, 9)},{draw.randint(10, 40)}}}$"}
        if kind == 1:
            return {"type": "integer", "minimum": draw.randint(0, 50), "maximum": draw.randint(51, 10**6)}
        if kind == 2:
            return {"enum": [f"value-{draw.randrange(10**9)}" for _ in range(draw.randint(2, 40))]}
        if kind == 3:
            return {"type": "string", "format": draw.choice(("date-time", "uuid", "email"))}
        if kind == 4:
            return {"type": "array", "items": member(depth - 1), "maxItems": draw.randint(1, 8)}
        return members(depth - 1, draw.randint(2, 6))

    def members(depth: int, count: int) -> dict[str, Any]:
        names = [f"field_{draw.randrange(10**6)}" for _ in range(count)]
        return {
            "type": "object",
            "properties": {name: member(depth) for name in names},
            "required": names,
            "additionalProperties": False,
        }

    return members(2, 12)


def hostile_schema(draw: random.Random) -> dict[str, Any]:
    """An object that is nearly too large to be compiled; no two alike."""
    formats = ("date-time", "email", "hostname", "ipv6", "uri", "duration")
    kinds: tuple[tuple[int, Callable[[int], dict[str, Any]]], ...] = (
        (300, lambda i: {"type": "string"}),
        (80, lambda i: {"type": "number", "minimum": -i * 1.23, "maximum": 7.5 * i + 9}),
        (70, lambda i: {"type": "string", "format": formats[i % len(formats)]}),
        (140, lambda i: {"type": "string", "pattern": f"^[a-z]{{2,5}}.*x{{1,{i + 1}}}"}),
        (6, lambda i: {"enum": [f"{draw.randrange(10**20):020}" for _ in range(150)]}),
    )
    count, member = draw.choice(kinds)
    return {
        "type": "object",
        "properties": {f"field_{draw.randrange(10**6)}_{i}": member(i) for i in range(count)},
    }


SCHEMAS: dict[str, Callable[[random.Random], dict[str, Any]] | None] = {
    "plain": None,
    "structured": schema,
    "hostile": hostile_schema,
}


def stream_body(number: int) -> bytes:
    """A background stream."""
    return _body(prompt=f"stream {number}", max_tokens=STREAM_TOKENS, ignore_eos=True)


def visitor_body(draw: random.Random, kind: str) -> bytes:
    """A short request, with a schema of its own or without. kind: one of SCHEMAS."""
    fields: dict[str, Any] = {"prompt": f"visitor {draw.randrange(10**9)}", "max_tokens": 8}
    if (make := SCHEMAS[kind]) is not None:
        fields["structured_outputs"] = {"json": make(draw)}
    return _body(**fields)


def _body(**fields: Any) -> bytes:
    return json.dumps({"model": "small", "temperature": 1, "stream": True, **fields}).encode()


async def exchange(endpoint: Endpoint, body: bytes) -> tuple[float, ...]:
    """Send a completion; when its tokens arrived. Raises LoadError, OSError."""
    connection = await connect(endpoint)
    try:
        return read_completion(await connection.send(endpoint.request(body))).token_times
    finally:
        connection.close()


async def run_round(
    endpoint: Endpoint, draw: random.Random, *, num_streams: int, kind: str
) -> tuple[list[float], int]:
    """Gaps between tokens of the streams, in seconds, and how many visitors came meanwhile."""
    streams = [asyncio.create_task(exchange(endpoint, stream_body(i))) for i in range(num_streams)]
    num_visitors = 0
    while not all(stream.done() for stream in streams):
        await exchange(endpoint, visitor_body(draw, kind))
        num_visitors += 1
    gaps = []
    for stream in streams:
        times = stream.result()
        # A visitor's own prompt is a step of its own kind; all kinds of visitor have it.
        gaps += [later - earlier for earlier, later in itertools.pairwise(times)]
    return gaps, num_visitors


def summary(gaps: Sequence[float]) -> dict[str, float]:
    """Milliseconds."""
    ordered = sorted(gaps)
    return {
        "p50_ms": round(1e3 * statistics.median(ordered), 3),
        "p99_ms": round(1e3 * ordered[int(0.99 * (len(ordered) - 1))], 3),
        "p99.9_ms": round(1e3 * ordered[int(0.999 * (len(ordered) - 1))], 3),
        "max_ms": round(1e3 * ordered[-1], 3),
    }


async def measure(endpoint: Endpoint, *, rounds: int, num_streams: int) -> dict[str, Any]:
    draw = random.Random(0)
    gaps: dict[str, list[float]] = {kind: [] for kind in SCHEMAS}
    visitors = dict.fromkeys(SCHEMAS, 0)
    await run_round(endpoint, draw, num_streams=num_streams, kind="structured")  # warms up
    for kind in list(SCHEMAS) * rounds:
        new_gaps, num_visitors = await run_round(endpoint, draw, num_streams=num_streams, kind=kind)
        gaps[kind] += new_gaps
        visitors[kind] += num_visitors
    return {kind: {"visitors": visitors[kind], **summary(gaps[kind])} for kind in SCHEMAS}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="rounds of each kind, in turns")
    parser.add_argument("--streams", type=int, default=8, help="streams that are watched")
    parser.add_argument("--vocabulary", type=int, default=128256, help="tokens in the model's vocabulary")
    parser.add_argument("--output", action="store_true", help=f"append the run to {RESULTS.name}")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps({**CONFIG, "vocab_size": options.vocabulary}))
        flags = ["--model", str(config), "--load-format", "dummy", "--served-model-name", "small"]
        flags += ["--cpu-threads", "1", "--kv-cache-memory-bytes", "64MiB"]
        try:
            with graphllm_server(flags, ready_timeout=180) as (url, _):
                endpoint = Endpoint.parse(url, "/v1/completions")
                result = asyncio.run(measure(endpoint, rounds=options.rounds, num_streams=options.streams))
        except (ProcessError, LoadError, OSError) as error:
            print(f"structured_stall: {error}", file=sys.stderr)
            return 1
    line = {
        "benchmark": "structured_stall",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": f"{platform.machine()}, {usable_cores()} cores",
        "streams": options.streams,
        "vocabulary": options.vocabulary,
        **result,
    }
    for name in SCHEMAS:
        print(name, result[name])
    if options.output:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
