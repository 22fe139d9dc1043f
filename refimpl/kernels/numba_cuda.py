"""Numba CUDA to PTX and machine code, which needs no GPU; kept on disk as the kernels in CUDA C
are.

Kernels take plain pointers and numbers (numba's own arrays would be seven words each), so they have
the very parameters of their twins in CUDA C, and the same host side starts both. bfloat16 is left
out: numba compiles it to calls of functions that it does not contain.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np

from .. import __version__
from ..errors import CouldNotRun
from . import SOURCE
from .compile import TARGETS, BuildError, Module, release_of
from .kept import kept

__all__ = ["NUMBA_STEMS", "NUMBA_STORAGE", "compile_numba", "kernels_of", "numba_versions"]

NUMBA_STORAGE = ("float64", "float32")  # types of arrays that the twins take
# the sources, kernels/<stem>_numba_cuda.py
NUMBA_STEMS = tuple(
    sorted(path.name.removesuffix("_numba_cuda.py") for path in SOURCE.glob("*_numba_cuda.py"))
)
NUMBA_STEMS = tuple(stem for stem in NUMBA_STEMS if stem != "common")


# A module in NVVM's language with nothing in it
NOTHING = b"""
target datalayout = "e-p:64:64:64-i1:8:8-i8:8:8-i16:16:16-i32:32:32-i64:64:64-i128:128:128-\
f32:32:32-f64:64:64-v16:16:16-v32:32:32-v64:64:64-v128:128:128-n16:32:64"
target triple = "nvptx64-nvidia-cuda"
!nvvmir.version = !{!0}
!0 = !{i32 2, i32 0}
"""


def kernels_of(stem: str, storage: str) -> dict[str, Callable[..., None]]:
    """The kernels of ``kernels/<stem>_numba_cuda.py`` for a storage type, by name, as Python
    functions.

    TypeError for bfloat16, ValueError for an unknown stem; CouldNotRun if there is no numba-cuda.
    """
    _expect_known(stem, storage)
    _numba()
    real = getattr(importlib.import_module(".common_numba_cuda", __package__), storage)
    functions = importlib.import_module(f".{stem}_numba_cuda", __package__).kernels(real)
    return {function.__name__: function for function in functions}


def _expect_known(stem: str, storage: str) -> None:
    if storage not in NUMBA_STORAGE:
        raise TypeError(
            f"kernels in Numba CUDA take {' and '.join(NUMBA_STORAGE)} arrays, got {storage}"
        )
    if stem not in NUMBA_STEMS:
        raise ValueError(f"stem must be one of {', '.join(NUMBA_STEMS)}, got {stem}")


@cache
def compile_numba(stem: str, kernel: str, target: str, storage: str) -> Module:
    """One kernel for a target and a storage type; for sm_90a that for sm_90. BuildError if it does
    not compile."""
    _expect_known(stem, storage)
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target}")
    if target.endswith("a"):
        return compile_numba(stem, kernel, target.rstrip("a"), storage)
    sources = [(SOURCE / f"{name}_numba_cuda.py").read_text() for name in ("common", stem)]
    found = kept(
        kernel,
        (__version__, sources, kernel, target, storage),
        numba_versions,
        lambda: build_numba(kernels_of(stem, storage)[kernel], target),
    )
    return Module(kernel, target, storage, *found)


@cache
def numba_versions() -> str:
    """The releases of all that compiles; CouldNotRun if part of it is missing.

    Neither Python's nor NumPy's is among them: the PTX of all kernels is the same under 3.11 with
    NumPy 2.4 and under 3.13 with 2.5.
    """
    try:
        packages = [f"{name}{version(name)}" for name in ("numba", "numba-cuda")]
        libraries = importlib.import_module("cuda.bindings.nvjitlink").version()
        return "-".join([*packages, f"nvvm{_nvvm_release()}", "nvjitlink{}.{}".format(*libraries)])
    except (ImportError, RuntimeError) as error:
        raise _no_numba(error) from error


def _nvvm_release() -> str:
    """NVVM's own answer, 2.0, is that of many releases; the PTX of nothing names the very one."""
    nvvm = importlib.import_module("cuda.bindings.nvvm")
    program = nvvm.create_program()
    try:
        nvvm.add_module_to_program(program, NOTHING, len(NOTHING), "nothing")
        nvvm.compile_program(program, 0, [])
        ptx = bytearray(nvvm.get_compiled_result_size(program))
        nvvm.get_compiled_result(program, ptx)
    finally:
        nvvm.destroy_program(program)
    return release_of(bytes(ptx))


