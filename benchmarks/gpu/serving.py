"""Our server, seen by an HTTP client in another process: tokens a second, time to first token, steadiness.

    python -m benchmarks.gpu.serving

Owns which servers are started and what of them is reported. Nothing is asked of a device here but the
ceilings; what it does while serving is known from the server's own metrics.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from benchmarks.gpu.ceilings import measure_ceilings
from benchmarks.gpu.command import empty_device_cache, failing, run_benchmark
from benchmarks.gpu.engines import LARGE_SERVER, SMALL_SERVER, EngineLimits
from benchmarks.gpu.floors import Ceilings, shape_of, shape_path
from benchmarks.gpu.http_load import Window, run_load, run_window, times_to_first_token
from benchmarks.gpu.results import ResultLog
from benchmarks.gpu.targets import (
    LOOK_AHEAD_METRIC,
    TTFT_1B_METRIC,
    TTFT_8B_METRIC,
    host_time_metric,
    idle_metric,
    inter_token_metric,
)
from benchmarks.processes import graphllm_server

SMALL, LARGE = SMALL_SERVER.shape, LARGE_SERVER.shape
PROMPT = 1024
# Streams, tokens of each, seconds of the window in which all decode.
WINDOWS = ((1, 2000, 0.8), (8, 2000, 0.8), (64, 1200, 0.8), (256, 700, 0.8))
LARGE_WINDOW = (64, 200, 1.0)
LOOK_AHEAD_WINDOW = (8, 2000, 0.8)
_READY_TIMEOUT = 60.0
_NUM_PROMPTS = 12


@contextmanager
def server(limits: EngineLimits, *flags: str, folder: str | None = None) -> Iterator[str]:
    """Our server with its graphs, of random weights unless they lie in a folder; gives its address.

    Its prompts must differ, as those of http_load do: it keeps the KV of those that it has seen.
    """
    weights = ["--model", folder] if folder else ["--model", str(shape_path(limits.shape))]
    arguments = [*weights, "--load-format", "auto" if folder else "dummy", "--device", "cuda"]
    arguments += ["--dtype", "bfloat16", "--served-model-name", "model", "--eager-capture"]
    # Nothing is preempted here, and to pin the default takes a second or two.
    arguments += [*limits.flags(), "--swap-space", "0", *flags]
    with graphllm_server(arguments, ready_timeout=_READY_TIMEOUT) as (url, _):
        yield url


def measure(options: argparse.Namespace, log: ResultLog) -> None:
    ceilings = measure_ceilings()
    empty_device_cache()
    with failing(log, f"{SMALL}: serving", unit="finished"):
        _measure_small(ceilings, log)
    with failing(log, f"{LARGE}: serving", unit="finished"):
        _measure_large(ceilings, log)


def _measure_small(ceilings: Ceilings, log: ResultLog) -> None:
    with server(SMALL_SERVER) as url:
        run_load(run_window(url, model="model", num_streams=8, max_tokens=400, seconds=0.05))
        with failing(log, TTFT_1B_METRIC, unit="ms"):
            milliseconds, floor = _first_tokens(url, SMALL, ceilings, log)
            log.measured(TTFT_1B_METRIC, milliseconds - floor, unit="ms")
        with_look_ahead: float | None = None
        for num_streams, max_tokens, seconds in WINDOWS:
            with failing(log, inter_token_metric(num_streams), unit="times"):
                window = _window(url, num_streams, max_tokens, seconds=seconds)
                write_window(log, SMALL, window)
                if num_streams == LOOK_AHEAD_WINDOW[0]:
                    with_look_ahead = window.tokens_per_second
    with (
        failing(log, LOOK_AHEAD_METRIC, unit="times"),
        server(SMALL_SERVER, "--no-look-ahead") as url,
    ):
        num_streams, max_tokens, seconds = LOOK_AHEAD_WINDOW
        run_load(run_window(url, model="model", num_streams=1, max_tokens=400, seconds=0.05))
        without = _window(url, num_streams, max_tokens, seconds=seconds)
        name = f"{SMALL} {num_streams} streams without look-ahead"
        log.measured(f"{name}: idle between replays", 1e6 * without.idle, unit="us")
        log.measured(f"{name}: tokens a second", without.tokens_per_second, unit="tokens/s")
        if with_look_ahead is None:
            raise RuntimeError("there is no number with look-ahead")
        log.measured(LOOK_AHEAD_METRIC, with_look_ahead / without.tokens_per_second, unit="times")


def _measure_large(ceilings: Ceilings, log: ResultLog) -> None:
    num_streams, max_tokens, seconds = LARGE_WINDOW
    with server(LARGE_SERVER) as url:
        run_load(run_window(url, model="model", num_streams=8, max_tokens=60, seconds=0.05))
        with failing(log, TTFT_8B_METRIC, unit="times"):
            milliseconds, floor = _first_tokens(url, LARGE, ceilings, log)
            log.measured(TTFT_8B_METRIC, milliseconds / floor, unit="times", floor=1.0)
        window = _window(url, num_streams, max_tokens, seconds=seconds)
        name = f"{LARGE} {num_streams} streams"
        log.measured(f"{name}: tokens a second", window.tokens_per_second, unit="tokens/s")
        log.measured(
            f"{name}: inter-token time over device step", window.inter_token / window.step, unit="times"
        )
        log.measured(f"{name}: idle between replays", 1e6 * window.idle, unit="us")


def _window(url: str, num_streams: int, max_tokens: int, *, seconds: float) -> Window:
    load = run_window(url, model="model", num_streams=num_streams, max_tokens=max_tokens, seconds=seconds)
    window, _ = run_load(load)
    return window


def write_window(log: ResultLog, shape: str, window: Window) -> None:
    """The lines of one window."""
    name = f"{shape} {window.num_streams} streams"
    log.measured(f"{name}: tokens a second", window.tokens_per_second, unit="tokens/s")
    log.measured(f"{name}: device step", 1e3 * window.step, unit="ms")
    log.measured(f"{name}: inter-token time", 1e3 * window.inter_token, unit="ms", floor=1e3 * window.step)
    log.measured(f"{name}: idle between replays", 1e6 * window.idle, unit="us")
    if window.num_misses is not None:
        log.measured(f"{name}: steps without a graph", window.num_misses, unit="steps")
    log.measured(
        inter_token_metric(window.num_streams), window.inter_token / window.step, unit="times", floor=1.0
    )
    log.measured(idle_metric(window.num_streams), window.idle_over_allowed, unit="times")
    metric = host_time_metric(window.num_streams)
    if window.host is None:
        log.failed(metric, "the server's metrics do not say", unit="us")
    else:
        log.measured(metric, 1e6 * window.host, unit="us")


def _first_tokens(url: str, shape: str, ceilings: Ceilings, log: ResultLog) -> tuple[float, float]:
    """(median milliseconds, floor) of a prompt's time to first token; writes both."""
    asking = times_to_first_token(url, model="model", num_tokens=PROMPT, num_requests=_NUM_PROMPTS)
    seconds, num_tokens = run_load(asking)
    floor = shape_of(shape).prefill_floor_ms(num_tokens, ceilings)
    median = 1e3 * statistics.median(seconds)
    log.measured(f"{shape} 1k prompt: time to first token", median, unit="ms", floor=floor)
    return median, floor


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark("serving", measure, description=__doc__, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
