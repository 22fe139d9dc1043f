"""A SwiGLU kernel of your own beside ours: compiled, executed, checked and counted without a GPU.

It needs a clone, since the interpreter of PTX (tests/ptx) is not in the package, and the extra dev.
"""

from __future__ import annotations

import sys
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from refimpl.check.cases import RandomDraw
from refimpl.kernels.compile import STORAGE, TARGETS, build, constants
from refimpl.kernels.host import ready
from refimpl.kernels.swiglu import swiglu
from refimpl.ops import Op

from kernel_support import SHAPES, compare, make_launch
from shares import Launch, share_of

THREADS = 128  # per block; the kernel of refimpl has 256
SOURCE = """
#include "common.cuh"  // storage: the type in memory; real: the type of the arithmetic

extern "C" __global__ void swiglu_forward(storage* y, const storage* gate, const storage* up,
                                          int64 size) {
    const int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= size) return;
    const real g = widen(gate[i]);
    y[i] = narrow(g * sigmoid(g) * widen(up[i]));  // (swiglu.1)
}
"""


def compiled(storage, target):
    return build("mine", target, storage, constants(storage) + SOURCE)


def mine(launch):
    """The op with this forward and our backward; ``launch`` executes: here or on a GPU."""

    def forward(gate, up):
        gate, up = ready(gate), ready(up)  # contiguous
        y = launch.empty(gate.shape, gate.dtype, gate)
        module = compiled(str(gate.dtype), launch.target)
        grid = -(-gate.size // THREADS)
        arguments = y, gate, up, np.int64(gate.size)  # of the parameters' very types
        launch(module, "swiglu_forward", (grid,), (THREADS,), arguments)
        return y, (gate, up)

    return Op(forward, swiglu(launch).backward)


def check():
    """By the rule for all kernels. AssertionError: errs too much; PTXError: undefined on a GPU."""
    for storage in STORAGE:
        for seed in range(5):
            case = SHAPES["swiglu"](RandomDraw(seed))
            compare("swiglu", mine(make_launch(seed)), case, storage, seed)
        print(f"{storage}: within the rule")


def count():
    """Both forwards, per element of a row of V3's width in bfloat16."""
    gate, up = np.random.default_rng(0).normal(size=(2, 1, 18432)).astype(ml_dtypes.bfloat16)
    for name, make in (("ours", swiglu), ("mine", mine)):
        launch = Launch()  # executes, and keeps the reports
        make(launch).forward(gate, up)
        ((_, report),) = launch.reports
        asked = report.read["global"] + report.written["global"]
        accesses = sum(n for op, n in report.histogram.items() if op.startswith(("ld.g", "st.g")))
        predicted = share_of(launch, gate.size, least=6)  # bytes: 2 of gate, up and y each
        print(f"{name}: {report.instructions / gate.size:.2f} instructions of PTX,", end=" ")
        print(
            f"{accesses / gate.size:.3f} accesses, {asked / gate.size:.2f} bytes asked for,",
            end=" ",
        )
        print(f"{32 * report.sectors / gate.size:.2f} of sectors;", end=" ")
        print(
            f"{predicted.blocks} blocks at once, predicted {predicted.share:.0%} of the copy rate"
        )


if __name__ == "__main__":
    for target in TARGETS:
        print(target, compiled("bfloat16", target).usage["swiglu_forward"])
    check()
    count()
