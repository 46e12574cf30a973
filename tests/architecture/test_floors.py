"""The house has floors: a file imports only from lower ones, never sideways between packages, never up.

Also holds narrower claims of the design: floor 0 needs the standard library only and the arena torch
only, the scheduler and the block manager hold no tensors, and the HTTP files know nothing of models.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.architecture.source_tree import Import, SourceFile, imports_of, read_package

# Every top-level name of the package: its floor, and the group within which imports are free.
FLOOR_OF = {
    "adapter": (0, "floor 0"),
    "batch": (0, "floor 0"),
    "config": (0, "floor 0"),
    "constraint": (0, "floor 0"),
    "errors": (0, "floor 0"),
    "log": (0, "floor 0"),
    "outputs": (0, "floor 0"),
    "sampling_params": (0, "floor 0"),
    "sequence": (0, "floor 0"),
    "step_buckets": (0, "floor 0"),
    "structured_outputs": (0, "floor 0"),
    "arena": (1, "arena"),
    "kernels": (1, "kernels"),
    "tokenizer": (1, "tokenizer"),
    "output_formats": (1, "output_formats"),
    "structured": (1, "structured"),
    "attention": (2, "attention"),
    "cache": (2, "cache"),
    "distributed": (2, "distributed"),
    "quant": (2, "quant"),
    "layers": (3, "layers"),
    "models": (4, "models"),
    "runner": (5, "runner"),
    "scheduler": (5, "scheduler"),
    "speculative": (5, "speculative"),
    "engine": (6, "engine"),
    "llm": (7, "llm"),
    "offline": (7, "llm"),
    "server": (7, "server"),
    "__main__": (8, "command line"),
    "cli": (8, "command line"),
}
# The public face stands outside the house: it may import anything, lazily, and nothing imports it.
PUBLIC_FACE = "graphllm/__init__.py"
# Names that the public face defines before it imports anything.
PUBLIC_CONSTANTS = {"__version__"}

# Simulated by the million steps, so nothing here may hold a tensor.
TENSOR_FREE = (
    "graphllm/scheduler/",
    "graphllm/cache/block_manager.py",
    "graphllm/cache/host_tier.py",
    "graphllm/cache/prefix_hash.py",
)
TENSOR_LIBRARIES = {"numpy", "torch", "triton"}
# Memory and nothing else: it knows neither the package nor what is computed in it.
TORCH_ONLY = {"graphllm/arena.py"}

# The server's files know bytes and requests only: of graphllm, floor 0 and each other. But for these,
# which know the engine, and the folder openai/.
KNOW_THE_ENGINE = {"graphllm/server/app.py", "graphllm/server/health.py"}


def knows_bytes_only(path: str) -> bool:
    folder, _, name = path.rpartition("/")
    return folder == "graphllm/server" and path not in KNOW_THE_ENGINE and name != "openai.py"


def unit_of(module: str) -> str:
    """`graphllm.server.openai.chat` belongs to `server`."""
    return module.split(".")[1]


def target_units(imported: Import) -> Iterator[str]:
    """The top-level names of graphllm that an import reaches; "" is the public face."""
    if imported.module != "graphllm":
        if imported.module.startswith("graphllm."):
            yield unit_of(imported.module)
    elif imported.name in FLOOR_OF:
        yield imported.name
    elif imported.name not in PUBLIC_CONSTANTS:
        yield ""


def floor_violations(source: SourceFile) -> list[str]:
    """What is wrong with one file's place and imports; empty when nothing is."""
    if source.path == PUBLIC_FACE:
        return []
    unit = unit_of(source.module)
    if unit not in FLOOR_OF:
        return [f"{source.path}: belongs to no floor; give {unit!r} one in DESIGN and in FLOOR_OF"]
    floor, group = FLOOR_OF[unit]
    found = []
    for imported in imports_of(source):
        where = f"{source.path}:{imported.line}"
        if imported.module == "<dynamic>":
            found.append(f"{where}: imports a module whose name is not written out")
            continue
        for target in target_units(imported):
            if not target:
                found.append(f"{where}: imports the public face, which imports everything")
            elif target not in FLOOR_OF:
                found.append(f"{where}: imports {target!r}, which belongs to no floor")
            elif unit == "kernels" and target != "kernels":
                found.append(f"{where}: kernels import nothing of graphllm, not even {target!r}")
            elif FLOOR_OF[target][1] != group and FLOOR_OF[target][0] >= floor:
                way = "sideways" if FLOOR_OF[target][0] == floor else "up"
                found.append(f"{where}: floor {floor} imports {way} from {target!r}")
    return found


