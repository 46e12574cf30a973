"""Which functions of some source files can run when certain functions are called, told by names alone.

Owns the tree. A function is taken to reach every function, method and property of these files whose name
it mentions, called or passed on: too many rather than too few. Knows no rule: the tests do.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from tests.architecture.source_tree import SourceFile


@dataclass(frozen=True)
class Function:
    """One function or method, without those defined in it. `name` is qualified: "StepLoop._launch"."""

    path: str
    name: str
    node: ast.FunctionDef | ast.AsyncFunctionDef

    @property
    def bare_name(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def decorators(self) -> list[str]:
        return [ast.unparse(decorator) for decorator in self.node.decorator_list]

    def body(self) -> Iterator[ast.AST]:
        """All nodes that run with it: functions in its body are apart, lambdas belong to it."""
        waiting: list[ast.AST] = [*self.node.body, *self.node.args.defaults]
        while waiting:
            node = waiting.pop()
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield node
                waiting.extend(ast.iter_child_nodes(node))

    def mentioned(self) -> set[str]:
        """Names that it may call, hand on or read as a property; classes among them."""
        names = {node.id for node in self.body() if isinstance(node, ast.Name)}
        return names | {node.attr for node in self.body() if isinstance(node, ast.Attribute)}


def functions_of(source: SourceFile) -> Iterator[Function]:
    """Every function of a file, those inside classes and functions too."""

    def inside(parent: ast.AST, prefix: str) -> Iterator[Function]:
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield Function(source.path, prefix + node.name, node)
            name = getattr(node, "name", None)
            is_scope = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            yield from inside(node, f"{prefix}{name}." if is_scope else prefix)

    yield from inside(source.tree(), "")


def reached(
    functions: Iterable[Function],
    *,
    is_root: Callable[[Function], bool],
    is_outside: Callable[[Function], bool],
) -> list[Function]:
    """Roots and all that they reach, in the order of the files; nothing goes through what is outside."""
    inside = [function for function in functions if not is_outside(function)]
    by_name: dict[str, list[Function]] = defaultdict(list)
    for function in inside:
        by_name[function.bare_name].append(function)
        if function.bare_name in ("__init__", "__post_init__", "__enter__", "__call__"):
            # To name a class is to make one.
            by_name[function.name.split(".")[-2]].append(function)
    found: set[int] = set()
    waiting = [function for function in inside if is_root(function)]
    while waiting:
        function = waiting.pop()
        if id(function) not in found:
            found.add(id(function))
            waiting.extend(other for name in function.mentioned() for other in by_name[name])
    return [function for function in inside if id(function) in found]
