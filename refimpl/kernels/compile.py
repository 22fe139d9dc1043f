"""CUDA C to PTX and machine code by NVRTC, which needs no GPU; kept on disk (`kept`).

A kernel is compiled for one target (``sm_90``, …) and one storage type; both, and tile sizes if a
kernel has any, are ``#define`` lines put before the source. PTX is what the tests' interpreter
executes, the cubin what a device loads.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import CouldNotRun
from . import SOURCE
from .kept import kept

__all__ = [
    "STEMS",
    "STORAGE",
    "TARGETS",
    "BuildError",
    "Module",
    "Usage",
    "build",
    "compile_kernel",
    "constants",
    "nvrtc_version",
    "release_of",
]

# Machine code for sm_80 runs on sm_86 and sm_89 too, for sm_100 on sm_103, for sm_120 on sm_121
TARGETS = ("sm_80", "sm_90", "sm_90a", "sm_100", "sm_120")
STORAGE = ("float64", "float32", "bfloat16")  # types of arrays that kernels are compiled for
STEMS = tuple(sorted(path.stem for path in SOURCE.glob("*.cu")))  # the sources, kernels/<stem>.cu
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

    registers: int  # per thread
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


@cache
def compile_kernel(
    stem: str, target: str, storage: str, defines: tuple[tuple[str, int], ...] = ()
) -> Module:
    """``kernels/<stem>.cu`` for a target and a storage type, with such constants.

    ValueError for an unknown name; CouldNotRun if there is no NVRTC; BuildError if it does not
    compile. `build` compiles a source from elsewhere.
    """
    for name, value, known in (
        ("stem", stem, STEMS),
        ("target", target, TARGETS),
        ("storage", storage, STORAGE),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value}")
    source = constants(storage, defines) + (SOURCE / f"{stem}.cu").read_text()
    return build(stem, target, storage, source)


def constants(storage: str, defines: tuple[tuple[str, int], ...] = ()) -> str:
    """The lines that `compile_kernel` puts before a source: the storage type and such constants."""
    all_of_them = ((f"STORAGE_{storage.upper()}", 1), *defines)
    return "".join(f"#define {name} {value}\n" for name, value in all_of_them) + "#line 1\n"


def build(stem: str, target: str, storage: str, source: str) -> Module:
    """Compile any ``source`` in CUDA C, or take what was compiled before.

    It may include common.cuh if `constants` stand before it. ``stem`` names it in errors and in the
    folder of compiled kernels. CouldNotRun and BuildError as `compile_kernel`.
    """
    header = (SOURCE / "common.cuh").read_text()
    options = (f"--gpu-architecture={target}", *OPTIONS)
    found = kept(
        stem,
        (__version__, stem, source, header, options),
        lambda: f"nvrtc{nvrtc_version()}",
        lambda: _run(_nvrtc(), stem, source, header, options),
    )
    return Module(stem, target, storage, *found)


def nvrtc_version() -> str:
    """``13.0.88``; CouldNotRun if there is no NVRTC."""
    return _release(_nvrtc())


@cache
def _release(nvrtc: Any) -> str:
    """NVRTC's own answer, 13.0, is that of several releases; the PTX of nothing names the very
    one."""
    return release_of(_run(nvrtc, "nothing", "", "", ())[0])


def release_of(ptx: bytes) -> str:
    """The release of the compiler that made some PTX, as it says at the top."""
    found = re.search(rb"release [\d.]+, V([\d.]+)", ptx)
    if found is None:
        raise RuntimeError(f"PTX that does not name its compiler: {ptx[:200]!r}")
    return found[1].decode()


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
