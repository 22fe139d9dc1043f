"""Every planted bug has a place in our code, and the code that is said to stand there does."""

from __future__ import annotations

import ast
import re

from refimpl.check.planted import PLANTED
from refimpl.port.places import place_of

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
