"""The suite as on a GPU, without one: a pytest plugin for ``REFIMPL_GPU=1``, with NumPy dressed as
CuPy and the kernels under our interpreter. It finds what would fail on a device in the tests and
the host side, not in the kernels.

``python -m pretended_device FILE …`` or ``… -m MODULE …`` runs another program in the same way. The
benchmark's shapes are small here. With ``$REFIMPL_PRETEND_COUNTS`` each process adds a line to that
file: what it launched, called and would have compiled.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.bench.rows import ROWS
from refimpl.check import rules
from refimpl.kernels import launch
from refimpl.kernels.compile import STEMS

import ptx
from bench.sizes import SMALL
from pretended_cupy import CALLS, Pretended, Runtime, here, there

sys.modules["cupy"] = Pretended("cupy")
arrays_of, DeviceLaunch = rules._arrays, launch.DeviceLaunch
LAUNCHES: dict[str, int] = {}  # by file, kernel and type
COMPILED: dict[str, set[str]] = {"cuda": set(), "numba_cuda": set()}


def whose(x: Any) -> Any:
    """What an array and another view of all of it have in common."""
    if not isinstance(x, np.ndarray):
        return id(x)
    return x.ctypes.data, x.shape, x.strides, str(x.dtype)


class PretendedDevice:
    """In the place of `DeviceLaunch`, unless a test brings a CuPy of its own."""

    def __init__(self) -> None:
        if not isinstance(sys.modules["cupy"], Pretended):
            DeviceLaunch.__init__(self)  # type: ignore[arg-type]
        self.target = getattr(self, "target", "sm_90")
        self.most_shared = getattr(self, "most_shared", 227 << 10)

    def __call__(
        self,
        module: Any,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Any],
        *,
        shared: int = 0,
    ) -> None:
        if hasattr(self, "_kernels"):  # on a test's own CuPy
            work = module, kernel, grid, block, arguments
            return DeviceLaunch.__call__(self, *work, shared=shared)  # type: ignore[arg-type]
        assert not any(type(x) is np.ndarray for x in arguments), (
            f"{kernel} was given a NumPy array"
        )
        Runtime.deviceSynchronize()
        column = "cuda" if module.stem in STEMS else "numba_cuda"
        key = f"{column} {kernel} {module.storage}"
        LAUNCHES[key] = LAUNCHES.get(key, 0) + 1
        COMPILED[column].add(f"{module.stem} {module.storage}")
        given: dict[Any, Any] = {}  # one object for an array that comes twice
        told = [given.setdefault(whose(x), here(x)) for x in arguments]
        ptx.run(module.ptx, kernel, grid, block, told, shared=shared, most_shared=self.most_shared)

    def empty(self, shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
        return there(np.empty(shape, dtype))


launch.DeviceLaunch = PretendedDevice  # type: ignore[misc,assignment]
rules._arrays = lambda x: [
    a for a in arrays_of(x) if type(a) is np.ndarray
]  # CuPy's arrays are no NumPy arrays
ROWS.update({name: replace(row, sizes=SMALL) for name, row in ROWS.items()})


def write_counts() -> None:
    """A line of JSON, if they are asked for."""
    if path := os.environ.get("REFIMPL_PRETEND_COUNTS"):
        counts = {"launches": LAUNCHES, "calls": CALLS}
        counts |= {column: sorted(of) for column, of in COMPILED.items()}  # type: ignore[misc]
        with Path(path).open("a") as file:
            file.write(json.dumps(counts) + "\n")


def pytest_sessionfinish() -> None:
    write_counts()


def main(arguments: Sequence[str]) -> None:
    """Run a program as if there were a GPU."""
    from refimpl.bench import device

    device.COPIED, device.SIDE = 2**12, 16
    by_name = arguments[0] == "-m"
    sys.argv = list(arguments[1:] if by_name else arguments)
    try:
        if by_name:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        write_counts()


if __name__ == "__main__":
    main(sys.argv[1:])
