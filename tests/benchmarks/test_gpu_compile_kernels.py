"""What is compiled before a run is what the run loads, and the processes that do it leave nothing behind."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import compile_kernels, startup
from benchmarks.gpu.compile_kernels import Job, compile_all
from benchmarks.gpu.decode_rig import limited_config
from benchmarks.gpu.decode_step import decode_config
from benchmarks.gpu.engines import DECODE, ENGINES, GRAPH_TESTS, SMALL_SERVER, engines_of
from benchmarks.gpu.floors import SHAPES, shape_of
from benchmarks.gpu.results import OUTPUT_VARIABLE, REPOSITORY, ResultLog
from graphllm.cli import parse_configs
from graphllm.config import EngineConfig
from graphllm.runner import compilation
from graphllm.runner.compilation import run_share
from graphllm.runner.device import InlineDevice
from graphllm.step_buckets import StepBuckets
from tests.tiny_model import write_tiny_model


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ResultLog:
    monkeypatch.delenv(OUTPUT_VARIABLE, raising=False)
    return ResultLog("compile", "compile", folder=tmp_path / "results")


def said_by(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_every_share_of_every_model_is_compiled_and_the_comparison_without_dependent_launch() -> None:
    jobs = compile_kernels.jobs()
    assert len({job.name for job in jobs}) == len(jobs)
    for shape in SHAPES:
        shares = {job.share for job in jobs if job.shape == shape and job.with_dependent_launch}
        assert shares >= set(compilation.SHARES)
    without = [job for job in jobs if not job.with_dependent_launch]
    assert {(job.shape, job.share) for job in without} == {
        ("qwen3-0.6b", share) for share in compilation.SHARES
    }
    assert {limits for job in without for limits in job.engines()} == {DECODE["qwen3-0.6b"]}


def test_all_engines_are_gone_through_and_nobody_takes_limits_of_their_own() -> None:
    assert {limits for shape in SHAPES for limits in engines_of(shape)} == set(ENGINES)
    folders = [REPOSITORY / "benchmarks" / "gpu", REPOSITORY / "tests" / "gpu"]
    own_limits = {
        path.name
        for folder in folders
        for path in folder.glob("*.py")
        if re.search(r"max_num_seqs ?=|max-num-seqs|max_num_batched_tokens ?=", path.read_text())
    }
    assert own_limits == {"engines.py"}


def test_limits_are_the_same_as_options_and_as_flags() -> None:
    for limits in (SMALL_SERVER, *GRAPH_TESTS.values()):
        parsed, _ = parse_configs(limits.flags())
        assert parsed == EngineConfig(**limits.options())


def test_every_engine_fits_its_model_and_a_large_batch_is_no_hundred_graphs() -> None:
    for limits in ENGINES:
        config = limited_config(limits, num_kv_tokens=limits.max_model_len)
        assert limits.max_model_len <= shape_of(limits.shape).max_context
        assert (config.dtype, config.load_format, config.swap_space) == ("bfloat16", "dummy", 0.0)
    buckets = StepBuckets.choose(
        max_num_seqs=SMALL_SERVER.max_num_seqs,
        max_num_batched_tokens=2048,
        decode_sizes=SMALL_SERVER.cudagraph_capture_sizes,
    )
    assert 2 * len(buckets.decode_sizes) + len(buckets.token_sizes) < 60


def test_the_pool_of_a_decode_engine_holds_the_batches_and_the_longest_context() -> None:
    for shape in SHAPES:
        config = decode_config(shape)
        num_tokens = config.kv_cache_memory_bytes // (2 * shape_of(shape).num_kv_elements)
        assert num_tokens >= 64 * 1088 and num_tokens >= config.max_model_len


@pytest.mark.parametrize("share", compile_kernels.SHARES)
def test_a_share_runs_the_steps_of_a_configuration(tmp_path: Path, share: str) -> None:
    folder = write_tiny_model(tmp_path / "model")
    config = EngineConfig(model=str(folder), device="cpu", dtype="float32", max_num_seqs=4)
    run_share(config, share, InlineDevice())


def test_each_process_has_its_line_and_one_that_fails_stops_no_other(log: ResultLog) -> None:
    codes = {
        "decode": "import sys; sys.exit(3)",
        "mixed": "import json; print('a word'); print(json.dumps({'num_compiled': 7}))",
    }
    jobs = [Job("qwen3-0.6b", share) for share in codes]
    compile_all(log, jobs, command=lambda job: said_by(codes[job.share]), at_once=1)
    found = {result.metric: (result.value, result.reason) for result in log.results}
    assert found["qwen3-0.6b decode"] == (None, "exit code 3")
    assert found["qwen3-0.6b mixed: compiled"] == (7.0, None)
    assert found["qwen3-0.6b mixed"][0] is not None


def test_switches_are_in_the_environment_of_the_process(log: ResultLog) -> None:
    code = "import json, os; print(json.dumps({'num_compiled': int(os.environ.get('GRAPHLLM_PDL', 9))}))"
    jobs = [Job("qwen3-0.6b", "decode"), Job("qwen3-0.6b", "decode", with_dependent_launch=False)]
    compile_all(log, jobs, command=lambda job: said_by(code), at_once=2)
    numbers = {result.metric: result.value for result in log.results if result.unit == "kernels"}
    assert numbers == {
        "qwen3-0.6b decode: compiled": 9,
        "qwen3-0.6b decode without dependent launch: compiled": 0,
    }
    assert "--decode-only" in compile_kernels.child_command(jobs[1])


def test_processes_run_side_by_side_and_none_stays_when_the_run_is_stopped(
    log: ResultLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / share for share in compile_kernels.SHARES]
    code = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    rest = time.sleep

    def stop_when_all_run(seconds: float) -> None:
        rest(seconds)
        if all(path.exists() and path.read_text() for path in paths):
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", stop_when_all_run)
    jobs = [Job("qwen3-0.6b", share) for share in compile_kernels.SHARES]
    with pytest.raises(KeyboardInterrupt):
        compile_all(log, jobs, command=lambda job: [*said_by(code), str(tmp_path / job.share)], at_once=3)
    assert not any(Path(f"/proc/{path.read_text()}").exists() for path in paths)


def test_a_start_that_compiles_comes_first_unless_everything_was_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(compile_kernels.AHEAD_VARIABLE, raising=False)
    assert startup.starts() == ("start that compiles", "start")
    monkeypatch.setenv(compile_kernels.AHEAD_VARIABLE, "0")
    assert startup.starts() == ("start",)
