"""The kernels' columns beside ``reference`` in the table of implementations."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from ..errors import CouldNotRun
from ..fp8 import DEFAULT, Recipe, fp8_table, recipe_of
from ..ops import IMPLEMENTATIONS, REFERENCE, AnyOp, Op, Ops
from .cross_entropy import cross_entropy
from .embedding import embedding
from .flash_attention import COMPILED_AHEAD, attention, tiles
from .grouped_linear import TILINGS
from .grpo import grpo
from .launch import Launch, NumbaLaunch
from .linear import linear_backward, linear_forward
from .log_prob import log_prob
from .mla_absorbed import MLA_ABSORBED
from .mla_decode import mla_decode, tiles_ahead
from .moe import moe
from .rms_norm import rms_norm
from .rope import rope
from .router import router
from .swiglu import swiglu

__all__ = [
    "COLUMNS",
    "COMPOSITES",
    "CUDA",
    "IN_FP8",
    "NUMBA_CUDA",
    "ON_CPU",
    "cuda_table",
    "decoding",
    "device_launch",
    "expect_backend",
    "expect_dtype",
    "expect_recipe",
    "for_generation",
    "numba_cuda_table",
    "on_cpu",
    "placement",
    "table_of",
    "variants",
]

CUDA = {
    "embedding": embedding,
    "rms_norm": rms_norm,
    "swiglu": swiglu,
    "rope": rope,
    "router": router,
    "cross_entropy": cross_entropy,
    "log_prob": log_prob,
    "moe": moe,
    "grpo": grpo,
    "attention": attention,
}
"""What makes each op that has kernels in CUDA C from a `Launch`."""

COMPOSITES = ("linear", "ffn", "mla", "mtp", "head_cross_entropy")
"""Ops made of those, which bfloat16 reaches too: cuBLAS's product, and what holds no arithmetic but
sums of two."""

NUMBA_CUDA = {
    name: CUDA[name]
    for name in (
        "rms_norm",
        "swiglu",
        "rope",
        "router",
        "cross_entropy",
        "log_prob",
        "moe",
        "attention",
    )
}
"""Those that have kernels in Numba CUDA too: the same host side."""


def cuda_table(launch: Launch) -> Ops:
    """The reference's table with every op that CUDA C does in its place; an op without kernels
    stays the reference."""
    kernels = {name: make(launch) for name, make in CUDA.items()}
    return REFERENCE | {"linear": Op(linear_forward, linear_backward)} | kernels


def numba_cuda_table(launch: Launch) -> Ops:
    """As `cuda_table`, with the kernels in Numba CUDA; without bfloat16."""
    kernels = {name: make(NumbaLaunch(launch)) for name, make in NUMBA_CUDA.items()}
    return REFERENCE | {"linear": Op(linear_forward, linear_backward)} | kernels


def variants(stem: str, storage: str) -> list[tuple[tuple[str, int], ...]]:
    """The constants that a source in CUDA C is compiled with ahead of its use; of most, none."""
    if stem == "flash_attention":
        return [tiles(storage, *widths).defines for widths in COMPILED_AHEAD]
    if stem == "grouped_linear":
        return [tiling.defines for tiling in TILINGS[storage]]
    if stem == "mla_decode":
        return [shape.defines for shape in tiles_ahead(storage)]
    return [()]


COLUMNS = {"cuda": cuda_table, "numba_cuda": numba_cuda_table}
"""By the implementation's name, what makes the table from a `Launch`."""

ON_CPU = (*IMPLEMENTATIONS, "numba_cpu")
"""The implementations that take NumPy's arrays."""

IN_FP8 = "fp8"
"""One more of them, which computes another function: V3's FP8 training, emulated."""


NEEDS = dict.fromkeys(COLUMNS, "cupy") | {"numba_cpu": "numpy", IN_FP8: "numpy"}


def expect_backend(backend: str, implementation: str) -> None:
    """CouldNotRun unless an implementation takes the arrays of a backend."""
    if NEEDS.get(implementation, backend) != backend:
        raise CouldNotRun(
            f"must be {NEEDS[implementation]} for the implementation {implementation}, got "
            f"{backend}",
            argument="backend",
        )


