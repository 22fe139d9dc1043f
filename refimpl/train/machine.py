"""Where and with what a stage computes: the array library, the tables of ops, the number type."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..array import Array
from ..config import ModelConfig
from ..errors import CouldNotRun
from ..generate.sampler import to_numpy
from ..kernels.columns import (
    COLUMNS,
    IN_FP8,
    ON_CPU,
    expect_backend,
    expect_dtype,
    expect_recipe,
    for_generation,
    placement,
    table_of,
)
from ..ops import Ops
from ..optimizer import AdamW, NarrowAdamW
from ..parallel.ranks import Ranks
from ..parameters import init_parameters, is_buffer

__all__ = ["Machine", "open_machine", "use_own_device"]


@dataclass(frozen=True)
class Machine:
    """The choices of `open_machine`, and what they stand for."""

    backend: str
    implementation: str
    dtype: str
    place: Callable[[Any], Array]  # a NumPy array to the backend
    ops: Ops  # of training
    prefill: Ops  # of generation: the prompt,
    decode: Ops  # and the tokens behind it
    optimizer: Callable[..., AdamW]
    ranks: Ranks | None = None  # the processes that share each step; None: this one alone

    @property
    def real(self) -> str:
        """The type of arithmetic, of losses and of weights' gradients."""
        return "float32" if self.dtype == "bfloat16" else self.dtype

    def parameters(self, config: ModelConfig, *, seed: int, std: float) -> dict[str, Array]:
        """Random initial ones, as `init_parameters` draws them."""
        return self.placed(init_parameters(config, seed=seed, std=std, dtype=self.dtype))

    def placed(self, params: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """Parameters in this type; the gates' biases are float32 always, as checkpoints have
        them."""
        return {
            name: self.place(x.astype("float32" if is_buffer(name) else self.dtype))
            for name, x in params.items()
        }

    def fetched(self, arrays: Mapping[str, Array]) -> dict[str, np.ndarray]:
        """As NumPy's arrays; on NumPy the same ones."""
        return {name: to_numpy(x) for name, x in arrays.items()}


def open_machine(
    backend: str = "numpy", implementation: str = "fastest", dtype: str = "float32", fp8: str = ""
) -> Machine:
    """CouldNotRun for a combination that does not exist or can't run here.

    ``fastest`` is numba_cpu on NumPy where Numba is installed, and cuda on CuPy. ``fp8``: choices
    of the implementation of that name, as `recipe_of` reads them.
    """
    if backend not in ("numpy", "cupy"):
        raise CouldNotRun(f"must be numpy or cupy, got {backend}", argument="backend")
    if implementation == "fastest":
        on_host = "numba_cpu" if importlib.util.find_spec("numba") else "reference"
        implementation = "cuda" if backend == "cupy" else on_host
    if implementation not in (names := (*ON_CPU, IN_FP8, *COLUMNS)):
        raise CouldNotRun(
            f"must be fastest or one of {', '.join(names)}, got {implementation}",
            argument="implementation",
        )
    expect_backend(backend, implementation)
    expect_dtype(dtype, implementation)
    recipe = expect_recipe(fp8, implementation)
    place, table = placement(backend), table_of(implementation, recipe)
    prefill, decode = for_generation(implementation, dtype, recipe)
    return Machine(
        backend,
        implementation,
        dtype,
        place or np.asarray,
        table,
        prefill,
        decode,
        optimizer_of(implementation),
    )


def use_own_device(rank: int) -> None:
    """Of a machine's GPUs, this process's is the rank-th, counted around."""
    import cupy

    cupy.cuda.Device(rank % cupy.cuda.runtime.getDeviceCount()).use()


def optimizer_of(implementation: str) -> Callable[..., AdamW]:
    """The optimizer's class that goes with an implementation."""
    if implementation == "numba_cpu":
        from ..kernels.cpu.adamw import FusedAdamW

        return FusedAdamW
    if implementation == "cuda":
        from ..kernels.adamw import adamw
        from ..kernels.launch import DeviceLaunch

        return adamw(DeviceLaunch())
    return NarrowAdamW if implementation == IN_FP8 else AdamW
