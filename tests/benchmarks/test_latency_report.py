"""The numbers of a benchmark: each against a case that can be worked out by hand."""

from __future__ import annotations

import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.latency_report import percentile, percentiles, speed_ratio, summarize, table
from benchmarks.sse_client import Completion
from benchmarks.workload import Round


def completion(*token_times: float, start: float = 0.0, num_tokens: int | None = None) -> Completion:
    return Completion(
        start=start,
        token_times=token_times,
        end=token_times[-1] + 0.5,
        num_tokens=len(token_times) if num_tokens is None else num_tokens,
        num_prompt_tokens=10,
        text="x",
    )


def test_percentiles_lie_between_neighbours() -> None:
    ordered = [10.0, 20.0, 30.0, 40.0, 50.0]
    assert percentile(ordered, 0) == 10.0
    assert percentile(ordered, 50) == 30.0
    assert percentile(ordered, 90) == pytest.approx(46.0)
    assert percentile(ordered, 100) == 50.0


def test_percentiles_do_not_need_order_and_survive_one_sample_or_none() -> None:
    assert percentiles([3.0, 1.0, 2.0]).p50 == 2.0
    assert percentiles([7.0]) == percentiles([7.0, 7.0])
    assert math.isnan(percentiles([]).p99)


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=50))
def test_the_median_is_the_median(samples: list[float]) -> None:
    assert percentiles(samples).p50 == pytest.approx(statistics.median(samples))


def test_summary_of_one_request() -> None:
    only = Round((completion(1.0, 1.2, 1.6, 1.7, start=0.5),), (), seconds=2.0)
    summary = summarize("server", [only], concurrency=1)
    assert summary.num_tokens == 4
    assert summary.tokens_per_second == 2.0
    assert summary.ttft_ms.p50 == pytest.approx(500)
    assert summary.itl_ms.p50 == pytest.approx(200)
    assert summary.itl_ms.max == pytest.approx(400)
    assert summary.tpot_ms.p50 == pytest.approx(700 / 3)
    assert summary.e2e_s.p50 == pytest.approx(1.7)
    assert summary.mean_context_len == 12.0


def test_throughput_is_all_tokens_over_all_time_not_the_mean_of_rounds() -> None:
    rounds = [
        Round((completion(1.0, num_tokens=10),), (), seconds=1.0),
        Round((completion(1.0, num_tokens=10),), (), seconds=4.0),
    ]
    summary = summarize("server", rounds, concurrency=1)
    assert summary.tokens_per_second == 4.0
    assert summary.round_tokens_per_second == (10.0, 2.5)


def test_gaps_are_within_a_request_never_between_two() -> None:
    both = Round((completion(1.0, 1.1), completion(5.0, 5.1)), (), seconds=6.0)
    assert summarize("server", [both], concurrency=2).itl_ms.max == pytest.approx(100)


def test_the_server_s_count_of_tokens_is_used_where_events_carry_several() -> None:
    one = Round((completion(1.0, 2.0, num_tokens=5),), (), seconds=1.0)
    assert summarize("server", [one], concurrency=1).tpot_ms.p50 == pytest.approx(250)


def test_errors_are_counted_and_no_request_is_no_crash() -> None:
    summary = summarize("server", [Round((), ("refused", "refused"), seconds=0.0)], concurrency=4)
    assert (summary.num_requests, summary.num_errors) == (0, 2)
    assert math.isnan(summary.tokens_per_second)
    assert json.loads(json.dumps(summary.as_json(), allow_nan=False))["tokens_per_second"] is None
    assert "nan" in table([summary])


def test_speed_ratio() -> None:
    fast = summarize("a", [Round((completion(1.0, num_tokens=30),), (), seconds=1.0)], concurrency=1)
    slow = summarize("b", [Round((completion(1.0, num_tokens=10),), (), seconds=1.0)], concurrency=1)
    none = summarize("c", [Round((), (), seconds=0.0)], concurrency=1)
    assert speed_ratio(fast, slow) == 3.0
    assert math.isnan(speed_ratio(fast, none))


def test_the_table_lines_up() -> None:
    summaries = [
        summarize("server", [Round((completion(1.0, 2.0),), (), seconds=0.001)], concurrency=1),
        summarize("transformers", [Round((completion(1.0, 2.0),), (), seconds=9.0)], concurrency=16),
    ]
    lines = table(summaries).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split()[:4] == ["server", "1", "1", "2000.0"]
    assert lines[2].split()[4:8] == ["1000.0"] * 4
