"""The only differences between array libraries and number types, kept in one place.

Every op runs unchanged on NumPy float32, float64 and longdouble, on complex numbers (the checker's
complex step), on object arrays (its exact dual numbers), on array-api-strict, on JAX and on
CuPy. Three rules make that work, and each has its function here:

* a branch, a maximum or a top-k looks at ``real(x)``, so that the infinitesimal part never decides
  anything;
* a contraction is a ``matmul``, alone or by way of `einsum`, which every library and number type
  has;
* a constant that enters an array takes that array's own number type (`fill`, `zeros`, `cast`).

Arrays have any shape unless one is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from math import prod
from types import ModuleType
from typing import Any

Array = Any  # an array of any of the libraries above

__all__ = [
    "Array",
    "add_to",
    "argsort",
    "blocks",
    "cast",
    "einsum",
    "expect",
    "expect_ids",
    "expect_mask",
    "expect_some",
    "expect_that",
    "fill",
    "integers",
    "finite",
    "last",
    "library",
    "namespace",
    "number",
    "put",
    "real",
    "scatter_add",
    "sigmoid",
    "sum_along",
    "take_rows",
    "zeros",
]


def namespace(*, moved: bool = False, **arrays: Array) -> ModuleType:
    """The array namespace of all the named differentiable arrays (None entries are skipped).

    TypeError if one is not an array, they come from two libraries, or a dtype is neither an object
    type nor floating with at least 32 bits: sums in a 16-bit type are wrong numbers, so cast up
    first. ``moved``: the arrays are only moved, and added in pairs, each sum rounded once, as a
    composite does between ops that compute; then bfloat16 is right, too.
    """
    found: ModuleType | None = None
    for name, x in arrays.items():
        if x is None:
            continue
        xp = library(x, name)
        if found not in (None, xp):
            raise TypeError(
                f"{name} must come from {found.__name__} like the other arrays, got {xp.__name__}"
            )
        found = xp
        if not (
            is_object(x)
            or (moved and str(x.dtype) == "bfloat16")
            or (itemsize(x) >= 4 and is_float(xp, x.dtype))
        ):
            raise TypeError(
                f"{name} must be float32 or wider (cast 16-bit and integer arrays up), got "
                f"{x.dtype}"
            )
    if found is None:
        raise TypeError("at least one array is needed, got none")
    return found


@cache
def is_float(xp: ModuleType, dtype: Any) -> bool:
    """True for real and complex floating types; every op asks, and the library is slow to say."""
    return bool(xp.isdtype(dtype, ("real floating", "complex floating")))


def library(x: Array, name: str = "x") -> ModuleType:
    """The namespace of one array of any dtype; TypeError if it is none."""
    if type(x).__module__.partition(".")[0] == "cupy":
        return CUPY
    if not hasattr(x, "__array_namespace__"):
        raise TypeError(
            f"{name} must be an array of NumPy, CuPy or an array-API library, got "
            f"{type(x).__name__}"
        )
    return x.__array_namespace__()  # type: ignore[no-any-return]


class _CuPy(ModuleType):
    """CuPy with the standard's argument ``device``, which its functions that make arrays (14.2)
    lack."""

    def __getattr__(self, name: str) -> Any:
        import cupy

        function = getattr(cupy, name)

        def make(*args: Any, device: Any = None, **kwargs: Any) -> Array:
            with device or nullcontext():
                return function(*args, **kwargs)

        return make if name in ("arange", "asarray", "full", "ones", "zeros") else function


CUPY = _CuPy("cupy")


def is_object(x: Array) -> bool:
    """True for object arrays, which hold the checker's dual numbers."""
    return getattr(x.dtype, "kind", "") == "O"


def is_wide(x: Array) -> bool:
    """True for longdouble, real or complex."""
    return getattr(x.dtype, "char", "") in ("g", "G")


def itemsize(x: Array) -> int:
    """Bytes of one element; a namespace without ``itemsize`` (array-api-strict) holds 4 bytes or
    more anyway."""
    return getattr(x.dtype, "itemsize", 4)


def expect(name: str, x: Array, letters: str, wanted: tuple[Any, ...]) -> None:
    """ValueError, ``w must have shape (D,)=(64,), got (32,)``, unless ``x`` has the shape
    ``wanted``; None in ``wanted`` stands for any length."""
    library(x, name)
    if len(x.shape) != len(wanted) or any(
        w is not None and w != n for w, n in zip(wanted, x.shape, strict=True)
    ):
        shape = tuple("any" if w is None else w for w in wanted)
        raise ValueError(f"{name} must have shape {letters}={shape}, got {tuple(x.shape)}")


def last(x: Array, name: str) -> int:
    """The length of the last axis; ValueError if there is none, or nothing along it."""
    library(x, name)
    if len(x.shape) < 1 or x.shape[-1] < 1:
        raise ValueError(
            f"{name} must have a last axis of at least 1 entry, got shape {tuple(x.shape)}"
        )
    return int(x.shape[-1])


