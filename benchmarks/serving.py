"""A load generator for any OpenAI-compatible server: streamed chats, latencies, throughput.

    python benchmarks/serving.py                                  # starts graphllm with the demo model
    python benchmarks/serving.py --peer transformers              # beside transformers' generate
    python benchmarks/serving.py --url http://127.0.0.1:8080 --model NAME

Owns the order of a run and what is printed: rounds of every concurrency and of the peer take turns, so
that a machine that slows down slows all of them; a table, the ratios, the floor, and one JSON line last.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.latency_report import Summary, speed_ratio, summarize, table
from benchmarks.processes import REPOSITORY, JsonLineProcess, ProcessError, graphllm_server, usable_cores
from benchmarks.sse_client import Completion, Endpoint
from benchmarks.step_floor import BYTES_OF, Ceilings, ModelSize, StepFloor, step_floor
from benchmarks.workload import Round, Workload, run_round

PEERS = {"transformers": "benchmarks.peers.transformers_generate"}
DEFAULT_OUTPUT = REPOSITORY / "benchmarks" / "results" / "serving.jsonl"


@dataclass(slots=True)
class Results:
    """Everything that a run found out."""

    summaries: dict[int, Summary] = field(default_factory=dict)
    peer: Summary | None = None
    peer_versions: dict[str, str] = field(default_factory=dict)
    floors: dict[int, StepFloor] = field(default_factory=dict)
    ceilings: Ceilings | None = None
    ready_seconds: float | None = None
    errors: list[str] = field(default_factory=list)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    server = parser.add_argument_group("the server")
    server.add_argument("--url", help="a running server; without it graphllm is started on a free port")
    server.add_argument("--model", default="demo", help="the model to start, or its name at --url (demo)")
    server.add_argument(
        "--dtype", default="auto", choices=("auto", *BYTES_OF), help="its number format (auto)"
    )
    server.add_argument(
        "--threads", type=int, default=usable_cores(), help="its and the peer's threads (all)"
    )
    server.add_argument("--server-args", default="", help="more arguments for it, in one string")
    server.add_argument("--ready-timeout", type=float, default=600.0, help="seconds to wait for it (600)")
    server.add_argument("--api-key", help="bearer token to send")
    load = parser.add_argument_group("the load")
    load.add_argument("--concurrency", type=_counts, default=(1, 16), help="streams at once (1,16)")
    load.add_argument("--num-requests", type=int, default=16, help="requests a round and concurrency (16)")
    load.add_argument("--max-tokens", type=int, default=96, help="tokens of each answer (96)")
    load.add_argument("--prompt-words", type=int, default=0, help="words of context in each prompt (0)")
    load.add_argument("--rounds", type=int, default=3, help="how often everything is measured in turn (3)")
    load.add_argument(
        "--no-ignore-eos", action="store_true", help="let answers end where the model ends them"
    )
    load.add_argument("--seed", type=int, default=0, help="chooses the prompts (0)")
    peer = parser.add_argument_group("the peer")
    peer.add_argument("--peer", choices=PEERS, help="measure it in the same run, one request at a time")
    peer.add_argument("--peer-requests", type=int, default=4, help="its requests a round (4)")
    parser.add_argument(
        "--output",
        type=Path,
        nargs="?",
        const=DEFAULT_OUTPUT,
        help="append the JSON line to this file (benchmarks/results/serving.jsonl)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 when a request failed or a process did not start."""
    options = build_parser().parse_args(argv)
    # Like Ctrl-C: the processes that were started must not outlive this one.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        results = measure(options)
    except (ProcessError, OSError, ValueError) as error:
        print(f"benchmarks/serving.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(report(options, results))
    line = json.dumps(record(options, results))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with options.output.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line)
    return 1 if results.errors else 0


