"""An op is pure inside, too: no statement of an op or the model writes into an array. What is
written goes through `put` and `add_to` of array.py, so arrays that cannot be written to will do."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import refimpl

PACKAGE = Path(refimpl.__file__).parent
FILES = sorted([*(PACKAGE / "ops").glob("*.py"), PACKAGE / "batch.py", PACKAGE / "model.py"])
DICTS = {("model.py", "self.sums")}  # of gradients by name


def writes(tree: ast.AST) -> list[ast.Subscript]:
    """Every subscript that an assignment, plain or augmented, writes to."""
    found = []
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AugAssign | ast.AnnAssign) else targets
        found += [x for t in targets for x in ast.walk(t) if isinstance(x, ast.Subscript)]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_is_written_to(path: Path) -> None:
    for target in writes(ast.parse(path.read_text())):
        known = (path.name, ast.unparse(target.value)) in DICTS
        assert known, f"{path.name}:{target.lineno}: {ast.unparse(target)} is written to"


def test_this_test_sees_a_write() -> None:
    for line in ("x[0] = 1", "x[0] += 1", "a, x[0] = b", "x.y[1:, ...] = z"):
        assert writes(ast.parse(line)), line
