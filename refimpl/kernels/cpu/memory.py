"""Memory of large arrays, used again: the system clears a page and maps it at its first touch,
which takes longer than most kernels take to fill it.

Every training step asks for the same arrays. The memory of one that nothing refers to any more is
lent to the next of nearly its size. What waits and what is lent are together never more than was
once lent at a time. For arrays that NumPy makes by itself, `keep_freed` has malloc do alike.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from functools import cache
from math import prod
from typing import Any

import numpy as np

__all__ = ["LARGE", "STORE", "Store", "keep_freed", "release"]

LARGE = 2**20  # bytes; malloc keeps what is smaller by itself
LINE = 64  # bytes, of the cache
PARTS = 8  # sizes per power of two: memory is at most an eighth larger than its array
# glibc's settings, by their numbers in malloc.h. M_MMAP_THRESHOLD: an array of more bytes has pages
# of its own, which go with it. M_TRIM_THRESHOLD: so many bytes at the end stay when they are free.
MALLOC = {-3: 2**25, -1: 2**28}
MALLOC_IS_SET = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def come_back(self: Any) -> None:
    if self.memory is not None:  # else interrupted while it was made
        self.back(self.memory)


@cache
def lent_type(size: int) -> type[Any]:
    """Of so many bytes of memory, which come back when the last array on them is gone."""
    return type("Lent", (ctypes.c_uint8 * size,), {"__del__": come_back, "memory": None})


class Store:
    """Memory that waits for the next array."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        # What came back, not counted yet. An array may go at any moment and on any thread, in the
        # middle of a method of this class too: to append needs no lock.
        self.back: deque[np.ndarray] = deque()
        self.waiting: dict[int, list[np.ndarray]] = {}  # by size; what came back last is last
        self.lent = 0  # bytes that arrays hold, or that `back` still has
        self.most = 0  # bytes lent at a time, since the last `release`

    @property
    def kept(self) -> int:
        """Bytes that wait."""
        return sum(size * len(same) for size, same in self.waiting.items())

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """An array whose numbers are arbitrary; MemoryError as by NumPy."""
        size = prod(shape) * dtype.itemsize
        if size < LARGE:
            return np.empty(shape, dtype)
        size = rounded(size)
        memory = self._take(size)
        if memory is None:
            memory = self._new(size)
        place = lent_type(size).from_address(memory.__array_interface__["data"][0])
        place.back = self.back.append
        place.memory = memory
        return np.ndarray(shape, dtype, buffer=place)

    def _take(self, size: int) -> np.ndarray | None:
        """Memory of this size that waits, or None; then what waits is dropped, the oldest size
        first, until the new memory fits below `most`. It is counted as lent."""
        with self.lock:
            self._count()
            memory = self._pop(size)
            while memory is None and self.waiting and self.lent + self.kept + size > self.most:
                self._pop(next(iter(self.waiting)))
            self.lent += size
            self.most = max(self.most, self.lent)
            return memory

    def _new(self, size: int) -> np.ndarray:
        try:
            try:
                return aligned(size)
            except MemoryError:
                self.release()
                return aligned(size)
        except BaseException:
            with self.lock:
                self.lent -= size
            raise

    def _count(self) -> None:
        # an interrupt between two lines may lose memory, and must not lend it twice
        while self.back:
            memory = self.back.popleft()
            same = self.waiting.pop(memory.size, [])
            same.append(memory)
            self.waiting[memory.size] = same
            self.lent -= memory.size

    def _pop(self, size: int) -> np.ndarray | None:
        same = self.waiting.pop(size, None)
        if not same:
            return None
        memory = same.pop()
        if same:
            self.waiting[size] = same
        return memory

    def release(self) -> None:
        """Give what waits back to NumPy, and so to malloc."""
        with self.lock:
            self._count()
            self.waiting.clear()
            self.most = self.lent


def rounded(size: int) -> int:
    """The least size of the store that is not below ``size``."""
    step = 1 << max((size - 1).bit_length() - PARTS.bit_length(), 0)
    return -(-size // step) * step


def aligned(size: int) -> np.ndarray:
    """So many bytes, from the beginning of a line of the cache on."""
    memory = np.empty(size + LINE, np.uint8)
    first = -memory.ctypes.data % LINE
    return memory[first : first + size]


STORE = Store()
"""The process's own."""


def release() -> None:
    """Give back the memory that waits for the next arrays: where other work needs it."""
    STORE.release()


def keep_freed() -> bool:
    """Have malloc keep up to 256 MiB that arrays of at most 32 MiB leave, for the next ones: what
    the store does for kernels, for NumPy's own arrays.

    It is a setting of the whole process, so commands make it, not the library. False where it was
    not made: the user has settings of malloc in the environment, or the library is not glibc.
    """
    if os.name != "posix" or any(name in os.environ for name in MALLOC_IS_SET):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, value) for name, value in MALLOC.items())


if hasattr(os, "register_at_fork"):  # another thread may have been in the middle of something
    os.register_at_fork(after_in_child=STORE.__init__)  # type: ignore[misc]
