"""CUDA C to PTX and machine code by NVRTC, which needs no GPU; kept on disk by the hash of all that
enters.

A kernel is compiled for one target (``sm_90``, …) and one storage type; both, and tile sizes if a
kernel has any, are ``#define`` lines put before the source. PTX is what the tests' interpreter
executes, the cubin what a device loads.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from ..errors import CouldNotRun
from ..files import replacing_folder
from . import SOURCE

__all__ = [
    "STEMS",
    "STORAGE",
    "TARGETS",
    "BuildError",
    "Module",
    "Usage",
    "cache_folder",
    "compile_kernel",
    "kept",
    "library_file",
    "nvrtc_version",
]

TARGETS = ("sm_80", "sm_90", "sm_90a", "sm_100")
STORAGE = ("float64", "float32", "bfloat16")
STEMS = tuple(sorted(path.stem for path in SOURCE.glob("*.cu")))
FILES = ("kernel.ptx", "kernel.cubin", "log", "sha256")
OPTIONS = (
    "--std=c++17",
    "--ptxas-options=-v",
    "--fmad=true",
    "--ftz=false",
    "--prec-div=true",
    "--prec-sqrt=true",
)


class BuildError(RuntimeError):
    """A kernel that does not compile: NVRTC's log. It is never taken for a missing GPU."""


@dataclass(frozen=True)
class Usage:
    """What ptxas says that one kernel takes."""

    registers: int  # a thread
    spills: int  # bytes per thread, stores and loads
    stack: int  # bytes per thread
    shared: int  # bytes per block, static


@dataclass(frozen=True)
class Module:
    """A compiled source file."""

    stem: str
    target: str
    storage: str
    ptx: str
    log: str
    cubin: Path

    @cached_property
    def usage(self) -> dict[str, Usage]:
        """By the kernel's name."""
        return {
            part.split("'")[0]: _usage(part)
            for part in self.log.split("Compiling entry function '")[1:]
        }


def _usage(part: str) -> Usage:
    """From what ptxas logs of one kernel."""

    def number(pattern: str) -> int:
        found = re.search(pattern, part)
        return int(found[1]) if found else 0

    spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    return Usage(
        number(r"Used (\d+) registers"),
        spills,
        number(r"(\d+) bytes stack"),
        number(r"(\d+) bytes smem"),
    )


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``$XDG_CACHE_HOME/refimpl``, by default
    ``~/.cache/refimpl``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "refimpl"


@cache
def compile_kernel(stem: str, target: str, storage: str) -> Module:
    """``kernels/<stem>.cu`` for a target and a storage type.

    ValueError for an unknown name; CouldNotRun if there is no NVRTC; BuildError if it does not
    compile.
    """
    for name, value, known in (
        ("stem", stem, STEMS),
        ("target", target, TARGETS),
        ("storage", storage, STORAGE),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value}")
    source = f"#define STORAGE_{storage.upper()} 1\n#line 1\n" + (SOURCE / f"{stem}.cu").read_text()
    return build(stem, target, storage, source)


def build(stem: str, target: str, storage: str, source: str) -> Module:
    """Compile ``source``, which may include common.cuh, or take it from the cache."""
    nvrtc = _nvrtc()
    header, options = (
        (SOURCE / "common.cuh").read_text(),
        (f"--gpu-architecture={target}", *OPTIONS),
    )
    all_that_enters = library_file("nvrtc"), options, header, source, stem
    return kept(
        stem, target, storage, all_that_enters, lambda: _run(nvrtc, stem, source, header, options)
    )


