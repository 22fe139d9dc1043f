"""The API reference: the directive ``api``, which documents the public names of packages.

A module's names are those of its ``__all__``. What a function takes and returns stands in its
docstring, what a field or a constant is in the comment beside it.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sources import address
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

__all__ = ["constants", "fields", "modules", "names", "setup", "source"]

ROOT = Path(__file__).parents[2]


def modules(package: str) -> list[str]:
    """The package's modules that have an ``__all__``, itself first; of the whole, itself alone."""
    path = getattr(import_module(package), "__path__", []) if package != "refimpl" else []
    inside = [info.name for info in iter_modules(path) if not info.ispkg]
    found = [package, *(f"{package}.{name}" for name in inside if name != "__main__")]
    return [name for name in found if hasattr(import_module(name), "__all__")]


def _comment(lines: list[str], node: ast.stmt) -> str:
    """The comment at a statement's first or last line, or else the lines of comment above it."""
    for number in (node.lineno, node.end_lineno or node.lineno):
        if "  # " in lines[number - 1]:
            return lines[number - 1].rsplit("  # ", 1)[1]
    first = node.lineno - 1
    while first and lines[first - 1].lstrip().startswith("# "):
        first -= 1
    return " ".join(line.strip(" #") for line in lines[first : node.lineno - 1])


def _assigned(body: list[ast.stmt], lines: list[str]) -> dict[str, tuple[str, str]]:
    """Each name that is assigned: what it is, and the comment beside it."""
    found = {}
    for node in body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            kind = node.annotation if isinstance(node, ast.AnnAssign) else node.value
            found[ast.unparse(target)] = (ast.unparse(kind), _comment(lines, node))
    return found


@cache
def constants(module: ModuleType) -> dict[str, tuple[str, str]]:
    """The public names that a module assigns: the type or the value as it is written, the
    comment."""
    text = inspect.getsource(module)
    found = _assigned(ast.parse(text).body, text.splitlines())
    return {name: told for name, told in found.items() if name in module.__all__}


def fields(cls: type) -> dict[str, tuple[str, str]]:
    """The fields of a record: the type, and the comment beside it."""
    text = textwrap.dedent(inspect.getsource(cls))
    (node,) = ast.parse(text).body
    assert isinstance(node, ast.ClassDef)
    annotated = [x for x in node.body if isinstance(x, ast.AnnAssign)]
    found = _assigned(annotated, text.splitlines())
    return {name: told for name, told in found.items() if not name.startswith("_")}


def names(module: ModuleType) -> tuple[list[str], list[str]]:
    """The names of ``__all__`` that the module defines, in the order of its source, and those that
    it has from others."""
    body = ast.parse(inspect.getsource(module)).body
    here = [x.name for x in body if isinstance(x, ast.ClassDef | ast.FunctionDef)]
    mine = [name for name in [*constants(module), *here] if name in module.__all__]
    return mine, [name for name in module.__all__ if name not in mine]


def _entry(module: ModuleType, name: str) -> list[str]:
    """One public name as reStructuredText."""
    thing = getattr(module, name)
    told = constants(module).get(name)
    if told is None:
        kind = "autoclass" if inspect.isclass(thing) else "autofunction"
        return [f".. {kind}:: {module.__name__}.{name}", *["   :members:"] * inspect.isclass(thing), ""]
    value, comment = told
    short = value if len(value) < 60 else value[:56] + " …"
    return [f".. py:data:: {name}", f"   :value: {short}", f"   :module: {module.__name__}", "", f"   {plain(comment)}", ""]


class Api(SphinxDirective):
    """A section per module of the packages that are named: its docstring and its public names."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        return [self.section(name) for given in self.arguments[0].split() for name in modules(given)]

    def section(self, name: str) -> nodes.section:
        module = import_module(name)
        section = nodes.section(name, nodes.title(name, name), ids=[name], names=[name])
        lines = [f".. automodule:: {name}", ""]
        mine, others = names(module)
        for public in mine:
            lines += _entry(module, public)
        if others:
            homes = [(x, getattr(getattr(module, x), "__module__", name)) for x in others]
            listed = ", ".join(f":py:obj:`{x} <{home}.{x}>`" for x, home in homes)
            lines += [f"From its modules: {listed}.", ""]
        self.state.nested_parse(StringList(lines, name), 0, section)
        return section


def plain(line: str) -> str:
    """A line of a docstring as reStructuredText: docstrings are plain text with ``code``, where
    bars, stars and underscores of formulas are no markup."""
    parts = re.split(r"(^ *\* |``.*?``|`[^`]*`)", line)
    parts[::2] = [re.sub(r"([*|]|(?<=\w)_(?!\w))", r"\\\1", text) for text in parts[::2]]
    return "".join(parts)


def as_text(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Before napoleon reads a docstring (event autodoc-process-docstring): a block that is set off by
    an empty line and indented stands as it is."""
    made, block = [], 0  # the indentation of the block
    for before, line in zip(["", *lines], lines, strict=False):
        indent = len(line) - len(line.lstrip())
        if line and indent < block:
            block = 0
        if line and not before and indent > _indent(made) and not block:
            block = indent
            made += [" " * _indent(made) + "::", ""]
        made.append(line if block else plain(line))
    lines[:] = made


def _indent(lines: list[str]) -> int:
    """The indentation of the last line that is not empty."""
    return next((len(x) - len(x.lstrip()) for x in reversed(lines) if x), 0)


def add_fields(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """A record's docstring ends with its fields (event autodoc-process-docstring)."""
    if what == "class" and (listed := fields(thing)):
        lines += ["", *(f"- ``{field}``: {plain(comment)}" for field, (_, comment) in listed.items()), ""]


def skip_fields(
    app: Sphinx, what: str, name: str, thing: Any, skip: bool, options: Any
) -> bool | None:
    """Fields are listed already, and a NamedTuple would say "Alias for field number 0"."""
    return True if what == "class" and not callable(thing) and not isinstance(thing, property) else None


def source(domain: str, info: dict[str, str]) -> str | None:
    """The address of a name's definition, for sphinx.ext.linkcode."""
    thing: Any = import_module(info["module"])
    for part in info["fullname"].split("."):
        thing = getattr(thing, part, None)
    try:
        thing = inspect.unwrap(thing)
        path = Path(inspect.getsourcefile(thing) or "").relative_to(ROOT)
        return address("docs/api/x", path.as_posix(), inspect.getsourcelines(thing)[1])
    except (TypeError, ValueError, OSError):
        return None


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("api", Api)
    app.connect("autodoc-process-docstring", as_text, priority=100)
    app.connect("autodoc-process-docstring", add_fields, priority=900)
    app.connect("autodoc-skip-member", skip_fields)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
