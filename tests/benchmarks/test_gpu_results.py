"""Lines of results, the targets they are judged by, and the page that is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import results, results_page
from benchmarks.gpu.results import (
    OUTPUT_VARIABLE,
    RESULTS_FOLDER,
    Provenance,
    Result,
    ResultLog,
    as_line,
    missing_targets,
    read_lines,
)
from benchmarks.gpu.targets import (
    PDL_METRIC,
    POOL_METRIC,
    PREFILL_METRIC,
    TARGETS,
    TTFT_8B_METRIC,
    step_metric,
    target_of,
)

FIELDS = {
    *("benchmark", "metric", "value", "unit", "target", "passed", "floor", "peer"),
    *("device", "driver", "torch", "triton", "commit", "dirty"),
}
EIGHT_B = step_metric("llama-3.1-8b", 1, "1k")
CARD = Provenance("NVIDIA H100", "580.1", "2.11.0+cu130", "3.6.0", "0123456789ab", False)


def lines_of(folder: Path, part: str = "bench") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"gpu-{part}.jsonl").read_text().splitlines()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results folder of the test's own."""
    monkeypatch.delenv(OUTPUT_VARIABLE, raising=False)
    return tmp_path / "results"


def test_a_line_has_the_fields_of_the_schema_and_a_reason_only_where_there_is_no_value(folder: Path) -> None:
    log = ResultLog("bench", "decode_step", folder=folder)
    log.measured("some time", 1.23456789, unit="ms", floor=1.0)
    log.failed("another time", "it  broke\nbadly", unit="ms", peer="transformers")
    measured, failed = lines_of(folder)
    assert set(measured) == FIELDS
    assert set(failed) == FIELDS | {"reason"}
    assert (measured["value"], measured["floor"], measured["passed"]) == (1.23457, 1.0, None)
    assert (failed["value"], failed["reason"], failed["passed"]) == (None, "it broke badly", False)
    assert failed["peer"] == "transformers"


def test_a_metric_with_a_target_is_judged_by_it(folder: Path) -> None:
    log = ResultLog("bench", "decode_step", folder=folder)
    assert log.measured(EIGHT_B, 1.10, unit="times").passed is True
    assert log.measured(EIGHT_B, 1.11, unit="times").passed is False
    assert log.measured(PDL_METRIC, 1.11, unit="times").passed is True
    assert log.measured(PDL_METRIC, 1.09, unit="times").passed is False
    reported = log.measured(step_metric("llama-3.1-8b", 1, "128k"), 9.0, unit="times")
    assert (reported.target, reported.passed) == (None, None)


def test_a_line_is_in_the_file_as_soon_as_it_is_known(folder: Path) -> None:
    log = ResultLog("bench", "decode_step", folder=folder)
    for number in range(1, 4):
        log.measured(f"time {number}", 1.0, unit="ms")
        assert len(lines_of(folder)) == number


def test_the_folder_that_the_environment_names_gets_every_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(OUTPUT_VARIABLE, str(tmp_path / "out"))
    log = ResultLog("peers", "peers", folder=folder)
    log.measured("rate", 5.0, unit="tokens/s")
    assert lines_of(folder, "peers") == lines_of(tmp_path / "out", "peers") != []


def test_a_number_that_is_not_finite_is_no_result(folder: Path) -> None:
    result = ResultLog("bench", "decode_step", folder=folder).measured(EIGHT_B, float("nan"), unit="times")
    assert (result.value, result.passed, result.reason) == (None, False, "measured nan")


def test_a_peer_that_is_not_installed_is_no_failure(folder: Path) -> None:
    result = ResultLog("peers", "peers", folder=folder).absent("rate", "not installed", unit="tokens/s")
    assert (result.value, result.passed, result.reason) == (None, None, "not installed")


@pytest.mark.parametrize(("value", "reason"), [(None, None), (1.0, "why")])
def test_a_result_has_a_value_or_a_reason(value: float | None, reason: str | None) -> None:
    with pytest.raises(ValueError, match="either a value or a reason"):
        Result(benchmark="b", metric="m", value=value, unit="ms", reason=reason)


