"""Products with bfloat16 weights as they are stored: every column's rule of errors, any blocks, and
the same bits for any number of threads."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from refimpl.kernels.columns import ON_CPU, for_generation, on_cpu
from refimpl.kernels.cpu import stored
from refimpl.kernels.cpu.compile import kernel
from refimpl.kernels.cpu.pool import threads
from refimpl.kernels.cpu.stored import FEW, stored_linear
from refimpl.ops import IMPLEMENTATIONS, LEAVES, REFERENCE

pytest.importorskip("numba")
LINEAR = stored_linear(REFERENCE.linear)
ROWS = (1, 2, 3, 4, 5, FEW, FEW + 1, 40)
WIDTHS = ((1, 1), (3, 5), (70, 33), (129, 64), (300, 257))


class Weight:
    """A weight that is stored in bfloat16, an array of ``dtype`` to those who ask for one."""

    def __init__(self, x: np.ndarray, dtype: Any) -> None:
        self.stored = x.astype(ml_dtypes.bfloat16)
        self.shape, self.dtype = x.shape, np.dtype(dtype)
        self.bits: np.ndarray | None = self.stored.view(np.uint16)

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        return np

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.stored.astype(self.dtype), dtype, copy=copy)


def drawn(rows: int, shape: tuple[int, int], dtype: Any, seed: int = 0) -> tuple[Any, Weight]:
    rng = np.random.default_rng([seed, rows, *shape])
    return rng.standard_normal((rows, shape[1])).astype(dtype), Weight(
        rng.normal(size=shape), dtype
    )


@pytest.mark.parametrize("shape", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_error(rows: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """float64 within 4 units of the largest sum of |terms|; float32 within twice the reference's
    error and a unit. Blocks are small enough that several cover W."""
    monkeypatch.setattr(stored, "ONE_TASK", 500)
    monkeypatch.setattr(stored, "WIDENED", 500)
    for dtype in (np.float64, np.float32):
        x, w = drawn(rows, shape, dtype)
        wide, weight = x.astype(np.longdouble), np.asarray(w).astype(np.longdouble)
        exact, unit = wide @ weight.T, np.finfo(dtype).eps
        scale = np.max(np.abs(wide) @ np.abs(weight).T)
        found = LINEAR.forward(x, w)[0]
        assert found.dtype == dtype
        assert found.shape == exact.shape
        error = np.max(np.abs(found - exact))
        if dtype == np.float64:
            assert error <= 4 * unit * scale
        else:
            reference = np.max(np.abs(REFERENCE.linear.forward(x, np.asarray(w))[0] - exact))
            assert error <= 2 * reference + unit * scale


@pytest.mark.parametrize(("rows", "used"), [(1, {"linear_forward"}), (FEW + 1, {"widen"})])
def test_few_rows_widen_nothing(rows: int, used: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    names: set[str] = set()

    def noting(stem: str, name: str, dtype: Any) -> Any:
        names.add(name)
        return kernel(stem, name, dtype)

    monkeypatch.setattr(stored, "kernel", noting)
    LINEAR.forward(*drawn(rows, (70, 33), np.float32))
    assert names == used


def test_special_numbers() -> None:
    """Subnormal weights, infinities and NaN are those of the widened weights."""
    x = np.ones((1, 1), np.float32)
    special = np.array([[2.0**-133], [np.inf], [-np.inf], [np.nan], [-0.0]])
    for rows in (1, FEW + 1):
        y = LINEAR.forward(np.repeat(x, rows, axis=0), Weight(special, np.float32))[0]
        assert np.array_equal(y, np.repeat(special.T, rows, axis=0), equal_nan=True)


@pytest.mark.parametrize("rows", [3, FEW + 1])
def test_same_bits_for_any_number_of_threads(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "ONE_TASK", 2000)
    monkeypatch.setattr(stored, "WIDENED", 2000)
    x, w = drawn(rows, (300, 257), np.float32)
    found = []
    for count in (1, 2, 3):
        with threads(count):
            found.append(LINEAR.forward(x, w)[0].tobytes())
    assert len(set(found)) == 1


def test_other_weights() -> None:
    """An array, or a weight that is stored otherwise, goes to the linear map as an array."""
    x, w = drawn(3, (7, 5), np.float64)
    w.bits = None
    for given in (w, np.asarray(w)):
        assert np.array_equal(LINEAR.forward(x, given)[0], x @ np.asarray(w).T)


def test_backward() -> None:
    x, w = drawn(3, (7, 5), np.float64)
    x = x.reshape(1, 3, 5)
    y, saved = LINEAR.forward(x, w)
    dy = np.cos(np.arange(y.size)).reshape(y.shape)
    wanted = REFERENCE.linear.backward(dy, REFERENCE.linear.forward(x, np.asarray(w))[1])
    for got, expected in zip(LINEAR.backward(dy, saved), wanted, strict=True):
        assert np.array_equal(got, expected)


@pytest.mark.parametrize(
    ("x", "shape", "message"),
    [
        (np.ones((2, 4), np.float32), (3, 5), r"w must have shape \(O, I\)=\('any', 4\), got"),
        (np.ones((2, 5), np.int64), (3, 5), "x must be float32 or float64, got int64"),
        (np.ones((2, 5), np.float32), (0, 5), "w must have at least 1 entry"),
        (np.ones((), np.float32), (3, 5), "x must have a last axis"),
    ],
)
def test_errors(x: np.ndarray, shape: tuple[int, int], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        LINEAR.forward(x, Weight(np.ones(shape), np.float32))


@pytest.mark.parametrize("implementation", ON_CPU)
def test_tables_for_generation(implementation: str) -> None:
    """The prompt by the implementation's ops, the rest with MLA absorbed; numba_cpu's linear map
    takes stored weights, and nothing in the table would refuse them. Its attention is the
    reference's where a token is read: a task per row is more than there is to do."""
    prefill, decode = for_generation(implementation)
    plain, absorbed = on_cpu(implementation), IMPLEMENTATIONS["absorbed"].mla
    assert decode.mla == absorbed
    others = {"mla", "attention"} if implementation == "numba_cpu" else {"mla"}
    assert {name for name in decode if decode[name] != prefill[name]} <= others
    for name in prefill:
        if implementation != "numba_cpu" or name in LEAVES.keys() - {"linear", "embedding"}:
            assert prefill[name] == plain[name], name
        elif name in ("embedding", "ffn", "mla", "moe", "mtp"):
            assert prefill[name] == REFERENCE[name], name
