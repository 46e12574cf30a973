"""The host never waits for the device in the middle of a step: no synchronizing call in its call tree.

Reads the source files and follows the step from the loop through runner, program, layers and launchers by
the names they mention, and refuses the calls that are known to read a device tensor on the host or to wait
for the device. What a syntax tree does not show (an index by a mask, the truth of a tensor) is left to
torch's own debug mode on a card.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.architecture.call_tree import Function, functions_of, reached
from tests.architecture.source_tree import SourceFile, read_package

# Where a step runs: files, and folders of which all files count.
HOT = (
    "graphllm/arena.py",
    "graphllm/attention/",
    "graphllm/cache/kv_cache.py",
    "graphllm/engine/step_loop.py",
    "graphllm/kernels/",
    "graphllm/layers/",
    "graphllm/models/decoder.py",
    "graphllm/quant/",
    "graphllm/runner/",
)
# Where the tree begins. Modules and schemes are called through objects, so their methods begin it too.
ROOTS = {
    "StepLoop.run",
    "StepHandle.ready",
    "StepHandle.result",
    "StepHandle.sample",
    "ModelRunner.launch",
}
ROOT_METHODS = {"__call__", "apply", "begin_step", "forward", "forward_in_slices", "plan", "project"}

# What never runs on a card: the CPU's device and attention, and what says so in its name.
CPU_ONLY_FILES = {
    "graphllm/attention/paged.py",
    "graphllm/attention/row_groups.py",
    "graphllm/kernels/packed_cpu.py",
    "graphllm/kernels/paged_attention.py",
    "graphllm/runner/device.py",
}
CPU_ONLY_ENDINGS = ("_ref", "_reference", "_openblas", "_cpu")

# What schemes do with a checkpoint's tensors, on the CPU and before there are steps.
LOADING_METHODS = {"finish", "load"}

# Methods and functions that wait for the device or read from it, whatever they are called on.
CALLS = {
    "allclose",
    "argwhere",
    "bincount",
    "cpu",
    "empty_cache",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "numpy",
    "repeat_interleave",
    "synchronize",
    "tolist",
    "unique",
    "unique_consecutive",
}
# Functions of torch that make a tensor of host numbers; on a device that is a copy which is waited for.
MAKERS = {"as_tensor", "tensor"}
NUMBERS = {"bool", "float", "int"}
# Files whose copies go between host and device, so each must say that nobody waits for it.
COPYING_FILES = {"graphllm/runner/staging.py", "graphllm/runner/step_reports.py"}

# (file, function) -> what it may do, and why. Only what touches host memory, or is no part of a steady step.
ALLOWED = {
    # Before there are steps: the loader's thread, and a stream's first product, once, before its first
    # capture.
    ("graphllm/runner/cuda_device.py", "CudaDevice.run.load"): {"synchronize"},
    # A factor that is a number of the model's, rounded on the CPU and kept.
    ("graphllm/kernels/embedding.py", "_rounded"): {"item", "tensor"},
    # Counters and parameters of the host's own.
    ("graphllm/runner/graph_runner.py", "GraphRunner.has_captures_due"): {"bool"},
    ("graphllm/runner/sampler.py", "SamplerVariant.of"): {"bool"},
    # Pinned memory that the step's own copy has filled: its event was asked first.
    ("graphllm/runner/model_runner.py", "StepHandle.result"): {"tolist"},
    ("graphllm/runner/model_runner.py", "_token_logprob"): {"float", "int", "tolist"},
    ("graphllm/runner/step_reports.py", "read_scores"): {"numpy"},
    ("graphllm/runner/text_pooling.py", "read_results"): {"numpy"},
    # Pinned memory that is written before it is uploaded.
    ("graphllm/runner/model_runner.py", "StepHandle._open_rows"): {"numpy"},
    ("graphllm/runner/staging.py", "_HostTable.write"): {"numpy"},
    ("graphllm/runner/staging.py", "StagingRing.stage_subset"): {"numpy"},
    ("graphllm/runner/step_reports.py", "stage_spans"): {"numpy"},
    ("graphllm/runner/staging.py", "StagingRing._stage_rows"): {"numpy"},
    # Not a tensor's `to` but `_HostTable.to`, which waits for nothing and is looked at itself.
    ("graphllm/runner/staging.py", "upload"): {"to"},
    ("graphllm/runner/staging.py", "_upload_slots"): {"to"},
    ("graphllm/runner/staging.py", "_HostLines.to"): {"to"},
    ("graphllm/runner/model_runner.py", "ModelRunner._step"): {"to"},
    ("graphllm/runner/model_runner.py", "ModelRunner._report"): {"to"},
}


def is_on_cpu_only(function: Function) -> bool:
    is_kernel = any(decorator.startswith("triton.jit") for decorator in function.decorators)
    is_loading = function.path.startswith("graphllm/quant/") and function.bare_name in LOADING_METHODS
    is_named_so = function.path in CPU_ONLY_FILES or function.bare_name.endswith(CPU_ONLY_ENDINGS)
    return is_kernel or is_loading or is_named_so


def is_root(function: Function) -> bool:
    return function.name in ROOTS or function.bare_name in ROOT_METHODS


def offences(function: Function) -> Iterator[tuple[str, int]]:
    """(what, line) of every call in a function that could wait for the device."""
    for node in function.body():
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        is_patient = "non_blocking" not in keywords
        if isinstance(node.func, ast.Name):
            if node.func.id in NUMBERS and _may_be_tensor(node.args):
                yield node.func.id, node.lineno
            elif node.func.id == "print":
                yield "print", node.lineno
        elif isinstance(node.func, ast.Attribute):
            owner, name = ast.unparse(node.func.value), node.func.attr
            if name in CALLS or (owner == "torch" and name in MAKERS):
                yield name, node.lineno
            elif name == "to" and is_patient and _goes_elsewhere(node, keywords):
                yield "to", node.lineno
            elif name == "cuda" or (name == "copy_" and is_patient and function.path in COPYING_FILES):
                yield name, node.lineno
            elif name == "where" and owner == "torch" and len(node.args) == 1:
                yield "where", node.lineno


def _goes_elsewhere(node: ast.Call, keywords: dict[str | None, ast.expr]) -> bool:
    """Whether a `.to` names a device: by a string, or by what has "device" in its name."""
    target = keywords.get("device", node.args[0] if node.args else None)
    if isinstance(target, ast.Constant):
        return isinstance(target.value, str)
    return target is not None and "device" in ast.unparse(target)


def _may_be_tensor(arguments: list[ast.expr]) -> bool:
    """Numbers made of an element, an attribute or a result; not of a plain name, a sum or a comparison."""
    return any(isinstance(argument, ast.Subscript | ast.Attribute | ast.Call) for argument in arguments)


def hot_functions(sources: list[SourceFile]) -> list[Function]:
    functions = [
        function for source in sources if source.path.startswith(HOT) for function in functions_of(source)
    ]
    return reached(functions, is_root=is_root, is_outside=is_on_cpu_only)


def sync_violations(sources: list[SourceFile]) -> list[str]:
    """What the step does without being allowed to; empty when nothing."""
    return [
        f"{function.path}:{line}: {function.name}: {what}"
        for function in hot_functions(sources)
        for what, line in offences(function)
        if what not in ALLOWED.get((function.path, function.name), set())
    ]


@pytest.fixture(scope="module")
def of_a_step() -> dict[tuple[str, str], Function]:
    """The package's functions that a step can reach, by file and name."""
    return {(function.path, function.name): function for function in hot_functions(read_package())}


