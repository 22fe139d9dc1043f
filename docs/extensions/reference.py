"""The API reference: the directive ``api``, which documents every public module of a package."""

from __future__ import annotations

import ast
import inspect
import textwrap
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from sources import address

__all__ = ["fields", "modules", "setup", "source"]

ROOT = Path(__file__).parents[2]


def modules(package: str) -> list[str]:
    """The package's modules that have an ``__all__``, itself first."""
    found = [package]
    module = import_module(package)
    for info in iter_modules(getattr(module, "__path__", [])):
        if not info.name.startswith("_") and not info.ispkg:
            found.append(f"{package}.{info.name}")
    return [name for name in found if hasattr(import_module(name), "__all__")]


class Api(SphinxDirective):
    """A section per module: its docstring, and the names of its ``__all__``."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        made = []
        for given in self.arguments[0].split():
            for name in modules(given):
                title = nodes.title(name, name)
                section = nodes.section(name, title, ids=[f"module-{name}"], names=[name])
                lines = [f".. automodule:: {name}", "   :members:", ""]
                self.state.nested_parse(StringList(lines, name), 0, section)
                made.append(section)
        return made


def fields(cls: type) -> list[tuple[str, str]]:
    """The fields of a record and the comments beside them."""
    source = inspect.getsource(cls)
    lines = source.splitlines()
    found = []
    for node in ast.parse(textwrap.dedent(source)).body[0].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = lines[node.end_lineno - 1]
            comment = text.split("  # ", 1)[1] if "  # " in text else ""
            found.append((node.target.id, comment))
    return found


def add_fields(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """A record's docstring ends with its fields (event autodoc-process-docstring)."""
    if what == "class" and (listed := fields(thing)):
        lines += ["", "Fields:"]
        for field, comment in listed:
            lines += [f"  - ``{field}`` {comment}"]


def source(domain: str, info: dict[str, str]) -> str | None:
    """Where a name is defined, for sphinx.ext.linkcode: its line on the page of its file."""
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
    app.connect("autodoc-process-docstring", add_fields)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