def integers(x: Array) -> list[int]:
    """A 1-D array of integers as Python's own, in one copy from a device: ``map(int, x)`` would be
    a copy for each of them, and wait for the device each time."""
    return x.tolist() if hasattr(x, "tolist") else [int(n) for n in x]


def expect_that(holds: bool, message: str) -> None:
    """ValueError with the message unless something ``holds``."""
    if not holds:
        raise ValueError(message)


def expect_some(name: str, x: Array, letters: str) -> None:
    """ValueError if an axis of ``x``, which are ``letters``, is empty."""
    if 0 in x.shape:
        raise ValueError(
            f"{name} must have at least 1 entry along each axis of {letters}, got shape "
            f"{tuple(x.shape)}"
        )


def expect_ids(name: str, ids: Array, limit: int) -> Array:
    """``ids`` as int64, since arithmetic on narrow ones would wrap.

    TypeError unless they are integers; ValueError unless all lie in 0 … limit − 1 (−1 would count
    from the end).
    """
    xp = library(ids, name)
    if not xp.isdtype(ids.dtype, "integral"):
        raise TypeError(f"{name} must be integers, got {ids.dtype}")
    if ids.size:
        lowest, highest = integers(xp.stack((xp.min(ids), xp.max(ids))))
        expect_that(
            lowest >= 0 and highest < limit,
            f"{name} must lie in 0…{limit - 1}, got {lowest}…{highest}",
        )
    return xp.astype(ids, xp.int64, copy=False)


def expect_mask(name: str, mask: Array, letters: str, wanted: tuple[Any, ...]) -> None:
    """TypeError unless ``mask`` is bool; ValueError unless it has the shape ``wanted``."""
    if not library(mask, name).isdtype(mask.dtype, "bool"):
        raise TypeError(f"{name} must be bool, got {mask.dtype}")
    expect(name, mask, letters, wanted)


def real(x: Array) -> Array:
    """The part of ``x`` that branches and sorts look at: real part, or a dual number's value as
    float64."""
    if is_object(x):
        import numpy as np

        return np.asarray(x).astype(np.float64)  # calls float() on every element
    xp = namespace(x=x)
    return xp.real(x) if xp.isdtype(x.dtype, "complex floating") else x


def cast(x: Array, like: Array) -> Array:
    """``x`` (real) in the number type of ``like``."""
    if is_object(like):
        return x + 0 * like.reshape(-1)[0]
    return library(like).astype(x, like.dtype, copy=False)


def number(x: Any, like: Array) -> Array:
    """``x``, a scalar or an array, in the number type of ``like`` and on its device, so that it
    widens nothing."""
    if is_object(like):
        return x
    return library(like).asarray(x, dtype=like.dtype, device=like.device)


def fill(condition: Array, x: Array, otherwise: float) -> Array:
    """``x`` where the condition holds, elsewhere the constant ``otherwise`` in the number type of
    ``x``."""
    return namespace(x=x).where(condition, x, cast(number(otherwise, x), x))


def finite(x: Array) -> Array:
    """``x`` where it is finite, elsewhere NaN: 1 / ∞, e^−∞ or σ(∞) would make of an overflow a 0
    or a 1 that nobody can tell from a right one."""
    return fill(namespace(x=x).isfinite(real(x)), x, float("nan"))


def zeros(shape: tuple[int, ...], like: Array) -> Array:
    """Zeros of the number type and device of ``like``."""
    xp = library(like)
    if is_object(like):
        return xp.full(shape, 0 * like.reshape(-1)[0], dtype=object)
    return xp.zeros(shape, dtype=like.dtype, device=like.device)


def sum_along(x: Array, axis: int) -> Array:
    """The sum along an axis; bfloat16 is summed in float32, and rounded once."""
    xp = namespace(moved=True, x=x)
    return cast(xp.sum(x, axis=axis, dtype=x.dtype if itemsize(x) >= 4 else xp.float32), x)


def put(x: Array, index: Any, values: Array) -> Array:
    """``x`` with ``values`` at ``index``.

    JAX makes a new array. Elsewhere ``x`` itself is written to (a copy per block would make the
    blockwise ops quadratic), so it must be one that the caller has made and nobody else holds.
    """
    if hasattr(x, "at"):
        return x.at[index].set(values)
    x[index] = values
    return x


def add_to(x: Array, index: Any, values: Array) -> Array:
    """``x`` with ``values`` added at ``index``; on the terms of `put`."""
    total = x[index]
    total += values  # in place where x[index] is a view
    return put(x, index, total)


