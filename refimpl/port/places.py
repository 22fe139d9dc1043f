"""The line of our code, with its equation's tag, that a planted bug has otherwise; the equations of
an op's gradients."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from functools import cache
from typing import Any, NamedTuple

from ..check.cases import pair_of
from ..check.planted import Planted, home

__all__ = ["Place", "equations_of", "place_of"]

TAG = re.compile(r"# (\([a-z_]+\.\d+\))")
TAGS = re.compile(r"\([a-z_]+\.\d+\)")


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
def equations_of(op: str) -> dict[str, list[str]]:
    """The equations of each gradient that the op's backward returns, such as (moe.7), by the
    forward's argument.

    They are the tags in the statements that assign to the gradient, ``d`` and the argument's name:
    of the backward, else of the functions of its module that it calls. A gradient without such a
    statement has the tags of the backward's return.
    """
    forward, backward = pair_of(op)
    module = inspect.getmodule(backward)
    called = (getattr(module, name, None) for name in backward.__code__.co_names)
    tags = [_tags(f) for f in (backward, *filter(inspect.isfunction, called))]
    parameters = inspect.signature(forward).parameters.values()
    return {
        p.name: next(
            (x[f"d{p.name}"] for x in tags if f"d{p.name}" in x), tags[0].get("return", [])
        )
        for p in parameters
        if p.kind != p.KEYWORD_ONLY
    }


def _tags(function: Any) -> dict[str, list[str]]:
    """The tags that a function's statements cite, at their end or in a line of their own above, by
    the name assigned to, or "return"."""
    source = inspect.getsource(function)
    lines, found = source.splitlines(), dict[str, list[str]]()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign | ast.Return):
            continue
        above = lines[node.lineno - 2].strip()
        cited = [above] if above.startswith("#") else []
        cited += lines[node.lineno - 1 : node.end_lineno]
        tags = TAGS.findall(" ".join(line.partition("#")[2] for line in cited))
        names = [x for x in ast.walk(node) if isinstance(x, ast.Name)]
        assigned = [x.id for x in names if isinstance(x.ctx, ast.Store)]
        for name in ["return"] if isinstance(node, ast.Return) else assigned:
            if tags:
                found[name] = list(dict.fromkeys(found.get(name, []) + tags))
    return found


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
