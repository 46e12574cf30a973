"""`make test` runs two suites, and between them every test that needs no card."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest

from tests.architecture.source_tree import REPOSITORY
from tests.conftest import runs_here

PLAIN = {"is_interpreting": False, "has_card": False}
INTERPRETED = {"is_interpreting": True, "has_card": False}
ON_A_CARD = {"is_interpreting": False, "has_card": True}


@pytest.mark.parametrize(
    ("marks", "suites"),
    [
        (set(), [PLAIN, ON_A_CARD]),
        ({"slow", "parametrize"}, [PLAIN, ON_A_CARD]),
        ({"triton"}, [INTERPRETED, ON_A_CARD]),
        ({"triton", "slow"}, [INTERPRETED, ON_A_CARD]),
        ({"gpu"}, [ON_A_CARD]),
        ({"triton", "gpu"}, [ON_A_CARD]),
    ],
)
def test_a_test_runs_where_it_can_and_nowhere_twice(marks: set[str], suites: list[dict[str, bool]]) -> None:
    found = [suite for suite in (PLAIN, INTERPRETED, ON_A_CARD) if runs_here(marks, **suite)]
    assert found == suites


def test_make_runs_the_plain_suite_and_the_interpreted_one() -> None:
    make = shutil.which("make")
    assert make is not None
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = [make, "--dry-run", "test", "ARGS=tests/kernels"]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=True, env=environment
    )
    suites = re.findall(r"TRITON_INTERPRET=(\d) \S+/python -m pytest .* tests/kernels;", done.stdout)
    assert suites == ["0", "1"]
