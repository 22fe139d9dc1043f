"""The checker is checked: planted bugs are caught by the rules that should, clean code is not."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys

import numpy as np
import pytest

from refimpl.check import RULES
from refimpl.check.cases import pair_of
from refimpl.check.planted import PLANTED, Planted, edited, home, plant
from refimpl.ops import Op
from refimpl.ops.attention import visible
from refimpl.port.power import false_alarms

from kill_table import kill
from support import FULL


def name(bug: Planted) -> str:
    return f"{bug.op}: {bug.name}"


# On the model, differences take seven times what the other rules take together: one of its bugs has
# them in every run (below), all have them in make test-full and make bugs.
ON_MODELS = RULES if FULL else ("contract", "noise")


@pytest.mark.parametrize("bug", PLANTED, ids=name)
def test_caught(bug: Planted) -> None:
    """On the default examples of ``refimpl verify`` the checker catches a wrong backward and names
    its tensor; the golden values catch a mistake of both passes."""
    row = kill(bug, ON_MODELS)
    if bug.shared:
        assert "golden" in row.caught
    else:
        assert row.caught & {"contract", "differences", "noise", "sharpness"}
        assert row.tensors or bug.op == "model"


def test_every_rule_sees_a_wrong_model() -> None:
    bug = next(bug for bug in PLANTED if bug.name == "residual dropped in the backward")
    row = kill(bug)
    assert row.caught == {"differences", "noise", "golden"}
    assert row.tensors


@pytest.mark.parametrize(
    "shared", ["rope: halves for interleaved, both ways", "attention: scale squared, both ways"]
)
def test_self_consistency_is_blind_to_shared_mistakes(shared: str) -> None:
    """Which is why golden values exist: the checker alone lets these pass."""
    bug = next(bug for bug in PLANTED if bug.shared and name(bug) == shared)
    assert kill(bug).caught == {"golden"}


def test_wrong_in_float64_alone() -> None:
    """The longdouble run is right: the noise rule sees no error, its bound on sharpness does."""
    bug = next(bug for bug in PLANTED if bug.name == "float32 cast inside")
    caught = kill(bug).caught
    assert "noise" not in caught
    assert "sharpness" in caught


def test_catalogue_is_large_enough() -> None:
    assert len(PLANTED) >= 110
    assert sum(bug.shared for bug in PLANTED) >= 18
    assert len({name(bug) for bug in PLANTED}) == len(PLANTED)


def test_clean_code_is_not_accused() -> None:
    assert false_alarms()[0] == 0


def bug_of(old: str, new: str, **fields: str) -> Planted:
    return Planted("linear", "a bug", "any", ((old, new),), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "old", "new", "wanted"),
    [
        ("y = f(\n    a,\n    (b * c),  # why\n)\n", "f(a, b * c)", "f(a, b)", "y = f(a, b)"),
        ("y = [a - b - c]", "a - b", "a", "y = [a - c]"),
        ('y = f("a")[0]', "f('a')", "'b'", "y = 'b'[0]"),
        ("if a:\n    b += 1\nc = 2", "b += 1", "b = 1", "if a:\n    b = 1\nc = 2"),
        ("if a:\n    b = 1\n    c = 2", "b = 1\nc = 2", "d = 3", "if a:\n    d = 3"),
        ("a = 1\nb = 2", "a = 1", "", "b = 2"),
        ("if a:\n    f(b)", "f(b)", "", "if a:\n    pass"),
        ("for a in b:\n    c\nelse:\n    d = 1", "d = 1", "d = 2\ne = 3",
         "for a in b:\n    c\nelse:\n    d = 2\n    e = 3"),
    ],
)  # fmt: skip
def test_edit_is_of_the_syntax_tree(source: str, old: str, new: str, wanted: str) -> None:
    assert ast.dump(edited(source, bug_of(old, new))) == ast.dump(ast.parse(wanted))


@pytest.mark.parametrize(
    ("source", "old", "count"),
    [
        ("y = a - b - c", "b - c", 0),  # other operands than the text suggests
        ("f(a, f(a))", "a", 2),
        ("a = 1\nif b:\n    a = 1", "a = 1", 2),
        ("a = 1", "b = 1", 0),
    ],
)
def test_code_must_stand_once(source: str, old: str, count: int) -> None:
    with pytest.raises(ValueError, match=f"must stand once in linear, stands {count} times"):
        edited(source, bug_of(old, "0"))


def test_edit_within_a_function() -> None:
    source = "def f():\n    return a\ndef g():\n    return a"
    tree = edited(source, bug_of("a", "b", within="g"))
    assert ast.dump(tree) == ast.dump(ast.parse(source[:-1] + "b"))
    with pytest.raises(ValueError, match="must stand once in h, stands 0 times"):
        edited(source, bug_of("a", "b", within="h"))


def test_edit_in_a_module_that_the_op_imports_from() -> None:
    """The op runs with the edited function; the true modules stay as they are."""
    bug = Planted(
        "flash_attention",
        "mask of the other kind",
        "any",
        (("(s <= t) | (not causal)", "s <= t + k.shape[1]"),),
        within="visible",
        module="refimpl.ops.attention",
    )
    q = np.random.default_rng(0).normal(size=(1, 3, 1, 2))
    right, wrong = pair_of("flash_attention"), plant(bug)
    assert isinstance(wrong, Op)
    y, wanted = wrong.forward(q, q, q, scale=1.0)[0], right.forward(q, q, q, scale=1.0)[0]
    assert np.array_equal(y[:, -1], wanted[:, -1])
    assert not np.allclose(y[:, 0], wanted[:, 0])
    assert sys.modules["refimpl.ops.attention"].visible is visible


@pytest.mark.parametrize("bug", PLANTED, ids=name)
def test_layout_plays_no_part(bug: Planted) -> None:
    """A bug finds its place in the bare syntax tree's own layout too."""
    source = inspect.getsource(importlib.import_module(bug.module or home(bug.op)))
    other_layout = ast.unparse(ast.parse(source))
    assert other_layout != source
    assert ast.dump(edited(source, bug)) == ast.dump(edited(other_layout, bug))