def measure(options: argparse.Namespace) -> Results:
    """Start what is needed, take turns, and end it all."""
    results = Results()
    with ExitStack() as stack:
        peer = floor = None
        helper_arguments = ["--model", options.model, "--threads", str(options.threads)]
        if options.url is None:
            _progress("opening the model")
            floor = JsonLineProcess("benchmarks.step_floor", helper_arguments)
            stack.callback(floor.close)
            ceilings = Ceilings(**floor.ask("ceilings"))
        if options.peer is not None:
            _progress(f"loading {options.peer}")
            peer = JsonLineProcess(PEERS[options.peer], helper_arguments)
            stack.callback(peer.close)
            results.peer_versions = peer.ready
        url = options.url
        if url is None:
            _progress("starting graphllm")
            started = graphllm_server(_server_arguments(options), ready_timeout=options.ready_timeout)
            url, results.ready_seconds = stack.enter_context(started)
        endpoint = Endpoint.parse(url, "/v1/chat/completions", api_key=options.api_key)
        rounds, peer_rounds = _take_turns(options, endpoint, peer)
        results.summaries = {n: summarize("server", done, concurrency=n) for n, done in rounds.items()}
        if peer_rounds:
            results.peer = summarize(options.peer, peer_rounds, concurrency=1)
        if floor is not None:
            # Once more, and the better counts: a floor must not be a busy moment's.
            results.ceilings = ceilings.best(Ceilings(**floor.ask("ceilings")))
            size = ModelSize(**floor.ready)
            results.floors = _floors(results, size, dtype=options.dtype)
    results.errors = [error for done in rounds.values() for round in done for error in round.errors]
    return results


def _take_turns(
    options: argparse.Namespace, endpoint: Endpoint, peer: JsonLineProcess | None
) -> tuple[dict[int, list[Round]], list[Round]]:
    """Rounds of every concurrency and of the peer in turn; whoever is not measured is idle."""
    workload = Workload(
        model=options.model,
        max_tokens=options.max_tokens,
        prompt_words=options.prompt_words,
        ignore_eos=not options.no_ignore_eos,
        seed=options.seed,
    )
    rounds: dict[int, list[Round]] = {concurrency: [] for concurrency in options.concurrency}
    peer_rounds: list[Round] = []
    _progress("warming up")
    for concurrency in options.concurrency:
        asyncio.run(run_round(endpoint, [workload.body(-1)] * concurrency, concurrency=concurrency))
    if peer is not None:
        peer_round(peer, workload, range(-1, 0))
    first = 0
    for turn in range(options.rounds):
        for concurrency, done in rounds.items():
            _progress(f"round {turn + 1} of {options.rounds}: {concurrency} streams")
            # Prompts are new each time, so that no cached prefix helps.
            bodies = [workload.body(first + index) for index in range(options.num_requests)]
            first += options.num_requests
            done.append(asyncio.run(run_round(endpoint, bodies, concurrency=concurrency)))
        if peer is not None:
            _progress(f"round {turn + 1} of {options.rounds}: {options.peer}")
            peer_rounds.append(peer_round(peer, workload, range(first, first + options.peer_requests)))
    return rounds, peer_rounds


def peer_round(peer: JsonLineProcess, workload: Workload, indices: Sequence[int]) -> Round:
    """The peer's answers to some of the workload's requests, one after another."""
    completions = []
    for index in indices:
        answer = peer.ask({"messages": workload.messages(index), "max_tokens": workload.max_tokens})
        times = tuple(answer.pop("token_times"))
        completions.append(Completion(token_times=times, num_tokens=len(times), **answer))
    return Round(tuple(completions), (), sum(c.end - c.start for c in completions))


def report(options: argparse.Namespace, results: Results) -> str:
    """The table and the lines below it."""
    summaries = list(results.summaries.values())
    lines = ["", table(summaries + ([results.peer] if results.peer else [])), ""]
    if results.ready_seconds is not None:
        lines.append(f"ready {results.ready_seconds:.1f} s after the command")
    for name, ratio in ratios(results).items():
        lines.append(f"{name}: {ratio:.2f} times the tokens per second")
    if results.ceilings is not None:
        for concurrency, floor in results.floors.items():
            lines.append(_floor_line(results.summaries[concurrency], floor, ceilings=results.ceilings))
    lines += [f"error: {error}" for error in results.errors[:5]]
    return "\n".join(lines)


