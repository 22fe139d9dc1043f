"""What the host sides of the CPU's kernels share: arrays as kernels want them, and products."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import numpy as np

from ...array import Array
from .memory import STORE
from .pool import Task, blocks_of, run

__all__ = ["empty", "expect_real", "products", "ready", "rows_of", "run_products", "some_rows"]

ONE_TASK = 2**17  # numbers that one task handles at least: waking a thread takes 50 µs
ONE_PRODUCT = 2**22  # multiplications of one task at least, likewise
MOST = 16  # tasks of one product
SIDE = 256  # rows and columns of one at least: with fewer, packing takes the time


def expect_real(**arrays: Array | None) -> np.dtype[Any]:
    """The dtype of all named ``arrays`` of any shape (None entries are skipped); TypeError unless
    they are NumPy's, and all float32 or all float64."""
    first: tuple[str, np.dtype[Any]] | None = None
    for name, x in arrays.items():
        if x is None:
            continue
        if not isinstance(x, (np.ndarray, np.generic)):
            raise TypeError(f"{name} must be a NumPy array, got {type(x).__name__}")
        if x.dtype not in (np.float32, np.float64):
            raise TypeError(f"{name} must be float32 or float64, got {x.dtype}")
        if first is None:
            first = name, x.dtype
        elif first[1] != x.dtype:
            raise TypeError(f"{name} must be {first[1]} like {first[0]}, got {x.dtype}")
    if first is None:
        raise TypeError("at least one array is needed, got none")
    return first[1]


def ready(x: Array) -> np.ndarray:
    """``x`` (any shape) without gaps: itself, if it is so already."""
    return np.asarray(x, order="C")


def rows_of(x: Array) -> np.ndarray:
    """``x`` […, n] as [rows, n], a view where that is possible."""
    rows: np.ndarray = x.reshape(prod(x.shape[:-1]), x.shape[-1])
    return rows


def empty(shape: tuple[int, ...], like: Array) -> np.ndarray:
    """An array of the type of ``like`` (any shape) that will be written to, all of it."""
    return STORE.array(shape, like.dtype)


def some_rows(count: int, width: int = 1) -> tuple[slice, ...]:
    """Blocks of ``count`` rows that have `ONE_TASK` numbers each."""
    return blocks_of(count, max(1, ONE_TASK // width))


def products(a: Array, b: Array, out: Array) -> list[Task]:
    """Tasks that write a [n, k] @ b [k, m] into ``out`` [n, m], any of them views; each makes a
    block, as square as it can be: BLAS packs both factors of each anew."""
    (n, k), m = a.shape, b.shape[1]
    count = max(1, min(MOST, n * k * m // ONE_PRODUCT))
    most = [max(1, min(count, length // SIDE)) for length in (n, m)]
    long = int(n < m)
    most[1 - long] = min(most[1 - long], count // most[long])
    rows, columns = (blocks_of(x, -(-x // part)) for x, part in zip((n, m), most, strict=True))
    return [partial(np.matmul, a[i], b[:, j], out=out[i, j]) for i in rows for j in columns]


def run_products(*factors: tuple[Array, Array, Array]) -> None:
    """Write a @ b into ``out`` for each (a, b, out); on one thread where waking another would take
    longer."""
    tasks = [task for a, b, out in factors for task in products(a, b, out)]
    if sum(out.size * a.shape[1] for a, _, out in factors) < 2 * ONE_PRODUCT:
        tasks = [partial(_all, tasks)]
    run(tasks)


def _all(tasks: list[Task]) -> None:
    for task in tasks:
        task()