def build_numba(function: Callable[..., None], target: str) -> tuple[bytes, bytes, bytes]:
    """(PTX, cubin, ptxas's log) of a kernel whose annotations are the types of its arguments."""
    numba = _numba()
    kernel = function.__name__
    number = int(target.removeprefix("sm_"))
    signature = numba.types.void(*function.__annotations__.values())
    try:
        with as_numba_cuda_knows_numpy():  # some of it is imported when something is compiled
            ptx, _ = importlib.import_module("numba.cuda").compile(
                function, signature, cc=divmod(number, 10), device=False, abi="numba", output="ptx"
            )
    except numba.core.errors.NumbaError as error:
        raise BuildError(f"{kernel} does not compile for {target}:\n{error}") from error
    (mangled,) = re.findall(r"\.entry (\w+)\(", ptx)
    plain = ptx.replace("\0", "").replace(mangled, kernel).encode()
    return plain, *_assemble(kernel, plain, target)


def _assemble(kernel: str, ptx: bytes, target: str) -> tuple[bytes, bytes]:
    """(cubin, log) of PTX, by nvJitLink: it holds ptxas and needs no GPU."""
    from cuda.bindings import nvjitlink

    options = (f"-arch={target}", "-verbose")
    handle = nvjitlink.create(len(options), options)
    try:
        nvjitlink.add_data(handle, nvjitlink.InputType.PTX, ptx, len(ptx), f"{kernel}.ptx")
        nvjitlink.complete(handle)
        cubin, log = (
            bytearray(nvjitlink.get_linked_cubin_size(handle)),
            bytearray(nvjitlink.get_info_log_size(handle)),
        )
        nvjitlink.get_linked_cubin(handle, cubin)
        nvjitlink.get_info_log(handle, log)
    except nvjitlink.nvJitLinkError as error:
        text = bytearray(nvjitlink.get_error_log_size(handle))
        nvjitlink.get_error_log(handle, text)
        raise BuildError(
            f"{kernel} does not assemble for {target}: {text.decode(errors='replace')}"
        ) from error
    finally:
        nvjitlink.destroy(handle)
    return bytes(cubin), bytes(log).rstrip(b"\0")


def _numba() -> Any:
    try:
        version("numba-cuda")  # numba's own CUDA target can't compile without a driver
        with as_numba_cuda_knows_numpy():
            importlib.import_module("numba.cuda")
            importlib.import_module("numba.cuda.np.arrayobj")  # else imported by what is compiled
        return importlib.import_module("numba")
    except (ImportError, RuntimeError) as error:
        raise _no_numba(error) from error


@contextmanager
def as_numba_cuda_knows_numpy() -> Iterator[None]:
    """NumPy 2.5 as numba-cuda 0.30 needs it to be imported, and afterwards as it was.

    It asks for ``numpy.row_stack``, an old name of ``vstack`` that is gone; and it makes a
    timedelta64 without a unit, of which NumPy warns.
    """
    numpy: Any = np
    missing = not hasattr(numpy, "row_stack")
    if missing:
        numpy.row_stack = numpy.vstack
    try:
        with warnings.catch_warnings():
            about = "The 'generic' unit for NumPy timedelta is deprecated"
            warnings.filterwarnings("ignore", about, DeprecationWarning)
            yield
    finally:
        if missing:
            del numpy.row_stack


def _no_numba(error: Exception) -> CouldNotRun:
    return CouldNotRun(
        f"Numba CUDA needs numba-cuda: pip install -e '.[kernels]' ({str(error).splitlines()[0]})"
    )
