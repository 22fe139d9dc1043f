"""Kernels of ``kernels/*_numba_cpu.py``, compiled by Numba for this CPU and kept on disk."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ...errors import CouldNotRun
from .. import SOURCE
from ..kept import kernels_folder

__all__ = ["CHECKED", "STEMS", "compile_all", "kernel", "numba"]

STEMS = tuple(
    sorted(
        stem
        for path in SOURCE.glob("*_numba_cpu.py")
        if (stem := path.name.removesuffix("_numba_cpu.py")) != "common"
    )
)
CHECKED = os.environ.get("REFIMPL_BOUNDS_CHECKS") == "1"
"""Whether kernels are compiled with a check of every index: IndexError, and slow."""
# sums may be reordered, into vector lanes; a product and a sum stay two roundings, as in NumPy
FAST = {"reassoc"}


@cache
def numba() -> ModuleType:
    """Numba; CouldNotRun without it."""
    try:
        return importlib.import_module("numba")
    except ImportError as error:
        raise CouldNotRun(
            f"numba_cpu needs Numba and threadpoolctl: pip install -e '.[cpu]' ({error})"
        ) from error


@cache
def kernel(stem: str, name: str, dtype: Any) -> Callable[..., None]:
    """The function ``name`` of ``kernels/<stem>_numba_cpu.py`` for arrays of a dtype, float32 or
    float64.

    The first call on a machine compiles, and says so on standard error; later processes load what
    was compiled. Nothing is kept where no folder can be written to.
    """
    module: Any = numba()
    function = getattr(importlib.import_module(f"..{stem}_numba_cpu", __package__), name)
    real = np.dtype(dtype).name
    arguments = inspect.get_annotations(function, eval_str=True)
    del arguments["return"]
    signature = module.types.void(*(_type(argument, real) for argument in arguments.values()))
    options = {"nogil": True, "fastmath": FAST, "boundscheck": CHECKED, "error_model": "numpy"}
    place = _place()
    if place is None:
        _tell_once("nothing is kept: the folder of compiled kernels can't be written")
        return module.njit(signature, **options)(function)  # type: ignore[no-any-return]
    with _kept_in(place):
        if not any(place.rglob(f"*.{name}-*.nbi")):
            _tell_once(f"kept in {place}")
        try:
            return module.njit(signature, cache=True, **options)(function)  # type: ignore[no-any-return]
        except OSError as error:  # full, or read-only since
            _tell_once(f"nothing is kept: {error.strerror}")
            return module.njit(signature, **options)(function)  # type: ignore[no-any-return]


def _type(argument: Any, real: str) -> Any:
    """Numba's type of an `Argument` of the kernels."""
    types: Any = numba().types
    scalar = getattr(types, real if argument.kind == "real" else argument.kind)
    if argument.dims == 0:
        return scalar
    return types.Array(scalar, argument.dims, "C", readonly=not argument.written)


@cache
def _place() -> Path | None:
    """Where Numba keeps what it compiles from these very sources; None if that can't be written,
    or could have been written by another user (what is loaded from it is executed)."""
    digest = hashlib.sha256(repr((CHECKED, sorted(FAST))).encode())
    for path in sorted(SOURCE.glob("*_numba_cpu.py")):  # Numba looks at the kernel's own file alone
        digest.update(path.read_bytes())
    place = kernels_folder() / f"numba_cpu-{digest.hexdigest()[:32]}"
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = place.stat()
    except OSError:
        return None
    own = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
    return place if own and not status.st_mode & 0o022 and os.access(place, os.W_OK) else None


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


def compile_all() -> None:
    """Every kernel for both types: what a machine needs once."""
    numba()
    for stem in STEMS:
        module = importlib.import_module(f"..{stem}_numba_cpu", __package__)
        for name, function in vars(module).items():
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                for dtype in (np.float32, np.float64):
                    kernel(stem, name, np.dtype(dtype))
