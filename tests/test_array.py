"""`refimpl.array`: what differs between libraries and number types, against NumPy's own
functions."""

from __future__ import annotations

import sys
from decimal import Decimal
from typing import Any

import array_api_strict
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.array import (
    argsort,
    blocks,
    cast,
    einsum,
    expect,
    expect_ids,
    expect_mask,
    expect_some,
    fill,
    finite,
    integers,
    last,
    namespace,
    number,
    real,
    scatter_add,
    sigmoid,
    take_rows,
    zeros,
)
from refimpl.check.dual import Dual, dual_array, tangents, values

import pretended_cupy

EPS = np.finfo(np.float64).eps
WIDE = [np.float32, np.float64, np.longdouble, np.complex64, np.complex128, np.clongdouble, object]


def whole(*shape: int, seed: int = 0) -> np.ndarray:
    """Small whole numbers as floats, whose sums and products are exact."""
    return np.random.default_rng(seed).integers(-9, 10, shape).astype(np.float64)


# namespace


@pytest.mark.parametrize("dtype", WIDE)
def test_namespace_of_numpy(dtype: Any) -> None:
    assert namespace(x=np.ones(2).astype(dtype), absent=None, y=np.ones(2)) is np


def test_namespace_of_an_array_api_library() -> None:
    assert namespace(x=array_api_strict.ones(2)) is array_api_strict


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": [1.0]}, "x must be an array of NumPy, CuPy or an array-API library, got list"),
        ({"x": 1.0}, "x must be an array of .*, got float"),
        ({"x": np.ones(1), "y": 2}, "y must be an array of .*, got int"),
        (
            {"x": np.ones(1, np.float16)},
            r"x must be float32 or wider \(cast 16-bit and integer arrays up\), got float16",
        ),
        ({"x": np.ones(1), "y": np.ones(1, int)}, "y must be float32 or wider .* got int64"),
        ({"x": np.ones(1, bool)}, "x must be float32 or wider .* got bool"),
        (
            {"x": array_api_strict.ones(1, dtype=array_api_strict.int32)},
            "x must be float32 or wider .* got .*int32",
        ),
        (
            {"x": np.ones(1), "y": array_api_strict.ones(1)},
            "y must come from .*numpy.* like the other .*array_api_strict",
        ),
        (
            {"x": array_api_strict.ones(1), "y": np.ones(1)},
            "y must come from .*array_api_strict.* like the other .*numpy",
        ),
        ({}, "at least one array is needed, got none"),
        ({"x": None}, "at least one array is needed, got none"),
    ],
)
def test_namespace_errors(arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        namespace(**arrays)


# einsum

SPECS = [
    "bthx,bshx->bhts",
    "bhts,bshv->bthv",
    "bhts,bthv->bshv",
    "bthx,bsx->bhts",
    "bhts,bsv->bhtv",
    "bthn,hnc->bthc",
    "bthc,hvc->bthv",
    "bthv,bthc->hvc",
    "ij,jk->ik",
    "ij,kj->ki",
    "ij,ij->",
    "ij,ij->ji",
    "i,j->ij",
    "i,i->i",
    ",->",
    ",ij->ji",
]


def sized(letters: str, sizes: dict[str, int], seed: int) -> np.ndarray:
    return whole(*(sizes[c] for c in letters), seed=seed)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("letters", SPECS)
def test_einsum_in_every_number_type(letters: str, dtype: Any) -> None:
    """Exactly numpy.einsum, and in the type it was given."""
    a, b = letters.split("->")[0].split(",")
    sizes = {c: 2 + i for i, c in enumerate(sorted({*a, *b}))}
    x, y = sized(a, sizes, 0), sized(b, sizes, 1)
    wanted = np.einsum(letters, x, y)
    x, y = x.astype(dtype), y.astype(dtype)
    if np.dtype(dtype).kind == "c":
        x, wanted = x * 1j, wanted * 1j
    got = np.asarray(einsum(letters, x, y))
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, wanted)


@given(st.data())
def test_einsum_of_any_contraction(data: st.DataObject) -> None:
    """Up to two letters in each role, in any order, of lengths from 0."""
    counts = [
        data.draw(st.integers(0, 2), label=role) for role in ("batch", "summed", "rows", "columns")
    ]
    names = iter("abcdefgh")
    batch, summed, rows, columns = ([next(names) for _ in range(n)] for n in counts)
    shuffled = [
        "".join(data.draw(st.permutations(part)))
        for part in (batch + summed + rows, batch + summed + columns)
    ]
    out = "".join(data.draw(st.permutations(batch + rows + columns)))
    letters = f"{shuffled[0]},{shuffled[1]}->{out}"
    sizes = {c: data.draw(st.integers(0, 3)) for c in "abcdefgh"}
    x, y = sized(shuffled[0], sizes, 0), sized(shuffled[1], sizes, 1)
    np.testing.assert_array_equal(einsum(letters, x, y), np.einsum(letters, x, y))


