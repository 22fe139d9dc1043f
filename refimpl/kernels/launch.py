"""How a compiled kernel is started: on the GPU at hand here, under the interpreter of PTX in the
tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..array import Array
from ..errors import CouldNotRun
from .compile import TARGETS, Module

__all__ = ["DeviceLaunch", "ForwardedLaunch", "Launch", "NumbaLaunch"]


UNASKED = 48 << 10  # bytes of shared memory that a block gets without asking


class Launch(Protocol):
    """What the host side needs from whatever executes kernels."""

    target: str  # of `refimpl.kernels.compile.TARGETS`
    most_shared: int  # bytes of shared memory that a block may have

    def __call__(
        self,
        module: Module,
        kernel: str,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: Sequence[Any],
        *,
        shared: int = 0,
    ) -> None:
        """Run ``kernel`` with arrays (read and written in place) and NumPy scalars of the
        parameters' very types."""

    def empty(self, shape: tuple[int, ...], dtype: Any, like: Array) -> Array:
        """An array whose content a kernel will write, on the device of ``like``."""


class ForwardedLaunch:
    """A launch that passes everything on to another one."""

    def __init__(self, launch: Launch) -> None:
        self.launch, self.target = launch, launch.target
        self.most_shared = launch.most_shared

    def __call__(self, *work: Any, **settings: Any) -> None:
        self.launch(*work, **settings)

    def empty(self, shape: tuple[int, ...], dtype: Any, like: Array) -> Array:
        return self.launch.empty(shape, dtype, like)


class NumbaLaunch(ForwardedLaunch):
    """A launch for the kernels in Numba CUDA: the host side compiles those for it."""


class DeviceLaunch:
    """Launches on the current CuPy device; CouldNotRun without a GPU, or on one that no target
    fits."""

    def __init__(self) -> None:
        try:
            import cupy
        except ImportError as error:
            raise CouldNotRun(f"kernels need CuPy: pip install -e '.[cuda13]' ({error})") from error
        try:
            count = cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise CouldNotRun(f"kernels need a GPU: {error}") from error
        if count < 1:
            raise CouldNotRun("kernels need a GPU, found none")
        self._cupy = cupy
        device = cupy.cuda.Device()
        capability = int(device.compute_capability)
        fitting = [t for t in TARGETS if _fits(t, capability)]
        if not fitting:
            raise CouldNotRun(
                f"kernels are compiled for {', '.join(TARGETS)}, this GPU is sm_{capability}"
            )
        self.target = fitting[-1]
        self.most_shared = int(device.attributes["MaxSharedMemoryPerBlockOptin"])
        self._kernels: dict[tuple[Path, str], Any] = {}

    def __call__(
        self,
        module: Module,
        kernel: str,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: Sequence[Any],
        *,
        shared: int = 0,
    ) -> None:
        if any(
            isinstance(x, np.ndarray) for x in arguments
        ):  # CuPy would pass its values, not its address
            raise TypeError(f"{kernel} runs on CuPy arrays, got a NumPy array")
        key = module.cubin, kernel
        if key not in self._kernels:
            self._kernels[key] = self._cupy.RawModule(path=str(module.cubin)).get_function(kernel)
        if shared > UNASKED:
            self._kernels[key].max_dynamic_shared_size_bytes = shared
        self._kernels[key](grid, block, tuple(arguments), shared_mem=shared)

    def empty(self, shape: tuple[int, ...], dtype: Any, like: Array) -> Array:
        return self._cupy.empty(shape, dtype=dtype)


def _fits(target: str, capability: int) -> bool:
    """Machine code runs on its own major version from its minor version on; ``a`` on its very
    version alone."""
    number = int(target.removeprefix("sm_").rstrip("a"))
    if target.endswith("a"):
        return number == capability
    return number // 10 == capability // 10 and number <= capability
