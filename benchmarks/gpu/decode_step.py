"""Whole decode steps of a model, embedding to sampled token, against what they must read.

    python -m benchmarks.gpu.decode_step --shapes qwen3-0.6b --batches 1 8

Each step is the captured graph that serving replays. Owns no engine and no floor. The large model has its
steps measured by `large_model.py`, which shares its engine. `--child` measures one step and prints its
milliseconds as JSON: dependent launch is chosen when a process starts.
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
from benchmarks.gpu.decode_rig import Rows, fill_kv, limited_config, open_engine
from benchmarks.gpu.engines import BATCHES, CONTEXT, DECODE, LARGE_SHAPE, LONG_CONTEXT, SMALLEST_SHAPE
from benchmarks.gpu.floors import SHAPES, Ceilings, context_name, shape_of
from benchmarks.gpu.results import REPOSITORY, ResultLog
from benchmarks.gpu.targets import PDL_METRIC, step_metric
from benchmarks.gpu.timing import Timing, time_on_device

PDL_SHAPE = SMALLEST_SHAPE
PDL_VARIABLE = "GRAPHLLM_PDL"
# Replays lengthen the sequences; their lengths are put back before they leave the blocks that they have. So
# sequences begin a little short, and what is measured is the mean context of a group of replays.
_REPLAYS = 10
_NUM_SHORT = 16
_NUM_MEAN_SHORT = _NUM_SHORT - 2 - _REPLAYS // 2


def decode_config(shape: str) -> Any:
    """The engine of a shape's decode steps, with room for the largest batch and the longest context."""
    limits = DECODE[shape]
    return limited_config(limits, num_kv_tokens=max(max(BATCHES) * (CONTEXT + 64), limits.max_model_len))


def measured_context(context: int) -> int:
    """The mean context of the replays that `time_decode` takes for `context`."""
    return context - _NUM_MEAN_SHORT


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
            _measure_shape(shape, options, ceilings, log=log)
    if PDL_SHAPE in options.shapes:
        with failing(log, PDL_METRIC, unit="times"):
            _measure_dependent_launch(log)


def _measure_shape(shape: str, options: argparse.Namespace, ceilings: Ceilings, *, log: ResultLog) -> None:
    with open_engine(decode_config(shape)) as (loaded, device):
        measure_steps(
            loaded,
            device,
            shape=shape,
            batches=options.batches,
            with_longest=not options.no_long,
            ceilings=ceilings,
            log=log,
        )


def measure_steps(
    loaded: Any,
    device: Any,
    *,
    shape: str,
    batches: Sequence[int],
    with_longest: bool,
    ceilings: Ceilings,
    log: ResultLog,
) -> None:
    """The lines of a loaded model: each batch at the short context, and one row at the longest."""
    with device.on_stream():
        fill_kv(loaded.runner)
    cases = [(num_rows, CONTEXT) for num_rows in batches]
    if with_longest and shape_of(shape).max_context >= LONG_CONTEXT:
        cases.append((1, LONG_CONTEXT))
    for num_rows, context in cases:
        with failing(log, step_metric(shape, num_rows, context_name(context)), unit="times"):
            timing = time_decode(loaded, device, num_rows=num_rows, context=context)
            _write(log, shape, num_rows, context, timing=timing, ceilings=ceilings)


def _write(
    log: ResultLog, shape: str, batch: int, context: int, *, timing: Timing, ceilings: Ceilings
) -> None:
    floor = shape_of(shape).decode_floor_ms(batch, measured_context(context), ceilings)
    name = f"{shape} batch {batch} context {context_name(context)}"
    log.measured(f"{name}: step", timing.median, unit="ms", floor=floor)
    log.measured(f"{name}: fastest step", timing.least, unit="ms", floor=floor)
    log.measured(
        step_metric(shape, batch, context_name(context)), timing.median / floor, unit="times", floor=1.0
    )


def _measure_dependent_launch(log: ResultLog) -> None:
    """The same step of the same engine in two processes, unless this one has measured it already."""
    name = f"{PDL_SHAPE} batch 1 context {context_name(CONTEXT)}: step"
    measured = [result.value for result in log.results if result.metric == name]
    on = measured[0] if measured and measured[0] is not None else _step_in_child("1")
    off = _step_in_child("0")
    log.measured(f"{name} without dependent launch", off, unit="ms")
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
    small = [shape for shape in SHAPES if shape != LARGE_SHAPE]
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=small, help=f"models ({' '.join(small)})"
    )
    parser.add_argument(
        "--batches", type=int, nargs="+", choices=BATCHES, default=list(BATCHES), help="rows of a step (all)"
    )
    parser.add_argument("--no-long", action="store_true", help="leave out the context of 128k")
    parser.add_argument("--child", action="store_true", help="measure batch 1 and print it, write nothing")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    if "--child" not in arguments:
        return run_benchmark("decode_step", measure, description=__doc__, argv=argv, add_flags=_add_flags)
    parser = argparse.ArgumentParser()
    _add_flags(parser)
    shape = parser.parse_args(arguments).shapes[0]
    with open_engine(decode_config(shape)) as (loaded, device):
        with device.on_stream():
            fill_kv(loaded.runner)
        timing = time_decode(loaded, device, num_rows=1, context=CONTEXT)
    print(json.dumps({"ms": timing.median}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
