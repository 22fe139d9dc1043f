"""The example of a kernel of your own compiles, keeps the rule and is counted; two mistakes in it
are seen."""

from __future__ import annotations

import runpy
from typing import Any

import pytest

import ptx
from kernel_support import without_a_device
from support import ROOT

pytestmark = without_a_device


def example() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "examples" / "swiglu_kernel.py"))


def replaced(old: str, new: str) -> dict[str, Any]:
    """The example's names, a piece of its kernel replaced."""
    names = example()
    globals_ = names["compiled"].__globals__
    assert globals_["SOURCE"].count(old) == 1
    globals_["SOURCE"] = globals_["SOURCE"].replace(old, new)
    return names


def test_within_the_rule(capsys: pytest.CaptureFixture[str]) -> None:
    example()["check"]()
    assert capsys.readouterr().out.count("within the rule") == 3


def test_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """Both ask for 6 bytes per element; ours with 16 bytes per access, the example with 2."""
    example()["count"]()
    ours, mine = capsys.readouterr().out.splitlines()
    for line, name, accesses in ((ours, "ours", "0.375"), (mine, "mine", "3.000")):
        assert line.startswith(f"{name}: ")
        assert f"{accesses} accesses, 6.00 bytes asked for, 6.00 of sectors" in line


def test_threads_past_the_end_are_seen() -> None:
    with pytest.raises(ptx.PTXError, match="out of bounds"):
        replaced("    if (i >= size) return;\n", "")["check"]()


def test_a_wrong_formula_is_seen() -> None:
    with pytest.raises(AssertionError, match="swiglu result 0"):
        replaced("sigmoid(g)", "sigmoid(real(1.01) * g)")["check"]()
