"""An interpreter of compiled PTX in NumPy, to execute kernels where there is no GPU.

`run` executes what NVRTC or numba-cuda emits, one lane of an array a thread, and checks what hardware leaves undefined:
bounds, alignment, unwritten bytes, races, barriers in divergent code, missing lanes. What it doesn't know raises.
Passing here is executing under this interpreter; it says nothing about speed on a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .machine import MOST_LANES, Machine, Report
from .memory import GLOBAL_START, Arena
from .parse import DTYPES, Function, PTXError, parse

__all__ = ["InterpreterLaunch", "PTXError", "Report", "run"]


def run(
    ptx: str,
    kernel: str,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    arguments: Sequence[Any],
    *,
    shared: int = 0,
    seed: int = 0,
    uninitialised: Sequence[np.ndarray] = (),
    races: bool = True,
    limit: int = 10_000_000,
) -> Report:
    """Execute a kernel; arrays among the arguments are read and written in place.

    grid, block: up to 3 sizes. arguments: NumPy scalars of the parameters' sizes and NumPy arrays: contiguous, one
    given twice is one allocation, one that isn't writeable may not be written. For kernels with numba's calling
    convention an array stands for its 5 + 2·ndim words. shared: bytes of dynamic shared memory. seed: fixes the order
    of warps and the errors of approximations. uninitialised: arrays among the arguments whose bytes may not be read
    before they are written. races: look for them. limit: of steps, to end endless loops. Raises PTXError for what the
    kernel does wrong, ValueError for wrong arguments.
    """
    module = parse(ptx)
    if kernel not in module.functions or not module.functions[kernel].entry:
        known = [name for name, function in module.functions.items() if function.entry]
        raise ValueError(f"kernel must be one of {known}, got {kernel!r}")
    function = module.functions[kernel]
    shape = [(*(int(n) for n in np.atleast_1d(size)), 1, 1)[:3] for size in (grid, block)]
    threads = int(np.prod(shape[1]))
    most = int(np.prod(function.limits.get(".maxntid", (1024,))))
    exact = function.limits.get(".reqntid")
    if min(*shape[0], *shape[1]) < 1 or threads > most or (exact and exact != shape[1][: len(exact)]):
        raise ValueError(
            f"block must have 1 to {most} threads and grid at least 1 block, got {shape[1]} and {shape[0]}"
        )
    with np.errstate(all="ignore"):
        memory = Arena("global", GLOBAL_START, granularity(module.functions.values()))
        for variable in module.variables.values():
            if variable.space in ("global", "const"):
                memory.add(variable.name, variable.size, max(variable.align, 16), variable.space == "const")
        arrays = allocate(memory, arguments)
        memory.allocate(1)
        for variable in module.variables.values():
            if variable.space in ("global", "const"):
                memory.put(variable.name, variable.data.ljust(variable.size, b"\0"))
        for name, (array, data) in arrays.items():
            memory.put(name, data, valid=not any(array is other for other in uninitialised))
        parameters = bind_parameters(function, arguments, memory, arrays)
        machine = Machine(module, function, *shape, memory, parameters, shared, seed, limit, races)
        blocks = int(np.prod(shape[0]))
        chunk = max(1, min(blocks, MOST_LANES // (32 * machine.warps)))
        machine.prepare(chunk)
        numbers = machine.rng.permutation(blocks)
        try:
            for start in range(0, blocks, chunk):
                machine.run_blocks(numbers[start : start + chunk])
        finally:
            for name, (array, data) in arrays.items():
                start = memory.offsets[name]
                if array.flags.writeable:
                    data[:] = memory.bytes[start : start + len(data)]
    report = machine.report
    report.instructions = int(machine.counts.sum())
    for instruction, count in zip(machine.program, machine.counts, strict=True):
        report.histogram[instruction.opcode] += int(count)
    report.histogram = +report.histogram
    return report


def granularity(functions: Any) -> int:
    """The smallest element that any memory instruction moves: the unit in which bytes are tracked."""
    sizes = [
        np.dtype(DTYPES[instruction.opcode.split(".")[-1]]).itemsize
        for function in functions
        for instruction in function.instructions
        if instruction.opcode.split(".")[0] in ("ld", "st", "atom", "red", "ldu")
        and instruction.opcode.split(".")[-1] in DTYPES
    ]
    return min([*sizes, 4])


def allocate(memory: Arena, arguments: Sequence[Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Give each array a place of its own; the array and its bytes, by name."""
    arrays: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for number, argument in enumerate(arguments):
        if not isinstance(argument, np.ndarray) or any(argument is array for array, _ in arrays.values()):
            continue
        if not argument.flags.c_contiguous:
            raise ValueError(f"argument {number} must be C-contiguous, got strides {argument.strides}")
        if any(np.may_share_memory(argument, array) for array, _ in arrays.values()):
            raise ValueError(f"argument {number} must not overlap another array")
        data = argument.reshape(-1).view(np.uint8)
        name = f"argument {number} {argument.dtype}{list(argument.shape)}"
        memory.add(name, data.nbytes, read_only=not argument.flags.writeable)
        arrays[name] = argument, data
    return arrays


