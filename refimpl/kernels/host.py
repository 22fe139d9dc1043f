"""What the host sides of all kernels share: number types, arrays as kernels want them, and the
launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from types import ModuleType
from typing import Any

import numpy as np

from ..array import Array, library
from .compile import compile_kernel
from .launch import Launch, NumbaLaunch
from .numba_cuda import compile_numba

__all__ = [
    "Kernels",
    "Numbers",
    "cover",
    "cublas",
    "matmul",
    "numbers",
    "parts",
    "place",
    "product",
    "ready",
]

WIDE = {"float64": "float64", "float32": "float32", "bfloat16": "float32"}
# CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION: no partial sum in the type of a bfloat16 result
FULL_SUMS = 16


class Numbers:
    """The array namespace and the two number types of one call: of arrays in memory, and of
    arithmetic."""

    def __init__(self, xp: ModuleType, storage: str, dtype: Any) -> None:
        self.xp = xp
        self.storage = storage
        self.dtype = dtype
        self.real: Any = np.dtype(
            WIDE[storage]
        )  # of sums, weight gradients and whatever is not a storage array
        self.vector = 16 // np.dtype(dtype).itemsize  # elements of 16 bytes

    def scalar(self, x: Any) -> np.generic:
        """A number as a kernel's ``real`` parameter."""
        return self.real.type(x)  # type: ignore[no-any-return]


def numbers(**arrays: Array | None) -> Numbers:
    """The types that all the named ``arrays`` of any shape (None entries are skipped) have in
    common.

    TypeError if one is not an array, or they differ in library or dtype, or that is not float64,
    float32 or bfloat16.
    """
    first: tuple[str, Any, Any] | None = None
    for name, x in arrays.items():
        if x is None:
            continue
        xp = library(x, name)
        if str(x.dtype) not in WIDE:
            raise TypeError(f"{name} must be float64, float32 or bfloat16, got {x.dtype}")
        if first is None:
            first = name, xp, x.dtype
        elif first[1:] != (xp, x.dtype):
            raise TypeError(
                f"{name} must be {first[1].__name__} {first[2]} like {first[0]}, got "
                f"{xp.__name__} {x.dtype}"
            )
    if first is None:
        raise TypeError("at least one array is needed, got none")
    return Numbers(first[1], str(first[2]), first[2])


def ready(x: Array, dtype: Any = None) -> Array:
    """``x`` (any shape; in ``dtype``, if given) contiguous and at a multiple of 16 bytes: itself,
    if it is so already."""
    xp = library(x)
    x = xp.asarray(x, dtype=x.dtype if dtype is None else dtype, order="C")
    address = x.data.ptr if xp.__name__ == "cupy" else x.ctypes.data
    return x if address % 16 == 0 else x.copy()


def product(a: Array, b: Array, dtype: Any) -> Array:
    """a […, n] @ b [n, m] in ``dtype``, summed in float32 or wider; ``a`` may be float32 beside a
    bfloat16 ``b``."""
    rows = (
        a if a.ndim == 2 else a.reshape(prod(a.shape[:-1]), b.shape[0])
    )  # CuPy has no stacks of bfloat16 products
    out = library(a).empty((rows.shape[0], b.shape[1]), dtype=dtype)
    for i, part in enumerate(parts(rows, b.dtype)):
        matmul(part, b, out, add=i > 0)
    return out.reshape(*a.shape[:-1], b.shape[1])


def parts(x: Array, dtype: Any, count: int = 3) -> Iterator[Array]:
    """Arrays in ``dtype`` whose sum is ``x`` (any shape): ``x`` itself, or of float32 in bfloat16
    ``count``, the largest first.

    Each holds 8 of its 24 bits, so that with three, products on tensor cores, which take bfloat16,
    are those of float32; with fewer each element is wrong by at most 2^(−8 count) of itself.
    Exact down to 2⁻¹⁰³, where CuPy takes what is left for 0; an infinite element, or one beyond
    3.395 · 10³⁸, becomes NaN, or with one part is infinite.
    """
    if x.dtype == dtype:
        yield x
        return
    for i in range(count):
        part = x.astype(dtype)
        yield part
        if i < count - 1:
            x = x - part