def expect_dtype(dtype: str, implementation: str) -> None:
    """CouldNotRun unless an implementation stores a type: bfloat16 is what kernels in CUDA C alone
    store, and float64 and float32 what all do."""
    if dtype not in (known := ("float32", "float64", "bfloat16")):
        raise CouldNotRun(f"must be one of {', '.join(known)}, got {dtype}", argument="dtype")
    if dtype == "bfloat16" and implementation != "cuda":
        raise CouldNotRun(
            "bfloat16 needs the implementation cuda and the backend cupy, got the implementation "
            f"{implementation}",
            argument="dtype",
        )


def expect_recipe(text: str, implementation: str) -> Recipe:
    """What ``text`` chooses of FP8 (`recipe_of`); CouldNotRun if it can't be, or if it is given for
    another implementation."""
    if text and implementation != IN_FP8:
        raise CouldNotRun(
            f"needs the implementation {IN_FP8}, got {implementation}", argument="fp8"
        )
    try:
        return recipe_of(text)
    except ValueError as error:
        raise CouldNotRun(str(error), argument="fp8") from error


def on_cpu(implementation: str, recipe: Recipe = DEFAULT) -> Ops:
    """The table of one of `ON_CPU`, or `IN_FP8` with a recipe; ValueError for another name,
    CouldNotRun for numba_cpu without Numba."""
    if implementation == "numba_cpu":
        from .cpu.table import numba_cpu_table

        return numba_cpu_table()
    if implementation == IN_FP8:
        return fp8_table(recipe)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(ON_CPU)}, got {implementation}")
    return IMPLEMENTATIONS[implementation]


@cache
def table_of(implementation: str, recipe: Recipe = DEFAULT) -> Ops:
    """The table of any implementation; CouldNotRun for kernels without a GPU or without Numba."""
    if implementation not in COLUMNS:
        return on_cpu(implementation, recipe)
    return COLUMNS[implementation](device_launch())


@cache
def device_launch() -> Launch:
    """The launch of the device at hand; CouldNotRun without a GPU."""
    from .launch import DeviceLaunch

    return DeviceLaunch()


def placement(backend: str) -> Callable[[Any], Any] | None:
    """What moves an array to the backend; None for NumPy."""
    if backend == "numpy":
        return None
    try:
        import cupy
    except ImportError as error:
        raise CouldNotRun(
            f"cupy needs CuPy: pip install -e '.[cuda13]' ({error})", argument="backend"
        ) from error
    try:
        if cupy.cuda.runtime.getDeviceCount() < 1:
            raise CouldNotRun("cupy needs a GPU, found none", argument="backend")
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise CouldNotRun(f"cupy needs a GPU: {error}", argument="backend") from error
    return cupy.asarray  # type: ignore[no-any-return]


def decoding(launch: Launch) -> dict[str, AnyOp]:
    """What stands in the table `cuda_table` where tokens are read behind a cache."""
    return {"attention": mla_decode(launch), "mla": MLA_ABSORBED}


def for_generation(
    implementation: str, dtype: str = "float32", recipe: Recipe = DEFAULT
) -> tuple[Ops, Ops]:
    """The tables of an implementation for the prompt and for the tokens behind it, which MLA reads
    in its absorbed form; on NumPy both take weights that are read when they are used."""
    table = decode = table_of(implementation, recipe)
    if implementation == "cuda":
        return table, table | decoding(device_launch())
    if implementation == IN_FP8:
        return table, table
    if implementation == "numba_cpu":
        from .cpu.stored import stored_table

        table = stored_table(table)
    if implementation in NEEDS:
        # A token has one query: a task per row of the batch would cost more than its work. And the
        # kernels' heads are narrower than the latent, which is all heads' key.
        decode = table | {"attention": REFERENCE.attention}
    return table, decode | {"mla": IMPLEMENTATIONS["absorbed"].mla}
