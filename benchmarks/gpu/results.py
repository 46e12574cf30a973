"""One line for each number that was measured on a card, written the moment it is known.

Owns the lines' schema, where they are kept, and on which machine and code they were measured. Judges
nothing: whether a number is good enough is `targets.py`'s. Needs no torch, so that a machine whose torch
is broken can still say so.

A line is a JSON object: benchmark, metric, value (null where it could not be measured, and then `reason`
says why), unit, target, passed (null without a target), floor (the least or most that the hardware allows,
in the value's unit, measured in the same run), peer, device, driver, torch, triton, commit, dirty.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import subprocess
from collections.abc import Iterator
from copy import copy
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.gpu.targets import TARGETS, Target, target_of

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS_FOLDER = REPOSITORY / "benchmarks" / "results"
OUTPUT_VARIABLE = "OUT"
"""Names the environment variable with the folder that gets a copy of every line."""
COMMIT_VARIABLE = "GRAPHLLM_COMMIT"
"""Names the one that says which commit a tree without git is of; a plus behind it means with changes."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """The machine and the code of a measurement. None where it could not be found out."""

    device: str | None
    driver: str | None
    torch: str | None
    triton: str | None
    commit: str | None
    dirty: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One number, or the reason why there is none."""

    benchmark: str
    metric: str
    value: float | None
    unit: str
    target: float | None = None
    passed: bool | None = None
    floor: float | None = None
    peer: str | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        if (self.value is None) == (self.reason is None):
            raise ValueError(f"{self.metric}: a result has either a value or a reason why it has none.")


class ResultLog:
    """Appends a benchmark's lines to `gpu-<part>.jsonl`, in the results folder and in $OUT."""

    def __init__(self, part: str, benchmark: str, *, folder: Path = RESULTS_FOLDER) -> None:
        self.benchmark = benchmark
        self.results: list[Result] = []
        self._paths = [path / file_name(part) for path in result_folders(folder)]

    def of(self, benchmark: str) -> ResultLog:
        """The same file for another benchmark's lines, which count among this one's results."""
        other = copy(self)
        other.benchmark = benchmark
        return other

    def measured(
        self, metric: str, value: float, *, unit: str, floor: float | None = None, peer: str | None = None
    ) -> Result:
        """Write a number. One that is not finite is written as missing, with that as the reason."""
        if not math.isfinite(value):
            return self.failed(metric, f"measured {value}", unit=unit, peer=peer)
        target = target_of(self.benchmark, metric)
        return self._write(
            Result(
                benchmark=self.benchmark,
                metric=metric,
                value=value,
                unit=unit,
                target=None if target is None else target.limit,
                passed=None if target is None else target.is_met_by(value),
                floor=floor,
                peer=peer,
            )
        )

    def failed(self, metric: str, reason: str, *, unit: str, peer: str | None = None) -> Result:
        """Write that a number could not be measured: whoever measures has failed."""
        return self._write(self._missing(metric, reason, unit=unit, peer=peer, counts=True))

    def absent(self, metric: str, reason: str, *, unit: str, peer: str | None = None) -> Result:
        """Write that there was nothing to measure here, as with a peer that is not installed."""
        return self._write(self._missing(metric, reason, unit=unit, peer=peer, counts=False))

    def tests(self, metric: str, *, num_passed: int, reason: str | None) -> Result:
        """Write how the tests of a file went: `reason` names those that failed, None when none did."""
        result = Result(
            benchmark=self.benchmark,
            metric=metric,
            value=num_passed if reason is None else None,
            unit="tests passed",
            passed=reason is None,
            reason=reason,
        )
        return self._write(result)

    def _missing(self, metric: str, reason: str, *, unit: str, peer: str | None, counts: bool) -> Result:
        target = target_of(self.benchmark, metric)
        return Result(
            benchmark=self.benchmark,
            metric=metric,
            value=None,
            unit=unit,
            target=None if target is None else target.limit,
            passed=False if counts else None,
            peer=peer,
            reason=" ".join(reason.split())[:500],
        )

    def _write(self, result: Result) -> Result:
        self.results.append(result)
        line = as_line(result, provenance()) + "\n"
        for path in self._paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Opened for each line: what is known survives whatever happens to the process next.
            with path.open("a", encoding="utf-8") as file:
                file.write(line)
        print(as_text(result), flush=True)
        return result


def file_name(part: str) -> str:
    """The file of a part's lines."""
    return f"gpu-{part}.jsonl"


def result_folders(folder: Path = RESULTS_FOLDER) -> list[Path]:
    """Where lines go: the results folder, and the one that the environment names."""
    named = os.environ.get(OUTPUT_VARIABLE)
    return [folder, Path(named)] if named else [folder]


def as_line(result: Result, machine: Provenance) -> str:
    """A result as one line of JSON; `reason` is there only where it is needed."""
    fields: dict[str, Any] = {**asdict(result), **asdict(machine)}
    reason = fields.pop("reason")
    if reason is not None:
        fields["reason"] = reason
    for name in ("value", "floor"):
        if isinstance(fields[name], float):
            fields[name] = _significant(fields[name])
    return json.dumps(fields, allow_nan=False)


def as_text(result: Result) -> str:
    """A result for somebody who watches."""
    verdict = {True: "ok  ", False: "MISS", None: "    "}[result.passed]
    if result.value is None:
        return f"{verdict} {result.benchmark}: {result.metric}: {result.reason}"
    notes = []
    if result.target is not None:
        notes.append(f"target {result.target:g}")
    if result.floor is not None:
        notes.append(f"floor {result.floor:.4g}")
    suffix = f" ({', '.join(notes)})" if notes else ""
    return f"{verdict} {result.benchmark}: {result.metric}: {result.value:.4g} {result.unit}{suffix}"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, none if there is no file. Raises ValueError for a line that is no result."""
    if not path.exists():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        fields = json.loads(line)
        missing = {"benchmark", "metric", "value", "unit", "device", "commit"} - fields.keys()
        if missing:
            raise ValueError(f"{path.name}, line {number}: no {', '.join(sorted(missing))}.")
        yield fields


def missing_targets(part: str, step: str, *, folder: Path = RESULTS_FOLDER) -> list[Target]:
    """The targets of a step that no line of the part speaks of."""
    seen = {(line["benchmark"], line["metric"]) for line in read_lines(folder / file_name(part))}
    return [t for t in TARGETS if t.step == step and (t.benchmark, t.metric) not in seen]


@cache
def provenance() -> Provenance:
    """This machine and this code, asked once a process and without torch."""
    commit, dirty = _commit()
    return Provenance(device_name(), _driver(), _version("torch"), _version("triton"), commit, dirty)


@cache
def device_name() -> str | None:
    """The first CUDA device's name, from the driver itself; None where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    if driver.cuDeviceGetName(name, len(name), device):
        return None
    return name.value.decode(errors="replace")


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found[0] if found else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> tuple[str | None, bool | None]:
    """The checkout's commit, and whether files other than results differ from it."""
    commands = (
        ["git", "rev-parse", "--short=12", "HEAD"],
        ["git", "status", "--porcelain", "--", ".", ":!benchmarks/results"],
    )
    try:
        commit, changes = (
            subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        named = os.environ.get(COMMIT_VARIABLE)
        return (named.removesuffix("+"), named.endswith("+")) if named else (None, None)
    return commit, bool(changes)


def _significant(value: float) -> float:
    """No more digits than were measured."""
    return float(f"{value:.6g}")
