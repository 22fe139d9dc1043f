"""Who executes the kernels (our interpreter of their PTX, or the GPU), and the tables of both
columns."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from refimpl.array import library
from refimpl.check.cases import pair_of
from refimpl.kernels.columns import COLUMNS
from refimpl.kernels.compile import STORAGE, Module
from refimpl.kernels.flash_attention import Sizes, attention
from refimpl.kernels.grouped_linear import Tiling, Tilings
from refimpl.kernels.launch import DeviceLaunch, Launch, NumbaLaunch
from refimpl.kernels.moe import moe
from refimpl.kernels.numba_cuda import NUMBA_STORAGE
from refimpl.ops import Ops
from refimpl.verify import placed

import pretended_cupy
import ptx
from support import FULL

ON_DEVICE = os.environ.get("REFIMPL_GPU") == "1"  # tests/gpu.py: the same suite on the GPU
PRETENDED = os.environ.get("REFIMPL_PRETEND") == "1"  # tests/gpu.py --pretend: one example each
LARGE = ON_DEVICE and not PRETENDED
ALL = FULL or LARGE  # on the GPU time is the compiler's, not the kernels'
SANITIZED = os.environ.get("REFIMPL_SANITIZER") == "1"  # under compute-sanitizer


# Bytes of a block that a launch may ask for (CUDA C++ Programming Guide, compute capabilities)
MOST_SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}


SMALL = Sizes(((2, 16),), ((2, 16),))  # tiles of attention of which small examples have several
SMALL_TILINGS: Tilings = {  # of experts, the same
    "bfloat16": 2 * (Tiling(16, 16, 16, 16, 16, 3),),
    "float32": 2 * (Tiling(16, 16, 16, 16, 4, 3),),
    "float64": 2 * (Tiling(16, 16, 16, 16, 4, 3),),
}


class InterpreterLaunch:
    """Executes kernels from their PTX, on NumPy arrays. What they shall write is NaN (or all ones)
    before, and reading it before that is an error."""

    def __init__(self, seed: int = 0, target: str = "sm_90") -> None:
        self.seed, self.target = seed, target
        self.most_shared = MOST_SHARED[target]
        self.reports: list[tuple[str, ptx.Report]] = []
        self.unwritten: list[np.ndarray] = []

    def __call__(
        self,
        module: Module,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Any],
        *,
        shared: int = 0,
    ) -> None:
        unwritten = [x for x in arguments if any(x is y for y in self.unwritten)]
        locked = {
            i: x
            for i, x in enumerate(arguments)
            if isinstance(x, np.ndarray) and not x.flags.writeable
        }
        given = [locked[i].copy() if i in locked else x for i, x in enumerate(arguments)]
        report = ptx.run(
            module.ptx,
            kernel,
            grid,
            block,
            given,
            shared=shared,
            most_shared=self.most_shared,
            seed=self.seed,
            uninitialised=unwritten,
        )
        self.reports.append((kernel, report))
        for i, x in locked.items():
            assert given[i].tobytes() == x.tobytes(), (
                f"{kernel} wrote to its argument {i}, which is read-only"
            )
        self.unwritten = [x for x in self.unwritten if not any(x is y for y in unwritten)]

    def empty(self, shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
        x = np.empty(shape, dtype)
        x.reshape(-1).view(np.uint8)[...] = 0xFF
        self.unwritten.append(x)
        return x


class PretendedLaunch(InterpreterLaunch):
    """The interpreter under arrays that are dressed as CuPy's."""

    def __call__(
        self, module: Any, kernel: str, grid: Any, block: Any, arguments: Any, *, shared: int = 0
    ) -> None:
        assert not any(type(x) is np.ndarray for x in arguments), (
            f"{kernel} was given a NumPy array"
        )
        given = {
            id(x): pretended_cupy.here(x) for x in arguments
        }  # one object for an array that comes twice
        super().__call__(
            module, kernel, grid, block, [given[id(x)] for x in arguments], shared=shared
        )

    def empty(self, shape: Any, dtype: Any, like: Any) -> Any:
        return pretended_cupy.there(super().empty(shape, dtype, like))


class PoisonedLaunch(DeviceLaunch):
    """On the GPU: what a kernel shall write is NaN (or all ones) before. Not under
    compute-sanitizer, whose initcheck sees reading before writing by itself."""

    def empty(self, shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
        x = super().empty(shape, dtype, like)
        if not SANITIZED:
            x.reshape(-1).view(np.uint8)[...] = 0xFF
        return x


def to_device(x: np.ndarray) -> Any:
    """Where kernels read it."""
    if not ON_DEVICE:
        return x
    import cupy

    return cupy.asarray(x)


def to_host(x: Any) -> np.ndarray:
    return x.get() if ON_DEVICE else x


def strided(x: Any) -> Any:
    """As `to_device`, but between any two elements lies another."""
    x = to_device(np.asarray(x))
    room = library(x).empty((*x.shape, 2), dtype=x.dtype)
    room[...] = x[..., None]
    return room[..., 0]


def make_table(launch: Launch, column: str = "cuda") -> Ops:
    """A column, from and to NumPy arrays wherever it runs."""
    table = COLUMNS[column](launch)
    if not ON_DEVICE:
        if column == "cuda":
            table |= {"attention": attention(launch, SMALL), "moe": moe(launch, SMALL_TILINGS)}
        return table
    return table | {name: placed(pair, to_device) for name, pair in table.items()}


def make_launch(seed: int = 0, column: str = "cuda", target: str = "sm_90") -> Launch:
    """What host functions outside a table are given. target: of what the interpreter executes."""
    launch: Launch = PoisonedLaunch() if ON_DEVICE else InterpreterLaunch(seed, target)
    return NumbaLaunch(launch) if column == "numba_cuda" else launch


if SANITIZED:  # each array an allocation of its own, so that its bounds are seen
    import cupy

    cupy.cuda.set_allocator(None)


TABLES = {column: make_table(make_launch(), column) for column in COLUMNS}
TABLE = TABLES["cuda"]


def ops_of(op: str, column: str = "cuda", target: str = "sm_90") -> dict[str, Any]:
    """The argument ``ops`` for an op made of others."""
    if "ops" not in inspect.signature(pair_of(op).forward).parameters:
        return {}
    return {"ops": COLUMNS[column](make_launch(target=target))}


EXECUTED = ("sm_90", "sm_100")  # the targets whose code is executed
TYPES = [("cuda", storage) for storage in STORAGE] + [
    ("numba_cuda", storage) for storage in NUMBA_STORAGE
]
# in Numba CUDA many launches of many instructions: one type of each width stands for both
QUICK_TYPES = [case for case in TYPES if ALL or case != ("numba_cuda", "float64")]
without_a_device = pytest.mark.skipif(ON_DEVICE, reason="needs no GPU: make test")
