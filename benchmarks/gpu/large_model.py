"""All that is measured on the large model in one process: its graphs' memory, decode steps and prefill.

    python -m benchmarks.gpu.large_model

To start a process and to load so large a model takes longer than most measurements of it. Owns their order;
each measurement is its own module's, and its lines bear that benchmark's name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.gpu.ceilings import measure_ceilings
from benchmarks.gpu.command import failing, run_benchmark
from benchmarks.gpu.decode_rig import open_engine
from benchmarks.gpu.decode_step import decode_config, measure_steps
from benchmarks.gpu.engines import BATCHES, LARGE_SHAPE
from benchmarks.gpu.floors import Ceilings
from benchmarks.gpu.graph_memory import measure_graphs
from benchmarks.gpu.prefill import measure_prefill
from benchmarks.gpu.results import ResultLog
from benchmarks.gpu.targets import LARGE_MODEL_STEP


def measure(options: argparse.Namespace, log: ResultLog) -> None:
    ceilings = measure_ceilings()
    with failing(log, "decode engine", unit="finished"):
        _measure_decode(ceilings, log)
    with failing(log.of("prefill"), "prefill engine", unit="finished"):
        measure_prefill(ceilings, log.of("prefill"))


def _measure_decode(ceilings: Ceilings, log: ResultLog) -> None:
    with open_engine(decode_config(LARGE_SHAPE)) as (loaded, device):
        with failing(log.of("graph_memory"), "graphs", unit="finished"):
            measure_graphs(loaded, device, log.of("graph_memory"))
        measure_steps(
            loaded,
            device,
            shape=LARGE_SHAPE,
            batches=BATCHES,
            with_longest=True,
            ceilings=ceilings,
            log=log.of("decode_step"),
        )


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark(LARGE_MODEL_STEP, measure, description=__doc__, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
