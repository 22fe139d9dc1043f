"""Arrays whose sums run in another order: what rounding alone changes in a function.

Ops find their library by `array.namespace`, so an array that names another one is enough: here
NumPy, with the terms of every ``matmul``, ``sum`` and ``mean`` in a random order.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

__all__ = ["shuffled"]


class Shuffled(np.ndarray):
    """An array whose library is a `Shuffling`; what is computed of it has the same."""

    library: Any = None

    def __array_finalize__(self, made_from: Any) -> None:
        self.library = getattr(made_from, "library", None)

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        return self.library or np


class Shuffling(ModuleType):
    """NumPy, but for the order of sums; its functions return `Shuffled` arrays."""

    def __init__(self, seed: int) -> None:
        super().__init__("numpy")
        self.rng = np.random.default_rng(seed)

    def __getattr__(self, name: str) -> Any:
        found = getattr(np, name)
        if isinstance(found, type) or not callable(found):
            return found

        def function(*args: Any, **kwargs: Any) -> Any:
            return self.own(found(*args, **kwargs))

        return function

    def own(self, x: Any) -> Any:
        """``x`` as an array of this library, if it is one."""
        if not isinstance(x, np.ndarray | np.generic):
            return x
        mine = np.asarray(x).view(Shuffled)
        mine.library = self
        return mine

    def order(self, length: int) -> np.ndarray:
        return self.rng.permutation(length)

    def matmul(self, a: Any, b: Any) -> Any:
        order = self.order(a.shape[-1])
        return self.own(np.matmul(np.take(a, order, axis=-1), np.take(b, order, axis=-2)))

    def sum(self, x: Any, axis: Any = None, **kwargs: Any) -> Any:
        return self.own(np.sum(self.mixed(x, axis), axis=axis, **kwargs))

    def mean(self, x: Any, axis: Any = None, **kwargs: Any) -> Any:
        return self.own(np.mean(self.mixed(x, axis), axis=axis, **kwargs))

    def mixed(self, x: Any, axis: Any) -> np.ndarray:
        """``x`` with another order along ``axis``, or of all it has."""
        if axis is None:
            return np.take(np.reshape(x, -1), self.order(np.size(x)))
        return np.take(x, self.order(x.shape[axis]), axis=axis)


def shuffled(seed: int) -> Any:
    """A function that makes arrays with sums in an order of the seed's; 0: NumPy's own order, and
    the array as it is."""
    return Shuffling(seed).own if seed else np.asarray
