"""`make gpu`: parts that hang, crash or leave processes behind, their time, and what is said at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import results, results_page, step_runner
from benchmarks.gpu.compile_kernels import AHEAD_VARIABLE
from benchmarks.gpu.step_runner import Outcome, Step, run_steps
from benchmarks.gpu.targets import POOL_METRIC, PREFILL_METRIC, STARTUP_METRIC, TARGETS, step_metric
from tools import gpu

HANG = "import time; print('hanging', flush=True); time.sleep(60)"
# A child in a session of its own, as a benchmark's server is, that would outlive its parent.
LEAVE_BEHIND = (
    "import subprocess, sys; "
    "command = [sys.executable, '-c', 'import time; time.sleep(60)']; "
    "child = subprocess.Popen(command, start_new_session=True); "
    "print(child.pid, flush=True); "
)


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_runner, "_GRACE", 0.3)


def python(name: str, code: str, *, seconds: float = 30.0) -> Step:
    return Step(name, [sys.executable, "-c", code], seconds)


def run(steps: list[Step], folder: Path, *, at_once: int = 1) -> tuple[dict[str, Outcome], str]:
    """Outcomes by name, and all that was said."""
    outcomes: dict[str, Outcome] = {}
    said: list[str] = []
    run_steps(
        steps,
        at_once=at_once,
        folder=folder,
        environment=dict(os.environ),
        on_start=lambda step: None,
        on_output=said.append,
        on_end=lambda outcome: outcomes.update({outcome.step.name: outcome}),
    )
    return outcomes, "".join(said)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_step_that_fails_or_crashes_stops_no_other(tmp_path: Path) -> None:
    steps = [
        python("fails", "import sys; print('so far'); sys.exit(3)"),
        python("crashes", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        python("works", "print('fine')"),
    ]
    outcomes, said = run(steps, tmp_path)
    assert {name: outcome.reason for name, outcome in outcomes.items()} == {
        "fails": "exit code 3",
        "crashes": "killed by SIGSEGV",
        "works": None,
    }
    assert said.split() == ["so", "far", "fine"]


def test_a_step_that_hangs_is_stopped_in_time_and_what_it_said_is_kept(tmp_path: Path) -> None:
    start = time.monotonic()
    outcomes, said = run([python("hangs", HANG, seconds=1.5), python("works", "print('on')")], tmp_path)
    assert time.monotonic() - start < 20
    assert outcomes["hangs"].reason == "stopped after 1 s, the time it has"
    assert outcomes["works"].reason is None
    assert said.split() == ["hanging", "on"]


def test_a_step_that_ignores_being_asked_is_killed(tmp_path: Path) -> None:
    stubborn = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {HANG}"
    outcomes, _ = run([python("stubborn", stubborn, seconds=1.5)], tmp_path)
    assert outcomes["stubborn"].reason is not None
    assert outcomes["stubborn"].seconds < 10


@pytest.mark.parametrize("end", ["time.sleep(60)", "sys.exit(0)"], ids=["stopped", "ended"])
def test_nothing_that_a_step_started_outlives_it(tmp_path: Path, end: str) -> None:
    _, said = run([python("parent", f"import time; {LEAVE_BEHIND}{end}", seconds=2.0)], tmp_path)
    pid = int(said.split()[0])
    assert not is_running(pid)


def test_time_that_a_step_leaves_goes_to_the_next(tmp_path: Path) -> None:
    slow = python("slow", "import time; time.sleep(2)", seconds=1.0)
    outcomes, _ = run([python("quick", "pass", seconds=9.0), slow], tmp_path)
    assert outcomes["slow"].reason is None
    outcomes, _ = run([slow], tmp_path)
    assert outcomes["slow"].reason is not None


def test_what_a_part_leaves_of_its_time_goes_to_the_next(folder: Path) -> None:
    summary = gpu.Summary()
    slow = python("slow", "import time; time.sleep(2)", seconds=1.0)
    quick = gpu.Part("graphs", (python("quick", "pass", seconds=9.0),))
    report = gpu.Report(None, summary, folder=folder)
    gpu.run([quick, gpu.Part("e2e", (slow,))], environment=dict(os.environ), report=report)
    assert summary.failures == []
    gpu.run([gpu.Part("e2e", (slow,))], environment=dict(os.environ), report=report)
    assert len(summary.failures) == 1


def test_steps_side_by_side_take_the_time_of_one(tmp_path: Path) -> None:
    steps = [python(f"step {number}", "import time; time.sleep(1.5)", seconds=5.0) for number in range(3)]
    start = time.monotonic()
    outcomes, _ = run(steps, tmp_path, at_once=3)
    assert time.monotonic() - start < 4
    assert [outcome.reason for outcome in outcomes.values()] == [None] * 3


def test_a_step_is_told_how_long_it_has(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print(sys.argv[1])", step_runner.SECONDS]
    _, said = run([Step("asks", command, 9.0)], tmp_path)
    assert 7 <= int(said) <= 9


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results of the command's own, away from the repository's."""
    monkeypatch.delenv(results.OUTPUT_VARIABLE, raising=False)
    target = tmp_path / "results"
    target.mkdir()
    return target


