"""The API reference: the directive ``api``, which documents the public names of packages.

What is said of each name is found by ``public_names``.
"""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from public_names import constants, defined, fields, modules
from sources import address
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

__all__ = ["setup", "source"]

ROOT = Path(__file__).parents[2]


def _entry(module: ModuleType, name: str) -> list[str]:
    """One public name as reStructuredText."""
    if told := constants(module).get(name):
        short = told.value if len(told.value) < 60 else told.value[:56] + " …"
        head = [f".. py:data:: {name}", f"   :value: {short}", f"   :module: {module.__name__}"]
        return [*head, "", f"   {plain(told.comment)}", ""]
    if inspect.isclass(getattr(module, name)):
        return [f".. autoclass:: {module.__name__}.{name}", "   :members:", ""]
    return [f".. autofunction:: {module.__name__}.{name}", ""]


class Api(SphinxDirective):
    """A section per module of the packages that are named: its docstring and its public names."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        packages = self.arguments[0].split()
        return [self.section(name) for package in packages for name in modules(package)]

    def section(self, name: str) -> nodes.section:
        module = import_module(name)
        section = nodes.section(name, nodes.title(name, name), ids=[name], names=[name])
        lines = [f".. automodule:: {name}", ""]
        for public in defined(module):
            lines += _entry(module, public)
        if others := [x for x in module.__all__ if x not in defined(module)]:
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


def as_text(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Before napoleon reads a docstring (event autodoc-process-docstring): a block that an empty
    line sets off and that is indented stands as it is, and so does an example, after >>>."""
    made: list[str] = []
    block = 0  # the indentation of the block
    example = False
    for before, line in zip(["", *lines], lines, strict=False):
        example = bool(line) and (example or line.lstrip().startswith(">>> "))
        indent = len(line) - len(line.lstrip())
        if line and indent < block:
            block = 0
        if line and not before and indent > _indent(made) and not block:
            block = indent
            made += [" " * _indent(made) + "::", ""]
        made.append(line if block or example else plain(line))
    lines[:] = made


def _indent(lines: list[str]) -> int:
    """The indentation of the last line that is not empty."""
    return next((len(x) - len(x.lstrip()) for x in reversed(lines) if x), 0)


def add_fields(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """A record's docstring ends with its fields (event autodoc-process-docstring)."""
    if what == "class" and (listed := fields(thing)):
        items = [
            f"- ``{field}: {told.value}``" + f" – {plain(told.comment)}" * bool(told.comment)
            for field, told in listed.items()
        ]
        lines += ["", *items, ""]


def skip_fields(
    app: Sphinx, what: str, name: str, thing: Any, skip: bool, options: Any
) -> bool | None:
    """Fields are listed already, and a NamedTuple would say "Alias for field number 0"."""
    shown = what != "class" or callable(thing) or isinstance(thing, property)
    return None if shown else True


def short_types(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, arguments: str, returns: str
) -> tuple[str | None, str | None]:
    """Signatures with the aliases' names (event autodoc-process-signature)."""
    alias = re.compile(r"TypeAliasForwardRef\('([^']*)'\)")
    return tuple(x and alias.sub(r"\1", x) for x in (arguments, returns))


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
    app.connect("autodoc-process-signature", short_types)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
