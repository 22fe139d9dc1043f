"""Memory of large arrays, used again: the system clears a page and maps it at its first touch,
which takes longer than most kernels take to fill it.

Every training step asks for the same arrays. The memory of one that nothing refers to any more is
lent to the next of nearly its size. What waits and what is lent are together never more than was
once lent at a time.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

__all__ = ["LARGE", "STORE", "Store", "release"]

LARGE = 2**20  # bytes; malloc keeps what is smaller by itself
LINE = 64  # bytes, of the cache
PARTS = 8  # sizes per power of two: memory is at most an eighth larger than its array


class Lent:
    """Memory that comes back when the last array on it is gone."""

    __slots__ = ("__array_interface__", "back", "memory")

    def __init__(
        self,
        memory: np.ndarray,
        back: Callable[[np.ndarray], None],
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
    ) -> None:
        start = memory.__array_interface__["data"]
        interface = {"data": start, "shape": shape, "typestr": dtype.str, "version": 3}
        self.memory, self.back = memory, back
        self.__array_interface__ = interface

    def __del__(self) -> None:
        self.back(self.memory)


class Store:
    """Memory that waits for the next array."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        # What came back, not counted yet. An array may go at any moment and on any thread, in the
        # middle of a method of this class too: to append needs no lock.
        self.back: deque[np.ndarray] = deque()
        self.waiting: dict[int, list[np.ndarray]] = {}  # by size; what came back last is last
        self.kept = 0  # bytes that wait
        self.lent = 0  # bytes that arrays hold, or that `back` still has
        self.most = 0  # bytes lent at a time, since the last `release`

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """An array whose numbers are arbitrary; MemoryError as by NumPy."""
        size = prod(shape) * dtype.itemsize
        if size < LARGE:
            return np.empty(shape, dtype)
        size = rounded(size)
        memory = self._take(size)
        if memory is None:
            try:
                memory = aligned(size)
            except MemoryError:
                self.release()
                memory = aligned(size)
        with self.lock:
            self.lent += size
            self.most = max(self.most, self.lent)
        return np.asarray(Lent(memory, self.back.append, shape, dtype))

    def _take(self, size: int) -> np.ndarray | None:
        """Memory of this size that waits, or None; then what waits is dropped, the oldest size
        first, until the new memory fits below `most`."""
        with self.lock:
            self._count()
            if size in self.waiting:
                return self._pop(size)
            while self.waiting and self.lent + self.kept + size > self.most:
                self._pop(next(iter(self.waiting)))
            return None

    def _count(self) -> None:
        while self.back:
            memory = self.back.popleft()
            same = self.waiting.pop(memory.size, [])
            same.append(memory)
            self.waiting[memory.size] = same
            self.kept += memory.size
            self.lent -= memory.size

    def _pop(self, size: int) -> np.ndarray:
        same = self.waiting[size]
        memory = same.pop()
        self.kept -= size
        if not same:
            del self.waiting[size]
        return memory

    def release(self) -> None:
        """Give what waits back to NumPy, and so to malloc."""
        with self.lock:
            self._count()
            self.waiting.clear()
            self.kept = 0
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


if hasattr(os, "register_at_fork"):  # the thread that held the lock is not in the child
    os.register_at_fork(after_in_child=lambda: setattr(STORE, "lock", threading.Lock()))