def einsum(letters: str, a: Array, b: Array) -> Array:
    """Contract two arrays, written as in ``numpy.einsum``: ``einsum("bthx,bshx->bhts", q, k)``.

    It is one batched matrix product: letters in both inputs and the output are the batch, letters
    in both inputs alone are summed, the others are rows (of ``a``) and columns (of ``b``). So it
    runs on BLAS in NumPy and CuPy, on array-API namespaces (which have no einsum), and on
    longdouble, complex and object arrays.

    >>> import numpy as np
    >>> einsum("bi,bj->bij", np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]])).tolist()
    [[[3.0, 4.0], [6.0, 8.0]]]
    """
    inputs, out = letters.split("->")
    in_a, in_b = inputs.split(",")
    if len(a.shape) != len(in_a) or len(b.shape) != len(in_b):
        raise ValueError(f"einsum {letters!r} got shapes {tuple(a.shape)} and {tuple(b.shape)}")
    batch = [c for c in in_a if c in in_b and c in out]
    summed = [c for c in in_a if c in in_b and c not in out]
    rows = [c for c in in_a if c not in in_b]
    columns = [c for c in in_b if c not in in_a]
    sizes = dict(zip(in_a + in_b, a.shape + b.shape, strict=True))
    if any(sizes[c] != n for c, n in zip(in_a, a.shape, strict=True)) or {*rows, *columns} - {*out}:
        raise ValueError(
            f"einsum {letters!r} cannot contract shapes {tuple(a.shape)} and {tuple(b.shape)}"
        )
    xp = namespace(a=a, b=b)

    def arrange(x: Array, current: str, *parts: list[str]) -> Array:
        x = xp.permute_dims(x, tuple(current.index(c) for part in parts for c in part))
        return xp.reshape(
            x,
            tuple(sizes[c] for c in parts[0]) + tuple(prod(sizes[c] for c in p) for p in parts[1:]),
        )

    y = xp.matmul(arrange(a, in_a, batch, rows, summed), arrange(b, in_b, batch, summed, columns))
    current = "".join(batch + rows + columns)
    y = xp.reshape(y, tuple(sizes[c] for c in current))
    return xp.permute_dims(y, tuple(current.index(c) for c in out))


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x), without overflow on either side."""
    xp = namespace(x=x)
    positive = cast(real(x) >= 0, x)  # 1 or 0: products with it cost less than a where
    z = xp.exp((1 - 2 * positive) * x)
    return (positive + (1 - positive) * z) / (1 + z)


def blocks(length: int, size: int, end: int | None = None) -> Iterator[tuple[int, int]]:
    """Ranges (start, stop) of at most ``size`` that cover 0 … length, or 0 … end if that comes
    first.

    >>> list(blocks(5, 2))
    [(0, 2), (2, 4), (4, 5)]
    """
    stop = length if end is None else min(end, length)
    return ((start, min(start + size, stop)) for start in range(0, stop, size))


def argsort(x: Array) -> Array:
    """Indices that sort the last axis upwards; equal elements keep their order (the lower index
    first)."""
    xp = library(x)
    if xp.__name__ in ("numpy", "cupy"):
        return xp.argsort(x, axis=-1, kind="stable")
    return xp.argsort(x, axis=-1, stable=True)


def take_rows(x: Array, rows: Array) -> Array:
    """``x[rows]`` along the first axis, for 1-D integer ``rows``."""
    return library(x).take(x, rows, axis=0)


def scatter_add(rows: Array, values: Array, length: int) -> Array:
    """The adjoint of `take_rows`: ``length`` rows, with ``values[i]`` [M, D] added to row
    ``rows[i]`` [M].

    Equal rows are sorted together and added in pairs, pairs of pairs and so on: the same order, and
    so the same bits, in every library and every run, where atomic additions would differ from run
    to run.

    >>> import numpy as np
    >>> scatter_add(np.array([0, 2, 0]), np.array([[1.0], [2.0], [3.0]]), 3).tolist()
    [[4.0], [0.0], [2.0]]
    """
    xp, n = namespace(values=values), rows.shape[0]
    if n == 0:
        return zeros((length, values.shape[1]), values)
    rows = xp.astype(rows, xp.int64)
    order = argsort(rows)
    rows, values = xp.take(rows, order), take_rows(values, order)
    every = xp.arange(length, device=values.device)
    start, stop = (
        xp.searchsorted(rows, every, side="left"),
        xp.searchsorted(rows, every, side="right"),
    )
    place, run = (
        xp.arange(n, device=values.device) - xp.take(start, rows),
        xp.take(stop - start, rows),
    )
    span, longest = 1, int(xp.max(stop - start))
    while span < longest:
        later = xp.concat(
            (values[span:, :], values[:span, :]), axis=0
        )  # what wraps around has no partner
        values = xp.where((place + span < run)[:, None], values + later, values)
        span *= 2
    found = take_rows(values, xp.where(stop > start, start, 0))
    return fill((stop > start)[:, None], found, 0.0)
