"""What graphs cost: memory of the pool, of the driver, and the time of a capture.

    python -m benchmarks.gpu.graph_memory

Captures everything that steady traffic needs of an engine with the default numbers of sequences and tokens.
The pool is the arena of intermediates with what torch reserved while capturing; the largest bucket needs the
arena as it was after that bucket alone. Owns no engine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.command import run_benchmark
from benchmarks.gpu.decode_rig import open_engine
from benchmarks.gpu.decode_step import decode_config
from benchmarks.gpu.engines import LARGE_SHAPE
from benchmarks.gpu.results import ResultLog
from benchmarks.gpu.targets import POOL_METRIC, POOL_TOTAL_METRIC

SHAPE = LARGE_SHAPE


def measure(options: argparse.Namespace, log: ResultLog) -> None:
    with open_engine(decode_config(SHAPE)) as (loaded, device):
        measure_graphs(loaded, device, log)


def measure_graphs(loaded: Any, device: Any, log: ResultLog) -> None:
    """The lines of an engine that has captured nothing yet; leaves all its graphs captured."""
    import torch

    runner = loaded.runner
    torch.cuda.synchronize()
    need = runner.arena.num_bytes
    torch.cuda.empty_cache()
    free_before, _ = torch.cuda.mem_get_info()
    reserved_before, allocated_before = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    start = time.perf_counter()
    with device.on_stream():
        runner.graphs.capture_all()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    free_after, _ = torch.cuda.mem_get_info()
    arena_growth = runner.arena.num_bytes - need
    reserved = torch.cuda.memory_reserved() - reserved_before
    pool = need + max(reserved, arena_growth)
    name = SHAPE
    log.measured(f"{name}: graphs captured", runner.graphs.num_captured, unit="graphs")
    log.measured(f"{name}: time of a capture", 1e3 * seconds / max(1, runner.graphs.num_captured), unit="ms")
    log.measured(
        f"{name}: tensors allocated while capturing",
        (torch.cuda.memory_allocated() - allocated_before) / 2**20,
        unit="MiB",
    )
    log.measured(
        f"{name}: allocations inside captures", runner.graphs.num_capture_allocations, unit="allocations"
    )
    log.measured(f"{name}: largest bucket's need", need / 2**20, unit="MiB")
    log.measured(f"{name}: driver's part", (free_before - free_after - reserved) / 2**20, unit="MiB")
    log.measured(POOL_METRIC, pool / need, unit="times", floor=1.0)
    # All that capturing took from the card, and the arena that stood before.
    log.measured(POOL_TOTAL_METRIC, (need + free_before - free_after) / 2**30, unit="GiB")


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark("graph_memory", measure, description=__doc__, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