def lines_of(path: Path) -> dict[str, dict[str, object]]:
    lines = (json.loads(line) for line in path.read_text().splitlines())
    return {line["metric"]: line for line in lines}


def test_targets_of_a_step_that_was_killed_are_failed_with_its_reason(folder: Path) -> None:
    summary = gpu.Summary()
    part = gpu.Part("bench", (python("startup", HANG, seconds=1.0),))
    gpu.run([part], environment=dict(os.environ), report=gpu.Report(None, summary, folder=folder))
    lines = lines_of(folder / "gpu-bench.jsonl")
    assert lines.keys() == {STARTUP_METRIC, "startup"}
    for line in lines.values():
        assert (line["value"], line["passed"]) == (None, False)
        assert str(line["reason"]).startswith("stopped after")
    assert len(summary.failures) == 1 and summary.failures[0].startswith("bench: startup: stopped after")


def test_what_a_step_had_measured_before_it_failed_is_kept(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from benchmarks.gpu.results import ResultLog; "
        f"log = ResultLog('bench', 'startup', folder=Path({str(folder)!r})); "
        f"log.measured({STARTUP_METRIC!r}, 12.0, unit='s'); sys.exit(1)"
    )
    summary = gpu.Summary()
    report = gpu.Report(None, summary, folder=folder)
    gpu.run([gpu.Part("bench", (python("startup", code),))], environment=dict(os.environ), report=report)
    lines = lines_of(folder / "gpu-bench.jsonl")
    assert (lines[STARTUP_METRIC]["value"], lines[STARTUP_METRIC]["passed"]) == (12.0, False)
    assert lines["startup"]["reason"] == "exit code 1"


def test_a_step_that_ends_well_without_its_targets_has_failed(folder: Path) -> None:
    summary = gpu.Summary()
    part = gpu.Part("bench", (python("startup", "pass"),))
    gpu.run([part], environment=dict(os.environ), report=gpu.Report(None, summary, folder=folder))
    assert summary.failures == ["bench: startup: ended without 1 of its targets"]


def test_targets_of_a_shared_step_are_failed_under_their_benchmarks_names(folder: Path) -> None:
    summary = gpu.Summary()
    part = gpu.Part("bench", (python("large_model", "import sys; sys.exit(1)"),))
    gpu.run([part], environment=dict(os.environ), report=gpu.Report(None, summary, folder=folder))
    benchmark_of = {
        metric: line["benchmark"] for metric, line in lines_of(folder / "gpu-bench.jsonl").items()
    }
    assert benchmark_of[POOL_METRIC] == "graph_memory"
    assert benchmark_of[PREFILL_METRIC] == "prefill"
    assert benchmark_of[step_metric("llama-3.1-8b", 1, "1k")] == "decode_step"
    assert not any("llama-3.2-1b" in metric or "qwen" in metric for metric in benchmark_of)
    assert len(summary.failures) == 1


def test_every_target_is_some_steps_and_every_step_is_run() -> None:
    steps = {step for steps in gpu.LIMITS.values() for step in steps}
    assert {target.step for target in TARGETS} <= steps


def test_a_run_begins_its_files_anew(folder: Path) -> None:
    (folder / "gpu-bench.jsonl").write_text("of an older run\n")
    part = gpu.Part("bench", (python("another", "pass"),))
    gpu.run([part], environment=dict(os.environ), report=gpu.Report(None, gpu.Summary(), folder=folder))
    assert not (folder / "gpu-bench.jsonl").exists()


