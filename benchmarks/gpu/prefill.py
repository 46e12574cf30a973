"""Prefill of a long prompt, as a share of the rate that a large matrix product reaches in the same run.

    python -m benchmarks.gpu.prefill

The operations are those of `ModelShape.prefill_flops`: products, causal attention, the head for one token;
the time is the device's, from the first upload to the sampled token. Owns no engine and no ceiling.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.ceilings import measure_ceilings
from benchmarks.gpu.command import failing, run_benchmark
from benchmarks.gpu.decode_rig import Rows, fill_kv, limited_config, open_engine
from benchmarks.gpu.engines import LARGE_SHAPE, PREFILL, PROMPT
from benchmarks.gpu.floors import Ceilings, shape_of
from benchmarks.gpu.results import ResultLog
from benchmarks.gpu.targets import PREFILL_METRIC
from benchmarks.gpu.timing import Timing, timing_of

SHAPE = LARGE_SHAPE
CHUNKS = (PROMPT, 2048)
_WARM_UPS = 2
_SAMPLES = 5


def time_prefill(loaded: Any, *, prompt: int, chunk: int) -> Timing:
    """Milliseconds from the first chunk's upload to the last one's token, with chunks back to back."""
    import torch

    from graphllm.batch import SlotInstall

    rows = Rows(loaded, [prompt])
    cuda: Any = torch.cuda  # only partly typed
    stream = loaded.runner.stream
    samples = []
    for number in range(_WARM_UPS + _SAMPLES):
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        previous = None
        for first in range(0, prompt, chunk):
            installs = [] if first else [SlotInstall(rows.sequences[0], 0, 0)]
            is_last = first + chunk >= prompt
            handle = rows.launch([min(chunk, prompt - first)], installs, sampled=is_last)
            # Two steps in flight, as in serving.
            if previous is not None:
                rows.finish(previous)
            previous = handle
        end.record(stream)
        if previous is not None:
            rows.finish(previous)
        end.synchronize()
        if number >= _WARM_UPS:
            samples.append(start.elapsed_time(end))
    return timing_of(samples)


def measure(options: argparse.Namespace, log: ResultLog) -> None:
    measure_prefill(measure_ceilings(), log)


def measure_prefill(ceilings: Ceilings, log: ResultLog) -> None:
    """The lines, on an engine of its own: prompts are built by hand, so that none comes from a cache."""
    with open_engine(limited_config(PREFILL, num_kv_tokens=2 * PROMPT)) as (loaded, device):
        with device.on_stream():
            fill_kv(loaded.runner)
        for chunk in CHUNKS:
            name = f"{SHAPE} 8k prompt in chunks of {chunk}"
            with failing(log, name, unit="ms"):
                timing = time_prefill(loaded, prompt=PROMPT, chunk=chunk)
                floor = shape_of(SHAPE).prefill_floor_ms(PROMPT, ceilings)
                log.measured(name, timing.median, unit="ms", floor=floor)
                if chunk == PROMPT:
                    share = prefill_share(timing.median, ceilings, shape=SHAPE, prompt=PROMPT)
                    log.measured(PREFILL_METRIC, share, unit="of the rate", floor=1.0)


def prefill_share(milliseconds: float, ceilings: Ceilings, *, shape: str, prompt: int) -> float:
    """The rate of a prefill over the ceiling's."""
    rate = shape_of(shape).prefill_flops(prompt) / milliseconds * 1e3
    return rate / ceilings.flops_per_second


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark("prefill", measure, description=__doc__, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