def test_nothing_in_a_step_waits_for_the_device() -> None:
    assert sync_violations(read_package()) == []


@pytest.mark.parametrize(("path", "name"), ALLOWED, ids=lambda part: part.rpartition("/")[2])
def test_allowance_is_used(of_a_step: dict[tuple[str, str], Function], path: str, name: str) -> None:
    assert {what for what, _ in offences(of_a_step[path, name])} == ALLOWED[path, name]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("graphllm/engine/step_loop.py", "StepLoop._apply"),
        ("graphllm/runner/staging.py", "_HostTable.to"),
        ("graphllm/runner/staging.py", "download"),
        ("graphllm/runner/step_program.py", "StepProgram.forward_in_slices"),
        ("graphllm/runner/device_sampler.py", "sample_on_device"),
        ("graphllm/runner/step_reports.py", "score_lines"),
        ("graphllm/runner/text_pooling.py", "TextPooling.pool"),
        ("graphllm/runner/graph_runner.py", "GraphRunner.run"),
        ("graphllm/runner/cuda_device.py", "_CudaEvent.query"),
        ("graphllm/runner/cuda_device.py", "_CudaCapture.end"),
        ("graphllm/models/decoder.py", "DecoderLayer.forward"),
        ("graphllm/layers/mlp.py", "GatedMLP.forward"),
        ("graphllm/kernels/rms_norm.py", "add_rms_norm"),
        ("graphllm/kernels/rotary_cache_write.py", "rotary_cache_write"),
        ("graphllm/kernels/step_inputs.py", "step_inputs"),
        ("graphllm/kernels/paged_decode_attention.py", "paged_decode_attention"),
        ("graphllm/kernels/paged_prefill_attention.py", "paged_prefill_attention"),
        ("graphllm/kernels/skinny_linear.py", "skinny_linear"),
    ],
)
def test_the_tree_reaches(of_a_step: dict[tuple[str, str], Function], path: str, name: str) -> None:
    assert (path, name) in of_a_step


# The checker itself, on sources made up here: each rule must be able to fail.

