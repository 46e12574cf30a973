"""Compiles every kernel that a run on a card will need, side by side, into Triton's cache.

    python -m benchmarks.gpu.compile_kernels

The first step of a run: what follows starts no compiling helpers of its own (`AHEAD_VARIABLE`), and measures
no compiler. A process for each share of each model runs the steps of all its engines, as listed in
`engines.py`; another one runs what is measured without a model. Owns the processes and the time they took.
`--child` is such a process; it prints what it compiled as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

from benchmarks.gpu.command import empty_device_cache
from benchmarks.gpu.engines import BATCHES, DECODE, LARGE_SHAPE, EngineLimits, engines_of
from benchmarks.gpu.floors import SHAPES, shape_of
from benchmarks.gpu.fp8_linear import SHAPES as PACKED_SHAPES
from benchmarks.gpu.results import REPOSITORY, ResultLog, device_name

AHEAD_VARIABLE = "GRAPHLLM_COMPILE_AHEAD"
"""Names the environment variable that is 0 where everything was compiled before."""
PDL_VARIABLE = "GRAPHLLM_PDL"
SHARES = ("decode", "mixed", "sampler")
LAYERS = "layers"
PACKED = "packed"
PART = "compile"
_PDL_SHAPE = SHAPES[-1]  # the one whose decode steps are measured without dependent launch
_POLL = 0.05  # seconds


@dataclass(frozen=True, slots=True)
class Job:
    """A process: a share of a model's engines, or its attention layers and swaps, or its products with packed
    weights; by default as the card can.

    with_dependent_launch False: only the engine of decode steps is ever run so.
    """

    shape: str
    share: str
    with_dependent_launch: bool = True

    @property
    def name(self) -> str:
        suffix = "" if self.with_dependent_launch else " without dependent launch"
        return f"{self.shape} {self.share}{suffix}"

    def engines(self) -> list[EngineLimits]:
        return engines_of(self.shape) if self.with_dependent_launch else [DECODE[self.shape]]


def jobs() -> list[Job]:
    """All of a run, the longest first."""
    with_launch = [Job(shape, share) for share in SHARES for shape in SHAPES]
    without_launch = [Job(_PDL_SHAPE, share, with_dependent_launch=False) for share in SHARES]
    packed = [Job(shape, PACKED) for shape in PACKED_SHAPES]
    return [*with_launch, *packed, Job(LARGE_SHAPE, LAYERS), *without_launch]


def at_once() -> int:
    """Compilers need a core each, and every process a few hundred MiB of the card."""
    return max(3, len(os.sched_getaffinity(0)))


class _Process:
    """A job under way."""

    def __init__(self, job: Job, command: Sequence[str]) -> None:
        self.job = job
        self.start = time.monotonic()
        switch = {} if job.with_dependent_launch else {PDL_VARIABLE: "0"}
        self.process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**os.environ, **switch},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )

    def write(self, log: ResultLog) -> None:
        """Its line, once it has ended."""
        stdout: IO[str] | None = self.process.stdout
        said = "" if stdout is None else stdout.read()
        if self.process.returncode:
            log.failed(self.job.name, f"exit code {self.process.returncode}", unit="s")
            return
        number = json.loads(said.splitlines()[-1])["num_compiled"]
        log.measured(f"{self.job.name}: compiled", number, unit="kernels")
        log.measured(self.job.name, time.monotonic() - self.start, unit="s")

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def compile_all(
    log: ResultLog, waiting: Sequence[Job], *, command: Callable[[Job], Sequence[str]], at_once: int
) -> None:
    """Run jobs as processes, each with its line as it ends. Whatever happens here, none of them stays."""
    due, running = list(waiting), list[_Process]()
    try:
        while due or running:
            while due and len(running) < at_once:
                job = due.pop(0)
                running.append(_Process(job, command(job)))
            for one in tuple(running):
                if one.process.poll() is not None:
                    running.remove(one)
                    try:
                        one.write(log)
                    finally:
                        one.end()
            time.sleep(_POLL)
    finally:
        for one in running:
            one.end()


def child_command(job: Job) -> list[str]:
    """What a job is done by; it finds its switches in the environment."""
    kind = [] if job.with_dependent_launch else ["--decode-only"]
    return [sys.executable, "-m", "benchmarks.gpu.compile_kernels", "--child", job.shape, job.share, *kind]


def compile_share(job: Job) -> None:
    """In a process of its own: run the steps of a share for each of the model's engines, on padding alone."""
    from benchmarks.gpu.decode_rig import limited_config
    from graphllm.runner.compilation import run_share
    from graphllm.runner.device import open_device

    device = open_device("cuda")
    for limits in job.engines():
        config = limited_config(limits, num_kv_tokens=limits.max_model_len)
        _do(device, partial(run_share, config, job.share, device))
        # The large model's tables and heads, before the next engine has its own.
        gc.collect()
        empty_device_cache()
    if job.share == "sampler" and job.with_dependent_launch:
        _do(device, lambda: _copy_blocks(job.shape, device))
    device.close()


