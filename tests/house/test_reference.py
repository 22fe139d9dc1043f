"""Every public name is described in its source, and arrays by their shapes: what `help()` shows and
what the site's API reference is made of."""

from __future__ import annotations

import doctest
import inspect
import pydoc
import re
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest

from support import PACKAGE, ROOT

sys.path.append(str(ROOT / "docs" / "extensions"))
from public_names import constants, defined, fields

MOST_LINES = 40  # of help(), a screen
ARRAY = re.compile(r"(Array|np\.ndarray)( \| None)?")
SHAPE = re.compile(r"\[[^\]\n]*\]|\bscalar\b|\bany shape\b")
AS = re.compile(r"\b[Aa]s `([\w.]+)`")  # arguments are those of another function
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__main__" and "__all__" in path.read_text()
)


def source_of(module: str) -> str:
    path = ROOT.joinpath(*module.split("."))
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


def without_shape(name: str, text: str) -> bool:
    """Whether no shape stands after an argument's name in the same paragraph, or the word scalar
    before it."""
    for found in re.finditer(rf"(?<![\w.]){re.escape(name)}(?!\w)", text):
        if SHAPE.search(text[found.end() :].split("\n\n")[0]):
            return False
    return f"scalar ``{name}``" not in text


def is_described_by(thing: Any, text: str) -> bool:
    """Whether the docstring says that the arguments are those of a function that says them."""
    for name in AS.findall(text):
        home, _, other = name.rpartition(".")
        module = import_module(home) if home else sys.modules[thing.__module__]
        function = getattr(module, other, None)
        if inspect.isroutine(function) and not missing_of(function):
            return True
    return False


def missing_of(thing: Any) -> list[str]:
    """What a function or a class leaves unsaid."""
    text = inspect.getdoc(thing) or ""
    if inspect.isclass(thing):
        made = text.startswith(f"{thing.__name__}(")  # by NamedTuple or dataclass
        silent = [
            field
            for field, told in fields(thing).items()
            if ARRAY.fullmatch(told.value) and not SHAPE.search(told.comment)
        ]
        return (["docstring"] if not text or made or thing.__doc__ is None else []) + silent
    if not text:
        return ["docstring"]
    arguments = inspect.signature(thing).parameters.values()
    arrays = [x.name for x in arguments if ARRAY.fullmatch(str(x.annotation))]
    module = inspect.getdoc(sys.modules[thing.__module__]) or ""
    if "any shape unless" in module or is_described_by(thing, text):
        return []
    return [f"shape of {name}" for name in arrays if without_shape(name, text)]


def undescribed(module: ModuleType) -> list[str]:
    found = []
    for name in defined(module):
        told = constants(module).get(name)
        if told is not None:
            found += [] if told.comment else [f"{name}: comment"]
        else:
            found += [f"{name}: {what}" for what in missing_of(getattr(module, name))]
    return found


def long_help(module: ModuleType) -> list[str]:
    functions = [x for name in defined(module) if inspect.isroutine(x := getattr(module, name))]
    helps = {x.__name__: pydoc.render_doc(x, renderer=pydoc.plaintext) for x in functions}
    return [name for name, text in helps.items() if text.count("\n") > MOST_LINES]


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_described(module: str) -> None:
    assert not undescribed(import_module(module))


@pytest.mark.parametrize("module", [x for x in MODULES if ">>> " in source_of(x)])
def test_examples_are_true(module: str) -> None:
    home = import_module(module)
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    for name in defined(home):
        text = inspect.getdoc(getattr(home, name)) or ""
        runner.run(parser.get_doctest(text, dict(vars(home)), name, home.__file__, None))
    assert runner.tries
    assert not runner.failures


@pytest.mark.parametrize("module", MODULES)
def test_help_fits_a_screen(module: str) -> None:
    assert not long_help(import_module(module))


def test_these_tests_see_what_they_forbid() -> None:
    written = ModuleType("written")
    source = """
def bare(x): ...
def silent(x: Array, y: Array | None): "Of ``x`` [D]."
"""
    exec(source, vars(written))
    sys.modules["written"] = written
    try:
        assert missing_of(written.bare) == ["docstring"]
        assert missing_of(written.silent) == ["shape of y"]
    finally:
        del sys.modules["written"]
    assert without_shape("x", "Of ``xs`` [D].")
    assert not without_shape("x", "Of the scalar ``x``.")
