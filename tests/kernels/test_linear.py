"""The linear map by dense products: those of `refimpl.kernels.host`, which has their tests."""

from __future__ import annotations

import numpy as np
import pytest

from refimpl.check.cases import Case
from refimpl.kernels.compile import STORAGE

from kernel_support import DTYPES, TABLE, WIDE, compare, rounded


@pytest.mark.parametrize("storage", STORAGE)
def test_error_is_that_of_the_reference(storage: str) -> None:
    """By the rule of the kernels, in every type; sides of 1 and odd ones, and no rows at all."""
    rng = np.random.default_rng(0)
    for shape, width in (((3, 5, 33), 7), ((2, 1), 1), ((1, 40), 1), ((0, 4), 3)):
        case = Case((rng.normal(size=shape), rng.normal(size=(width, shape[-1]))))
        compare("linear", TABLE["linear"], case, storage, 0)


@pytest.mark.parametrize("storage", STORAGE)
def test_types(storage: str) -> None:
    """Storage for y and dx; the gradient of the weight is as wide as sums are."""
    x, w = (rounded(np.ones(shape), storage) for shape in ((2, 3), (5, 3)))
    y, saved = TABLE["linear"].forward(x, w)
    dx, dw = TABLE["linear"].backward(y, saved)
    assert y.dtype == dx.dtype == DTYPES[storage]
    assert dw.dtype == WIDE[storage]


def test_errors() -> None:
    x, w = np.ones((2, 3)), np.ones((5, 3))
    with pytest.raises(ValueError, match=r"w must have shape \(O, I\)=\('any', 3\), got \(5, 2\)"):
        TABLE["linear"].forward(x, w[:, :2])
    with pytest.raises(TypeError, match=r"w must be \w+ float64 like x, got \w+ float32"):
        TABLE["linear"].forward(x, w.astype(np.float32))
    _, saved = TABLE["linear"].forward(x, w)
    with pytest.raises(ValueError, match=r"dy must have shape \(…, O\)=\(2, 5\), got \(2, 3\)"):
        TABLE["linear"].backward(x, saved)