def _do(device: Any, work: Callable[[], None]) -> None:
    """Raises what the work raised."""
    event = device.submit(work)
    while not event.query():
        time.sleep(_POLL)
    if event.error is not None:
        raise event.error


def _copy_blocks(shape: str, device: Any) -> None:
    """The copies of KV blocks, which a server compiles when it loads."""
    import torch

    from graphllm.cache.kv_cache import KVCache, KVCacheShape
    from graphllm.cache.swap import BlockSwapper
    from graphllm.config import EngineConfig

    sizes = shape_of(shape)
    block_size = EngineConfig().block_size
    kv_shape = KVCacheShape(sizes.num_layers, sizes.num_kv_heads, sizes.head_dim, block_size, torch.bfloat16)
    BlockSwapper(KVCache(kv_shape, 2, device=device.torch_device), 2, device=device).compile_copies()


def compile_layers() -> None:
    """In a process of its own: what is measured of attention layers, with short contexts."""
    import torch

    from benchmarks.gpu import attention

    for name in attention.SHAPES:
        attention.time_layers(shape_of(name), [[attention.CONTEXT] * BATCHES[-1]])
    attention.time_layers(
        shape_of(LARGE_SHAPE), [[attention.CONTEXT] * BATCHES[-1]], kv_dtype=torch.float8_e4m3fn
    )


def compile_packed(shape: str) -> None:
    """In a process of its own: the products with packed weights that are measured."""
    import torch

    from benchmarks.gpu import packed_linear
    from benchmarks.gpu.fp8_linear import layer_products

    for form in packed_linear.FORMS:
        device = torch.device("cuda")
        layers = packed_linear.make_layers(layer_products(shape), form, device=device, copies=1)
        for num_rows in packed_linear.ALL_ROWS:
            for copies in layers:
                packed_linear.largest_error(copies[0], num_rows)


def main(argv: Sequence[str] | None = None) -> int:
    """1 where there is no card (and then no line is written) and where a process failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.compile_kernels", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--child", nargs=2, metavar=("SHAPE", "SHARE"), help="do one job in this process")
    parser.add_argument("--decode-only", action="store_true", help="of --child: no other engine")
    options = parser.parse_args(argv)
    if device_name() is None:
        print("compile_kernels needs a CUDA device, and this machine has none.", file=sys.stderr)
        return 1
    if options.child is not None:
        shape, share = options.child
        return _child(Job(shape, share, with_dependent_launch=not options.decode_only))
    # Like Ctrl-C: the processes that were started must not outlive this one.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    log = ResultLog(PART, PART)
    start = time.monotonic()
    compile_all(log, jobs(), command=child_command, at_once=at_once())
    log.measured("all kernels", time.monotonic() - start, unit="s")
    return 1 if any(result.value is None for result in log.results) else 0


def _child(job: Job) -> int:
    from graphllm.runner.compilation import CompilationWatch

    compiled = []
    watch = CompilationWatch(lambda kernel, seconds: compiled.append(kernel))
    watch.start()
    if job.share == LAYERS:
        compile_layers()
    elif job.share == PACKED:
        compile_packed(job.shape)
    else:
        compile_share(job)
    print(json.dumps({"num_compiled": len(compiled)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
