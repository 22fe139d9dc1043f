"""Numba CUDA to PTX and machine code, which needs no GPU; kept on disk as the kernels in CUDA C
are.

Kernels take plain pointers and numbers (numba's own arrays would be seven words each), so they have
the very parameters of their twins in CUDA C, and the same host side starts both. bfloat16 is left
out: numba compiles it to calls of functions that it does not contain.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import Any

from ..errors import CouldNotRun
from . import SOURCE
from .compile import TARGETS, BuildError, Module, kept, library_file

__all__ = ["NUMBA_STEMS", "NUMBA_STORAGE", "compile_numba", "kernels_of"]

NUMBA_STORAGE = ("float64", "float32")
NUMBA_STEMS = tuple(
    sorted(path.name.removesuffix("_numba_cuda.py") for path in SOURCE.glob("*_numba_cuda.py"))
)
NUMBA_STEMS = tuple(stem for stem in NUMBA_STEMS if stem != "common")


def kernels_of(stem: str, storage: str) -> dict[str, Callable[..., None]]:
    """The kernels of ``kernels/<stem>_numba_cuda.py`` for a storage type, by name, as Python
    functions.

    TypeError for bfloat16, ValueError for an unknown stem; CouldNotRun if there is no numba-cuda.
    """
    if storage not in NUMBA_STORAGE:
        raise TypeError(
            f"kernels in Numba CUDA take {' and '.join(NUMBA_STORAGE)} arrays, got {storage}"
        )
    if stem not in NUMBA_STEMS:
        raise ValueError(f"stem must be one of {', '.join(NUMBA_STEMS)}, got {stem}")
    real = getattr(_numba(), storage)
    functions = importlib.import_module(f".{stem}_numba_cuda", __package__).kernels(real)
    return {function.__name__: function for function in functions}


@cache
def compile_numba(stem: str, kernel: str, target: str, storage: str) -> Module:
    """One kernel for a target and a storage type; for sm_90a that for sm_90. BuildError if it does
    not compile."""
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target}")
    if target.endswith("a"):
        return compile_numba(stem, kernel, target.rstrip("a"), storage)
    function = kernels_of(stem, storage)[kernel]
    sources = [(SOURCE / f"{name}_numba_cuda.py").read_text() for name in ("common", stem)]
    all_that_enters = tools(), sources, kernel, target, storage
    return kept(kernel, target, storage, all_that_enters, lambda: build_numba(function, target))


def tools() -> list[object]:
    """What tells one release of the compilers from another."""
    libraries = [library_file(name) for name in ("nvvm", "nvJitLink")]
    return [version("numba"), version("numba-cuda"), *libraries]


def build_numba(function: Callable[..., None], target: str) -> tuple[bytes, bytes, bytes]:
    """(PTX, cubin, ptxas's log) of a kernel whose annotations are the types of its arguments."""
    numba = _numba()
    kernel = function.__name__
    number = int(target.removeprefix("sm_"))
    signature = numba.types.void(*function.__annotations__.values())
    try:
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
        for library in ("nvvm", "nvJitLink"):
            library_file(library)
        importlib.import_module("numba.cuda")
        version("numba-cuda")  # numba's own CUDA target can't compile without a driver
        return importlib.import_module("numba")
    except (ImportError, RuntimeError) as error:
        raise CouldNotRun(
            "Numba CUDA needs numba-cuda: pip install -e '.[kernels]' "
            f"({str(error).splitlines()[0]})"
        ) from error
