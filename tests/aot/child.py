"""Runs the build in a process of its own and reads the rows that it wrote."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.aot.build import REPOSITORY
from tests.aot.compiling import Row


def build_rows(cases: str, *, cache: Path, output: Path) -> tuple[list[Row], str]:
    """The rows of a module of cases and what the build printed; what it said on an error, on an error."""
    command = [sys.executable, "-m", "tests.aot.build", "--cases", cases]
    command += ["--cache", str(cache), "--output", str(output)]
    # Kernels are compiled, with what the compiler does on its own: a developer's switches stay outside.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = output.read_text(encoding="utf-8").splitlines()
    return [Row.from_json(line) for line in lines], done.stdout
