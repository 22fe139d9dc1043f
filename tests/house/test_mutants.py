"""The mutants that tests/mutate.py runs: what they are, that the sample can be drawn, and that each
one that no test kills is explained."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from mutants import PACKAGE, SAMPLE, SEED, mutants, population, sample
from support import ROOT

OUTCOME = json.loads((ROOT / "tests" / "mutants.json").read_text())
WRITTEN = '''"""What is 1 < 2."""

from __future__ import annotations

__all__ = ["run"]


def run(x: int = 0, *, flag: bool = True) -> str:
    """Return 2."""
    while flag and x[x:] is None:
        x += 1
        x.put(left=x)
        break
    if not x:
        raise ValueError("must not be 0" + 1)
    x = -x * x
    return min("é", x + x, f"{x + 1}", "a b")
'''


def test_sample() -> None:
    """By the seed alone; every file has its share, and a mutant is another program."""
    everything, size = population(), 120
    drawn = sample(everything, SEED, size)
    assert drawn == sample(everything, SEED, size) != sample(everything, SEED + 1, size)
    assert len(set(drawn)) == size
    total = sum(map(len, everything.values()))
    for file, found in everything.items():
        mine = [mutant for mutant in drawn if mutant.file == file]
        assert abs(len(mine) - size * len(found) / total) < 1, file
    for mutant in drawn[:30]:
        before = (PACKAGE / mutant.file).read_text()
        assert ast.dump(ast.parse(mutant.source())) != ast.dump(ast.parse(before)), mutant


def test_edits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a small file, all of them: no docstring, annotation or text of an error is one."""
    monkeypatch.setattr("mutants.PACKAGE", tmp_path)
    (tmp_path / "f.py").write_text(WRITTEN)
    found = mutants("f.py")
    assert [(m.code, m.edit) for m in found] == [
        ("def run(x: int = «0», *, flag: bool = True) -> str:", "-1"),
        ("def run(x: int = «0», *, flag: bool = True) -> str:", "1"),
        ("def run(x: int = 0, *, flag: bool = «True») -> str:", "False"),
        ("while «flag and x[x:] is None»:", "flag or x[x:] is None"),
        ("while «flag and x[x:] is None»:", "not (flag and x[x:] is None)"),
        ("while flag and «x[x:] is None»:", "x[x:] is not None"),
        ("while flag and x[«x»:] is None:", "x + 1"),
        ("«x += 1»", "left out"),
        ("«x += 1»", "x -= 1"),
        ("x += «1»", "0"),
        ("x += «1»", "2"),
        ("«x.put(left=x)»", "without left"),
        ("«x.put(left=x)»", "left out"),
        ("«break»", "continue"),
        ("if «not x»:", "x"),
        ('«raise ValueError("must not be 0" + 1)»', "left out"),
        ("«x = -x * x»", "left out"),
        ("x = «-x» * x", "x"),
        ("x = «-x * x»", "-x / x"),
        ('«return min("é", x + x, f"{x + 1}", "a b")»', "return None"),
        ('return «min»("é", x + x, f"{x + 1}", "a b")', "max"),
        ('return min(«"é"», x + x, f"{x + 1}", "a b")', "'éx'"),
        ('return min("é", «x + x», f"{x + 1}", "a b")', "x - x"),
    ]
    assert found[-1].source().decode() == WRITTEN.replace("x + x", "(x - x)")


def test_every_survivor_is_explained() -> None:
    """In a line; a hole has the test that closed it; nothing of the sample is missing."""
    assert (OUTCOME["seed"], OUTCOME["sample"]) == (SEED, SAMPLE)
    assert sum(OUTCOME["ends"].values()) == SAMPLE
    assert OUTCOME["ends"]["survived"] == len(OUTCOME["survivors"])
    for survivor in OUTCOME["survivors"]:
        assert len(survivor["why"].split()) >= 3, survivor
    for hole in OUTCOME["holes"]:
        file, name = hole["test"].split("::")
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.M), hole
