"""The kernels of SwiGLU."""

from __future__ import annotations

import numpy as np
import pytest

from refimpl.kernels.compile import compile_kernel

from kernel_support import make_launch, make_table, without_a_device
from kernel_support.planted import PLANTED, PLANTED_IN_NUMBA, assert_seen, plant, plant_in_numba


@pytest.mark.parametrize("seed", range(4))
def test_sigmoid_errs_as_stated(seed: int) -> None:
    """In float32, as swiglu.cu says, in units of 2^-24 of itself; and one of the product with x."""
    x = np.concatenate([np.linspace(-87, 87, 8192), np.linspace(-4, 4, 8192)]).astype(np.float32)
    y, _ = make_table(make_launch(seed))["swiglu"].forward(x, np.ones_like(x))
    exact = x.astype(np.float64)
    silu = exact / (1 + np.exp(-exact))
    allowed = np.where(exact < 0, 1.3 * np.abs(exact) + 8, 5) + 1
    assert np.all(np.abs(y - silu) <= allowed * 2.0**-24 * np.abs(silu))


def test_sigmoid_at_the_ends() -> None:
    """What vanishes is 0, and nothing that is finite becomes NaN."""
    pair = make_table(make_launch())["swiglu"]
    x = np.array([-88, -200, -3e38, 200, 3e38, -np.inf, np.inf, np.nan], np.float32)
    one = np.ones_like(x)
    with np.errstate(all="ignore"):
        y, saved = pair.forward(x, one)
        dgate, dup = pair.backward(one, saved)
    nan, inf = np.nan, np.inf
    unit = {"rtol": 5 * 2**-24, "atol": 0}
    np.testing.assert_allclose(y, [0, 0, 0, *x[3:5], nan, inf, nan], **unit)
    np.testing.assert_allclose(dgate, [0, 0, 0, 1, 1, nan, nan, nan], **unit)
    np.testing.assert_array_equal(dup, y)


@without_a_device
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_no_division(storage: str) -> None:
    for target in ("sm_90", "sm_100"):
        code = compile_kernel("swiglu", target, storage).ptx
        assert code.count("ex2.approx.ftz.f32") == code.count("rcp.approx.ftz.f32") > 0
        assert "div." not in code


@without_a_device
@pytest.mark.parametrize("name", PLANTED["swiglu"])
def test_planted_mistakes_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant("swiglu", name, monkeypatch)
    assert_seen("swiglu", storage="float32")


@without_a_device
@pytest.mark.parametrize("name", PLANTED_IN_NUMBA["swiglu"])
def test_planted_mistakes_in_numba_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_in_numba("swiglu", name, monkeypatch)
    assert_seen("swiglu", column="numba_cuda")
