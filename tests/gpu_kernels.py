"""Every kernel once, on small shapes, for compute-sanitizer: ``python tests/gpu_kernels.py``.

Under pytest a sanitizer would watch mostly Python; here it sees one forward and one backward of
each op in each type, the optimizer's step, cross-entropy in place, and decoding. Nothing is
compared: errors are what the sanitizer finds.
"""

from __future__ import annotations

import os

os.environ |= {"REFIMPL_GPU": "1", "REFIMPL_SANITIZER": "1"}  # each array an allocation of its own

import cupy
import numpy as np

from refimpl.check.cases import RandomDraw, pair_of
from refimpl.check.rules import Pair
from refimpl.kernels.adamw import adamw
from refimpl.kernels.columns import CUDA, NUMBA_CUDA
from refimpl.kernels.compile import STORAGE
from refimpl.kernels.cross_entropy import cross_entropy_in_place
from refimpl.kernels.mla_decode import mla_decode
from refimpl.kernels.numba_cuda import NUMBA_STORAGE
from refimpl.optimizer import Moments

from kernel_support import DTYPES, SHAPES, TABLES, WIDE, make_launch, ops_of, results, rounded

WORK = [("cuda", op, storage) for op in CUDA for storage in STORAGE]
WORK += [("numba_cuda", op, storage) for op in NUMBA_CUDA for storage in NUMBA_STORAGE]


def main() -> None:
    for column, op, storage in WORK:
        print(column, op, storage, flush=True)
        case = SHAPES[op](RandomDraw(3))
        inputs = [rounded(x, storage) for x in case.inputs]
        kwargs = rounded(case.kwargs, np.dtype(WIDE[storage]).name)
        exact = Pair(*pair_of(op), case.kwargs).outputs(case.inputs)  # for their shapes
        cotangents = [np.ones(y.shape, DTYPES[storage]) for y in exact]
        results(TABLES[column][op], inputs, kwargs | ops_of(op, column), cotangents)
    for storage in STORAGE:
        print("adamw, cross_entropy in place, mla_decode", storage, flush=True)
        p, x = (cupy.asarray(rounded(np.ones((3, 37)), storage)) for _ in range(2))
        grads = {"p": cupy.ones(p.shape, dtype=WIDE[storage])}
        adamw(make_launch())().update({"p": p}, grads, Moments(), 0.1)
        cross_entropy_in_place(make_launch())(x, targets=cupy.asarray([1, 2, 3]))
        q, cache = (cupy.asarray(rounded(np.ones((2, n, 1, 11)), storage)) for n in (1, 70))
        mla_decode(make_launch()).forward(q, cache, cache[..., :7], scale=0.3)
    cupy.cuda.runtime.deviceSynchronize()


if __name__ == "__main__":
    main()
