"""Rows, groups and columns by name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from refimpl.bench.cpu import columns
from refimpl.bench.cpu.columns import COLUMNS, Column, select_columns
from refimpl.bench.cpu.problems import PROBLEMS
from refimpl.bench.cpu.rows import GROUPS, ROWS, TOY_ROWS, Row, select_rows
from refimpl.errors import CouldNotRun


@pytest.mark.parametrize("rows", [ROWS, TOY_ROWS])
def test_rows_cover_every_problem_and_group(rows: dict[str, Row]) -> None:
    assert {row.problem for row in rows.values()} == set(PROBLEMS)
    assert {row.group for row in rows.values()} == set(GROUPS)
    for row in rows.values():
        assert bool(GROUPS[row.group].along) == bool(row.x)
        assert "{" not in row.shape


def test_rows_that_the_issue_names() -> None:
    assert ROWS["step-d512"].shape == "2 × 512 × 512, 4 layers, 4 of 32, 8192"
    assert ROWS["step-d128"].shape == "2 × 256 × 128, 4 layers, 4 of 16, 256"
    assert [row.x for row in ROWS.values() if row.group == "attention"] == [
        2**n for n in range(9, 14)
    ]
    experts = [row.sizes for row in ROWS.values() if row.group == "experts"]
    assert [s.experts for s in experts] == [8, 16, 32, 64, 128, 256]
    assert {s.tokens * s.top_k for s in experts} == {8192}
    for group in ("cross-entropy", "head"):
        assert [row.x for row in ROWS.values() if row.group == group] == [
            2**n for n in range(13, 18)
        ]
    assert ROWS["experts-8"].written == 3 * 4 * 8 * 512 * 256
    assert ROWS["attention-512"].written == 0


def test_select_rows() -> None:
    assert select_rows([]) == list(ROWS.values())
    names = [row.name for row in select_rows(["skew", "swiglu"])]
    assert names == ["swiglu", "skew-balanced", "skew-zipf", "skew-one-hot"]
    with pytest.raises(CouldNotRun, match=r"^unknown row softmax; there are step, .*tokens-4096$"):
        select_rows(["softmax"])


def test_select_columns() -> None:
    names = [column.name for column in select_columns([], compiled=False)]
    assert names == [name for name in COLUMNS if name not in ("torch-compile", "hf-compile")]
    assert [x.name for x in select_columns([], compiled=True)] == list(COLUMNS)
    assert [x.name for x in select_columns(["torch", "flash"], False)] == ["flash", "torch"]
    with pytest.raises(CouldNotRun, match="unknown column cuda; there are reference, flash"):
        select_columns(["cuda"], False)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert COLUMNS["reference"].missing() is None
    absent = Column("x", ["swiglu"], "torch_cpu.py", ("a_package_that_is_not",))
    assert absent.missing() == "a_package_that_is_not not installed"
    monkeypatch.setattr(columns, "BENCHMARKS", columns.BENCHMARKS / "nowhere")
    assert (
        replace(absent, packages=()).missing() == "torch_cpu.py is not there: run from a checkout"
    )
