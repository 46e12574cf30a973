"""From completions to numbers, and from numbers to a table.

Owns what each reported number means. Measures nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from benchmarks.workload import Round


@dataclass(frozen=True, slots=True)
class Percentiles:
    """A distribution in the unit of its samples; NaN where there were none."""

    p50: float
    p90: float
    p99: float
    max: float


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The `percent`-th percentile of ascending samples, linear between neighbours; NaN of none."""
    if not ordered:
        return math.nan
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def percentiles(samples: Sequence[float]) -> Percentiles:
    ordered = sorted(samples)
    return Percentiles(*(percentile(ordered, percent) for percent in (50, 90, 99, 100)))


@dataclass(frozen=True, slots=True)
class Summary:
    """One way of asking (a server at some concurrency, or a peer), over all its rounds.

    tokens_per_second: all output tokens over all the time; round_tokens_per_second: each round's own.
    ttft_ms: from sending the request to the first text. itl_ms: between one text and the next, of all
    requests together. tpot_ms: a request's mean time for each token after the first.
    e2e_s: from sending the request to the stream's end.
    """

    name: str
    concurrency: int
    num_requests: int
    num_errors: int
    num_tokens: int
    seconds: float
    tokens_per_second: float
    round_tokens_per_second: tuple[float, ...]
    mean_context_len: float
    ttft_ms: Percentiles
    itl_ms: Percentiles
    tpot_ms: Percentiles
    e2e_s: Percentiles

    def as_json(self) -> dict[str, Any]:
        return _finite(asdict(self))  # type: ignore[no-any-return]


def summarize(name: str, rounds: Sequence[Round], *, concurrency: int) -> Summary:
    """The numbers of one or more rounds of the same load."""
    completions = [completion for round in rounds for completion in round.completions]
    seconds = sum(round.seconds for round in rounds)
    num_tokens = sum(round.num_tokens for round in rounds)
    gaps = [
        later - earlier for completion in completions for earlier, later in pairwise(completion.token_times)
    ]
    return Summary(
        name=name,
        concurrency=concurrency,
        num_requests=len(completions),
        num_errors=sum(len(round.errors) for round in rounds),
        num_tokens=num_tokens,
        seconds=seconds,
        tokens_per_second=_ratio(num_tokens, seconds),
        round_tokens_per_second=tuple(_ratio(round.num_tokens, round.seconds) for round in rounds),
        mean_context_len=_ratio(
            sum(c.num_prompt_tokens + c.num_tokens / 2 for c in completions), len(completions)
        ),
        ttft_ms=percentiles([1000 * (c.token_times[0] - c.start) for c in completions]),
        itl_ms=percentiles([1000 * gap for gap in gaps]),
        tpot_ms=percentiles(
            [
                1000 * (c.token_times[-1] - c.token_times[0]) / (c.num_tokens - 1)
                for c in completions
                if c.num_tokens > 1
            ]
        ),
        e2e_s=percentiles([c.end - c.start for c in completions]),
    )


def speed_ratio(ours: Summary, theirs: Summary) -> float:
    """How many times the tokens per second; NaN when the other made none."""
    return _ratio(ours.tokens_per_second, theirs.tokens_per_second)


def table(summaries: Sequence[Summary]) -> str:
    """A line for each summary: throughput, then p50 p90 p99 max of each latency."""
    header = [
        "",
        "streams",
        "requests",
        "tokens/s",
        "TTFT ms",
        "",
        "",
        "",
        "ITL ms",
        "",
        "",
        "",
        "e2e s",
        "",
        "",
        "",
    ]
    kinds = ["", "", "", "", *["p50", "p90", "p99", "max"] * 3]
    rows = [header, kinds]
    for summary in summaries:
        row = [summary.name, str(summary.concurrency), str(summary.num_requests)]
        row.append(f"{summary.tokens_per_second:.1f}")
        for distribution in (summary.ttft_ms, summary.itl_ms, summary.e2e_s):
            digits = 2 if distribution is summary.e2e_s else 1
            values = (distribution.p50, distribution.p90, distribution.p99, distribution.max)
            row += [f"{value:.{digits}f}" for value in values]
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def _ratio(value: float, by: float) -> float:
    return value / by if by else math.nan


def _finite(value: Any) -> Any:
    """JSON knows no NaN: None instead; and no more digits than were measured."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value
