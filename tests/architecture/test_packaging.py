"""The package declares what it imports, the tested set pins what it declares, and make serves as told."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.architecture.source_tree import REPOSITORY, SourceFile, imports_of, read_package

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RUNTIME = {Requirement(text).name for text in PROJECT["dependencies"]}
EXTRAS = {
    name: [Requirement(text) for text in texts] for name, texts in PROJECT["optional-dependencies"].items()
}
OPTIONAL = {requirement.name for name in EXTRAS if name != "dev" for requirement in EXTRAS[name]}


def pins() -> dict[str, Version]:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def libraries_of(source: SourceFile) -> set[str]:
    """The distributions that a file imports; for all of ours the module has the distribution's name."""
    tops = {imported.module.split(".")[0] for imported in imports_of(source)}
    return tops - {"graphllm", "<dynamic>"} - sys.stdlib_module_names


@pytest.mark.parametrize("source", read_package(), ids=lambda source: source.path)
def test_a_library_that_is_imported_is_declared(source: SourceFile) -> None:
    assert libraries_of(source) <= RUNTIME | OPTIONAL


def test_a_library_that_is_declared_is_imported() -> None:
    imported = set().union(*(libraries_of(source) for source in read_package()))
    assert imported >= RUNTIME


def test_an_undeclared_library_is_noticed() -> None:
    found = libraries_of(SourceFile("graphllm/x.py", "import os\ndef f():\n    from requests import get"))
    assert found - RUNTIME == {"requests"}


def test_torch_is_pinned_first_and_exactly_and_lets_local_builds_in() -> None:
    name, version = next(iter(pins().items()))
    assert name == "torch"
    assert version.local is None


def test_what_is_declared_is_pinned_within_its_bounds() -> None:
    pinned = pins()
    for requirement in [Requirement(text) for text in PROJECT["dependencies"]] + EXTRAS["dev"]:
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_make_serve_honours_port_and_model() -> None:
    make = shutil.which("make")
    assert make is not None
    command = [make, "--dry-run", "serve", "PORT=1234", "MODEL=some/model", "ARGS=--seed 3"]
    # A make that runs these tests must not make this one speak of the folders it enters.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=True, env=environment
    )
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(r'exec \S+/python -m graphllm --model "some/model" --port "1234" --seed 3', last)
