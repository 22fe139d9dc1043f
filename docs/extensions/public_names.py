"""The public names of the package, and what is said of each in its source.

A module's names are those of its ``__all__``. A function or a class is described by its docstring,
a constant and a record's field by the string after it, or the comment beside it or above it.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import NamedTuple

__all__ = ["Told", "constants", "defined", "fields", "modules"]


class Told(NamedTuple):
    value: str  # as it is written: the annotation, or the value
    comment: str


def modules(package: str) -> list[str]:
    """The package's modules that have an ``__all__``, itself first; of ``refimpl`` itself alone."""
    path = getattr(import_module(package), "__path__", []) if package != "refimpl" else []
    inside = [info.name for info in iter_modules(path) if not info.ispkg]
    found = [package, *(f"{package}.{name}" for name in inside if name != "__main__")]
    return [name for name in found if hasattr(import_module(name), "__all__")]


def _comment(lines: list[str], node: ast.stmt, after: ast.stmt | None) -> str:
    """The string after a statement, or the comment at its first or last line, or the lines of
    comment above it."""
    if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
        return " ".join(str(after.value.value).split())
    for number in (node.lineno, node.end_lineno or node.lineno):
        if "  # " in lines[number - 1]:
            return lines[number - 1].rsplit("  # ", 1)[1]
    first = node.lineno - 1
    while first and lines[first - 1].lstrip().startswith("# "):
        first -= 1
    return " ".join(line.strip(" #") for line in lines[first : node.lineno - 1])


def _assigned(body: list[ast.stmt], text: str) -> dict[str, Told]:
    found: dict[str, Told] = {}
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            value = node.annotation if isinstance(node, ast.AnnAssign) else node.value
            told = Told(ast.unparse(value), _comment(text.splitlines(), node, after))
            found.setdefault(ast.unparse(target), told)
    return found


@cache
def constants(module: ModuleType) -> dict[str, Told]:
    """The public names that a module assigns."""
    text = inspect.getsource(module)
    found = _assigned(ast.parse(text).body, text)
    return {name: told for name, told in found.items() if name in module.__all__}


@cache
def fields(cls: type) -> dict[str, Told]:
    """The fields of a record that are public."""
    text = textwrap.dedent(inspect.getsource(cls))
    (node,) = ast.parse(text).body
    assert isinstance(node, ast.ClassDef)
    found = _assigned(node.body, text)
    annotated = {ast.unparse(x.target) for x in node.body if isinstance(x, ast.AnnAssign)}
    return {x: told for x, told in found.items() if x in annotated and not x.startswith("_")}


@cache
def defined(module: ModuleType) -> list[str]:
    """The names of ``__all__`` that the module defines itself: constants, then functions and
    classes in the order of its source."""
    body = ast.parse(inspect.getsource(module)).body
    here = [x.name for x in body if isinstance(x, ast.ClassDef | ast.FunctionDef)]
    return [*constants(module), *(name for name in here if name in module.__all__)]
