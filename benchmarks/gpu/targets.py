"""What the CUDA path must show on one H100: every line as data.

Owns the limits and what each is a limit of. A benchmark names its metric; whether the number will do is
looked up here, and the results page lists these lines, measured or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

LARGE_MODEL_STEP = "large_model"
_LARGE_MODEL = "llama-3.1-8b"
_OF_THE_LARGE_MODEL = ("decode_step", "graph_memory", "prefill")


class Sense(Enum):
    """Which numbers meet a limit."""

    AT_MOST = "at most"
    AT_LEAST = "at least"
    REPORTED = "reported"


@dataclass(frozen=True, slots=True)
class Target:
    """One line. `limit` is None where the number is only to be reported; `stretch` is worth a mention."""

    benchmark: str
    metric: str
    what: str
    sense: Sense
    limit: float | None
    unit: str
    stretch: float | None = None

    @property
    def id(self) -> str:
        return f"{self.benchmark}/{self.metric}"

    @property
    def step(self) -> str:
        """The step of the run that measures it: the benchmark's own, or the one that shares the 8B."""
        shares = self.benchmark in _OF_THE_LARGE_MODEL and self.metric.startswith(_LARGE_MODEL)
        return LARGE_MODEL_STEP if shares else self.benchmark

    @property
    def text(self) -> str:
        """The limit in words."""
        if self.limit is None:
            return self.sense.value
        stretch = "" if self.stretch is None else f" (stretch {self.stretch:g})"
        return f"{self.sense.value} {self.limit:g} {self.unit}{stretch}"

    def is_met_by(self, value: float) -> bool | None:
        """None where there is no limit."""
        if self.limit is None:
            return None
        return value <= self.limit if self.sense is Sense.AT_MOST else value >= self.limit


def _at_most(
    benchmark: str, metric: str, what: str, *, limit: float, unit: str, stretch: float | None = None
) -> Target:
    return Target(benchmark, metric, what, Sense.AT_MOST, limit, unit, stretch)


def _at_least(benchmark: str, metric: str, what: str, *, limit: float, unit: str) -> Target:
    return Target(benchmark, metric, what, Sense.AT_LEAST, limit, unit)


def _reported(benchmark: str, metric: str, what: str, *, unit: str) -> Target:
    return Target(benchmark, metric, what, Sense.REPORTED, None, unit)


def step_metric(shape: str, batch: int, context: str) -> str:
    """The name of a decode step's time over its floor."""
    return f"{shape} batch {batch} context {context}: step over floor"


def attention_metric(shape: str, batch: int) -> str:
    """The name of the decode attention's share of the copy bandwidth, context 4k."""
    return f"{shape} batch {batch} context 4k: share of copy bandwidth"


def inter_token_metric(num_streams: int) -> str:
    """The name of the mean inter-token time over the device's step, on the 1B."""
    return f"llama-3.2-1b {num_streams} streams: inter-token time over device step"


def idle_metric(num_streams: int) -> str:
    """The name of the device's idle time in units of what is allowed, on the 1B."""
    return f"llama-3.2-1b {num_streams} streams: idle between replays over what is allowed"


def host_time_metric(num_streams: int) -> str:
    """The name of the event loop's time a token, on the 1B."""
    return f"llama-3.2-1b {num_streams} streams: host time a token"


def swap_metric(direction: str) -> str:
    """The name of a swap's bandwidth, "out" or "in", as a share of a large pinned copy's."""
    return f"llama-3.1-8b swap {direction}: share of the pinned copy's rate"


def quantized_metric(form: str, batch: int) -> str:
    """The name of a decode step's speed with packed weights as a multiple of bfloat16's."""
    return f"llama-3.1-8b {form} batch {batch} context 1k: step's speed beside bfloat16"


FP8_METRIC = "llama-3.1-8b batch 64 context 4k: decode attention over fp8 against bfloat16"
PDL_METRIC = "qwen3-0.6b batch 1 context 1k: dependent launch on against off"
RAGGED_METRIC = "llama-3.1-8b 16k + 63 x 512: time over a uniform batch of the same bytes"
PREFILL_METRIC = "llama-3.1-8b 8k prompt: share of the matrix product's rate"
TTFT_8B_METRIC = "llama-3.1-8b 1k prompt: time to first token over floor"
TTFT_1B_METRIC = "llama-3.2-1b 1k prompt: time to first token less floor"
LOOK_AHEAD_METRIC = "llama-3.2-1b 8 streams: look-ahead on against off"
SINGLE_METRIC = "llama-3.1-8b 64 streams over generate one at a time"
BATCHED_METRIC = "llama-3.1-8b 64 streams over generate with a batch of 64"
STARTUP_METRIC = "llama-3.1-8b: process start to first token"
POOL_METRIC = "llama-3.1-8b: graphs' pool over the largest bucket's need"
POOL_TOTAL_METRIC = "llama-3.1-8b: graphs' pool with the driver's part"