def library_violations(source: SourceFile) -> list[str]:
    """Imports that floor 0 and the tensor-free files may not have; empty when there are none."""
    floor = FLOOR_OF.get(unit_of(source.module), (None,))[0] if source.path != PUBLIC_FACE else None
    found = []
    for imported in imports_of(source):
        library = imported.module.split(".")[0]
        where = f"{source.path}:{imported.line}"
        if floor == 0 and library != "graphllm" and library not in sys.stdlib_module_names:
            found.append(f"{where}: floor 0 uses the standard library only, not {library!r}")
        if source.path in TORCH_ONLY and library != "torch" and library not in sys.stdlib_module_names:
            found.append(f"{where}: needs torch only, not {library!r}")
        if source.path.startswith(TENSOR_FREE) and library in TENSOR_LIBRARIES:
            found.append(f"{where}: holds no tensors, so it does not import {library!r}")
        if knows_bytes_only(source.path) and any(FLOOR_OF[unit][0] > 0 for unit in target_units(imported)):
            names = (imported.module, f"{imported.module}.{imported.name}")
            if not any(knows_bytes_only(name.replace(".", "/") + ".py") for name in names):
                found.append(f"{where}: knows bytes and requests, not {imported.module!r}")
    return found


@pytest.mark.parametrize("source", read_package(), ids=lambda source: source.path)
def test_file_imports_only_from_lower_floors(source: SourceFile) -> None:
    assert floor_violations(source) == []


@pytest.mark.parametrize("source", read_package(), ids=lambda source: source.path)
def test_file_imports_only_the_libraries_of_its_floor(source: SourceFile) -> None:
    assert library_violations(source) == []


# The checker itself, on sources made up here: each rule must be able to fail.

