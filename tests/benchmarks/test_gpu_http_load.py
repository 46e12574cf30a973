"""What a client and a server's metrics saw becomes times a step and a token."""

from __future__ import annotations

import json

import pytest

from benchmarks.gpu.http_load import Counts, chat_body, digits, parse_counts, window_of
from benchmarks.sse_client import Completion, LoadError

METRICS = """\
# TYPE graphllm_step_seconds histogram
graphllm_step_seconds_count 100.0
graphllm_step_seconds_sum 0.25
graphllm_generated_tokens_total 1e+03
graphllm_running_sequences 8.0
"""


def counts(when: float, *, steps: float, seconds: float, tokens: float, host: float | None = None) -> Counts:
    return Counts(when, 2.0, steps, seconds, tokens, host, 0.0)


def stream(*times: float, num_tokens: int | None = None) -> Completion:
    return Completion(
        start=0.0,
        token_times=times,
        end=times[-1],
        num_tokens=len(times) if num_tokens is None else num_tokens,
        num_prompt_tokens=4,
        text="",
    )


def test_metrics_are_read_and_those_that_do_not_exist_are_none() -> None:
    read = parse_counts(METRICS, when=7.0)
    assert read == Counts(7.0, 8.0, 100.0, 0.25, 1000.0, None, None)
    more = parse_counts(
        METRICS + "graphllm_host_seconds_total 0.5\ngraphllm_graph_misses_total 3.0\n", when=7.0
    )
    assert (more.host_seconds, more.num_misses) == (0.5, 3.0)


def test_a_metric_that_is_needed_and_missing_is_an_error_that_names_it() -> None:
    with pytest.raises(LoadError, match="graphllm_step_seconds_sum"):
        parse_counts(METRICS.replace("_sum", "_sun"), when=0.0)


def test_only_what_lies_in_the_window_counts() -> None:
    start = counts(10.0, steps=100, seconds=1.0, tokens=200, host=0.1)
    end = counts(10.5, steps=200, seconds=1.4, tokens=400, host=0.102)
    # The first gaps of a stream are those of prompts being computed.
    streams = [stream(9.0, 9.9, 10.1, 10.106, 10.111), stream(9.5, 10.2, 10.205, 10.209, 12.0)]
    window = window_of(start, end, streams)
    assert window.num_steps == 100
    assert window.step == pytest.approx(0.004)
    assert window.idle == pytest.approx(0.001)
    assert window.inter_token == pytest.approx((0.006 + 0.005 + 0.005 + 0.004) / 4)
    assert window.host == pytest.approx(0.002 / 200)
    assert window.tokens_per_second == pytest.approx(400)


@pytest.mark.parametrize(
    ("step", "idle", "share"),
    [(0.001, 10e-6, 1 / 2.02), (0.0001, 10e-6, 1.0), (0.098, 0.002, 1.0), (0.001, -5e-6, 0.0)],
    ids=["2 % is more", "10 us is more", "exactly 2 %", "clocks differ"],
)
def test_idle_is_compared_with_what_is_allowed(step: float, idle: float, share: float) -> None:
    start = counts(0.0, steps=0, seconds=0.0, tokens=0)
    end = counts(1000 * (step + idle), steps=1000, seconds=1000 * step, tokens=1000)
    window = window_of(start, end, [stream(0.0, 1000 * step / 2)])
    assert window.idle_over_allowed == pytest.approx(share, abs=0.02)


def test_tokens_without_text_make_times_between_tokens_unknown() -> None:
    start, end = counts(0.0, steps=0, seconds=0.0, tokens=0), counts(1.0, steps=9, seconds=0.9, tokens=9)
    with pytest.raises(LoadError, match="carried no text"):
        window_of(start, end, [stream(0.1, 0.2, 0.3, num_tokens=4)])


def test_a_window_in_which_nothing_happened_is_an_error() -> None:
    same = counts(0.0, steps=5, seconds=0.5, tokens=5)
    with pytest.raises(LoadError, match="0 steps"):
        window_of(same, counts(1.0, steps=5, seconds=0.5, tokens=5), [stream(0.1, 0.2)])


def test_prompts_have_a_length_and_differ() -> None:
    assert len(digits(500, seed=1)) == 500
    assert digits(40, seed=1) == digits(40, seed=1) != digits(40, seed=2)
    body = json.loads(chat_body("model", "12", max_tokens=7))
    assert (body["max_tokens"], body["ignore_eos"], body["messages"][0]["content"]) == (7, True, "12")