def matmul(a: Array, b: Array, out: Array, *, add: bool = False) -> None:
    """Write a [n, k] @ b [k, m] into ``out`` [n, m], contiguous; with ``add``, add it to what is
    there.

    ``a`` and ``b`` have one type, ``out`` that or, for bfloat16, float32. Sums are float32 or
    wider, and rounded once. On a device they are cuBLAS's, on tensor cores for bfloat16; transposed
    arrays are taken as they lie in memory.
    """
    xp = library(a)
    n, k = a.shape
    m = b.shape[1]
    types = a.dtype == b.dtype and str(out.dtype) in (str(a.dtype), WIDE[str(a.dtype)])
    if not types or b.shape[0] != k or out.shape != (n, m) or not out.flags.c_contiguous:
        raise ValueError(
            f"out must be contiguous, {(n, m)}, of the type of a {a.dtype} {a.shape} and b "
            f"{b.dtype} {b.shape}, or wider, got {out.dtype} {out.shape}"
        )
    real = np.dtype(WIDE[str(out.dtype)])
    if xp.__name__ != "cupy":
        found = xp.matmul(a.astype(real, copy=False), b.astype(real, copy=False))
        out[...] = out + found if add else found
    elif 0 in (n, k, m):
        out[...] = out if add else 0
    else:
        # cuBLAS counts columns first: what it takes for a matrix is the transpose of ours, so outᵀ
        # = bᵀ aᵀ
        (a, turn_a, step_a), (b, turn_b, step_b) = _in_memory(a), _in_memory(b)
        scale, keep = np.ones((), real), np.asarray(add, real)
        with cublas(xp) as (blas, handle, type_of, compute):
            blas.gemmEx(
                handle,
                turn_b,
                turn_a,
                m,
                n,
                k,
                scale.ctypes.data,
                b.data.ptr,
                type_of[str(b.dtype)],
                step_b,
                a.data.ptr,
                type_of[str(a.dtype)],
                step_a,
                keep.ctypes.data,
                out.data.ptr,
                type_of[str(out.dtype)],
                m,
                compute[real.name],
                blas.CUBLAS_GEMM_DEFAULT,
            )


@contextmanager
def cublas(xp: ModuleType) -> Iterator[tuple[Any, int, dict[str, int], dict[str, int]]]:
    """(CuPy's cuBLAS, its handle, its types of arrays, those of sums), which meanwhile sums in
    float32 or wider; its mode is put back."""
    blas, runtime = xp.cuda.cublas, xp.cuda.runtime
    handle = xp.cuda.device.get_cublas_handle()
    types = {
        "float64": runtime.CUDA_R_64F,
        "float32": runtime.CUDA_R_32F,
        "bfloat16": runtime.CUDA_R_16BF,
    }
    compute = {"float64": blas.CUBLAS_COMPUTE_64F, "float32": blas.CUBLAS_COMPUTE_32F}
    mode = blas.getMathMode(handle)
    blas.setMathMode(handle, mode | FULL_SUMS)
    try:
        yield blas, handle, types, compute
    finally:
        blas.setMathMode(handle, mode)


def _in_memory(x: Array) -> tuple[Array, int, int]:
    """(array, whether its rows lie across memory: cuBLAS's transposition of it, elements from line
    to line)."""
    if not x.flags.c_contiguous and x.flags.f_contiguous:
        return x, 1, x.shape[0]
    return library(x).ascontiguousarray(x), 0, x.shape[1]


def place(permutation: Array) -> Array:
    """The inverse of a ``permutation`` [n] of 0 … n − 1."""
    xp = library(permutation)
    inverse = xp.empty_like(permutation)
    inverse[permutation] = xp.arange(permutation.shape[0], dtype=permutation.dtype)
    return inverse


class Kernels:
    """The kernels of one source file, in the language of the launch, as it runs them."""

    def __init__(self, launch: Launch, stem: str) -> None:
        self.launch, self.stem = launch, stem

    def empty(self, shape: tuple[int, ...], dtype: Any, like: Array) -> Array:
        return self.launch.empty(shape, dtype, like)

    def __call__(
        self,
        kernel: str,
        storage: str,
        blocks: int | tuple[int, int],
        threads: int | tuple[int, int],
        *arguments: Any,
        shared: int = 0,
        defines: tuple[tuple[str, int], ...] = (),
    ) -> None:
        """Run ``kernel`` on so many blocks; nothing on 0 of them. Python ints, below 2³⁰, are int32
        parameters. ``defines``: constants that a kernel in CUDA C is compiled with."""
        grid = (blocks,) if isinstance(blocks, int) else blocks
        if 0 in grid:
            return
        if grid[0] >= 2**31 or grid[-1] >= 2 ** (31 if len(grid) == 1 else 16):
            raise ValueError(
                f"{kernel} can't run on more than 2³¹ − 1 blocks, of 2¹⁶ − 1 in y, got {grid}"
            )
        if large := [
            x for x in arguments if isinstance(x, int) and x >= 2**30
        ]:  # a step past a row's end must fit too
            raise ValueError(
                f"{kernel} counts in int32, so sizes must be below 2³⁰, got {large[0]}"
            )
        typed = [np.int32(x) if isinstance(x, int) else x for x in arguments]
        block = (threads,) if isinstance(threads, int) else threads
        if isinstance(self.launch, NumbaLaunch):
            module = compile_numba(self.stem, kernel, self.launch.target, storage)
        else:
            module = compile_kernel(self.stem, self.launch.target, storage, defines)
        self.launch(module, kernel, grid, block, typed, shared=shared)


def cover(count: int, each: int) -> int:
    """How many parts of ``each`` cover ``count``."""
    return -(-count // each)