@pytest.mark.parametrize(
    ("letters", "a", "b", "message"),
    [
        ("ij,jk->ik", (2,), (2, 3), r"einsum 'ij,jk->ik' got shapes \(2,\) and \(2, 3\)"),
        ("ij,jk->ik", (2, 3), (3, 4, 5), r"einsum 'ij,jk->ik' got shapes \(2, 3\) and \(3, 4, 5\)"),
        (
            "ij,jk->ik",
            (2, 3),
            (4, 5),
            r"einsum 'ij,jk->ik' cannot contract shapes \(2, 3\) and \(4, 5\)",
        ),
        ("ij,jk->ik", (2, 1), (3, 4), "cannot contract"),  # numpy.einsum would broadcast
        (
            "ij,jk->i",
            (2, 3),
            (3, 4),
            "cannot contract",
        ),  # a letter of one input alone is not summed
        ("ij,jk->k", (2, 3), (3, 4), "cannot contract"),
        ("ii,ij->ij", (2, 3), (3, 4), "cannot contract"),
        ("ij,jk,kl->il", (2, 3), (3, 4), "too many values"),
        ("ij,jk->ikz", (2, 3), (3, 4), "substring not found"),
    ],
)
def test_einsum_errors(letters: str, a: tuple[int, ...], b: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        einsum(letters, np.ones(a), np.ones(b))


# sigmoid


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.longdouble, np.complex128])
def test_sigmoid_far_out(dtype: Any) -> None:
    """0 and 1, in the type given and without overflow (pytest makes every warning an error)."""
    s = sigmoid(np.array([-1e5, -1000, 0, 1000, 1e5], dtype=dtype))
    assert s.dtype == dtype
    np.testing.assert_allclose(s, [0, 0, 0.5, 1, 1], rtol=0, atol=1e-300)
    np.testing.assert_array_equal(s[2:], [0.5, 1, 1])


def test_sigmoid_of_both_signs() -> None:
    x = np.linspace(-40, 40, 161)
    np.testing.assert_allclose(sigmoid(x) + sigmoid(-x), 1, rtol=2 * EPS)
    np.testing.assert_allclose(sigmoid(x), 1 / (1 + np.exp(-x)), rtol=4 * EPS)


@pytest.mark.parametrize("step", [1e-20, 1e-200])
def test_sigmoid_carries_the_complex_step(step: float) -> None:
    """The infinitesimal part is the derivative s(1 − s), and decides no branch, whatever its
    sign."""
    x = np.array([-1000.0, -30, -1, -0.0, 0, 1, 30, 1000])
    for h in (step, -step):
        s = sigmoid(x + 1j * h)
        np.testing.assert_allclose(s.imag / h, sigmoid(x) * sigmoid(-x), rtol=8 * EPS, atol=1e-100)


def test_sigmoid_of_duals() -> None:
    x = np.array([-2.0, 0.0, 3.0])
    s = sigmoid(dual_array(x, np.ones(3)))
    np.testing.assert_allclose([float(v) for v in values(s)], sigmoid(x), rtol=4 * EPS)
    np.testing.assert_allclose(
        [float(t) for t in tangents(s)], sigmoid(x) * sigmoid(-x), rtol=8 * EPS
    )


# argsort, take_rows, scatter_add


@pytest.mark.parametrize("xp", [np, array_api_strict])
def test_argsort_is_stable(xp: Any) -> None:
    x = np.random.default_rng(0).integers(0, 3, (5, 200)).astype(np.float64)
    expected = [sorted(range(200), key=lambda i, row=row: (row[i], i)) for row in x.tolist()]
    np.testing.assert_array_equal(np.asarray(argsort(xp.asarray(x))), expected)