@pytest.mark.parametrize(
    ("named", "expected"),
    [("0123abc", ("0123abc", False)), ("0123abc+", ("0123abc", True)), ("", (None, None))],
)
def test_a_tree_without_git_is_told_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, expected: tuple[str | None, bool | None]
) -> None:
    monkeypatch.setattr(results, "REPOSITORY", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv(results.COMMIT_VARIABLE, named)
    results.provenance.cache_clear()
    try:
        machine = results.provenance()
    finally:
        results.provenance.cache_clear()
    assert (machine.commit, machine.dirty) == expected


def test_a_file_with_a_line_that_is_no_result_is_refused(folder: Path) -> None:
    folder.mkdir()
    (folder / "gpu-bench.jsonl").write_text('{"benchmark": "x"}\n')
    with pytest.raises(ValueError, match="line 1: no commit, device, metric"):
        list(read_lines(folder / "gpu-bench.jsonl"))
    assert list(read_lines(folder / "gpu-peers.jsonl")) == []


def test_targets_that_no_line_speaks_of_are_known(folder: Path) -> None:
    ResultLog("bench", "decode_step", folder=folder).measured(EIGHT_B, 1.0, unit="times")
    for step in ("decode_step", "large_model"):
        expected = {target.metric for target in TARGETS if target.step == step}
        missing = {target.metric for target in missing_targets("bench", step, folder=folder)}
        assert missing == expected - {EIGHT_B} != set()


def test_the_large_models_targets_belong_to_the_step_that_shares_its_engine() -> None:
    step_of = {target.metric: target.step for target in TARGETS}
    assert step_of[EIGHT_B] == step_of[PREFILL_METRIC] == step_of[POOL_METRIC] == "large_model"
    assert step_of[step_metric("llama-3.2-1b", 1, "128k")] == step_of[PDL_METRIC] == "decode_step"
    assert step_of[TTFT_8B_METRIC] == "serving"


def test_a_log_of_another_benchmark_writes_to_the_same_file_and_counts_too(folder: Path) -> None:
    log = ResultLog("bench", "large_model", folder=folder)
    log.of("prefill").failed(PREFILL_METRIC, "no room", unit="of the rate")
    assert [result.benchmark for result in log.results] == ["prefill"]
    assert [line["benchmark"] for line in lines_of(folder)] == ["prefill"]
    assert log.benchmark == "large_model"


def test_targets_have_ids_of_their_own_and_a_limit_unless_they_are_reported() -> None:
    assert len({target.id for target in TARGETS}) == len(TARGETS)
    assert all((target.limit is None) == (target.text == "reported") for target in TARGETS)
    assert all(target_of(target.benchmark, target.metric) is target for target in TARGETS)


# The issue's own numbers, one for each of its lines.
@pytest.mark.parametrize(
    ("benchmark", "part_of_metric", "limits"),
    [
        ("decode_step", "llama-3.1-8b batch 1 context 1k", {1.10}),
        ("decode_step", "llama-3.2-1b batch 1 context 1k", {1.25}),
        ("decode_step", "qwen3-0.6b batch 1 context 1k: step", {1.6}),
        ("decode_step", "dependent launch", {1.10}),
        ("peers", "one at a time", {24.0}),
        ("attention", "context 4k", {0.90}),
        ("attention", "16k + 63 x 512", {1.15}),
        ("prefill", "8k", {0.70}),
        ("serving", "llama-3.1-8b 1k prompt", {1.4}),
        ("serving", "llama-3.2-1b 1k prompt", {4.0}),
        ("serving", "64 streams: inter-token", {1.10}),
        ("serving", "-1b 8 streams: inter-token", {1.05}),
        ("startup", "first token", {10.0}),
        ("graph_memory", "largest bucket", {1.05}),
        ("graph_memory", "driver", {1.0}),
    ],
)
def test_limits_are_those_that_were_asked_for(
    benchmark: str, part_of_metric: str, limits: set[float]
) -> None:
    found = {t.limit for t in TARGETS if t.benchmark == benchmark and part_of_metric in t.metric}
    assert found == limits


def write_line(folder: Path, part: str, result: Result) -> None:
    folder.mkdir(exist_ok=True)
    with (folder / f"gpu-{part}.jsonl").open("a") as file:
        file.write(as_line(result, CARD) + "\n")


def row_of(page: str, what: str) -> list[str]:
    (row,) = [line for line in page.splitlines() if line.startswith(f"| {what} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_what_no_line_speaks_of_is_not_measured(folder: Path) -> None:
    folder.mkdir()
    page = results_page.page(folder)
    for target in TARGETS:
        assert row_of(page, target.what) == [target.what, target.text, "not measured", "", ""]
    assert page.count("Not measured.") == len(results_page.PARTS)


def test_the_page_shows_the_latest_line_with_floor_verdict_and_machine(folder: Path) -> None:
    target = target_of("decode_step", EIGHT_B)
    assert target is not None
    for value in (1.3, 1.05):
        result = Result(benchmark="decode_step", metric=EIGHT_B, value=value, unit="times", floor=1.0)
        write_line(folder, "bench", result)
    page = results_page.page(folder)
    assert row_of(page, target.what) == [target.what, "at most 1.1 times", "1.05 times", "1", "yes"]
    assert "NVIDIA H100, driver 580.1, torch 2.11.0+cu130, triton 3.6.0, commit 0123456789ab." in page
    assert "1.3 times" not in page


def test_the_page_says_why_a_number_is_missing(folder: Path) -> None:
    target = target_of("decode_step", EIGHT_B)
    assert target is not None
    result = Result(
        benchmark="decode_step", metric=EIGHT_B, value=None, unit="times", passed=False, reason="no room | x"
    )
    write_line(folder, "bench", result)
    page = results_page.page(folder)
    assert f"| {target.what} | at most 1.1 times | failed: no room \\| x |  | no |" in page


def test_an_outdated_page_is_noticed(folder: Path) -> None:
    folder.mkdir()
    assert results_page.main(["--folder", str(folder)]) == 0
    assert results_page.main(["--folder", str(folder), "--check"]) == 0
    write_line(folder, "bench", Result(benchmark="decode_step", metric=EIGHT_B, value=1.0, unit="times"))
    assert results_page.main(["--folder", str(folder), "--check"]) == 1


def test_the_committed_page_is_current() -> None:
    committed = (RESULTS_FOLDER / results_page.PAGE).read_text(encoding="utf-8")
    assert committed == results_page.page(), "run python -m benchmarks.gpu.results_page"
