"""What keeps code readable and no formatter sees: assignments one per line, functions that fit a
screen, the formatter switched off for tables of numbers and planted text alone."""

from __future__ import annotations

import ast

import pytest

from support import ROOT

MOST_STATEMENTS = 45  # of a function of the package, those of functions inside it included
TABLES = {  # of numbers, or of planted text
    "refimpl/check/planted.py",
    "refimpl/config.py",
    "tests/bench/sizes.py",
    "tests/bench/test_rows.py",
    "tests/bench/test_works.py",
    "tests/check/test_planted.py",
    "tests/golden/grpo.py",
    "tests/golden/make_checkpoints.py",
    "tests/golden/model.py",
    "tests/port/outside.py",
    "tests/port/test_hints.py",
    "tests/ptx/planted.py",
}
TREES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text())
    for folder in ("refimpl", "kernels", "tests", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def crowded(tree: ast.AST) -> list[str]:
    """Assignments of three or more values at once, ``a, b, c = 1, 2, 3``. A call or a shape may be
    unpacked into as many names as it has."""
    assignments = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    return [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in assignments
        if isinstance(node.value, ast.Tuple) and len(node.value.elts) > 2
        if any(isinstance(target, ast.Tuple) for target in node.targets)
    ]


def long_functions(tree: ast.AST, most: int = MOST_STATEMENTS) -> list[str]:
    found = []
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            inside = sum(isinstance(node, ast.stmt) for node in ast.walk(function)) - 1
            if inside - (ast.get_docstring(function) is not None) > most:
                found.append(f"{function.name}: {inside} statements")
    return found


@pytest.mark.parametrize("path", TREES)
def test_one_assignment_per_line(path: str) -> None:
    assert not crowded(TREES[path])


@pytest.mark.parametrize("path", [path for path in TREES if path.startswith("refimpl/")])
def test_functions_fit_a_screen(path: str) -> None:
    assert not long_functions(TREES[path])


def test_the_formatter_is_on() -> None:
    marks = {path for path in TREES if "# fmt: " + "skip" in (ROOT / path).read_text()}
    assert marks == TABLES
    assert not [path for path in TREES if "# fmt: " + "off" in (ROOT / path).read_text()]


def test_these_tests_see_what_they_forbid() -> None:
    assert crowded(ast.parse("a, b, c = 1, 2, 3"))
    assert not crowded(ast.parse("a, b, c = f()\na, b = 1, 2"))
    lines = ["x = 1"] * MOST_STATEMENTS
    for body, long in ((lines, 0), (["'Docstring.'", *lines], 0), ([*lines, "y = 2"], 1)):
        assert len(long_functions(ast.parse("def f():\n    " + "\n    ".join(body)))) == long
    inner = "def f():\n    def g():\n        " + "\n        ".join(lines)
    assert len(long_functions(ast.parse(inner))) == 1  # of f, which has g's and g itself
