"""An interpreter of compiled PTX in NumPy, to execute kernels where there is no GPU.

`run` executes what NVRTC or numba-cuda emits for our kernels, one lane of an array a thread, and
checks what hardware leaves undefined: bounds, alignment, unwritten bytes, races, barriers in
divergent code, missing lanes. What it doesn't know raises. Passing here is executing under this
interpreter; it says nothing about speed on a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from .machine import Machine, Report
from .memory import Arena
from .parse import Kernel, PTXError, parse

__all__ = ["PTXError", "Report", "run"]

# bytes of a block, of a kernel that has not been allowed more by cudaFuncSetAttribute
MOST_SHARED = 48 << 10
MOST_LANES = 16384  # at once
FEW_LANES, FEW_BYTES = 1024, 1 << 16  # of a machine that is kept, and of its launch's arrays


def run(
    ptx: str,
    kernel: str,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    arguments: Sequence[Any],
    *,
    shared: int = 0,
    most_shared: int = MOST_SHARED,
    seed: int = 0,
    uninitialised: Sequence[np.ndarray] = (),
    races: bool = True,
    limit: int = 10_000_000,
    sectors: bool = False,
) -> Report:
    """Execute a kernel; arrays among the arguments are read and written in place.

    grid, block: up to 3 sizes. arguments: NumPy scalars of the parameters' sizes and NumPy arrays:
    contiguous, one given twice is one allocation, one that isn't writeable may not be written.
    shared: bytes of dynamic shared memory. most_shared: what the launch has been allowed of it and
    of static shared memory, which alone has at most 48 KB.
    seed: fixes the order of warps and the errors of approximations. uninitialised: arrays among the
    arguments whose bytes may not be read before they are written. races: look for them. limit: of
    steps, to end endless loops.
    sectors: count them. Raises PTXError for what the kernel does wrong, ValueError for wrong
    arguments.
    """
    kernels = parse(ptx)
    if kernel not in kernels:
        raise ValueError(f"kernel must be one of {[*kernels]}, got {kernel!r}")
    entry = kernels[kernel]
    sizes = [(*(int(n) for n in np.atleast_1d(size)), 1, 1)[:3] for size in (grid, block)]
    fits = (
        max(sizes[0][1:]) < 2**16
        and sizes[0][0] < 2**31
        and np.prod(sizes[1]) <= entry.most_threads
    )
    if min(*sizes[0], *sizes[1]) < 1 or not fits:
        wanted = (
            f"block must have 1 to {entry.most_threads} threads and grid 1 to 2³¹ − 1, 2¹⁶ − "
            "1, 2¹⁶ − 1 blocks"
        )
        raise ValueError(f"{wanted}, got {sizes[1]} and {sizes[0]}")
    static = sum(variable.size for variable in entry.shared)
    for needed, most in ((static, MOST_SHARED), (shared + static, most_shared)):
        if needed > most:
            raise ValueError(f"shared memory must be at most {most} bytes of a block, got {needed}")
    lanes = -(-int(np.prod(sizes[1])) // 32) * 32
    blocks = max(1, min(int(np.prod(sizes[0])), MOST_LANES // lanes))
    room = 1 << (blocks - 1).bit_length()  # for more, so that more launches find their machine
    size = sum(x.nbytes for x in arguments if isinstance(x, np.ndarray))
    keep = room * lanes <= FEW_LANES and size <= FEW_BYTES
    make, blocks = (kept_machine, room) if keep else (Machine, blocks)
    machine = make(entry, sizes[1], blocks, shared, races=races, sectors=sectors)
    machine.begin(sizes[0], seed, limit)
    memory = machine.memory
    arrays = allocate(memory, arguments)
    for array, address in arrays:
        memory.put(
            address,
            array.reshape(-1).view(np.uint8),
            not any(array is other for other in uninitialised),
        )
    parameters = values_of(entry, arguments, arrays)
    try:
        with np.errstate(all="ignore"):
            return machine.run(parameters)
    finally:
        for array, address in arrays:
            if array.flags.writeable:
                array.reshape(-1).view(np.uint8)[:] = memory.bytes[address - memory.base :][
                    : array.nbytes
                ]
        if not keep:
            vars(machine).clear()  # its steps refer to it, and it would wait for the collector


kept_machine = lru_cache(maxsize=32)(Machine)


def allocate(memory: Arena, arguments: Sequence[Any]) -> list[tuple[np.ndarray, int]]:
    """Give each array a place of its own, at a multiple of 16 bytes where it lies at one here:
    arrays and addresses."""
    arrays: list[tuple[np.ndarray, int]] = []
    for number, argument in enumerate(arguments):
        if not isinstance(argument, np.ndarray) or any(argument is array for array, _ in arrays):
            continue
        if not argument.flags.c_contiguous:
            raise ValueError(
                f"argument {number} must be C-contiguous, got strides {argument.strides}"
            )
        if any(np.may_share_memory(argument, array) for array, _ in arrays):
            raise ValueError(f"argument {number} must not overlap another array")
        name = f"argument {number} {argument.dtype}{list(argument.shape)}"
        read_only, offset = not argument.flags.writeable, argument.ctypes.data % 16
        address = memory.add(name, argument.nbytes, read_only=read_only, offset=offset)
        arrays.append((argument, address))
    memory.allocate(1)
    return arrays


def values_of(
    kernel: Kernel, arguments: Sequence[Any], arrays: list[tuple[np.ndarray, int]]
) -> dict[str, bytes]:
    """The parameters' bytes: addresses of arrays, scalars as they are."""
    if len(arguments) != len(kernel.parameters):
        raise ValueError(
            f"arguments must be {len(kernel.parameters)} for {kernel.name}, got {len(arguments)}"
        )
    values = {}
    for number, (parameter, given) in enumerate(zip(kernel.parameters, arguments, strict=True)):
        value = next((np.uint64(address) for array, address in arrays if array is given), given)
        values[parameter.name] = np.asarray(value).tobytes()
        if len(values[parameter.name]) != parameter.size:
            raise ValueError(f"argument {number} must have {parameter.size} bytes, got {value!r}")
    return values
