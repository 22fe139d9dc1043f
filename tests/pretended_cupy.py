"""NumPy dressed as CuPy 14.2, to find without a GPU what CuPy would refuse.

Its arrays don't mix with NumPy's, its functions that make arrays have no ``device``, it has no longdouble, sorts take
``kind``, not ``stable``, and what NumPy returns as a scalar is an array without axes.
"""

from __future__ import annotations

import types
from contextlib import nullcontext
from typing import Any

import numpy as np

MISSING = ("longdouble", "clongdouble", "einsum_path", "float128")
REFUSED = {name: {"device"} for name in ("arange", "asarray", "empty", "full", "ones", "zeros")} | {
    "argsort": {"stable"}
}


class ndarray(np.ndarray):
    """An array on the pretended device."""

    @property
    def device(self) -> Any:
        return nullcontext()

    @property
    def data(self) -> Any:
        return types.SimpleNamespace(ptr=self.ctypes.data)

    def get(self) -> np.ndarray:
        return self.view(np.ndarray)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **kwargs: Any) -> Any:
        if any(type(x) is np.ndarray for x in inputs):
            raise TypeError("Unsupported type <class 'numpy.ndarray'>")
        if out is not None:
            kwargs["out"] = tuple(here(x) for x in out)
        result = there(getattr(ufunc, method)(*map(here, inputs), **{k: here(v) for k, v in kwargs.items()}))
        return result if out is None else out[0]

    def __array_function__(self, function: Any, *_: Any) -> Any:
        raise TypeError(f"numpy.{function.__name__} was called on a CuPy array")


ndarray.__module__ = "cupy"


def here(x: Any) -> Any:
    """As NumPy's own."""
    if isinstance(x, ndarray):
        return np.ndarray.view(x, np.ndarray)
    return type(x)(map(here, x)) if type(x) in (tuple, list) else x


def there(x: Any) -> Any:
    """As the pretended library's."""
    if isinstance(x, (np.ndarray, np.generic)):
        return np.asarray(x).view(ndarray)
    return type(x)(map(there, x)) if type(x) in (tuple, list) else x


class Pretended(types.ModuleType):
    """The module ``cupy``."""

    ndarray = ndarray

    def __getattr__(self, name: str) -> Any:
        if name in MISSING or name.startswith("__"):
            raise AttributeError(f"module 'cupy' has no attribute {name!r}")
        found = getattr(np, name)
        if isinstance(found, type) or not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            if refused := REFUSED.get(name, set()) & set(kwargs):
                raise TypeError(f"{name}() got an unexpected keyword argument {refused}")
            if name != "asarray" and any(type(x) is np.ndarray and x.ndim for x in args):
                raise TypeError(f"{name}: unsupported type <class 'numpy.ndarray'>")
            return there(found(*map(here, args), **{k: here(v) for k, v in kwargs.items()}))

        return call
