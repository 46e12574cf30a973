"""Our server beside the others, in the same run and on the same weights.

    python -m benchmarks.gpu.peers --seconds 110

Owns the order (what has a target first), each peer's share of time, and the ratios. A peer runs in a
process of its own, and what it had measured when its time was over counts. Ours reads a checkpoint;
transformers and the plain graph draw the very same weights again (`weights.py`); vLLM and SGLang, where
installed, read the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from benchmarks.gpu.ceilings import measure_ceilings
from benchmarks.gpu.checkpoint import scratch_checkpoint
from benchmarks.gpu.command import empty_device_cache, failing, run_benchmark
from benchmarks.gpu.engines import LARGE_SERVER
from benchmarks.gpu.floors import SHAPES, Ceilings, shape_of
from benchmarks.gpu.http_load import chat_body, digits, run_load
from benchmarks.gpu.results import REPOSITORY, ResultLog
from benchmarks.gpu.serving import server
from benchmarks.gpu.targets import BATCHED_METRIC, SINGLE_METRIC
from benchmarks.peers.served_engines import SERVED_ENGINES, served_engine
from benchmarks.sse_client import Endpoint, LoadError
from benchmarks.workload import run_round

SHAPE, SMALL = LARGE_SERVER.shape, "llama-3.2-1b"
NUM_STREAMS = LARGE_SERVER.max_num_seqs
MAX_TOKENS = 128
_PROMPT_DIGITS = 64
_ROUNDS = 2
_CONTEXT = 1024
# Seconds that each peer has at most; the last ones get what is left.
_TRANSFORMERS_SECONDS = 60.0
_PLAIN_SECONDS = 30.0
_NO_TIME = "no time was left"


def measure(options: argparse.Namespace, log: ResultLog) -> None:
    deadline = time.monotonic() + options.seconds
    ceilings = measure_ceilings()
    empty_device_cache()
    ours: tuple[float, int] | None = None
    with failing(log, f"{SHAPE} {NUM_STREAMS} streams", unit="tokens/s"):
        folder = str(scratch_checkpoint(SHAPE))
        empty_device_cache()
        with server(LARGE_SERVER, folder=folder) as url:
            ours = measure_server(url)
        log.measured(f"{SHAPE} {NUM_STREAMS} streams", ours[0], unit="tokens/s")
    _measure_transformers(ours, log, seconds=min(_TRANSFORMERS_SECONDS, deadline - time.monotonic()))
    _measure_plain_graph(ceilings, log, seconds=min(_PLAIN_SECONDS, deadline - time.monotonic()))
    _measure_served(log, deadline=deadline)
    _measure_compiled(log, seconds=deadline - time.monotonic())


def measure_server(url: str) -> tuple[float, int]:
    """(tokens a second, tokens of a prompt) of the better of a few rounds, after one that is not counted."""
    endpoint = Endpoint.parse(url, "/v1/chat/completions")
    best, prompt_tokens = 0.0, 0
    for turn in range(1 + _ROUNDS):
        bodies = [
            chat_body("model", digits(_PROMPT_DIGITS, seed=(turn, index)), max_tokens=MAX_TOKENS)
            for index in range(NUM_STREAMS)
        ]
        done = run_load(run_round(endpoint, bodies, concurrency=NUM_STREAMS))
        if done.errors:
            raise LoadError(f"{len(done.errors)} streams failed, the first: {done.errors[0]}")
        prompt_tokens = done.completions[0].num_prompt_tokens
        if turn:
            best = max(best, done.num_tokens / done.seconds)
    return best, prompt_tokens


def _measure_transformers(ours: tuple[float, int] | None, log: ResultLog, *, seconds: float) -> None:
    names = {
        "single": "generate one at a time",
        "batched": f"generate with a batch of {NUM_STREAMS}",
        "continuous": f"continuous batching of {NUM_STREAMS}",
    }
    ratios = {"single": SINGLE_METRIC, "batched": BATCHED_METRIC}
    flags = ["--shape", SHAPE, "--modes", *names, "--num-requests", str(NUM_STREAMS)]
    flags += ["--max-tokens", str(MAX_TOKENS), "--prompt-tokens", str(ours[1] if ours else 80)]
    answers = {
        answer["mode"]: answer for answer in ask("benchmarks.peers.transformers_gpu", flags, seconds=seconds)
    }
    for mode, name in names.items():
        rate = write_rate(log, f"{SHAPE}: {name}", answers.get(mode), peer="transformers")
        if mode in ratios:
            if rate is None or ours is None:
                log.failed(ratios[mode], "one of the two sides is missing", unit="times", peer="transformers")
            else:
                log.measured(ratios[mode], ours[0] / rate, unit="times", peer="transformers")


def _measure_plain_graph(ceilings: Ceilings, log: ResultLog, *, seconds: float) -> None:
    answers = {answer["shape"]: answer for answer in ask("benchmarks.peers.plain_graph", [], seconds=seconds)}
    for shape in SHAPES:
        metric = f"{shape} batch 1 context 1k: step"
        answer = answers.get(shape, {"error": "it did not come to this"})
        if "ms" not in answer:
            log.failed(metric, answer["error"], unit="ms", peer="plain graph")
            continue
        floor = shape_of(shape).decode_floor_ms(1, _CONTEXT, ceilings)
        log.measured(metric, answer["ms"], unit="ms", floor=floor, peer="plain graph")


def _measure_served(log: ResultLog, *, deadline: float) -> None:
    for name, engine in SERVED_ENGINES.items():
        metric = f"{SHAPE} {NUM_STREAMS} streams of {name}"
        if find_spec(engine.package) is None:
            log.absent(metric, f"{name} is not installed", unit="tokens/s", peer=name)
            continue
        with failing(log, metric, unit="tokens/s", peer=name):
            folder = str(scratch_checkpoint(SHAPE))
            with served_engine(engine, folder, ready_timeout=max(1.0, deadline - time.monotonic())) as url:
                rate, _ = measure_server(url)
            log.measured(metric, rate, unit="tokens/s", peer=name)


def _measure_compiled(log: ResultLog, *, seconds: float) -> None:
    flags = ["--shape", SMALL, "--modes", "compiled", "--max-tokens", str(MAX_TOKENS)]
    answers = list(ask("benchmarks.peers.transformers_gpu", flags, seconds=seconds))
    name = f"{SMALL}: generate one at a time, static cache and torch.compile"
    write_rate(log, name, answers[0] if answers else None, peer="transformers")


def write_rate(log: ResultLog, metric: str, answer: dict[str, Any] | None, *, peer: str) -> float | None:
    """A peer's tokens a second, or why there are none."""
    if answer is None or "error" in answer:
        reason = _NO_TIME if answer is None else str(answer["error"])
        log.failed(metric, reason, unit="tokens/s", peer=peer)
        return None
    rate = float(answer["num_tokens"] / answer["seconds"])
    log.measured(metric, rate, unit="tokens/s", peer=peer)
    return rate


def ask(module: str, flags: Sequence[str], *, seconds: float) -> Iterator[dict[str, Any]]:
    """The JSON lines that a peer prints within so many seconds; then it is killed with all it started."""
    if seconds <= 0:
        return
    process = subprocess.Popen(
        [sys.executable, "-m", module, *flags],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    watch = threading.Timer(seconds, _kill_group, [process.pid])
    watch.start()
    try:
        for line in process.stdout or ():
            # Libraries print there too.
            with suppress(ValueError):
                answer = json.loads(line)
                if isinstance(answer, dict) and "mode" in answer:
                    yield answer
    finally:
        watch.cancel()
        _kill_group(process.pid)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=180.0, help="time for all of it (180)")


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark("peers", measure, description=__doc__, argv=argv, part="peers", add_flags=_add_flags)


if __name__ == "__main__":
    sys.exit(main())