@given(st.integers(0, 200), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_scatter_add_equals_add_at(n: int, length: int, seed: int) -> None:
    """Exactly, for whole numbers: none, few or many repeats, rows that nobody uses."""
    rows, added = np.random.default_rng(seed).integers(0, length, n), whole(n, 3, seed=seed)
    wanted = np.zeros((length, 3))
    np.add.at(wanted, rows, added)
    np.testing.assert_array_equal(scatter_add(rows, added, length), wanted)
    assert np.sum(take_rows(whole(length, 3), rows) * added) == np.sum(
        whole(length, 3) * wanted
    )  # the adjoint


@pytest.mark.parametrize("dtype", WIDE)
def test_scatter_add_of_nothing(dtype: Any) -> None:
    y = scatter_add(
        np.zeros(0, int),
        np.ones((1, 2)).astype(dtype)[:0] if dtype is not object else np.ones((0, 2)),
        3,
    )
    np.testing.assert_array_equal(y, np.zeros((3, 2)))


def test_scatter_add_adds_in_pairs() -> None:
    """2^15 times 0.1 in float32: in pairs it is exact but for scaling by 2; one after the other it
    is off by 1e-4."""
    y = scatter_add(np.zeros(2**15, int), np.full((2**15, 1), 0.1, np.float32), 1)
    assert y.dtype == np.float32
    assert y[0, 0] == np.float32(0.1) * 2**15


def test_scatter_add_is_reproducible_across_libraries() -> None:
    """The same bits in every run and in every library."""
    rng = np.random.default_rng(0)
    rows, added = rng.integers(0, 5, 1000), rng.normal(size=(1000, 3)).astype(np.float32)
    first = scatter_add(rows, added, 6)
    assert first.tobytes() == scatter_add(rows.copy(), added.copy(), 6).tobytes()
    strict = scatter_add(array_api_strict.asarray(rows), array_api_strict.asarray(added), 6)
    assert first.tobytes() == np.asarray(strict).tobytes()


def test_scatter_add_keeps_rows_apart() -> None:
    """A NaN stays in its row, also when it wraps around while rows are paired."""
    rows = np.array([0, 0, 0, 2, 2, 3])
    for bad in range(6):
        added = whole(6, 2)
        added[bad] = np.nan
        y = scatter_add(rows, added, 5)
        np.testing.assert_array_equal(np.isnan(y[:, 0]), np.arange(5) == rows[bad])


def test_scatter_add_of_duals() -> None:
    rows = np.array([2, 0, 2, 2])
    added = whole(4, 2)
    direction = whole(4, 2, seed=1)
    y = scatter_add(rows, dual_array(added, direction), 4)
    for part, x in ((values, added), (tangents, direction)):
        np.testing.assert_array_equal(
            np.reshape([float(v) for v in part(y)], (4, 2)), scatter_add(rows, x, 4)
        )


# fill, zeros, cast, real


@pytest.mark.parametrize("dtype", WIDE[:-1])
def test_constants_take_the_type_of_the_array(dtype: Any) -> None:
    x = np.ones((2, 3)).astype(dtype)
    filled, nothing = fill(np.array([[True], [False]]), x, -np.inf), zeros((4,), x)
    assert filled.dtype == nothing.dtype == cast(np.ones(2), x).dtype == dtype
    assert np.all(filled[0] == 1)
    assert np.all(filled[1].real == -np.inf)
    assert np.all(filled.imag == 0)
    np.testing.assert_array_equal(nothing, np.zeros(4))


def test_constants_in_duals() -> None:
    """They are duals too, and stand still."""
    x = dual_array(np.array([1.0, 2.0]), np.array([3.0, 4.0]))
    filled = fill(np.array([True, False]), x, -np.inf)
    nothing = zeros((2, 2), x)
    constant = cast(np.array([5.0, 6.0]), x)
    assert all(isinstance(element, Dual) for y in (filled, nothing, constant) for element in y.flat)
    assert values(filled) == [1, Decimal("-Infinity")]
    assert tangents(filled) == [3, 0]
    assert values(nothing) == tangents(nothing) == [0, 0, 0, 0]
    assert (values(constant), tangents(constant)) == ([5, 6], [0, 0])
    assert values(np.exp(filled))[1] == 0


def test_real_is_what_branches_look_at() -> None:
    x = np.array([1.0, -2.0])
    assert real(x) is x
    np.testing.assert_array_equal(real(x + 5j), x)
    plain = real(dual_array(x, np.array([7.0, 8.0])))
    assert plain.dtype == np.float64
    np.testing.assert_array_equal(plain, x)


# shapes


def test_expect() -> None:
    expect("w", np.ones((2, 3)), "(A, B)", (None, 3))
    for shape in ((2, 4), (3,), (2, 3, 1)):
        with pytest.raises(ValueError, match=r"^w must have shape \(A, B\)=\('any', 3\), got \("):
            expect("w", np.ones(shape), "(A, B)", (None, 3))
    with pytest.raises(ValueError, match=r"^w must have shape \(D,\)=\(64,\), got \(32,\)$"):
        expect("w", np.ones(32), "(D,)", (64,))


def test_last() -> None:
    assert last(np.ones((2, 3)), "x") == 3
    for shape in ((), (2, 0)):
        with pytest.raises(ValueError, match=r"^x must have a last axis of at least 1 entry, got"):
            last(np.ones(shape), "x")


def test_finite() -> None:
    """Of every number type: the finite as they are, the others NaN; a tangent decides nothing."""
    x = np.array([1.5, np.inf, -np.inf, np.nan, 0.0])
    for dtype in WIDE[:-1]:
        found = finite(x.astype(dtype))
        assert found.dtype == dtype
        np.testing.assert_array_equal(np.isnan(found), [False, True, True, True, False])
        np.testing.assert_array_equal(found[[0, -1]], [1.5, 0.0])
    (dual,) = finite(dual_array(np.array([2.0]), np.array([3.0])))
    assert (float(dual.value), float(dual.tangent)) == (2.0, 3.0)


def test_expect_some() -> None:
    expect_some("x", np.ones((2, 3)), "(T, D)")
    with pytest.raises(
        ValueError, match=r"^x must have at least 1 entry along each axis of \(T, D"
    ):
        expect_some("x", np.ones((0, 3)), "(T, D)")


def test_number_widens_nothing() -> None:
    for dtype in WIDE[:-1]:
        x = np.ones(2).astype(dtype)
        assert number(0.5, x).dtype == (number(np.float64(0.5), x) * x).dtype == dtype
    assert number(2, dual_array(np.ones(1))) == 2


@pytest.mark.parametrize(
    ("arguments", "ranges"),
    [
        ((5, 2), [(0, 2), (2, 4), (4, 5)]),
        ((4, 2), [(0, 2), (2, 4)]),
        ((3, 9), [(0, 3)]),
        ((5, 2, 3), [(0, 2), (2, 3)]),
        ((5, 2, 9), [(0, 2), (2, 4), (4, 5)]),
        ((0, 2), []),
        ((5, 2, 0), []),
    ],
)
def test_blocks(arguments: tuple[int, ...], ranges: list[tuple[int, int]]) -> None:
    assert list(blocks(*arguments)) == ranges


@pytest.mark.parametrize("xp", [np, array_api_strict])
def test_expect_ids(xp: Any) -> None:
    """−1 would count from the end, a float or a bool would index by accident."""
    assert (
        expect_ids("ids", xp.asarray([0, 4], dtype=xp.uint8), 5).dtype == xp.int64
    )  # narrow ones would wrap
    expect_ids("ids", xp.zeros((2, 0), dtype=xp.int64), 5)
    for wrong, span in (([-1, 4], "-1…4"), ([0, 5], "0…5")):
        with pytest.raises(ValueError, match=rf"^ids must lie in 0…4, got {span}$"):
            expect_ids("ids", xp.asarray(wrong), 5)
    for dtype in (xp.float64, xp.bool):
        with pytest.raises(TypeError, match=r"^ids must be integers, got .*(float64|bool)"):
            expect_ids("ids", xp.zeros(2, dtype=dtype), 5)


@pytest.mark.parametrize("xp", [np, array_api_strict])
def test_integers(xp: Any) -> None:
    for numbers in ([], [3, 0, 2**40]):
        found = integers(xp.asarray(numbers, dtype=xp.int64))
        assert found == numbers
        assert all(type(n) is int for n in found)


def test_copies_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CuPy each is a wait for the device: one for the span of ids, one for a scatter's longest
    run."""
    monkeypatch.setitem(sys.modules, "cupy", pretended_cupy.Pretended("cupy"))
    monkeypatch.setattr(pretended_cupy, "COPIES", copies := list[str]())
    expect_ids("ids", pretended_cupy.there(np.array([0, 4])), 5)
    assert copies == ["tolist"]
    assert integers(pretended_cupy.there(np.array([3, 1]))) == [3, 1]
    assert copies == ["tolist", "tolist"]
    rows, added = np.zeros(100, int), np.ones((100, 1))
    scatter_add(pretended_cupy.there(rows), pretended_cupy.there(added), 1)
    assert copies == ["tolist", "tolist", "int"]


@pytest.mark.parametrize("xp", [np, array_api_strict])
def test_expect_mask(xp: Any) -> None:
    expect_mask("mask", xp.zeros((2, 3), dtype=xp.bool), "(B, T)", (2, 3))
    with pytest.raises(ValueError, match=r"^mask must have shape \(B, T\)=\(2, 3\), got \(2, 1\)$"):
        expect_mask("mask", xp.zeros((2, 1), dtype=xp.bool), "(B, T)", (2, 3))
    with pytest.raises(TypeError, match=r"^mask must be bool, got .*int64"):
        expect_mask("mask", xp.ones((2, 3), dtype=xp.int64), "(B, T)", (2, 3))