def _floor_line(summary: Summary, floor: StepFloor, *, ceilings: Ceilings) -> str:
    return (
        f"floor at {summary.concurrency} streams: a step reads {floor.num_bytes / 1e6:.0f} MB"
        f" ({floor.read_ms:.1f} ms at the measured {ceilings.bytes_per_second / 1e9:.1f} GB/s)"
        f" and computes {floor.num_flops / 1e9:.2f} GFLOP"
        f" ({floor.compute_ms:.1f} ms at {ceilings.flops_per_second / 1e9:.0f} GFLOP/s);"
        f" measured {summary.itl_ms.p50:.1f} ms from token to token"
    )


def ratios(results: Results) -> dict[str, float]:
    """The comparisons of a run, by what is compared."""
    found = {}
    if 1 in results.summaries:
        for concurrency, summary in results.summaries.items():
            if concurrency != 1:
                found[f"{concurrency} streams / 1 stream"] = speed_ratio(summary, results.summaries[1])
    if results.peer is not None:
        for concurrency, summary in results.summaries.items():
            name = f"server at {concurrency} / {results.peer.name} at 1"
            found[name] = speed_ratio(summary, results.peer)
    return {name: ratio for name, ratio in found.items() if math.isfinite(ratio)}


def record(options: argparse.Namespace, results: Results) -> dict[str, Any]:
    """The run as one JSON object."""
    return {
        "benchmark": "serving",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **_versions(), **results.peer_versions},
        "machine": {
            "cpu": _cpu_name(),
            "cores": usable_cores(),
            "ceilings": None if results.ceilings is None else asdict(results.ceilings),
        },
        "options": {
            # No addresses or folders: the line is committed.
            "server": "graphllm" if options.url is None else "url",
            "model": Path(options.model).name,
            "dtype": options.dtype,
            "threads": options.threads,
            "server_args": options.server_args,
            "max_tokens": options.max_tokens,
            "prompt_words": options.prompt_words,
            "num_requests": options.num_requests,
            "rounds": options.rounds,
        },
        "ready_seconds": None if results.ready_seconds is None else round(results.ready_seconds, 2),
        "results": [summary.as_json() for summary in results.summaries.values()],
        "peer": None if results.peer is None else results.peer.as_json(),
        "ratios": {name: round(ratio, 3) for name, ratio in ratios(results).items()},
        "floors": {str(n): asdict(floor) for n, floor in results.floors.items()},
        "num_errors": len(results.errors),
    }


def _floors(results: Results, size: ModelSize, *, dtype: str) -> dict[int, StepFloor]:
    assert results.ceilings is not None
    # auto is float32 on a CPU, which is where the ceilings are measured.
    num_bytes = BYTES_OF.get(dtype, 4)
    return {
        concurrency: step_floor(
            size,
            results.ceilings,
            num_rows=concurrency,
            context_len=summary.mean_context_len,
            bytes_per_element=num_bytes,
        )
        for concurrency, summary in results.summaries.items()
        if math.isfinite(summary.mean_context_len)
    }


def _server_arguments(options: argparse.Namespace) -> list[str]:
    arguments = ["--model", options.model, "--dtype", options.dtype, "--cpu-threads", str(options.threads)]
    return [*arguments, *shlex.split(options.server_args)]


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(int(part) for part in text.split(","))
    if min(counts) < 1 or len(set(counts)) < len(counts):
        raise ValueError(text)
    return counts


def _versions() -> dict[str, str | None]:
    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in ("graphllm", "torch", "numpy")}


def _commit() -> str | None:
    """The checkout's commit, with a plus when files differ from it; None outside of one."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _progress(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
