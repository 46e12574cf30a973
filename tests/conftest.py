"""Which tests a process runs: the plain suite, the kernels under Triton's interpreter, or all on a card.

A process either compiles Triton kernels or interprets them, so the tests marked `triton` need a process
of their own where there is no card: one started with TRITON_INTERPRET=1, which runs them and nothing
else. `make test` starts both. Tests that cannot run in this process are deselected, not skipped: a skip
would be a claim left unproven.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

IS_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
# Where `make test` collects a line a suite for its last words; unset elsewhere.
COUNTS = os.environ.get("GRAPHLLM_TEST_COUNTS")


def _has_card() -> bool:
    import torch

    return torch.cuda.is_available()


def runs_here(marks: set[str], *, is_interpreting: bool, has_card: bool) -> bool:
    """Whether a test with these marks belongs to a process like this one."""
    if is_interpreting:
        return "triton" in marks and "gpu" not in marks
    return has_card or not marks & {"triton", "gpu"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    has_card = not IS_INTERPRETING and _has_card()
    kept: list[pytest.Item] = []
    deselected: list[pytest.Item] = []
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        is_kept = runs_here(marks, is_interpreting=IS_INTERPRETING, has_card=has_card)
        (kept if is_kept else deselected).append(item)
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = kept


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    # xdist's workers come by here as well, and know nothing.
    if COUNTS is None or hasattr(config, "workerinput"):
        return
    counted = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")
    counts = [(len(terminalreporter.getreports(name)), name) for name in counted]
    suite = "interpreted kernels" if IS_INTERPRETING else "plain"
    found = ", ".join(f"{count} {name}" for count, name in counts if count) or "no tests"
    with Path(COUNTS).open("a", encoding="utf-8") as file:
        file.write(f"{suite}: {found}\n")