WRONG = {
    "up": ("graphllm/cache/x.py", "from graphllm.layers.linear import Linear", "up from 'layers'"),
    "sideways": ("graphllm/scheduler/x.py", "import graphllm.runner.device", "sideways from 'runner'"),
    "sideways above the engine": ("graphllm/llm.py", "from graphllm.server import app", "sideways"),
    "server to llm": ("graphllm/server/app.py", "from graphllm.llm import LLM", "sideways from 'llm'"),
    "inside a function": (
        "graphllm/models/x.py",
        "def f():\n    from graphllm.engine import engine",
        "x.py:2: floor 4 imports up from 'engine'",
    ),
    "under TYPE_CHECKING": (
        "graphllm/quant/x.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from graphllm.cache import kv_cache",
        "x.py:3: floor 2 imports sideways",
    ),
    "from the package itself": ("graphllm/cache/x.py", "from graphllm import engine", "up from 'engine'"),
    "relative": ("graphllm/cache/x.py", "from ..engine import engine", "up from 'engine'"),
    "in an __init__": ("graphllm/cache/__init__.py", "from ..models import config", "up from 'models'"),
    "relative to the package": ("graphllm/errors.py", "from . import cli", "up from 'cli'"),
    "by string": (
        "graphllm/models/x.py",
        "import importlib\nimportlib.import_module('graphllm.server.app')",
        "up from 'server'",
    ),
    "by a computed name": ("graphllm/models/x.py", "__import__('graph' + 'llm')", "not written out"),
    "the public face": ("graphllm/engine/x.py", "from graphllm import LLM", "public face"),
    "the public face, plainly": ("graphllm/engine/x.py", "import graphllm", "public face"),
    "everything": ("graphllm/engine/x.py", "from graphllm import *", "public face"),
    "a kernel": ("graphllm/kernels/x.py", "from graphllm.errors import E", "nothing of"),
    "an unknown target": ("graphllm/cli.py", "from graphllm.utils import f", "belongs to no floor"),
    "an unknown file": ("graphllm/utils.py", "", "belongs to no floor"),
    "an unknown package": ("graphllm/helpers/x.py", "", "belongs to no floor"),
}
RIGHT = {
    "down": ("graphllm/engine/x.py", "from graphllm.runner import device\nimport graphllm.errors"),
    "own package": ("graphllm/runner/x.py", "from graphllm.runner.device import Device\nfrom . import y"),
    "within floor 0": ("graphllm/batch.py", "from graphllm.sequence import Sequence"),
    "kernels among themselves": ("graphllm/kernels/x.py", "from graphllm.kernels.rms_norm import rms_norm"),
    "__main__ to cli": ("graphllm/__main__.py", "from graphllm.cli import main"),
    "the version": ("graphllm/server/app.py", "from graphllm import __version__"),
    "libraries": ("graphllm/layers/x.py", "import torch\nfrom torch import nn"),
    "the public face": (PUBLIC_FACE, "from graphllm.llm import LLM"),
    "a name that only begins alike": ("graphllm/cache/x.py", "import graphllm_plugins.models"),
}
WRONG_LIBRARY = {
    "floor 0": ("graphllm/errors.py", "import orjson", "standard library only"),
    "scheduler": ("graphllm/scheduler/x.py", "def f():\n    import torch", "holds no tensors"),
    "block manager": ("graphllm/cache/block_manager.py", "from numpy import array", "holds no tensors"),
    "arena, a library": ("graphllm/arena.py", "import triton", "torch only"),
    "arena, the package": ("graphllm/arena.py", "from graphllm.errors import E", "torch only"),
    "http": ("graphllm/server/http.py", "from graphllm.engine.engine import Engine", "bytes and requests"),
    "router": ("graphllm/server/router.py", "from graphllm.server.app import App", "bytes and requests"),
    "sse": ("graphllm/server/sse.py", "from graphllm.server.openai import wire", "bytes and requests"),
}


@pytest.mark.parametrize(("path", "text", "complaint"), WRONG.values(), ids=WRONG)
def test_checker_refuses(path: str, text: str, complaint: str) -> None:
    found = floor_violations(SourceFile(path, text))
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(("path", "text"), RIGHT.values(), ids=RIGHT)
def test_checker_accepts(path: str, text: str) -> None:
    assert floor_violations(SourceFile(path, text)) == []


@pytest.mark.parametrize(("path", "text", "complaint"), WRONG_LIBRARY.values(), ids=WRONG_LIBRARY)
def test_library_checker_refuses(path: str, text: str, complaint: str) -> None:
    found = library_violations(SourceFile(path, text))
    assert len(found) == 1
    assert complaint in found[0]


def test_library_checker_accepts_tensors_beside_the_block_manager() -> None:
    assert library_violations(SourceFile("graphllm/cache/kv_cache.py", "import torch")) == []


def test_library_checker_accepts_floor_0_in_the_http_files() -> None:
    text = "import httptools\nfrom graphllm.errors import E\nfrom graphllm.server import sse, router"
    assert library_violations(SourceFile("graphllm/server/http.py", text)) == []
    text = "from graphllm.engine.engine import Engine"
    assert library_violations(SourceFile("graphllm/server/openai/chat_completions.py", text)) == []


def test_the_package_is_read_from_disk() -> None:
    paths = {source.path for source in read_package()}
    assert {"graphllm/__init__.py", "graphllm/errors.py", "graphllm/attention/backend.py"} <= paths
