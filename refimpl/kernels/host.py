"""What the host sides of all kernels share: number types, arrays as kernels want them, and the launch."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from ..array import Array, library
from .compile import compile_kernel
from .launch import Launch, NumbaLaunch
from .numba_cuda import compile_numba

__all__ = ["Kernels", "Numbers", "cover", "numbers", "place", "product", "ready"]

WIDE = {"float64": "float64", "float32": "float32", "bfloat16": "float32"}


class Numbers:
    """The array namespace and the two number types of one call: of arrays in memory, and of arithmetic."""

    def __init__(self, xp: ModuleType, storage: str, dtype: Any) -> None:
        self.xp, self.storage, self.dtype = xp, storage, dtype
        self.real: Any = np.dtype(WIDE[storage])  # of sums, weight gradients and whatever is no storage array
        self.vector = 16 // np.dtype(dtype).itemsize  # elements of 16 bytes

    def scalar(self, x: Any) -> np.generic:
        """A number as a kernel's ``real`` parameter."""
        return self.real.type(x)  # type: ignore[no-any-return]


def numbers(**arrays: Array | None) -> Numbers:
    """The types that all the named arrays (None entries are skipped) have in common.

    TypeError if one is no array, or they differ in library or dtype, or that is not float64, float32 or bfloat16.
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
                f"{name} must be {first[1].__name__} {first[2]} like {first[0]}, got {xp.__name__} {x.dtype}"
            )
    if first is None:
        raise TypeError("at least one array is needed, got none")
    return Numbers(first[1], str(first[2]), first[2])


def ready(x: Array, dtype: Any = None) -> Array:
    """``x`` (in ``dtype``, if given) contiguous and at a multiple of 16 bytes: itself, if it is so already."""
    xp = library(x)
    x = xp.asarray(x, dtype=x.dtype if dtype is None else dtype, order="C")
    address = x.data.ptr if xp.__name__ == "cupy" else x.ctypes.data
    return x if address % 16 == 0 else x.copy()


def product(a: Array, b: Array, dtype: Any) -> Array:
    """a […, n] @ b [n, m], summed in float32 or wider, in ``dtype``; cuBLAS on a device."""
    xp, shape = library(a), (*a.shape[:-1], b.shape[1])
    if a.dtype != dtype:  # CuPy would round the product of bfloat16 arrays to bfloat16
        a, b = a.astype(dtype), b.astype(dtype)
    rows = a.reshape(-1, b.shape[0])  # CuPy has no stacks of bfloat16 products
    return xp.matmul(rows, b).astype(dtype, copy=False).reshape(shape)


def place(permutation: Array) -> Array:
    """The inverse of a permutation of 0 … n − 1."""
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
        self, kernel: str, storage: str, blocks: int | tuple[int, int], threads: int | tuple[int, int], *arguments: Any,
        shared: int = 0,
    ) -> None:  # fmt: skip
        """Run ``kernel`` on so many blocks; nothing at all on 0 of them. Python ints are int32 parameters."""
        grid = (blocks,) if isinstance(blocks, int) else blocks
        if 0 in grid:
            return
        if grid[0] >= 2**31 or grid[-1] >= 2 ** (31 if len(grid) == 1 else 16):
            raise ValueError(f"{kernel} can't run on more than 2³¹ − 1 blocks, of 2¹⁶ − 1 in y, got {grid}")
        typed = [np.int32(x) if isinstance(x, int) else x for x in arguments]
        block = (threads,) if isinstance(threads, int) else threads
        if isinstance(self.launch, NumbaLaunch):
            module = compile_numba(self.stem, kernel, self.launch.target, storage)
        else:
            module = compile_kernel(self.stem, self.launch.target, storage)
        self.launch(module, kernel, grid, block, typed, shared=shared)


def cover(count: int, each: int) -> int:
    """How many parts of ``each`` cover ``count``."""
    return -(-count // each)
