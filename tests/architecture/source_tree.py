"""Reads a package's source files for the architecture tests, without importing any of them.

Owns walking the tree and naming what each import statement imports. Knows no rule: the tests do.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "graphllm"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file. `path` is relative to the repository, with forward slashes; `module` is dotted."""

    path: str
    text: str

    @property
    def module(self) -> str:
        parts = self.path.removesuffix(".py").split("/")
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def is_package(self) -> bool:
        return self.path.endswith("/__init__.py")

    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.path)


@dataclass(frozen=True, slots=True)
class Import:
    """One imported name: `from module import name`, or `import module` with name None."""

    module: str
    name: str | None
    line: int


def read_package(root: Path = PACKAGE) -> list[SourceFile]:
    """Every Python file below `root`, sorted by path."""
    return [
        SourceFile(f"{root.name}/{path.relative_to(root).as_posix()}", path.read_text(encoding="utf-8"))
        for path in sorted(root.rglob("*.py"))
    ]


def imports_of(source: SourceFile) -> Iterator[Import]:
    """All imports of a file: inside functions and `TYPE_CHECKING` blocks too, relative ones resolved.

    `import_module(...)` and `__import__(...)` count; what they import is "<dynamic>" unless it is
    written as a string.
    """
    for node in ast.walk(source.tree()):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, None, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            module = _resolve(source, node)
            for alias in node.names:
                yield Import(module, alias.name, node.lineno)
        elif isinstance(node, ast.Call) and _called_name(node) in ("import_module", "__import__"):
            argument = node.args[0] if node.args else None
            yield Import(_literal(argument) or "<dynamic>", None, node.lineno)


def _resolve(source: SourceFile, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parts = source.module.split(".")
    # One dot is the file's own package, which for an `__init__.py` is the module itself.
    drop = node.level - 1 if source.is_package else node.level
    base = parts[: len(parts) - drop]
    return ".".join([*base, *([node.module] if node.module else [])])


def _literal(node: ast.expr | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _called_name(node: ast.Call) -> str:
    function = node.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""
