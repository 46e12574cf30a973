"""Time to first token with and without a shared system prompt in the prefix cache, same run, same server.

    python -m benchmarks.prefix_cache [--num-tokens 2000] [--rounds 6] [--output]

One client asks one question after another behind the same long system prompt. In turns the prompt has a
cache salt of its own, so that all of it is computed, and the salt of all others, so that it is found. The
answers to the same question must be the same. Owns the comparison; the client is `sse_client.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import ProcessError, graphllm_server, usable_cores
from benchmarks.sse_client import Completion, Endpoint, LoadError, connect, read_completion, sse_events

TEXT = Path(__file__).resolve().parent / "texts" / "house_docs.txt"
RESULTS = Path(__file__).resolve().parent / "results" / "prefix_cache.jsonl"
MAX_TOKENS = 8
SHARED_SALT = "shared"


@dataclass(frozen=True, slots=True)
class Answer:
    """seconds: to the first token. num_cached: prompt tokens that were not computed."""

    seconds: float
    num_prompt_tokens: int
    num_cached: int
    text: str


def system_prompt(num_tokens: int) -> str:
    """So many tokens of the demo model's, or a few less, of the fixed text."""
    from graphllm.models.checkpoint import open_checkpoint, resolve_model_path

    tokenizer = open_checkpoint(resolve_model_path("demo")).load_tokenizer()
    token_ids = tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False)
    if len(token_ids) < num_tokens:
        raise ValueError(f"the text has {len(token_ids)} tokens only")
    return tokenizer.decode(token_ids[:num_tokens])


def question(system: str, number: int, *, salt: str) -> bytes:
    """A chat's body."""
    words = ("a fence", "a slot", "a block", "a step", "the loop", "a graph", "a kernel", "the arena")
    body = {
        "model": "demo",
        "messages": [
            {"role": "system", "content": system},
            {"role": "user", "content": f"Question {number}: what is {words[number % len(words)]}?"},
        ],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_salt": salt,
    }
    return json.dumps(body).encode()


async def ask(endpoint: Endpoint, body: bytes) -> Answer:
    """Raises LoadError, OSError."""
    connection = await connect(endpoint)
    try:
        exchange = await connection.send(endpoint.request(body))
    finally:
        connection.close()
    completion: Completion = read_completion(exchange)
    events = [json.loads(data) for _, data in sse_events(exchange.pieces) if data != b"[DONE]"]
    details = events[-1]["usage"]["prompt_tokens_details"]
    return Answer(
        seconds=completion.token_times[0] - completion.start,
        num_prompt_tokens=completion.num_prompt_tokens,
        num_cached=details["cached_tokens"],
        text=completion.text,
    )


async def compare(url: str, system: str, *, rounds: int) -> tuple[list[Answer], list[Answer]]:
    """(answers whose whole prompt was computed, answers that found it). Raises LoadError."""
    endpoint = Endpoint.parse(url, "/v1/chat/completions")
    await ask(endpoint, question(system, 0, salt=SHARED_SALT))
    computed, found = [], []
    for number in range(1, rounds + 1):
        computed.append(await ask(endpoint, question(system, number, salt=f"own-{number}")))
        found.append(await ask(endpoint, question(system, number, salt=SHARED_SALT)))
        if computed[-1].num_cached or not found[-1].num_cached:
            raise LoadError("the cache did not do what its salts ask for")
        if computed[-1].text != found[-1].text:
            raise LoadError(f"another answer: {computed[-1].text!r} and {found[-1].text!r}")
    return computed, found


def summary(computed: Sequence[Answer], found: Sequence[Answer]) -> dict[str, Any]:
    """Medians, and how many times sooner the first token came."""
    slow = statistics.median(answer.seconds for answer in computed)
    fast = statistics.median(answer.seconds for answer in found)
    return {
        "prompt_tokens": found[0].num_prompt_tokens,
        "cached_tokens": found[0].num_cached,
        "rounds": len(found),
        "first_token_ms_computed": round(1e3 * slow, 1),
        "first_token_ms_cached": round(1e3 * fast, 1),
        "times": round(slow / fast, 2),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """1 when a request failed or the server did not start."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-tokens", type=int, default=2000, help="of the system prompt (2000)")
    parser.add_argument("--rounds", type=int, default=6, help="questions of each kind (6)")
    parser.add_argument("--output", action="store_true", help=f"append the line to results/{RESULTS.name}")
    options = parser.parse_args(argv)
    try:
        system = system_prompt(options.num_tokens)
        with graphllm_server(["--dtype", "float32"], ready_timeout=300.0) as (url, _):
            results = summary(*asyncio.run(compare(url, system, rounds=options.rounds)))
    except (ProcessError, LoadError, OSError, ValueError) as error:
        print(f"benchmarks/prefix_cache.py: {error}", file=sys.stderr)
        return 1
    line = json.dumps(
        {
            "benchmark": "prefix_cache",
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": f"{platform.machine()}, {usable_cores()} cores",
            "model": "demo",
            "dtype": "float32",
            **results,
        }
    )
    print(line)
    if options.output:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
