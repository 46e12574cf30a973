"""A pytest plugin that writes one result line for each test file, as soon as its last test is over.

    python -m pytest -p benchmarks.gpu.pytest_lines --result-part kernels tests/kernels

Owns nothing but the counting: a file passed when each of its tests did, and its line names those that didn't.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from benchmarks.gpu.results import ResultLog

_MOST_NAMES = 6


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--result-part", default="kernels", help="the part that the result lines belong to")


def pytest_configure(config: pytest.Config) -> None:
    part = config.getoption("--result-part")
    config.pluginmanager.register(FileLines(ResultLog(part, part)), "graphllm-file-lines")


class FileLines:
    """Counts the tests of each file."""

    def __init__(self, log: ResultLog) -> None:
        self._log = log
        self._num_left: Counter[str] = Counter()
        self._num_passed: Counter[str] = Counter()
        self._failed: defaultdict[str, list[str]] = defaultdict(list)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._num_left = Counter(item.nodeid.split("::")[0] for item in session.items)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            path = report.nodeid.split("::")[0]
            lines = str(report.longrepr).strip().splitlines()
            self._log.tests(path, num_passed=0, reason=f"could not be read: {lines[-1] if lines else ''}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        path, _, name = report.nodeid.partition("::")
        if report.failed and name not in self._failed[path]:
            self._failed[path].append(name)
        if report.when == "call" and report.passed:
            self._num_passed[path] += 1
        if report.when == "teardown":
            self._num_left[path] -= 1
            if self._num_left[path] == 0:
                self._finish(path)

    def _finish(self, path: str) -> None:
        failed = self._failed[path]
        num_passed = self._num_passed[path]
        reason = None
        if failed:
            more = f" and {len(failed) - _MOST_NAMES} more" if len(failed) > _MOST_NAMES else ""
            reason = f"{len(failed)} failed, {num_passed} passed: {', '.join(failed[:_MOST_NAMES])}{more}"
        elif num_passed == 0:
            reason = "every test was skipped"
        self._log.tests(path, num_passed=num_passed, reason=reason)
