"""One process, one event loop, one thread: who may start anything else is listed here, with why.

Reads the import statements and the calls of every source file. That accepting, scheduling and
writing really happen on the main thread is an end-to-end test's claim, not this one's.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.architecture.source_tree import SourceFile, imports_of, read_package

# Modules whose use starts, or is only of use with, another thread or process.
MODULES = {
    "_posixsubprocess",
    "_thread",
    "concurrent.futures",
    "multiprocessing",
    "pty",
    "subprocess",
    "threading",
    "torch.multiprocessing",
}
# Functions and methods that do the same, whatever object they are called on.
CALLS = {
    "create_subprocess_exec",
    "create_subprocess_shell",
    "fork",
    "forkpty",
    "posix_spawn",
    "posix_spawnp",
    "run_in_executor",
    "set_default_executor",
    "subprocess_exec",
    "subprocess_shell",
    "to_thread",
}
# Too common as names of harmless methods: only as functions of `os`.
OS_CALLS = {"popen", "system"}

# What a file may use, and why. Add to this only what cannot be done on the loop.
ALLOWED = {
    # The CPU device is dressed as an asynchronous device: one worker stands in for the stream.
    "graphllm/runner/device.py": {"threading"},
    # Compiles Triton kernels in helper processes: seconds each, that would stall every stream on the loop.
    "graphllm/runner/compilation.py": {"subprocess"},
    # Reading weights takes seconds: one thread while a model is loaded, and none afterwards.
    "graphllm/runner/cuda_device.py": {"threading"},
    # Large schemas take tens of milliseconds to compile, in a library that lets go of the interpreter lock.
    "graphllm/structured/worker.py": {"concurrent.futures"},
    # Fetches the demo model with pip, before there is a loop.
    "graphllm/models/demo.py": {"subprocess"},
}


def uses_of(source: SourceFile) -> Iterator[tuple[str, int]]:
    """(name, line) of everything in a file that could leave the main thread."""
    for imported in imports_of(source):
        names = {imported.module, f"{imported.module}.{imported.name}"}
        for module in MODULES:
            if any(name == module or name.startswith(f"{module}.") for name in names):
                yield module, imported.line
        if imported.name in CALLS:
            yield imported.name, imported.line
        if imported.module == "os" and imported.name in OS_CALLS:
            yield f"os.{imported.name}", imported.line
    for node in ast.walk(source.tree()):
        if isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if node.attr in CALLS:
                yield node.attr, node.lineno
            elif owner == "os" and (node.attr in OS_CALLS or node.attr.startswith("spawn")):
                yield f"os.{node.attr}", node.lineno
            elif f"{owner}.{node.attr}" in MODULES:
                # `import torch` makes torch.multiprocessing reachable without naming it.
                yield f"{owner}.{node.attr}", node.lineno


def starts_progress_monitor(source: SourceFile) -> bool:
    """tqdm starts a monitor thread with the first bar, unless `tqdm.monitor_interval = 0` is set."""
    if not any(imported.module.split(".")[0] == "tqdm" for imported in imports_of(source)):
        return False
    return not any(
        isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and node.value.value == 0
        and any(isinstance(t, ast.Attribute) and t.attr == "monitor_interval" for t in node.targets)
        for node in ast.walk(source.tree())
    )


def thread_violations(source: SourceFile) -> list[str]:
    """What a file uses without being allowed to; empty when nothing."""
    allowed = ALLOWED.get(source.path, set())
    found = [f"{source.path}:{line}: {name}" for name, line in uses_of(source) if name not in allowed]
    if starts_progress_monitor(source) and "threading" not in allowed:
        found.append(f"{source.path}: tqdm without monitor_interval = 0 starts a thread")
    return found


@pytest.mark.parametrize("source", read_package(), ids=lambda source: source.path)
def test_file_stays_on_the_main_thread(source: SourceFile) -> None:
    assert thread_violations(source) == []


@pytest.mark.parametrize("path", ALLOWED)
def test_allowance_is_used(path: str) -> None:
    (source,) = [source for source in read_package() if source.path == path]
    assert {name for name, _ in uses_of(source)} == ALLOWED[path]


WRONG = {
    "plain": ("import threading", "threading"),
    "renamed": ("import threading as t", "threading"),
    "from": ("from threading import Lock", "threading"),
    "low level": ("from _thread import start_new_thread", "_thread"),
    "submodule": ("import concurrent.futures.thread", "concurrent.futures"),
    "from a parent": ("from concurrent import futures", "concurrent.futures"),
    "pool": ("from multiprocessing.pool import ThreadPool", "multiprocessing"),
    "inside a function": ("def f():\n    import multiprocessing", "multiprocessing"),
    "by string": ("import importlib\nimportlib.import_module('threading')", "threading"),
    "to_thread": ("import asyncio\nasync def f(g):\n    await asyncio.to_thread(g)", "to_thread"),
    "to_thread by name": ("from asyncio import to_thread", "to_thread"),
    "run_in_executor": ("def f(loop, g):\n    return loop.run_in_executor(None, g)", "run_in_executor"),
    "not even called": ("def f(loop):\n    return loop.run_in_executor", "run_in_executor"),
    "process": ("import subprocess", "subprocess"),
    "asyncio process": (
        "import asyncio\nasync def f():\n    await asyncio.create_subprocess_exec('ls')",
        "create_subprocess_exec",
    ),
    "fork": ("import os\nos.fork()", "fork"),
    "system": ("import os\nos.system('ls')", "os.system"),
    "popen by name": ("from os import popen", "os.popen"),
    "spawn": ("import os\nos.spawnv(0, 'ls', [])", "os.spawnv"),
    "torch": ("import torch\ntorch.multiprocessing.spawn(f)", "torch.multiprocessing"),
    "tqdm": ("from tqdm import tqdm", "tqdm"),
}
RIGHT = {
    "asyncio": "import asyncio\nasync def f():\n    await asyncio.sleep(0)",
    "a word in a string": "TEXT = 'threading, run_in_executor'",
    "a method called system": "def f(chat):\n    return chat.system('be brief')",
    "a module that begins alike": "import threading_notes",
    "tqdm without its monitor": "from tqdm import tqdm\ntqdm.monitor_interval = 0",
}


@pytest.mark.parametrize(("text", "name"), WRONG.values(), ids=WRONG)
def test_checker_refuses(text: str, name: str) -> None:
    found = thread_violations(SourceFile("graphllm/engine/x.py", text))
    assert found
    assert all(name in line for line in found)


@pytest.mark.parametrize("text", RIGHT.values(), ids=RIGHT)
def test_checker_accepts(text: str) -> None:
    assert thread_violations(SourceFile("graphllm/engine/x.py", text)) == []


def test_an_allowance_is_for_the_named_file_and_the_named_module_only() -> None:
    assert thread_violations(SourceFile("graphllm/runner/device.py", "import threading")) == []
    assert thread_violations(SourceFile("graphllm/runner/device.py", "import subprocess")) != []
    assert thread_violations(SourceFile("graphllm/runner/sampler.py", "import threading")) != []