def test_failures_are_said_last_and_decide_the_exit_code(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setenv(results.OUTPUT_VARIABLE, str(out))
    results.ResultLog("bench", "startup", folder=folder).measured(STARTUP_METRIC, 12.0, unit="s")
    report = gpu.Report(None, gpu.Summary(), folder=folder)
    assert gpu.conclude(["bench"], gpu.Summary(), report=report, seconds=1.0) == 0
    said = capsys.readouterr().out
    assert "Targets missed:\n  startup: llama-3.1-8b: process start to first token: 12 s, target 10\n" in said
    assert said.endswith("Nothing failed.\n")
    failed = gpu.Summary(failures=["graphs: graphs: exit code 1"])
    assert gpu.conclude(["bench"], failed, report=report, seconds=1.0) == 1
    assert capsys.readouterr().out.endswith("Failed:\n  graphs: graphs: exit code 1\n")
    assert {path.name for path in out.iterdir()} == {"gpu-bench.jsonl", "results.md"}


def test_parts_and_their_limits_fit_in_nine_minutes_and_eight_files() -> None:
    assert gpu.PARTS == ("compile", "kernels", "graphs", "e2e", "bench", "peers") == results_page.PARTS
    seconds = sum(sum(steps.values()) for steps in gpu.LIMITS.values())
    assert seconds + 15 <= gpu.MAX_SECONDS == 540
    planned = {part.name: sum(step.seconds for step in part.steps) for part in gpu.plan_parts(gpu.PARTS)}
    assert planned == {name: pytest.approx(sum(steps.values())) for name, steps in gpu.LIMITS.items()}
    # A file of lines for each part, the log and the page.
    assert len(gpu.PARTS) + 2 <= 8


def test_every_benchmark_of_the_table_can_be_asked_for_help_without_a_card() -> None:
    for part in gpu.plan_parts(("compile", "bench", "peers")):
        for step in part.steps:
            assert step.command[:2] == [sys.executable, "-m"]
            module = step.command[2]
            done = subprocess.run(
                [sys.executable, "-m", module, "--help"],
                cwd=gpu.REPOSITORY,
                capture_output=True,
                text=True,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            )
            assert (done.returncode, done.stdout.split()[0]) == (0, "usage:"), done.stderr


@pytest.mark.parametrize(
    ("asked", "planned"),
    [
        (["bench"], ("compile", "bench")),
        (["peers", "graphs"], ("compile", "graphs", "peers")),
        (["kernels"], ("kernels",)),
        (["compile"], ("compile",)),
        (list(gpu.PARTS), gpu.PARTS),
    ],
    ids=str,
)
def test_kernels_are_compiled_before_any_part_that_loads_a_model(
    asked: list[str], planned: tuple[str, ...]
) -> None:
    assert gpu.with_compilation(asked) == planned


def test_steps_of_a_run_compile_nothing_ahead_themselves(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, str] = {}

    def record(parts: object, *, environment: dict[str, str], report: object) -> None:
        seen.update(environment)

    monkeypatch.setattr(gpu, "refusal", lambda: None)
    monkeypatch.setattr(gpu, "run", record)
    monkeypatch.setattr(gpu, "conclude", lambda *args, **kwargs: 0)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu.main(["bench"]) == 0
    assert seen[AHEAD_VARIABLE] == "0"
    assert "TRITON_INTERPRET" not in seen


def test_packages_that_are_asked_for_are_those_that_the_server_and_the_run_import() -> None:
    """Read from the sources of everything that the server and the benchmarks load, not from ours alone."""
    script = (
        "import ast, json, sys; import graphllm.server.app, graphllm.cli, graphllm.engine.loading; "
        "import graphllm.runner.cuda_device, benchmarks.gpu.serving, benchmarks.peers.transformers_gpu; "
        "own = ('graphllm', 'benchmarks'); "
        "files = [m.__file__ for name, m in sys.modules.items() if name.split('.')[0] in own]; "
        "nodes = [n for f in files if f for n in ast.walk(ast.parse(open(f).read()))]; "
        "names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}; "
        "names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level}; "
        "loaded = {name.split('.')[0] for name in names} & set(sys.modules); "
        "print(json.dumps(sorted(loaded - set(sys.stdlib_module_names) - set(own))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=gpu.REPOSITORY, capture_output=True, text=True, check=True
    )
    assert set(gpu.NEEDED_PACKAGES) == {*json.loads(done.stdout), "pytest"}


def test_a_machine_without_a_compiler_is_told_so_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert gpu.missing_build_tool() == (
        "make gpu needs a C compiler, for Triton, and there is no gcc and no clang."
    )
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "no no-such-compiler" in str(gpu.missing_build_tool())
    compiler = tmp_path / "clang"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.delenv("CC")
    assert gpu.missing_build_tool() == (
        f"make gpu needs the headers of {sys.executable}, for Triton, and there is no {tmp_path}/Python.h."
    )
    (tmp_path / "Python.h").touch()
    assert gpu.missing_build_tool() is None


def test_kernel_tests_are_found_by_their_marks_and_no_other() -> None:
    files = gpu.kernel_test_files()
    assert "tests/kernels/test_triton_norms.py" in files
    assert "tests/runner/test_device.py" not in files
    assert not any(file.startswith(("tests/gpu/", "tests/benchmarks/")) for file in files)


@pytest.mark.skipif(results.device_name() is not None, reason="there is a card")
def test_without_a_card_it_says_so_in_a_line_and_writes_nothing(tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in results.RESULTS_FOLDER.iterdir()}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "tools/gpu.py"],
        cwd=gpu.REPOSITORY,
        capture_output=True,
        text=True,
        env={**os.environ, results.OUTPUT_VARIABLE: str(tmp_path)},
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "make gpu needs a CUDA device, and this machine has none.\n"
    assert time.monotonic() - start < 15
    assert {path: path.read_bytes() for path in results.RESULTS_FOLDER.iterdir()} == before
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_part_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        gpu.main(["kernel"])
    assert refused.value.code == 2
    assert "no part is called 'kernel'" in capsys.readouterr().err
