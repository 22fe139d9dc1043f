"""The suite as on a GPU, without one: a pytest plugin for ``REFIMPL_GPU=1``, with NumPy dressed as
CuPy and the kernels under our interpreter. It finds what would fail on a device in the tests and
the host side, not in the kernels."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from refimpl.check import rules
from refimpl.kernels import launch

import ptx
from pretended_cupy import Pretended, here, there

sys.modules["cupy"] = Pretended("cupy")
arrays_of, DeviceLaunch = rules._arrays, launch.DeviceLaunch


class PretendedDevice:
    """In the place of `DeviceLaunch`, unless a test brings a CuPy of its own."""

    def __init__(self) -> None:
        if not isinstance(sys.modules["cupy"], Pretended):
            DeviceLaunch.__init__(self)  # type: ignore[arg-type]
        self.target = getattr(self, "target", "sm_90")

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
        assert not any(type(x) is np.ndarray for x in arguments), (
            f"{kernel} was given a NumPy array"
        )
        given = {id(x): here(x) for x in arguments}  # one object for an array that comes twice
        ptx.run(module.ptx, kernel, grid, block, [given[id(x)] for x in arguments], shared=shared)

    def empty(self, shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
        return there(np.empty(shape, dtype))


launch.DeviceLaunch = PretendedDevice  # type: ignore[misc,assignment]
rules._arrays = lambda x: [
    a for a in arrays_of(x) if type(a) is np.ndarray
]  # CuPy's arrays are no NumPy arrays
