"""`refimpl.kernels.host`: dense products, and what a launch refuses; no host side does what CuPy
refuses."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from refimpl.array import Array
from refimpl.check.cases import RandomDraw
from refimpl.kernels import host
from refimpl.kernels.columns import CUDA, cuda_table
from refimpl.verify import placed

import pretended_cupy
from kernel_support import (
    DTYPES,
    ON_DEVICE,
    SHAPES,
    WIDE,
    PretendedLaunch,
    compare,
    make_launch,
    ops_of,
    strided,
    to_device,
)


def test_what_a_launch_refuses() -> None:
    for grid in (2**31, (1, 2**16)):
        with pytest.raises(
            ValueError,
            match="moe_permute can't run on more than 2³¹ − 1 blocks, of 2¹⁶ − 1 in y, got ",
        ):
            host.Kernels(make_launch(), "moe")("moe_permute", "float32", grid, 32)
    for size in (
        2**30,
        2**31,
    ):  # below 2³¹ the last step past a row's end would be a negative number
        with pytest.raises(
            ValueError,
            match="cross_entropy_forward counts in int32, so sizes must be below 2³⁰, got",
        ):
            host.Kernels(make_launch(), "cross_entropy")(
                "cross_entropy_forward", "float32", 1, 512, size
            )


@pytest.mark.skipif(ON_DEVICE, reason="there it is CuPy itself")
@pytest.mark.parametrize("op", CUDA)
def test_host_side_does_nothing_that_cupy_refuses(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", pretended_cupy.Pretended("cupy"))
    table = cuda_table(PretendedLaunch())
    extra = {"ops": table} if ops_of(op) else {}
    compare(
        op, placed(table[op], pretended_cupy.there), SHAPES[op](RandomDraw(1)), "float32", 1, extra
    )


@pytest.mark.skipif(ON_DEVICE, reason="counted on the pretended CuPy")
@pytest.mark.parametrize("experts", [4, 32])
def test_moe_copies_nothing_to_the_host(experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward on the kernels: not even how many tokens each expert has."""
    monkeypatch.setitem(sys.modules, "cupy", pretended_cupy.Pretended("cupy"))
    monkeypatch.setattr(pretended_cupy, "COPIES", copies := list[str]())
    table, there = cuda_table(PretendedLaunch()), pretended_cupy.there
    rng = np.random.default_rng(0)
    shapes = [(5, 8), (5, 3), (experts, 4, 8), (experts, 4, 8), (experts, 8, 4)]
    arrays = [there(rng.normal(size=shape).astype(np.float32)) for shape in shapes]
    indices = there(rng.integers(0, experts, (5, 3)))
    y, saved = table["moe"].forward(*arrays, None, None, None, indices=indices, ops=table)
    table["moe"].backward(y, saved)
    assert copies == []


