"""Whole decode steps of the large model with packed weights, beside bfloat16 in the same process.

    python -m benchmarks.gpu.quantized_decode

Each step is the captured graph that serving replays, at the context of `benchmarks.gpu.decode_step`. Weights
are random, and rounded as `--quantization` does it. A floor is what the step must read in this form over the
card's copy bandwidth. Whether the numbers are right is the business of `packed_linear` and `fp8_linear`,
which measure single products. Owns no engine and no floor.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.gpu.ceilings import measure_ceilings
from benchmarks.gpu.command import failing, run_benchmark
from benchmarks.gpu.decode_rig import fill_kv, limited_config, open_engine
from benchmarks.gpu.decode_step import measured_context, time_decode
from benchmarks.gpu.engines import CONTEXT, LARGE_SHAPE, QUANTIZED, QUANTIZED_BATCHES
from benchmarks.gpu.floors import context_name, shape_of
from benchmarks.gpu.results import ResultLog
from benchmarks.gpu.targets import quantized_metric

# What a weight of the layers takes, scales and offsets of its group included.
LAYER_BITS = {"bfloat16": 16, "int4": 5, "fp8": 8}


def measure(options: argparse.Namespace, log: ResultLog) -> None:
    ceilings = measure_ceilings()
    shape, plain = shape_of(LARGE_SHAPE), dict[int, float]()
    for form, limits in QUANTIZED.items():
        config = limited_config(limits, num_kv_tokens=max(QUANTIZED_BATCHES) * (CONTEXT + 64))
        with (
            failing(log, f"{LARGE_SHAPE} {form}: decode steps", unit="ms"),
            open_engine(config) as (loaded, device),
        ):
            with device.on_stream():
                fill_kv(loaded.runner)
            for num_rows in QUANTIZED_BATCHES:
                name = f"{LARGE_SHAPE} {form} batch {num_rows} context {context_name(CONTEXT)}: step"
                with failing(log, name, unit="ms"):
                    step = time_decode(loaded, device, num_rows=num_rows, context=CONTEXT).median
                    floor = shape.decode_floor_ms(
                        num_rows, measured_context(CONTEXT), ceilings, layer_bits=LAYER_BITS[form]
                    )
                    log.measured(name, step, unit="ms", floor=floor)
                    if form == "bfloat16":
                        plain[num_rows] = step
                    elif num_rows in plain:
                        log.measured(quantized_metric(form, num_rows), plain[num_rows] / step, unit="times")


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark("quantized_decode", measure, description=__doc__, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
