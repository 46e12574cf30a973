"""From the start of a server's process to the first token that it sends, with real weights.

    python -m benchmarks.gpu.startup

The checkpoint is written first, so that it lies in the page cache, and the server is started twice: the
first start leaves the kernels in Triton's cache, the second one is measured. Owns no checkpoint and no
server.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from benchmarks.gpu.checkpoint import scratch_checkpoint
from benchmarks.gpu.command import empty_device_cache, run_benchmark
from benchmarks.gpu.floors import SHAPES
from benchmarks.gpu.http_load import first_token, run_load
from benchmarks.gpu.results import ResultLog
from benchmarks.gpu.targets import STARTUP_METRIC
from benchmarks.processes import graphllm_server

SHAPE = "llama-3.1-8b"
_READY_TIMEOUT = 60.0


def measure(options: argparse.Namespace, log: ResultLog) -> None:
    start = time.perf_counter()
    folder = scratch_checkpoint(options.shape)
    print(f"{options.shape} is at {folder}: {time.perf_counter() - start:.1f} s", flush=True)
    empty_device_cache()
    flags = [
        "--model",
        str(folder),
        "--device",
        "cuda",
        "--dtype",
        "bfloat16",
        "--served-model-name",
        "model",
    ]
    flags += ["--max-model-len", "8192"]
    for name in ("first start", "second start"):
        start = time.perf_counter()
        with graphllm_server(flags, ready_timeout=_READY_TIMEOUT) as (url, ready):
            seconds = run_load(first_token(url, model="model")) - start
        log.measured(f"{options.shape}: {name}, ready", ready, unit="s")
        log.measured(f"{options.shape}: {name}, first token", seconds, unit="s")
    log.measured(STARTUP_METRIC, seconds, unit="s")


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default=SHAPE, help=f"the model ({SHAPE})")


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark("startup", measure, description=__doc__, argv=argv, add_flags=_add_flags)


if __name__ == "__main__":
    sys.exit(main())