TARGETS: tuple[Target, ...] = (
    _at_most(
        "decode_step",
        step_metric("llama-3.1-8b", 1, "1k"),
        "Whole decode step of Llama-3.1-8B, sampled token included, batch 1, context 1k, over its floor",
        limit=1.10,
        unit="times",
    ),
    _at_most(
        "decode_step",
        step_metric("llama-3.2-1b", 1, "1k"),
        "The same of Llama-3.2-1B",
        limit=1.25,
        unit="times",
        stretch=1.15,
    ),
    _at_most(
        "decode_step",
        step_metric("qwen3-0.6b", 1, "1k"),
        "The same of Qwen3-0.6B",
        limit=1.6,
        unit="times",
    ),
    _at_least(
        "decode_step",
        PDL_METRIC,
        "Programmatic dependent launch on against off, decode step of Qwen3-0.6B",
        limit=1.10,
        unit="times",
    ),
    *(
        _reported(
            "decode_step",
            step_metric(shape, 1, "128k"),
            f"Decode of {name} at 128k over its floor",
            unit="times",
        )
        for shape, name in (("llama-3.1-8b", "Llama-3.1-8B"), ("llama-3.2-1b", "Llama-3.2-1B"))
    ),
    _at_least(
        "peers",
        SINGLE_METRIC,
        "Llama-3.1-8B, 64 streams through HTTP: tokens a second over transformers generate, one at a time",
        limit=24.0,
        unit="times",
    ),
    _reported("peers", BATCHED_METRIC, "The same over generate with a batch of 64", unit="times"),
    *(
        _at_least(
            "attention",
            attention_metric(shape, batch),
            f"Decode attention with {name}'s heads, batch {batch}, context 4k, of copy bandwidth",
            limit=0.90,
            unit="of copy bandwidth",
        )
        for shape, name in (("llama-3.1-8b", "Llama-3.1-8B"), ("llama-3.2-1b", "Llama-3.2-1B"))
        for batch in (32, 64, 128)
    ),
    _at_most(
        "attention",
        RAGGED_METRIC,
        "Decode attention of one 16k and 63 rows of 512 over a uniform batch of the same bytes, same graph",
        limit=1.15,
        unit="times",
    ),
    _at_least(
        "prefill",
        PREFILL_METRIC,
        "Prefill of 8k on Llama-3.1-8B, of the rate that a large matrix product reaches",
        limit=0.70,
        unit="of the rate",
    ),
    _at_most(
        "serving",
        TTFT_8B_METRIC,
        "Time to first token for 1k through HTTP, Llama-3.1-8B, over its floor",
        limit=1.4,
        unit="times",
    ),
    _at_most(
        "serving",
        TTFT_1B_METRIC,
        "Time to first token for 1k through HTTP, Llama-3.2-1B, less its floor",
        limit=4.0,
        unit="ms",
    ),
    *(
        _at_most(
            "serving",
            idle_metric(num_streams),
            f"Device idle between replays on the 1B, streams: {num_streams}, in units of 2 % or 10 us,"
            " whichever is more",
            limit=1.0,
            unit="times",
        )
        for num_streams in (1, 8, 64)
    ),
    _reported("serving", LOOK_AHEAD_METRIC, "Look-ahead on against off, tokens a second", unit="times"),
    *(
        _at_most(
            "serving",
            inter_token_metric(num_streams),
            f"Mean inter-token time of a client over the device's step on the 1B, streams: {num_streams}",
            limit=limit,
            unit="times",
        )
        for num_streams, limit in ((1, 1.05), (8, 1.05), (64, 1.10))
    ),
    _reported("serving", inter_token_metric(256), "The same at 256 streams", unit="times"),
    _reported("serving", host_time_metric(256), "Host time a token at 256 streams", unit="us"),
    _at_most(
        "startup",
        STARTUP_METRIC,
        "Process start to first token, Llama-3.1-8B in safetensors in the page cache, Triton's cache warm",
        limit=10.0,
        unit="s",
    ),
    *(
        _reported(
            "swap",
            swap_metric(direction),
            f"Swap {direction} of 256 scattered KV blocks of Llama-3.1-8B over the rate of a pinned copy",
            unit="of the rate",
        )
        for direction in ("out", "in")
    ),
    _reported(
        "swap",
        FP8_METRIC,
        "Decode attention of Llama-3.1-8B over an fp8 KV cache against bfloat16, batch 64, context 4k",
        unit="times",
    ),
    *(
        _reported(
            "quantized_decode",
            quantized_metric(form, batch),
            f"Decode step of Llama-3.1-8B in {form} against bfloat16, batch {batch}, context 1k",
            unit="times",
        )
        for form in ("int4", "fp8")
        for batch in (1, 8, 32)
    ),
    _at_most(
        "graph_memory",
        POOL_METRIC,
        "The graphs' pool over the largest bucket's need",
        limit=1.05,
        unit="times",
    ),
    _at_most(
        "graph_memory", POOL_TOTAL_METRIC, "The graphs' pool with the driver's part", limit=1.0, unit="GiB"
    ),
)

_BY_METRIC = {(target.benchmark, target.metric): target for target in TARGETS}


def target_of(benchmark: str, metric: str) -> Target | None:
    """The target of a metric, if it has one."""
    return _BY_METRIC.get((benchmark, metric))
