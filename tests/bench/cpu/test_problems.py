"""The problems: the same numbers for every column, our gradients of them, and their products."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from refimpl.bench.cpu.columns import COLUMNS
from refimpl.bench.cpu.problems import PROBLEMS, Sizes, inputs_of
from refimpl.bench.cpu.rows import D512, TOY_ROWS
from refimpl.bench.cpu.worker import Worker
from refimpl.errors import CouldNotRun

TOYS = {row.problem: row.sizes for row in TOY_ROWS.values()}
OURS = [x for x in COLUMNS.values() if x.file is None]
# of float32, 6e-8 each, over some hundred roundings in a row: the step's worst is 2.2e-6
ERROR = 1e-5


def measured(column: str, problem: str, sizes: Sizes, truth: Path) -> float:
    return float(Worker(column).prepare(problem, asdict(sizes), str(truth))["error"])


@pytest.mark.parametrize("problem", PROBLEMS)
def test_our_columns_agree_with_float64(problem: str, tmp_path: Path) -> None:
    Worker("truth").truth(problem, asdict(TOYS[problem]), str(tmp_path))
    for column in OURS:
        if problem in column.problems:
            assert measured(column.name, problem, TOYS[problem], tmp_path) <= ERROR, column.name


@pytest.mark.parametrize("problem", PROBLEMS)
def test_other_columns_agree_with_float64(problem: str, tmp_path: Path) -> None:
    """Torch's and JAX's sides compute the same, or they would be no baselines."""
    others = [x for x in COLUMNS.values() if x.file and problem in x.problems and not x.missing()]
    others = [x for x in others if not x.name.endswith("-compile")]
    if not others:
        pytest.skip("neither torch nor JAX is installed: make oracle")
    Worker("truth").truth(problem, asdict(TOYS[problem]), str(tmp_path))
    for column in others:
        assert measured(column.name, problem, TOYS[problem], tmp_path) <= ERROR, column.name


@pytest.mark.parametrize("problem", PROBLEMS)
def test_numbers_are_the_same_in_every_type(problem: str) -> None:
    narrow, wide = (inputs_of(problem, TOYS[problem], x) for x in (np.float32, np.float64))
    for name, x in narrow.arrays.items():
        y = wide.arrays[name]
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            assert (x.dtype, y.dtype) == (np.float32, np.float64)
            assert np.array_equal(x, y), name


def test_routes() -> None:
    sizes = replace(D512, experts=16, shared=0)
    counts = {}
    for routing in ("balanced", "zipf", "one-hot"):
        indices = inputs_of("moe", replace(sizes, routing=routing)).fixed["indices"]
        assert indices.shape == (sizes.tokens, sizes.top_k)
        assert all(len(set(row)) == sizes.top_k for row in indices.tolist())
        counts[routing] = np.bincount(indices.reshape(-1), minlength=16)
    assert set(counts["balanced"]) == {sizes.tokens * sizes.top_k // 16}
    assert counts["one-hot"].tolist() == [sizes.tokens] * 4 + [0] * 12
    assert counts["zipf"][0] > 4 * counts["zipf"][8] > 4 * counts["zipf"][15] > 0


def test_products_are_counted() -> None:
    """By hand for d 512: 1,024 tokens; attention 8 heads of 96 and 64."""
    attention = 2 * 8 * 512 * 512 * (4 * 96 + 3 * 64)
    mla = 256 * 512 + 768 * 256 + 160 * 512 + 1024 * 128 + 512 * 512
    expert = 3 * 512 * 256
    layers = 4 * mla + 3 * 512 * 1408 + 3 * (5 * expert + 32 * 512)
    assert PROBLEMS["attention"].flops(D512) == attention
    assert PROBLEMS["mla"].flops(D512) == 6 * 1024 * mla + attention
    assert PROBLEMS["moe"].flops(D512) == 6 * 1024 * 5 * expert
    assert PROBLEMS["block"].flops(D512) == 6 * 1024 * 3 * 512 * 1408
    assert PROBLEMS["step"].flops(D512) == 6 * 1024 * (layers + 8192 * 512) + 4 * attention
    assert PROBLEMS["swiglu"].flops(D512) == 0


def test_quadratic_memory_is_refused(tmp_path: Path) -> None:
    """The probabilities alone would be 4.4 TB; the rest fits."""
    huge = replace(TOYS["attention"], length=2**20, width=1, heads=1, nope=1, rope=2, value=1)
    with pytest.raises(CouldNotRun, match=r"needs 17592\.2 GB, .* GB are free"):
        measured("reference", "attention", huge, tmp_path)
