"""Runs commands as processes of their own that cannot outlive their deadline, nor leave anything behind.

Owns starting, watching and killing; what they said goes to a log and, as it comes, to whoever watches.
Knows nothing of what they measure.

A step is killed with all its descendants, those in sessions of their own included: the server that a
benchmark started would keep the card's memory from every later step. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_PR_SET_CHILD_SUBREAPER = 36
_GRACE = 4.0  # seconds between asking a step to end and ending it
_POLL = 0.05  # seconds
SECONDS = "{seconds}"
"""In a step's command: the seconds that it has."""


@dataclass(frozen=True, slots=True)
class Step:
    """A command, and its share of time in seconds. What a step leaves of its time goes to later ones."""

    name: str
    command: Sequence[str]
    seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a step ended: `reason` is None when all went well."""

    step: Step
    reason: str | None
    seconds: float


class _Running:
    """A step's process and its log."""

    def __init__(self, step: Step, *, deadline: float, folder: Path, environment: dict[str, str]) -> None:
        self.step, self.deadline = step, deadline
        self.start = time.monotonic()
        seconds = max(1, int(deadline - self.start - _GRACE))
        command = [part.replace(SECONDS, str(seconds)) for part in step.command]
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `close`
        self._num_read = 0
        self._asked_at: float | None = None
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def new_output(self) -> str:
        """What it said since the last call."""
        self._log.seek(self._num_read)
        data = self._log.read()
        self._num_read += len(data)
        return data.decode(errors="replace")

    def outcome(self) -> Outcome | None:
        """None while it runs. Asks it to end a little before its deadline and ends it after."""
        code = self.process.poll()
        now = time.monotonic()
        if code is None:
            if self._asked_at is None and now > self.deadline - _GRACE:
                self._asked_at = now
                self._signal(signal.SIGTERM)
            if now > self.deadline:
                self.kill()
                code = self.process.wait()
        if code is None:
            return None
        return Outcome(self.step, self._reason(code), now - self.start)

    def kill(self) -> None:
        """End it and everything that it started."""
        descendants = list(descendants_of(self.process.pid))
        self._signal(signal.SIGKILL)
        _kill(descendants)

    def close(self) -> None:
        self._log.close()

    def _reason(self, code: int) -> str | None:
        if self._asked_at is not None:
            return f"stopped after {self._asked_at - self.start:.0f} s, the time it has"
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exit code {code}" if code else None

    def _signal(self, number: signal.Signals) -> None:
        # It leads its own process group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def run_steps(
    steps: Iterable[Step],
    *,
    at_once: int = 1,
    folder: Path,
    environment: dict[str, str],
    on_start: Callable[[Step], None],
    on_output: Callable[[str], None],
    on_end: Callable[[Outcome], None],
    spare: float = 0.0,
) -> float:
    """Run steps in order, `at_once` side by side, and report each as it goes.

    A step must have ended when the seconds of all steps up to it are over, and the `spare` ones; steps side
    by side share the sum of their seconds. So nothing takes longer than the sum, and each has at least its
    own time. The output of steps that run side by side is reported when they end. Gives the seconds left.
    """
    _adopt_orphans(True)
    older = set(_children(os.getpid()))
    waiting = deque(steps)
    running: list[_Running] = []
    deadline = time.monotonic() + spare
    if at_once > 1:
        deadline += sum(step.seconds for step in waiting)
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                step = waiting.popleft()
                deadline += step.seconds if at_once == 1 else 0.0
                on_start(step)
                running.append(_Running(step, deadline=deadline, folder=folder, environment=environment))
            for one in tuple(running):
                outcome = one.outcome()
                if at_once == 1 or outcome is not None:
                    on_output(one.new_output())
                if outcome is not None:
                    running.remove(one)
                    one.close()
                    if not running:
                        # What a step left behind is ours now, and holds memory that the next one needs.
                        _kill_orphans(older)
                    on_end(outcome)
            time.sleep(_POLL)
    finally:
        for one in running:
            one.kill()
            one.process.wait()
            one.close()
        _kill_orphans(older)
        _adopt_orphans(False)
    return max(0.0, deadline - time.monotonic())


def descendants_of(pid: int) -> Iterable[int]:
    """Children, and theirs, of a process that is there."""
    return _children(pid, and_theirs=True)


def _children(pid: int, *, and_theirs: bool = False) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name, in parentheses, may hold anything; behind it come the state and the parent.
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found: list[int] = []
    due = [pid]
    while due:
        own = children.get(due.pop(), [])
        found += own
        due += own if and_theirs else []
    return found


def _kill_orphans(older: Container[int]) -> None:
    """Kill the children that this process got since, and theirs."""
    for pid in _children(os.getpid()):
        if pid not in older:
            _kill([*descendants_of(pid), pid])


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _adopt_orphans(whether: bool) -> None:
    """Become the parent of what a step leaves behind (prctl(2)), so that it can be found."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(whether), 0, 0, 0)
