"""What a machine can read off an op's source: signatures, docstrings, words that break the complex
step."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from refimpl import ops

from support import PACKAGE, STEMS


@pytest.mark.parametrize("stem", STEMS)
def test_contract_of_signatures(stem: str) -> None:
    """Differentiable arguments are positional, the others keyword-only; backward takes (dy,
    saved)."""
    forward = inspect.signature(getattr(ops, f"{stem}_forward")).parameters.values()
    assert {p.kind for p in forward} <= {
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    }
    assert all(
        p.default is inspect.Parameter.empty for p in forward if p.kind == p.POSITIONAL_OR_KEYWORD
    )
    backward = list(inspect.signature(getattr(ops, f"{stem}_backward")).parameters)
    assert len(backward) == 2
    assert backward[0].startswith("d")
    assert backward[1] == "saved"


@pytest.mark.parametrize("stem", STEMS)
def test_docstrings(stem: str) -> None:
    """Every op says its source or letters, names its derivation, and documents every public
    function."""
    source = (PACKAGE / "ops" / f"{stem}.py").read_text()
    tree = ast.parse(source)
    head = ast.get_docstring(tree) or ""
    assert f"derivations/{stem}.md" in head
    assert "Letters" in head or stem == "swiglu"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


@pytest.mark.parametrize(
    "path", [*sorted((PACKAGE / "ops").glob("*.py")), PACKAGE / "model.py"], ids=lambda p: p.stem
)
def test_nothing_that_breaks_the_complex_step(path: Path) -> None:
    """abs, norm, var, std, conj and vdot have no complex derivative; no op imports NumPy for its
    arithmetic."""
    forbidden = re.compile(
        r"\b(abs|fabs|norm|var|std|conj|conjugate|vdot|angle)\(|\.T\b|np\.einsum|xp\.einsum"
    )
    for number, line in enumerate(path.read_text().splitlines(), 1):
        code = line.split("#")[0]
        assert not forbidden.search(code) or '"' in code or "``" in code, (
            f"{path.name}:{number}: {line}"
        )
    if path.stem not in ("rope", "model"):  # frequencies and initial parameters are made in NumPy
        assert not re.search(r"^\s*(import|from) numpy\b", path.read_text(), re.M)