def kept(
    name: str,
    target: str,
    storage: str,
    all_that_enters: object,
    make: Callable[[], tuple[bytes, bytes, bytes]],
) -> Module:
    """The module from the cache, by the hash of ``all_that_enters``; else what ``make`` gives: PTX,
    cubin and log.

    A cached module whose checksum no longer matches is made again. CouldNotRun if the cache cannot
    be written.
    """
    number = hashlib.sha256(repr(all_that_enters).encode()).hexdigest()[:32]
    folder = cache_folder() / "kernels" / f"{name}-{number}"
    content = _read(folder)
    if content is None:
        content = make()
        try:
            _write(folder, content)
        except OSError as error:
            raise CouldNotRun(
                f"compiled kernels are kept in {folder.parent}, which cannot be written "
                f"({error.strerror}): set XDG_CACHE_HOME to a folder that can"
            ) from error
    return Module(
        name, target, storage, content[0].decode(), content[2].decode(), folder / FILES[1]
    )


def _read(folder: Path) -> tuple[bytes, bytes, bytes] | None:
    """What `_write` wrote; None if it is not there or not whole."""
    try:
        ptx, cubin, log, digest = ((folder / name).read_bytes() for name in FILES)
    except OSError:
        return None
    return (ptx, cubin, log) if digest == _digest(ptx, cubin, log) else None


def _write(folder: Path, content: tuple[bytes, bytes, bytes]) -> None:
    """Whole or not at all, though two processes may do it at once."""
    try:
        with replacing_folder(folder) as fresh:
            for name, part in zip(FILES, (*content, _digest(*content)), strict=True):
                (fresh / name).write_bytes(part)
            if folder.exists() and _read(folder) is None:
                shutil.rmtree(folder)
    except OSError:
        if _read(folder) is None:  # else the other process was first
            raise


def _digest(*parts: bytes) -> bytes:
    return "".join(f"{hashlib.sha256(part).hexdigest()}\n" for part in parts).encode()


def library_file(name: str) -> tuple[str, int, int]:
    """What tells one release of a library of CUDA's from another, wherever it was installed from:
    size and time."""
    found = importlib.import_module("cuda.pathfinder").load_nvidia_dynamic_lib(name).abs_path
    status = Path(found).stat()
    return name, status.st_size, status.st_mtime_ns


def nvrtc_version() -> str:
    """``13.0``; CouldNotRun if there is no NVRTC."""
    nvrtc = _nvrtc()
    return "{}.{}".format(*_ok(nvrtc, nvrtc.nvrtcVersion()))


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:  # the bindings, or the library behind them
        raise CouldNotRun(
            f"CUDA C needs NVRTC: pip install -e '.[kernels]' ({str(error).splitlines()[0]})"
        ) from error
    return nvrtc


def _run(
    nvrtc: Any, stem: str, source: str, header: str, options: tuple[str, ...]
) -> tuple[bytes, bytes, bytes]:
    """(PTX, cubin, log)."""
    program = _ok(
        nvrtc,
        nvrtc.nvrtcCreateProgram(
            source.encode(), f"{stem}.cu".encode(), 1, [header.encode()], [b"common.cuh"]
        ),
    )
    try:
        (result,) = nvrtc.nvrtcCompileProgram(
            program, len(options), [option.encode() for option in options]
        )
        log = _text(nvrtc, program, "ProgramLog")
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise BuildError(
                f"{stem}.cu does not compile with {' '.join(options)}:\n"
                f"{log.decode(errors='replace')}"
            )
        return _text(nvrtc, program, "PTX"), _bytes(nvrtc, program, "CUBIN"), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _bytes(nvrtc: Any, program: Any, what: str) -> bytes:
    size = _ok(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program))
    # NVRTC writes into this object, so it must be nobody else's: Python shares bytes of length 0
    # and 1 (b" " * 1 too)
    content = bytes(bytearray(size + 1))
    _ok(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, content))
    return content[:size]


def _text(nvrtc: Any, program: Any, what: str) -> bytes:
    return _bytes(nvrtc, program, what).rstrip(b"\0")


def _ok(nvrtc: Any, answer: tuple[Any, ...]) -> Any:
    """What a call of NVRTC returns beside its status; RuntimeError unless that is success."""
    status, *values = answer
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"NVRTC answered {status}")
    return values[0] if len(values) == 1 else tuple(values)