LAUNCH = "class ModelRunner:\n    def launch(self, x):\n        {}\n"
WRONG = {
    "item": ("return x.item()", "item"),
    "tolist": ("return [a for a in x.tolist()]", "tolist"),
    "numpy": ("x.numpy()[0] = 1", "numpy"),
    "cpu": ("y = x.cpu()", "cpu"),
    "nonzero": ("return torch.nonzero(x)", "nonzero"),
    "masked_select": ("return x.masked_select(x > 0)", "masked_select"),
    "unique": ("return torch.unique(x)", "unique"),
    "where with one argument": ("return torch.where(x > 0)", "where"),
    "the device": ("torch.cuda.synchronize()", "synchronize"),
    "a stream": ("self.stream.synchronize()", "synchronize"),
    "an event": ("self.event.synchronize()", "synchronize"),
    "an element": ("n = int(x[0])", "int"),
    "a reduction": ("n = float(x.sum())", "float"),
    "the truth of a tensor": ("n = bool((x > 0).any())", "bool"),
    "a new tensor": ("y = torch.tensor([1, 2], device=x.device)", "tensor"),
    "to the host": ("y = x.to('cpu')", "to"),
    "to a device": ("y = x.to(device=self.device)", "to"),
    "cuda": ("y = x.cuda()", "cuda"),
    "print": ("print(x)", "print"),
    "inside a lambda": ("return lambda: x.item()", "item"),
    "in a condition": ("return 1 if x.item() else 2", "item"),
}
RIGHT = {
    "to a type": "y = x.to(torch.float32)",
    "to a device, not waited for": "y = x.to(self.device, non_blocking=True)",
    "an empty tensor": "y = torch.empty(4, device=x.device)",
    "where with three arguments": "y = torch.where(x > 0, x, 0)",
    "a number of a sum": "n = int(x + 1)",
    "host memory by another name": "y = torch.from_numpy(array)",
    "an event that is asked": "return self.event.query()",
    "a word in a string": "y = 'tolist'",
}


@pytest.mark.parametrize(("line", "what"), WRONG.values(), ids=WRONG)
def test_checker_refuses(line: str, what: str) -> None:
    (found,) = sync_violations([SourceFile("graphllm/runner/x.py", LAUNCH.format(line))])
    assert found == f"graphllm/runner/x.py:3: ModelRunner.launch: {what}"


@pytest.mark.parametrize("line", RIGHT.values(), ids=RIGHT)
def test_checker_accepts(line: str) -> None:
    assert sync_violations([SourceFile("graphllm/runner/x.py", LAUNCH.format(line))]) == []


REACHED = {
    "a method": "self._wait(x)\n    def _wait(self, x):\n        x.item()",
    "a method that is handed on": "partial(self._wait, x)\n    def _wait(self, x):\n        x.item()",
    "a property": "self.wait\n    @property\n    def wait(self):\n        x.item()",
    "a function": "wait(x)\ndef wait(x):\n    x.item()",
    "a function inside": "def wait():\n            x.item()\n        wait()",
    "a class that is made": "Waiter(x)\nclass Waiter:\n    def __init__(self, x):\n        x.item()",
    "at second hand": "a(x)\ndef a(x):\n    b(x)\ndef b(x):\n    x.item()",
}
NOT_REACHED = {
    "what nobody names": "pass\ndef wait(x):\n    x.item()",
    "a reference": "wait_ref(x)\ndef wait_ref(x):\n    x.item()",
    "what only a reference names": "wait_ref(x)\ndef wait_ref(x):\n    a(x)\ndef a(x):\n    x.item()",
    "a kernel": "_k[(1,)](x)\n@triton.jit\ndef _k(x):\n    x.item()",
}


@pytest.mark.parametrize("body", REACHED.values(), ids=REACHED)
def test_what_the_step_reaches_is_looked_at(body: str) -> None:
    assert len(sync_violations([SourceFile("graphllm/runner/x.py", LAUNCH.format(body))])) == 1


@pytest.mark.parametrize("body", NOT_REACHED.values(), ids=NOT_REACHED)
def test_what_the_step_does_not_reach_on_a_card_is_not(body: str) -> None:
    assert sync_violations([SourceFile("graphllm/runner/x.py", LAUNCH.format(body))]) == []


def test_a_copy_to_the_host_must_not_be_waited_for() -> None:
    text = "class StepHandle:\n    def result(self):\n        target.copy_(source{})\n"
    staging = "graphllm/runner/staging.py"
    assert len(sync_violations([SourceFile(staging, text.format(""))])) == 1
    assert sync_violations([SourceFile(staging, text.format(", non_blocking=True"))]) == []


def test_files_beside_the_step_and_of_the_cpu_are_not_looked_at() -> None:
    for path in ("graphllm/server/x.py", "graphllm/attention/row_groups.py"):
        assert sync_violations([SourceFile(path, LAUNCH.format("x.item()"))]) == []
