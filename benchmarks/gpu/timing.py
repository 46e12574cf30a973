"""Device times by CUDA events, and what becomes of many of them.

Owns how a time is taken: the host gets ahead of the device before the first event, so that no launch is
waited for inside a measurement, and work is repeated between two events, so that their own resolution (half
a microsecond) does not count. Torch is imported by whoever calls the functions that need it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_AHEAD_CYCLES = 2_000_000  # about a millisecond, in which the host launches what is measured


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one run of something: the median and the least of `num_samples`."""

    median: float
    least: float
    num_samples: int


def timing_of(samples: Sequence[float]) -> Timing:
    """Raises ValueError for no samples, or one that is not a positive number."""
    if not samples:
        raise ValueError("no samples")
    if not all(math.isfinite(sample) and sample > 0 for sample in samples):
        raise ValueError(f"not times: {sorted(samples)[:3]} ...")
    ordered = sorted(samples)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return Timing(median, ordered[0], len(ordered))


def time_on_device(
    run: Callable[[], Any],
    *,
    stream: Any = None,
    repeats: int = 10,
    groups: int = 20,
    before: Callable[[], Any] | None = None,
) -> Timing:
    """Milliseconds of one `run`, which only launches: `groups` samples of the mean of `repeats` runs.

    `before` is called in front of each group, outside of what is timed. stream: None is the current one.
    """
    import torch

    cuda: Any = torch.cuda  # only partly typed
    stream = stream or cuda.current_stream()
    pairs = []
    # An engine's tensors are inference tensors, which nothing else may write.
    with torch.cuda.stream(stream), torch.inference_mode():
        for _ in range(groups):
            if before is not None:
                before()
            start, end = (cuda.Event(enable_timing=True) for _ in range(2))
            cuda._sleep(_AHEAD_CYCLES)
            start.record(stream)
            for _ in range(repeats):
                run()
            end.record(stream)
            pairs.append((start, end))
            # Not further ahead than a group: a queue that is full blocks the host inside a measurement.
            end.synchronize()
    return timing_of([start.elapsed_time(end) / repeats for start, end in pairs])


def captured(run: Callable[[], Any], *, repeats: int = 1) -> Any:
    """A CUDA graph of `repeats` runs, each of which only launches. Run once before, to compile."""
    import torch

    cuda: Any = torch.cuda  # only partly typed
    stream = cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            run()
    return graph
