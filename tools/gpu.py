"""`make gpu`: everything that needs a card, in one command and at most nine minutes.

    python3 tools/gpu.py                 # compile, kernels, graphs, e2e, bench, peers
    python3 tools/gpu.py bench --list    # one part; --list only says what it would run

Every part that loads a model is preceded by `compile`, which leaves its kernels in Triton's cache. Owns the
table of parts with their time limits, and the summary. Needs a CUDA device, the source tree, a C compiler,
and the packages and headers of the Python that runs it: no environment, no network. Parts do not depend on
each other: one that fails is listed at the end, and what it had measured is kept. Lines go to
`benchmarks/results/gpu-<part>.jsonl` and, when it is set, to the folder $OUT, with the log and the results
page.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

REPOSITORY = Path(__file__).resolve().parents[1]
if str(REPOSITORY) not in sys.path:  # run as a script
    sys.path.insert(0, str(REPOSITORY))

from benchmarks.gpu import results_page  # noqa: E402
from benchmarks.gpu.compile_kernels import AHEAD_VARIABLE  # noqa: E402
from benchmarks.gpu.results import (  # noqa: E402
    OUTPUT_VARIABLE,
    RESULTS_FOLDER,
    ResultLog,
    device_name,
    file_name,
    missing_targets,
    read_lines,
    result_folders,
)
from benchmarks.gpu.step_runner import SECONDS, Outcome, Step, run_steps  # noqa: E402

SCRATCH_VARIABLE = "GRAPHLLM_GPU_SCRATCH"
MAX_SECONDS = 540
# Seconds of each part's steps. What a step leaves goes to the later ones; all of them together stay
# below MAX_SECONDS by what the start and the summary take.
LIMITS: dict[str, dict[str, int]] = {
    "compile": {"compile_kernels": 60},
    "kernels": {"kernels": 66},
    "graphs": {"graphs": 28},
    "e2e": {"e2e": 36},
    "bench": {
        "decode_step": 36,
        "large_model": 36,
        "attention": 14,
        "swap": 12,
        "fp8_linear": 18,
        "packed_linear": 16,
        "quantized_decode": 36,
        "serving": 46,
        "startup": 30,
    },
    "peers": {"peers": 71},
}
PARTS = tuple(LIMITS)
COMPILE = "compile"
# These load models; the kernels' own tests compile other kernels.
PARTS_WITH_MODELS = ("graphs", "e2e", "bench", "peers")
# Kernel tests wait for compilers most of the time, which have cores of their own.
MAX_KERNEL_TESTS_AT_ONCE = 8
NEEDED_PACKAGES = (
    "gguf",
    "httptools",
    "huggingface_hub",
    "jinja2",
    "msgspec",
    "numpy",
    "orjson",
    "prometheus_client",
    "pytest",
    "safetensors",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
    "triton",
    "uvloop",
)
_PYTEST_RAN_NOTHING = 5
_CHECK_TORCH = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else f'torch {torch.__version__}')"


@dataclass(frozen=True, slots=True)
class Part:
    """Steps that are run and reported together, `at_once` side by side."""

    name: str
    steps: tuple[Step, ...]
    at_once: int = 1


@dataclass(slots=True)
class Summary:
    """What went wrong, in the order in which it did."""

    failures: list[str] = field(default_factory=list)
    misses: list[str] = field(default_factory=list)


def plan_parts(names: Sequence[str]) -> list[Part]:
    """The parts and what they run."""
    return [_kernel_part() if name == "kernels" else _plain_part(name) for name in names]


def with_compilation(names: Sequence[str]) -> tuple[str, ...]:
    """The parts that are asked for, in their order, and the compilation that they want to be done before."""
    wants = any(name in PARTS_WITH_MODELS for name in names)
    return tuple(name for name in PARTS if name in names or (wants and name == COMPILE))


def _plain_part(name: str) -> Part:
    steps = []
    for step, seconds in LIMITS[name].items():
        if name in ("graphs", "e2e"):
            pattern = "test_graph_*.py" if name == "graphs" else "test_e2e_*.py"
            files = [str(p.relative_to(REPOSITORY)) for p in sorted((REPOSITORY / "tests/gpu").glob(pattern))]
            command = _pytest(name, *files)
        elif name == "peers":
            command = [sys.executable, "-m", "benchmarks.gpu.peers", "--seconds", SECONDS]
        else:
            command = [sys.executable, "-m", f"benchmarks.gpu.{step}"]
        steps.append(Step(step, command, seconds))
    return Part(name, tuple(steps))


def _kernel_part() -> Part:
    """A process for each test file, so that one that hangs or breaks the card's context hides no other."""
    files = kernel_test_files()
    seconds = LIMITS["kernels"]["kernels"] / max(1, len(files))
    steps = tuple(Step(file, _pytest("kernels", file), seconds) for file in files)
    cores = len(os.sched_getaffinity(0))
    return Part("kernels", steps, at_once=max(2, min(MAX_KERNEL_TESTS_AT_ONCE, cores // 2)))


def kernel_test_files() -> list[str]:
    """Test files outside of tests/gpu that have tests for a card, relative to the repository."""
    marked = re.compile(r"pytest\.mark\.(triton|gpu)\b")
    return [
        str(path.relative_to(REPOSITORY))
        for path in sorted((REPOSITORY / "tests").rglob("test_*.py"))
        if path.parts[-2] not in ("gpu", "benchmarks", "aot", "architecture")
        and marked.search(path.read_text())
    ]


def _pytest(part: str, *files: str) -> list[str]:
    """pytest as a bare machine has it: without plugins, and without the options that need them."""
    options = "-o addopts=--import-mode=importlib -W default -p no:cacheprovider -q --tb=short"
    plugin = ["-p", "benchmarks.gpu.pytest_lines", "--result-part", part, "-m", "triton or gpu"]
    return [sys.executable, "-m", "pytest", *options.split(), *plugin, *files]


class Report:
    """Says what happens, on standard output and in $OUT, and writes the lines of what never came."""

    def __init__(self, log: TextIO | None, summary: Summary, *, folder: Path = RESULTS_FOLDER) -> None:
        self.folder = folder
        self._log = log
        self._summary = summary

    def say(self, text: str) -> None:
        if not text:
            return
        print(text, end="", flush=True)
        if self._log is not None:
            self._log.write(text)
            self._log.flush()

    def start(self, part: Part, step: Step) -> None:
        self.say(f"=== {part.name}: {step.name}\n" if part.at_once == 1 else "")

    def end(self, part: Part, outcome: Outcome) -> None:
        step = outcome.step
        self.say(f"--- {step.name}: {outcome.reason or 'done'}, {outcome.seconds:.0f} s\n")
        benchmark = step.name if part.name in ("bench", "peers") else part.name
        log = ResultLog(part.name, benchmark, folder=self.folder)
        missing = missing_targets(part.name, step.name, folder=self.folder)
        reason = outcome.reason
        if reason == f"exit code {_PYTEST_RAN_NOTHING}" and benchmark == part.name:
            reason = "no test was run"
        if reason is None and missing:
            reason = f"ended without {len(missing)} of its targets"
        for target in missing:
            log.of(target.benchmark).failed(target.metric, reason or "", unit=target.unit)
        if reason is not None:
            self._summary.failures.append(f"{part.name}: {step.name}: {reason}")
            written = read_lines(self.folder / file_name(part.name))
            if step.name not in {line["metric"] for line in written}:
                log.failed(step.name, reason, unit="finished")


def run(parts: Sequence[Part], *, environment: dict[str, str], report: Report) -> None:
    """Run the parts one after another; what one leaves of its time goes to the next."""
    spare = 0.0
    for part in parts:
        for folder in result_folders(report.folder):
            (folder / file_name(part.name)).unlink(missing_ok=True)
        report.say(f"\n##### {part.name}: at most {sum(step.seconds for step in part.steps):.0f} s\n")
        spare = run_steps(
            part.steps,
            at_once=part.at_once,
            folder=REPOSITORY,
            environment=environment,
            on_start=lambda step, part=part: report.start(part, step),  # type: ignore[misc]
            on_output=report.say,
            on_end=lambda outcome, part=part: report.end(part, outcome),  # type: ignore[misc]
            spare=spare,
        )


def conclude(names: Sequence[str], summary: Summary, *, report: Report, seconds: float) -> int:
    """Write the results page and list what failed, last; 1 if anything did."""
    for name in names:
        for line in read_lines(report.folder / file_name(name)):
            if line["passed"] is False and line["value"] is not None:
                summary.misses.append(
                    f"{line['benchmark']}: {line['metric']}: {line['value']:g} {line['unit']}, "
                    f"target {line['target']:g}"
                )
    results_page.main(["--folder", str(report.folder)])
    if os.environ.get(OUTPUT_VARIABLE):
        shutil.copy(report.folder / results_page.PAGE, Path(os.environ[OUTPUT_VARIABLE]) / "results.md")
    report.say(f"\n##### {', '.join(names)}: {seconds:.0f} s\n")
    for title, lines in (("Targets missed", summary.misses), ("Failed", summary.failures)):
        if lines:
            report.say(f"{title}:\n" + "".join(f"  {line}\n" for line in lines))
    if not summary.failures:
        report.say("Nothing failed.\n")
    return 1 if summary.failures else 0


def refusal() -> str | None:
    """Why nothing can be run on this machine, in a line; None when it can."""
    if device_name() is None:
        return "make gpu needs a CUDA device, and this machine has none."
    try:
        subprocess.run(
            [sys.executable, "-c", _CHECK_TORCH], check=True, capture_output=True, text=True, timeout=90
        )
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        return f"make gpu needs a torch that sees {device_name()}, but {sys.executable} has: {last}"
    except subprocess.TimeoutExpired:
        return f"make gpu: {sys.executable} could not import torch within 90 s."
    return missing_build_tool()


def missing_build_tool() -> str | None:
    """What Triton lacks to build the code that launches kernels, looked for as Triton does."""
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    if not any(shutil.which(compiler) for compiler in compilers):
        return f"make gpu needs a C compiler, for Triton, and there is no {' and no '.join(compilers)}."
    scheme = sysconfig.get_default_scheme()
    # Debian's own scheme names a folder that has no headers.
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    header = Path(sysconfig.get_paths(scheme=scheme)["include"]) / "Python.h"
    if not header.is_file():
        return f"make gpu needs the headers of {sys.executable}, for Triton, and there is no {header}."
    return None


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Where checkpoints of the run are written; gone at the end."""
    with tempfile.TemporaryDirectory(prefix="graphllm-gpu-") as name:
        yield Path(name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for; 1 when one failed or there is no card."""
    parser = argparse.ArgumentParser(prog="make gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all without any")
    parser.add_argument("--list", action="store_true", help="say what would be run, and run nothing")
    options = parser.parse_args(argv)
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        parser.error(f"no part is called {unknown[0]!r}; there are {', '.join(PARTS)}")
    names = with_compilation(options.parts or PARTS)
    parts = plan_parts(names)
    if options.list:
        for part in parts:
            for step in part.steps:
                print(f"{part.name}\t{step.seconds:.0f} s\t{' '.join(step.command)}")
        return 0
    start = time.monotonic()
    reason = refusal()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 1
    out = os.environ.get(OUTPUT_VARIABLE)
    with contextlib.ExitStack() as stack:
        log = None
        if out:
            Path(out).mkdir(parents=True, exist_ok=True)
            log = stack.enter_context((Path(out) / "gpu.log").open("w", encoding="utf-8"))
        summary = Summary()
        report = Report(log, summary)
        absent = [name for name in NEEDED_PACKAGES if find_spec(name) is None]
        if absent:
            report.say(f"Not installed for {sys.executable}, so some of it will fail: {', '.join(absent)}\n")
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # Compiled by the first part; what it could not is compiled where it is needed.
            AHEAD_VARIABLE: "0",
            SCRATCH_VARIABLE: str(stack.enter_context(scratch_folder())),
        }
        try:
            run(parts, environment=environment, report=report)
        except KeyboardInterrupt:
            summary.failures.append("interrupted")
        return conclude(names, summary, report=report, seconds=time.monotonic() - start)


if __name__ == "__main__":
    sys.exit(main())