PRODUCTS = [
    (a, b, out)
    for a, b, out in (
        ("float64", "float64", "float64"),
        ("float32", "float32", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("bfloat16", "bfloat16", "float32"),
        ("float32", "bfloat16", "float32"),
    )
]
LYING = {  # how a matrix may lie in memory
    "rows": lambda x: x.copy(),
    "columns": lambda x: x.T.copy().T,
    "rows with gaps": lambda x: strided_rows(x),
    "elements with gaps": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "part of columns": lambda x: strided_rows(x.T).T,
}


def strided_rows(x: np.ndarray) -> np.ndarray:
    return np.concatenate((x, x), axis=1)[:, : x.shape[1]]


def _check_product(
    there: Any, a: np.ndarray, b: np.ndarray, dtype: Any, start: np.ndarray | None = None
) -> None:
    """`host.product` or, with a start, `host.matmul` that adds to it, against float64: each of k
    additions rounds."""
    wide = [x.astype(np.float64) for x in (a, b)]
    exact, most = wide[0] @ wide[1], abs(wide[0]) @ abs(wide[1])
    if start is None:
        found = host.product(there(a), there(b), dtype)
    else:
        exact, most = exact + start, most + abs(start)
        found = there(start.astype(dtype))
        host.matmul(there(a), there(b), found, add=True)
    found = found.get() if hasattr(found, "get") else found
    assert found.dtype == dtype
    assert found.shape == exact.shape
    sums = float(np.finfo(WIDE[np.dtype(dtype).name]).eps)
    bound = (a.shape[1] + 4) * sums * most + (
        2**-8 * abs(exact) if dtype == DTYPES["bfloat16"] else 0
    )
    assert np.all(abs(found.astype(np.float64) - exact) <= bound)


@pytest.mark.skipif(ON_DEVICE, reason="there it is cuBLAS itself")
@pytest.mark.parametrize(("a", "b", "out"), PRODUCTS)
def test_products_as_cublas_defines_them(
    a: str, b: str, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In NumPy, and by a gemmEx on bare addresses: every way that the two may lie in memory, sides
    of 0, 1 and odd."""
    cupy, rng = pretended_cupy.Pretended("cupy"), np.random.default_rng(0)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    for n, k, m in (
        (3, 5, 7),
        (1, 5, 7),
        (3, 1, 7),
        (3, 5, 1),
        (1, 1, 1),
        (8, 16, 24),
        (0, 5, 7),
        (3, 0, 7),
        (3, 5, 0),
    ):
        left, right = (
            rng.normal(size=(n, k)).astype(DTYPES[a]),
            rng.normal(size=(k, m)).astype(DTYPES[b]),
        )
        start = rng.normal(size=(n, m)).astype(DTYPES[out])
        for lay_a in LYING.values():
            for lay_b in LYING.values():
                for there in (lambda x: x, pretended_cupy.there):
                    _check_product(there, lay_a(left), lay_b(right), DTYPES[out])
                    if a == b and out != "bfloat16":
                        _check_product(there, lay_a(left), lay_b(right), DTYPES[out], start)
    calls = cupy.cuda.cublas.calls
    assert {call[:2] for call in calls} == {(0, 0), (0, 1), (1, 0), (1, 1)}  # transposed by flags
    assert cupy.cuda.cublas.mode == 0
    with pytest.raises(
        ValueError,
        match=r"out must be contiguous, \(3, 2\), of the type of a float64 \(3, 4\) and b float32",
    ):
        host.matmul(np.ones((3, 4)), np.ones((4, 2), np.float32), np.ones((3, 2)))


@pytest.mark.skipif(ON_DEVICE, reason="there it is cuBLAS itself")
def test_transposed_products_copy_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The addresses that cuBLAS gets are the arrays' own."""
    cupy = pretended_cupy.Pretended("cupy")
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    seen: list[tuple[int, int]] = []
    real = cupy.cuda.cublas.gemmEx
    monkeypatch.setattr(
        cupy.cuda.cublas, "gemmEx", lambda *x: (seen.append((x[7], x[10])), real(*x))
    )
    a, b = (pretended_cupy.there(np.ones(shape, DTYPES["bfloat16"])) for shape in ((5, 3), (7, 5)))
    host.product(a.T, b.T, np.float32)
    assert seen == [(b.data.ptr, a.data.ptr)]


def test_parts_are_the_number() -> None:
    """Three bfloat16 numbers hold a float32 one to the last bit."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=10_000) * 2.0 ** rng.integers(-80, 80, 10_000)).astype(np.float32)
    found = list(host.parts(x, DTYPES["bfloat16"]))
    assert [part.dtype for part in found] == [DTYPES["bfloat16"]] * 3
    assert np.array_equal(sum(part.astype(np.float64) for part in found), x)
    assert next(host.parts(x, np.dtype(np.float32))) is x
    for count, unit in ((1, 2.0**-8), (2, 2.0**-16)):
        fewer = list(host.parts(x, DTYPES["bfloat16"], count))
        assert all(np.array_equal(a, b) for a, b in zip(fewer, found[:count], strict=True))
        error = np.abs(sum(part.astype(np.float64) for part in fewer) - x)
        assert 0.25 * unit < np.max(error / np.abs(x)) <= unit


@pytest.mark.skipif(not ON_DEVICE, reason="cuBLAS itself: make gpu")
@pytest.mark.parametrize(("a", "b", "out"), PRODUCTS)
def test_products_on_the_device(a: str, b: str, out: str) -> None:
    rng = np.random.default_rng(0)
    for n, k, m in (
        (3, 5, 7),
        (1, 5, 7),
        (3, 1, 7),
        (3, 5, 1),
        (1, 1, 1),
        (129, 1000, 257),
        (0, 5, 7),
        (3, 0, 7),
    ):
        left, right = (
            rng.normal(size=(n, k)).astype(DTYPES[a]),
            rng.normal(size=(k, m)).astype(DTYPES[b]),
        )
        for there_a in (to_device, strided, lambda x: to_device(np.ascontiguousarray(x.T)).T):
            for there_b in (to_device, lambda x: to_device(np.ascontiguousarray(x.T)).T):

                def there(x: Array) -> Array:
                    return there_a(x) if x is left else there_b(x)  # noqa: B023 (used at once)

                _check_product(there, left, right, DTYPES[out])
        if a == b and out != "bfloat16":
            _check_product(
                to_device, left, right, DTYPES[out], rng.normal(size=(n, m)).astype(DTYPES[out])
            )
