"""The kernels of RMSNorm."""

from __future__ import annotations

import numpy as np
import pytest

from kernel_support import TABLE, TABLES, TYPES, rounded, without_a_device
from kernel_support.planted import PLANTED, PLANTED_IN_NUMBA, assert_seen, plant, plant_in_numba


def test_nothing_to_do() -> None:
    """No rows at all: empty results, no launch."""
    y, saved = TABLE["rms_norm"].forward(np.ones((0, 4)), np.ones(4), eps=0.1)
    assert y.shape == (0, 4)
    dx, dw = TABLE["rms_norm"].backward(y, saved)
    assert dx.shape == (0, 4)
    assert np.array_equal(dw, np.zeros(4))


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"x must be float64, float32 or bfloat16, got float16"):
        TABLE["rms_norm"].forward(np.ones((2, 3), np.float16), np.ones(3), eps=0.1)
    with pytest.raises(TypeError, match=r"w must be \w+ float32 like x, got \w+ float64"):
        TABLE["rms_norm"].forward(np.ones((2, 3), np.float32), np.ones(3), eps=0.1)
    with pytest.raises(ValueError, match=r"w must have shape \(D,\)=\(3,\), got \(2,\)"):
        TABLE["rms_norm"].forward(np.ones((2, 3)), np.ones(2), eps=0.1)
    with pytest.raises(ValueError, match=r"x must be at most 7168 wide in float64, got 7169"):
        TABLE["rms_norm"].forward(np.ones((1, 7169)), np.ones(7169), eps=0.1)


@pytest.mark.parametrize(("column", "storage"), [t for t in TYPES if t[1] != "float64"])
@np.errstate(all="ignore")
def test_squares_that_overflow(column: str, storage: str) -> None:
    """The row is NaN, and so are its dx and dw; eps beyond the type makes all rows so. Never a
    clean 0."""
    x = rounded(np.array([[3e19, 1.0, 2.0], [1.0, 2.0, 3.0]]), storage)
    w, pair = rounded(np.ones(3), storage), TABLES[column]["rms_norm"]
    y, saved = pair.forward(x, w, eps=1e-6)
    dx, dw = pair.backward(y, saved)
    for found in (y, dx):
        np.testing.assert_array_equal(np.isnan(found.astype(np.float64)).all(axis=-1), [1, 0])
    assert np.isfinite(y[1].astype(np.float64)).all()
    assert np.isnan(dw).all()
    assert np.isnan(pair.forward(x, w, eps=1e299)[0].astype(np.float64)).all()


@without_a_device
@pytest.mark.parametrize("name", PLANTED["rms_norm"])
def test_planted_mistakes_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant("rms_norm", name, monkeypatch)
    assert_seen("rms_norm")


@without_a_device
@pytest.mark.parametrize("name", PLANTED_IN_NUMBA["rms_norm"])
def test_planted_mistakes_in_numba_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_in_numba("rms_norm", name, monkeypatch)
    assert_seen("rms_norm", column="numba_cuda")
