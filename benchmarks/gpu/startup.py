"""From the start of a server's process to the first token that it sends, with real weights.

    python -m benchmarks.gpu.startup

The checkpoint is written first, so that it lies in the page cache. Kernels must lie in Triton's cache: where
no run of `make gpu` has compiled them before, a first start does, and the second one is measured. Owns no
checkpoint and no server.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from benchmarks.gpu.checkpoint import scratch_checkpoint
from benchmarks.gpu.command import empty_device_cache, run_benchmark
from benchmarks.gpu.compile_kernels import AHEAD_VARIABLE
from benchmarks.gpu.engines import STARTUP
from benchmarks.gpu.http_load import first_token, run_load
from benchmarks.gpu.results import ResultLog
from benchmarks.gpu.targets import STARTUP_METRIC
from benchmarks.processes import graphllm_server

SHAPE = STARTUP.shape
_READY_TIMEOUT = 60.0


def starts() -> tuple[str, ...]:
    """What the server is started for; the last one is measured."""
    were_compiled = os.environ.get(AHEAD_VARIABLE) == "0"
    return ("start",) if were_compiled else ("start that compiles", "start")


def measure(options: argparse.Namespace, log: ResultLog) -> None:
    start = time.perf_counter()
    folder = scratch_checkpoint(SHAPE)
    print(f"{SHAPE} is at {folder}: {time.perf_counter() - start:.1f} s", flush=True)
    empty_device_cache()
    flags = ["--model", str(folder), "--device", "cuda", "--dtype", "bfloat16"]
    flags += ["--served-model-name", "model", *STARTUP.flags()]
    for name in starts():
        start = time.perf_counter()
        with graphllm_server(flags, ready_timeout=_READY_TIMEOUT) as (url, ready):
            seconds = run_load(first_token(url, model="model")) - start
        log.measured(f"{SHAPE}: {name}, ready", ready, unit="s")
        log.measured(f"{SHAPE}: {name}, first token", seconds, unit="s")
    log.measured(STARTUP_METRIC, seconds, unit="s")


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark("startup", measure, description=__doc__, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
