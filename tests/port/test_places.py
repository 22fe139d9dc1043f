"""Every planted bug has a place in our code, and the code that is said to stand there does; every
gradient has its equation."""

from __future__ import annotations

import ast
import inspect
import re

import pytest

from refimpl.check.cases import CASES, pair_of
from refimpl.check.planted import PLANTED
from refimpl.port.places import equations_of, place_of

from support import ROOT


def bare(code: str) -> str:
    """Without layout, and without brackets, of which a syntax tree knows nothing."""
    return re.sub(r"[\s()]", "", code).replace('"', "'")


def test_every_place() -> None:
    tags = []
    for bug in PLANTED:
        place = place_of(bug)
        lines = (ROOT / place.file).read_text().splitlines()
        near = "\n".join(lines[place.line - 1 : place.line + 8])
        first = ast.unparse(ast.parse(bug.edits[-1][0]).body[0]).splitlines()[0]
        assert bare(first)[:12] in bare(near), bug
        assert place.tag in near, bug
        tags.append(place.tag)
    assert sum(map(bool, tags)) > len(PLANTED) / 2


def test_it_is_told_with_its_tag() -> None:
    (bug,) = [bug for bug in PLANTED if bug.name == "gradient of k_pe from one head"]
    place = place_of(bug)
    assert place.tag == "(mla.11)"
    assert str(place).startswith("refimpl/ops/mla.py:")
    assert str(place).endswith(
        " (mla.11) has sum_along(dk[..., n:], axis=2); the bug has dk[:, :, 0, n:]"
    )


@pytest.mark.parametrize("op", CASES)
def test_every_gradient_has_its_equation(op: str) -> None:
    """Of each differentiable argument, and all its tags stand on one page, in its Adjoint."""
    found = equations_of(op)
    parameters = inspect.signature(pair_of(op).forward).parameters.values()
    assert list(found) == [p.name for p in parameters if p.kind != p.KEYWORD_ONLY]
    for argument, tags in found.items():
        (page,) = {tag.strip("()").partition(".")[0] for tag in tags}
        text = (ROOT / "derivations" / f"{page}.md").read_text().replace(r"\_", "_")
        adjoint = text.split("\n## Adjoint\n")[1].split("\n## ")[0]
        for tag in tags:
            assert f"\\tag{{{tag[1:-1]}}}" in adjoint, f"{op} {argument}: {tag}"


def test_equations_of_gradients() -> None:
    """By the statement that makes it, in the backward or in a function it calls; else by the
    return."""
    assert equations_of("rms_norm") == {"x": ["(rms_norm.4)"], "w": ["(rms_norm.5)"]}
    assert equations_of("grpo") == {"log_prob": ["(grpo.10)", "(grpo.11)"]}
    ffn = {"x": "(ffn.6)", "w_gate": "(ffn.6)", "w_up": "(ffn.6)", "w_down": "(ffn.4)"}
    assert equations_of("ffn") == {argument: [tag] for argument, tag in ffn.items()}
    absorbed = equations_of("mla_absorbed")
    assert absorbed["w_kv_b"] == ["(mla_absorbed.5)", "(mla_absorbed.8)"]
    assert (absorbed["w_q_a"], absorbed["x"]) == (["(mla.19)"], ["(mla.12)"])
