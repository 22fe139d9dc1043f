"""Two tensors side by side: the numbers against formulas on whole arrays, NaN and infinity, pieces,
the heat map, memory."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from refimpl.config import preset
from refimpl.port import compare
from refimpl.port.blocks import cuts_of
from refimpl.port.compare import FACTOR, difference, errors_along, heat

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("piece", [1, 7, 10**6])
@pytest.mark.parametrize("size", [1e-200, 1.0, 1e200])
def test_numbers(monkeypatch: pytest.MonkeyPatch, piece: int, size: float) -> None:
    """Cut into pieces or not, in any range that the type has."""
    monkeypatch.setattr(compare, "PIECE", piece)
    truth = RNG.normal(size=(4, 6))
    theirs = truth + 0.1 * RNG.normal(size=(4, 6))
    theirs[2, 5] += 3
    found = difference(size * theirs, size * truth, size * np.abs(truth).max())
    wrong = np.abs(theirs - truth)
    norms = np.linalg.norm(theirs), np.linalg.norm(truth)
    assert found.worst == (2, 5)
    assert found.error == pytest.approx(size * wrong.max(), rel=1e-14)
    assert found.scale == pytest.approx(size * np.abs(truth).max(), rel=1e-14)
    assert found.relative == pytest.approx(wrong.max() / np.abs(truth).max(), rel=1e-13)
    assert found.cosine == pytest.approx((theirs * truth).sum() / np.prod(norms), rel=1e-13)
    assert found.norm_ratio == pytest.approx(norms[0] / norms[1], rel=1e-13)
    assert (found.theirs, found.truth) == (size * theirs[2, 5], size * truth[2, 5])
    assert found.unlike == 0
    assert found.units(size) == pytest.approx(wrong.max(), rel=1e-13)
    along = errors_along(size * theirs, size * truth)
    for axis in range(2):
        np.testing.assert_allclose(along[axis], size * wrong.max(axis=1 - axis), rtol=1e-13)


def test_what_is_not_finite() -> None:
    """It must be the truth's: the same infinity, NaN where NaN is."""
    truth = np.array([1.0, np.inf, -np.inf, np.nan, 2.0])
    assert difference(truth.copy(), truth).error == 0
    assert difference(truth.copy(), truth).scale == 2
    for place, value in ((0, np.nan), (0, np.inf), (1, -np.inf), (1, 5.0), (3, 0.0), (2, np.nan)):
        theirs = truth.copy()
        theirs[place] = value
        found = difference(theirs, truth)
        assert found.error == math.inf
        assert found.worst == (place,)
        assert found.unlike == 1
        assert not found.units(1e-7) <= FACTOR
        assert not found.units(math.inf) <= FACTOR


def test_zeros() -> None:
    """A truth of zeros with the unit 0 wants zeros."""
    found = difference(np.zeros(3), np.zeros(3), 0.0)
    assert (found.error, found.relative, found.units(0.0)) == (0, 0, 0)
    assert math.isnan(found.cosine)
    assert math.isnan(found.norm_ratio)
    found = difference(np.array([0, 1e-300, 0]), np.zeros(3), 0.0)
    assert (found.relative, found.units(0.0)) == (math.inf, math.inf)


def test_scalars_and_nothing() -> None:
    found = difference(np.array(3.0), np.array(2.0))
    assert (found.error, found.worst, found.theirs) == (1, (), 3)
    assert errors_along(np.array(3.0), np.array(2.0)) == []
    assert difference(np.zeros((0, 3)), np.zeros((0, 3))).error == 0


def test_heat_map_ends_cells_where_blocks_end() -> None:
    config = preset("tiny")
    name, shape = "grad/model.layers.1.self_attn.kv_a_proj_with_mqa.weight", (11, 20)
    truth, theirs = np.zeros(shape), np.zeros(shape)
    theirs[8, 13] = 2
    found = heat(theirs, truth, cuts_of(name, shape, config))
    assert found.axes == (0, 1)
    assert 7 in found.edges[0]  # latent | rotated
    row = np.searchsorted(found.edges[0], 8, side="right") - 1
    column = np.searchsorted(found.edges[1], 13, side="right") - 1
    assert found.cells[row, column] == 2
    assert found.cells.sum() == 2


@pytest.mark.parametrize(
    ("name", "shape", "axes"),
    [
        ("grad/model.norm.weight", (20,), (0, -1)),
        ("grad/lm_head.weight", (256, 20), (0, 1)),
        ("act/model.layers.1", (2, 9, 20), (0, 1)),
        ("act/model.layers.1.self_attn.q", (2, 9, 3, 9), (2, 3)),
        ("grad/model.layers.1.self_attn.o_proj.weight", (20, 18), (0, 1)),
    ],
)
def test_heat_map_axes(name: str, shape: tuple[int, ...], axes: tuple[int, int]) -> None:
    found = heat(np.ones(shape), np.zeros(shape), cuts_of(name, shape, preset("tiny")))
    assert found.axes == axes
    assert (found.cells == 1).all()
    assert max(found.cells.shape) <= compare.MOST_CELLS
    for axis, edges in zip(axes, found.edges, strict=True):
        assert edges[0] == 0
        assert edges[-1] == (shape[axis] if axis >= 0 else 1)


def test_memory_is_that_of_a_piece(tmp_path: Path) -> None:
    """128 MB on the disk, holes all of it: a piece and its float64 copies are held."""
    tensors = []
    for name in ("a", "b"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**26)
        tensors.append(np.memmap(tmp_path / name, np.float32, "r", shape=(2**11, 2**13)))
    tracemalloc.start()
    found = difference(*tensors)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.error == 0
    assert peak < 100 * compare.PIECE < 2**24
