"""Whole decode steps of the three models, embedding to sampled token, against what they must read.

    python -m benchmarks.gpu.decode_step --shapes qwen3-0.6b --batches 1 8

Each step is the captured graph that serving replays. Owns no engine and no floor. `--child` measures one
step and prints its milliseconds as JSON: dependent launch is chosen when a process starts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.ceilings import measure_ceilings, write_ceilings
from benchmarks.gpu.command import failing, run_benchmark
from benchmarks.gpu.decode_rig import Rows, engine_config, fill_kv, load_engine
from benchmarks.gpu.floors import SHAPES, Ceilings, context_name, shape_of
from benchmarks.gpu.results import REPOSITORY, ResultLog
from benchmarks.gpu.targets import PDL_METRIC, step_metric
from benchmarks.gpu.timing import Timing, time_on_device

BATCHES = (1, 8, 32, 64)
CONTEXT = 1024
LONG_CONTEXT = 131072
PDL_SHAPE = "qwen3-0.6b"
PDL_VARIABLE = "GRAPHLLM_PDL"
# Replays lengthen the sequences; their lengths are put back before they leave the blocks that they have. So
# sequences begin a little short, and what is measured is the mean context of a group of replays.
_REPLAYS = 10
_NUM_SHORT = 16
_NUM_MEAN_SHORT = _NUM_SHORT - 2 - _REPLAYS // 2


def load_for_decode(shape: str, *, batches: Sequence[int], longest: int, num_kv_tokens: int) -> Any:
    """A model with these decode graphs, all captured, and its KV pool filled."""
    config = engine_config(
        shape,
        num_kv_tokens=num_kv_tokens,
        bytes_per_token=2 * shape_of(shape).num_kv_elements,
        max_model_len=longest,
        max_num_seqs=max(batches),
        max_num_batched_tokens=max(64, max(batches)),
        cudagraph_capture_sizes=tuple(batches),
    )
    loaded, device = load_engine(config)
    with device.on_stream():
        fill_kv(loaded.runner)
    return loaded, device


def time_decode(loaded: Any, device: Any, *, num_rows: int, context: int) -> Timing:
    """Milliseconds of one replay of the decode graph for `num_rows` sequences of `context` tokens each."""
    import torch

    runner = loaded.runner
    rows = Rows(loaded, [context - _NUM_SHORT] * num_rows)
    with device.on_stream():
        runner.graphs.capture_all()
    rows.install_decode()
    rows.decode()
    torch.cuda.synchronize()
    with device.on_stream():
        lengths = runner.buffers.num_computed_tokens.clone()
    misses = runner.graphs.num_misses
    timing = time_on_device(
        lambda: runner.replay_decode(num_rows),
        stream=runner.stream,
        repeats=_REPLAYS,
        groups=25,
        before=lambda: runner.buffers.num_computed_tokens.copy_(lengths),
    )
    if runner.graphs.num_misses != misses:
        raise RuntimeError("the step that was measured was no graph")
    return timing


def measure(options: argparse.Namespace, log: ResultLog) -> None:
    ceilings = measure_ceilings()
    write_ceilings(log, ceilings)
    for shape in options.shapes:
        with failing(log, f"{shape}: decode steps", unit="ms"):
            _measure_batches(shape, options.batches, ceilings, log)
    for shape in options.shapes:
        if shape_of(shape).max_context >= LONG_CONTEXT and not options.no_long:
            metric = step_metric(shape, 1, context_name(LONG_CONTEXT))
            with failing(log, metric, unit="times"):
                loaded, device = load_for_decode(
                    shape, batches=(1,), longest=LONG_CONTEXT, num_kv_tokens=LONG_CONTEXT
                )
                timing = time_decode(loaded, device, num_rows=1, context=LONG_CONTEXT)
                _write(log, shape, 1, LONG_CONTEXT, timing=timing, ceilings=ceilings)
                del loaded
    if PDL_SHAPE in options.shapes:
        with failing(log, PDL_METRIC, unit="times"):
            _measure_dependent_launch(log)


def _measure_batches(shape: str, batches: Sequence[int], ceilings: Ceilings, log: ResultLog) -> None:
    loaded, device = load_for_decode(
        shape, batches=batches, longest=2 * CONTEXT, num_kv_tokens=max(batches) * (CONTEXT + 64)
    )
    for batch in batches:
        with failing(log, step_metric(shape, batch, context_name(CONTEXT)), unit="times"):
            timing = time_decode(loaded, device, num_rows=batch, context=CONTEXT)
            _write(log, shape, batch, CONTEXT, timing=timing, ceilings=ceilings)


def _write(
    log: ResultLog, shape: str, batch: int, context: int, *, timing: Timing, ceilings: Ceilings
) -> None:
    floor = shape_of(shape).decode_floor_ms(batch, context - _NUM_MEAN_SHORT, ceilings)
    name = f"{shape} batch {batch} context {context_name(context)}"
    log.measured(f"{name}: step", timing.median, unit="ms", floor=floor)
    log.measured(f"{name}: fastest step", timing.least, unit="ms", floor=floor)
    log.measured(
        step_metric(shape, batch, context_name(context)), timing.median / floor, unit="times", floor=1.0
    )


def _measure_dependent_launch(log: ResultLog) -> None:
    """The same step in two processes, one after the other."""
    on, off = _step_in_child("1"), _step_in_child("0")
    log.measured(f"{PDL_SHAPE} batch 1 context 1k: step without dependent launch", off, unit="ms")
    log.measured(PDL_METRIC, off / on, unit="times")


def _step_in_child(switch: str) -> float:
    command = [sys.executable, "-m", "benchmarks.gpu.decode_step", "--child", "--shapes", PDL_SHAPE]
    environment = {**os.environ, PDL_VARIABLE: switch}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120
    )
    if done.returncode:
        raise RuntimeError(f"with {PDL_VARIABLE}={switch}: {done.stderr.strip()[-300:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["ms"])


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="models (all)")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), help="rows of a step")
    parser.add_argument("--no-long", action="store_true", help="leave out the context of 128k")
    parser.add_argument("--child", action="store_true", help="measure batch 1 and print it, write nothing")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    if "--child" not in arguments:
        return run_benchmark("decode_step", measure, description=__doc__, argv=argv, add_flags=_add_flags)
    parser = argparse.ArgumentParser()
    _add_flags(parser)
    shape = parser.parse_args(arguments).shapes[0]
    loaded, device = load_for_decode(shape, batches=(1,), longest=2 * CONTEXT, num_kv_tokens=2 * CONTEXT)
    print(json.dumps({"ms": time_decode(loaded, device, num_rows=1, context=CONTEXT).median}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
