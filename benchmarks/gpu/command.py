"""What all benchmarks on a card have in common: flags, a card, failures that become lines.

Owns no measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence

from benchmarks.gpu.results import ResultLog

Measure = Callable[[argparse.Namespace, ResultLog], None]
AddFlags = Callable[[argparse.ArgumentParser], None]


def run_benchmark(
    name: str,
    measure: Measure,
    *,
    description: str | None,
    argv: Sequence[str] | None,
    part: str = "bench",
    add_flags: AddFlags | None = None,
) -> int:
    """Parse flags, measure, and say whether all went well: the exit code of a benchmark.

    1 where there is no card (and then no line is written) and where something could not be measured. A
    target that is missed is a result, not a failure.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.gpu.{name}", description=(description or "").splitlines()[0]
    )
    if add_flags is not None:
        add_flags(parser)
    options = parser.parse_args(argv)
    # Like Ctrl-C: the processes that a benchmark started must not outlive it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    import torch

    if not torch.cuda.is_available():
        print(f"{name} needs a CUDA device, and torch {torch.__version__} sees none.", file=sys.stderr)
        return 1
    log = ResultLog(part, name)
    with failing(log, name, unit="finished"):
        measure(options, log)
    return 1 if any(result.value is None and result.passed is False for result in log.results) else 0


@contextlib.contextmanager
def failing(log: ResultLog, metric: str, *, unit: str, peer: str | None = None) -> Iterator[None]:
    """An exception inside becomes a line that says why the metric is missing, and what follows goes on."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        log.failed(metric, f"{type(error).__name__}: {error}", unit=unit, peer=peer)
    finally:
        gc.collect()
        empty_device_cache()


def empty_device_cache() -> None:
    """Give back what the last model held, where there is a card."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