def bind_parameters(
    function: Function, arguments: Sequence[Any], memory: Arena, arrays: dict[str, tuple[np.ndarray, np.ndarray]]
) -> Arena:
    """The parameter space: addresses of arrays, scalars as they are."""

    def address(array: np.ndarray) -> np.uint64:
        name = next(name for name, (other, _) in arrays.items() if other is array)
        return np.uint64(memory.base + memory.offsets[name])

    values: list[Any] = [address(a) if isinstance(a, np.ndarray) else a for a in arguments]
    if len(function.parameters) != len(arguments):  # numba: meminfo, parent, size, itemsize, data, shape, strides
        values = []
        for a in arguments:
            words = (
                [0, 0, a.size, a.itemsize, int(address(a)), *a.shape, *a.strides] if isinstance(a, np.ndarray) else []
            )
            values += [np.uint64(word) for word in words] or [a]
    if len(values) != len(function.parameters):
        raise ValueError(f"arguments must be {len(function.parameters)} for {function.name}, got {len(arguments)}")
    parameters = Arena("param", 4096, memory.granule)
    for variable in function.parameters:
        parameters.add(variable.name, variable.size, variable.align, read_only=True)
    parameters.allocate(1, tracked=False)
    for number, (variable, value) in enumerate(zip(function.parameters, values, strict=True)):
        data = value if isinstance(value, bytes) else getattr(value, "tobytes", bytes)()
        if len(data) != variable.size:
            raise ValueError(f"argument {number} must have {variable.size} bytes, got {value!r} with {len(data)}")
        parameters.put(variable.name, data)
        parameters.offsets[variable.name] += parameters.base
    return parameters


class InterpreterLaunch:
    """A `refimpl.kernels.launch.Launch` that executes `module.ptx` here; `reports` keeps (kernel, Report) of each."""

    def __init__(self, seed: int = 0, target: str = "sm_90") -> None:
        self.seed, self.target = seed, target
        self.reports: list[tuple[str, Report]] = []
        self.fresh: list[np.ndarray] = []

    def empty(self, shape: tuple[int, ...], dtype: Any, like: Any = None) -> np.ndarray:
        """An array that the first kernel to take it may not read before it writes."""
        array = np.empty(shape, dtype)
        array.reshape(-1).view(np.uint8)[:] = 0xFF
        self.fresh.append(array)
        return array

    def __call__(
        self, module: Any, kernel: str, grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any], *,
        shared: int = 0,
    ) -> None:  # fmt: skip
        report = run(
            module.ptx, kernel, grid, block, arguments, shared=shared, seed=self.seed, uninitialised=self.fresh
        )
        self.fresh = [array for array in self.fresh if not any(array is argument for argument in arguments)]
        self.reports.append((kernel, report))
