"""Kernels of ``kernels/*_numba_cpu.py``, compiled by Numba for this CPU and kept on disk."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ...errors import CouldNotRun
from .. import SOURCE
from ..kept import OTHERS_WRITE, kernels_folder
from .pool import NEEDS, blas_libraries

__all__ = ["CHECKED", "STEMS", "compile_all", "kernel", "numba", "panel_width", "turned_shape"]

HELPERS = {"common", "products"}  # files without kernels: what kernels call
STEMS = tuple(  # the kernels' files, kernels/<stem>_numba_cpu.py
    sorted(
        {path.name.removesuffix("_numba_cpu.py") for path in SOURCE.glob("*_numba_cpu.py")}
        - HELPERS
    )
)
CHECKED = os.environ.get("REFIMPL_BOUNDS_CHECKS") == "1"
"""Whether kernels are compiled with a check of every index: IndexError, and slow."""
# sums may be reordered, into vector lanes; a product and a sum stay two roundings, as in NumPy
FAST = {"reassoc"}


OPTIONS = {"nogil": True, "fastmath": FAST, "boundscheck": CHECKED, "error_model": "numpy"}
LOCK = threading.RLock()  # one kernel at a time: where Numba keeps it is a global setting


@cache
def numba() -> ModuleType:
    """Numba; CouldNotRun without it or threadpoolctl."""
    blas_libraries()
    try:
        return importlib.import_module("numba")
    except ImportError as error:
        raise CouldNotRun(f"{NEEDS} ({error})") from error


@cache
def kernel(stem: str, name: str, dtype: Any) -> Callable[..., None]:
    """The function ``name`` of ``kernels/<stem>_numba_cpu.py`` for arrays of a dtype, float32 or
    float64.

    The first call on a machine compiles, and says so on standard error; later processes load what
    was compiled. Nothing is kept where no folder can be written to.
    """
    module: Any = numba()
    real = np.dtype(dtype).name
    with LOCK:
        function = getattr(importlib.import_module(f"..{stem}_numba_cpu", __package__), name)
        arguments = inspect.get_annotations(function, eval_str=True)
        del arguments["return"]
        signature = module.types.void(*(_type(argument, real) for argument in arguments.values()))
        place = _place(real)
        if place is None:
            _tell_once("nothing is kept: the folder of compiled kernels can't be written")
            return module.njit(signature, **OPTIONS)(function)  # type: ignore[no-any-return]
        with _kept_in(place):
            if not any(place.rglob(f"*.{name}-*.nbi")):
                _tell_once(f"kept in {place.parent}")
            try:
                return module.njit(signature, cache=True, **OPTIONS)(function)  # type: ignore[no-any-return]
            except OSError as error:  # full, or read-only since
                _tell_once(f"nothing is kept: {error.strerror}")
                return module.njit(signature, **OPTIONS)(function)  # type: ignore[no-any-return]


@cache
def panel_width(dtype: Any) -> int:
    """Columns of a panel (kernels/products_numba_cpu.py) of a dtype on this CPU."""
    return int(_products().width_of(np.dtype(dtype)))


@cache
def turned_shape(steps: int, rows: int) -> tuple[int, ...]:
    """The shape of the transpose of a weight [steps, rows], as kernels on this CPU read it."""
    return tuple(_products().turned_shape(steps, rows))


def _products() -> Any:
    numba()
    return importlib.import_module("..products_numba_cpu", __package__)


def _type(argument: Any, real: str) -> Any:
    """Numba's type of an `Argument` of the kernels."""
    types: Any = numba().types
    scalar = getattr(types, real if argument.kind == "real" else argument.kind)
    if argument.dims == 0:
        return scalar
    return types.Array(scalar, argument.dims, argument.layout, readonly=not argument.written)


@cache
def _place(real: str) -> Path | None:
    """Where Numba keeps what it compiles from these very sources for this very CPU; None if that
    can't be written, or could have been by another user (what is loaded from it is executed).

    A folder per type: two processes that write one function for two types at the same time would
    each lose the other's.
    """
    llvm: Any = importlib.import_module("llvmlite.binding")
    products = _products()
    made_by = [*sorted(OPTIONS.items(), key=str), numba().__version__, llvm.get_host_cpu_name()]
    made_by += [numba().config.CPU_NAME, sorted(products.FEATURES), products.CHECKED]
    digest = hashlib.sha256(repr(made_by).encode())
    for path in sorted(SOURCE.glob("*_numba_cpu.py")):  # Numba looks at the kernel's own file alone
        digest.update(path.read_bytes())
    place = kernels_folder() / f"numba_cpu-{digest.hexdigest()[:32]}" / real
    try:
        for folder in (place.parent.parent, place.parent, place):
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            status = folder.stat()
            own = not hasattr(os, "geteuid") or status.st_uid in (0, os.geteuid())
            if not own or status.st_mode & OTHERS_WRITE:
                return None
    except OSError:
        return None
    return place if os.access(place, os.W_OK) else None


@contextmanager
def _kept_in(place: Path) -> Iterator[None]:
    """Inside, Numba keeps what it compiles in this folder."""
    config: Any = importlib.import_module("numba.core.config")
    before = config.CACHE_DIR
    config.CACHE_DIR = str(place)
    try:
        yield
    finally:
        config.CACHE_DIR = before


@cache
def _tell_once(where: str) -> None:
    print(f"compiling the kernels of numba_cpu for this CPU ({where})", file=sys.stderr)


def compile_all(*reals: str) -> None:
    """Every kernel for these types, both if none is named: what a machine needs once."""
    numba()
    for stem in STEMS:
        module = importlib.import_module(f"..{stem}_numba_cpu", __package__)
        for name, function in vars(module).items():
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                for real in reals or ("float32", "float64"):
                    kernel(stem, name, np.dtype(real))
