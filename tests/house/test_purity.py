"""An op is pure inside, too: no statement of an op or the model writes into an array. What is
written goes through `put` and `add_to` of array.py, so arrays that cannot be written to will do."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import refimpl

PACKAGE = Path(refimpl.__file__).parent
FILES = sorted([*(PACKAGE / "ops").glob("*.py"), PACKAGE / "batch.py", PACKAGE / "model.py"])
IN_PLACE = ("at", "fill", "sort", "itemset", "setflags")  # methods of arrays and ufuncs
DICTS = {("model.py", "self.sums")}  # of gradients by name


def writes(tree: ast.AST) -> list[ast.Subscript]:
    """Every subscript that an assignment, plain or augmented, writes to."""
    found = []
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AugAssign | ast.AnnAssign) else targets
        found += [x for t in targets for x in ast.walk(t) if isinstance(x, ast.Subscript)]
    return found


def reaches(tree: ast.AST) -> list[str]:
    """Calls that write in another way: ufuncs with ``out`` or ``at``, methods that fill or sort in
    place, and `put` or `add_to` on what is not a plain name, or is an argument of a forward or a
    backward."""
    found = []
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        is_op = function.name.endswith(("_forward", "_backward"))
        given = (
            {a.arg for a in [*function.args.args, *function.args.kwonlyargs]} if is_op else set()
        )
        for call in [node for node in ast.walk(function) if isinstance(node, ast.Call)]:
            name = call.func.id if isinstance(call.func, ast.Name) else ""
            method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
            if name in ("put", "add_to"):
                target = call.args[0]
                if not isinstance(target, ast.Name) or target.id in given:
                    found.append(ast.unparse(call))
            elif any(keyword.arg == "out" for keyword in call.keywords) or (
                method in IN_PLACE and ast.unparse(call.func.value) not in ("xp", "batch")
            ):
                found.append(ast.unparse(call))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_is_written_to(path: Path) -> None:
    for target in writes(ast.parse(path.read_text())):
        known = (path.name, ast.unparse(target.value)) in DICTS
        assert known, f"{path.name}:{target.lineno}: {ast.unparse(target)} is written to"
    assert reaches(ast.parse(path.read_text())) == []


def test_this_test_sees_a_write() -> None:
    for line in ("x[0] = 1", "x[0] += 1", "a, x[0] = b", "x.y[1:, ...] = z"):
        assert writes(ast.parse(line)), line
    for line in (
        "np.add.at(x, i, y)",
        "x.fill(0)",
        "put(saved.x, 0, y)",
        "put(x, 0, y)",
        "xp.add(y, z, out=x)",
    ):
        assert reaches(ast.parse(f"def f_forward(x):\n    {line}")), line
    assert not reaches(ast.parse("def f_forward(x):\n    y = zeros(x)\n    y = put(y, 0, x)"))
