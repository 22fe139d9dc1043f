"""The line of our code, with its equation's tag, that a planted bug has otherwise."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from functools import cache
from typing import NamedTuple

from ..check.planted import Planted, home

__all__ = ["Place", "place_of"]

TAG = re.compile(r"# (\([a-z_]+\.\d+\))")


class Place(NamedTuple):
    """Where an edit of a bug is made."""

    file: str  # refimpl/ops/mla.py
    line: int
    tag: str  # of the equation, (mla.11); empty if the line has none
    ours: str
    theirs: str  # the bug's, in the place of ours

    def __str__(self) -> str:
        tag = f" {self.tag}" if self.tag else ""
        return (
            f"{self.file}:{self.line}{tag} has {self.ours}; the bug has {self.theirs or 'nothing'}"
        )


def place_of(bug: Planted) -> Place:
    """The place of a bug's last edit, which is the backward's where both directions have one."""
    name = bug.module or home(bug.op)
    tree, lines = _code(name)
    scopes: list[ast.AST] = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == bug.within
    ]
    old, new = bug.edits[-1]
    first, last = _lines_of(old, scopes or [tree])
    found = TAG.search("\n".join(lines[first - 1 : last]))
    file = f"{name.replace('.', '/')}.py"
    words = (" ".join(text.split()) for text in (old, new))
    return Place(file, first, found[1] if found else "", *words)


@cache
def _code(module: str) -> tuple[ast.Module, list[str]]:
    source = inspect.getsource(importlib.import_module(module))
    return ast.parse(source), source.splitlines()


def _lines_of(old: str, scopes: list[ast.AST]) -> tuple[int, int]:
    """The first and the last line of a piece of code, compared as a syntax tree."""
    body = ast.parse(old).body
    wanted: list[ast.AST] = list(body)
    if len(body) == 1 and isinstance(body[0], ast.Expr):
        wanted = [body[0].value]
    dumps = [ast.dump(node) for node in wanted]
    for scope in scopes:
        for node in ast.walk(scope):
            same = type(node) is type(wanted[0]) and ast.dump(node) == dumps[0]
            if same and isinstance(node, ast.stmt | ast.expr):
                return node.lineno, (node.end_lineno or node.lineno) + len(wanted) - 1
    raise ValueError(f"no such code: {old!r}")
