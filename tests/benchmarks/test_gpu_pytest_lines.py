"""The lines that a run of tests leaves behind: one a file, as soon as the file is done."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.results import REPOSITORY

RUN = """
import sys
from pathlib import Path
import pytest
from benchmarks.gpu.pytest_lines import FileLines
from benchmarks.gpu.results import ResultLog
log = ResultLog("kernels", "kernels", folder=Path(sys.argv[1]) / "results")
options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib", "--rootdir", sys.argv[1]]
sys.exit(pytest.main([*options, *sys.argv[2:]], plugins=[FileLines(log)]))
"""
FILES = {
    "test_good.py": "def test_a(): pass\ndef test_b(): pass\n",
    "test_bad.py": "def test_a(): pass\ndef test_b(): assert False\ndef test_c(): assert False\n",
    "test_teardown.py": (
        "import pytest\n@pytest.fixture\ndef f():\n    yield\n    assert False\ndef test_a(f): pass\n"
    ),
    "test_skipped.py": "import pytest\n@pytest.mark.skip\ndef test_a(): pass\n",
    "test_unreadable.py": "import no_such_module\n",
    "test_zz_ends_the_process.py": "import os\ndef test_a(): pass\ndef test_b(): os._exit(7)\n",
}


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What a run over all kinds of files wrote, by file, though its last test ended the process."""
    folder = tmp_path_factory.mktemp("lines")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    options = ["--continue-on-collection-errors", str(folder)]
    command = [sys.executable, "-c", RUN, str(folder), *options]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 7, done.stdout
    written = (folder / "results" / "gpu-kernels.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in written]
    assert all(line["benchmark"] == "kernels" and line["unit"] == "tests passed" for line in found)
    return {Path(line["metric"]).name: line for line in found}


def test_a_file_whose_tests_pass_says_how_many(lines: dict[str, dict[str, Any]]) -> None:
    assert (lines["test_good.py"]["value"], lines["test_good.py"]["passed"]) == (2, True)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("test_bad.py", "2 failed, 1 passed: test_b, test_c"),
        ("test_teardown.py", "1 failed, 1 passed: test_a"),
        ("test_skipped.py", "every test was skipped"),
        (
            "test_unreadable.py",
            "could not be read: E   ModuleNotFoundError: No module named 'no_such_module'",
        ),
    ],
)
def test_a_file_with_failures_names_them(lines: dict[str, dict[str, Any]], name: str, reason: str) -> None:
    line = lines[name]
    assert (line["value"], line["passed"], line["reason"]) == (None, False, reason)


def test_a_file_that_did_not_come_to_its_end_has_no_line(lines: dict[str, dict[str, Any]]) -> None:
    assert lines.keys() == FILES.keys() - {"test_zz_ends_the_process.py"}
