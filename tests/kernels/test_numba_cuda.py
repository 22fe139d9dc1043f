"""`refimpl.kernels.numba_cuda`: the kernels in Numba CUDA compile within their budget, under the
names of those in CUDA C; errors."""

from __future__ import annotations

import re
import sys
from typing import Any

import numpy as np
import pytest

from refimpl.errors import CouldNotRun
from refimpl.kernels.compile import TARGETS, BuildError
from refimpl.kernels.numba_cuda import (
    NUMBA_STEMS,
    NUMBA_STORAGE,
    build_numba,
    compile_numba,
    kernels_of,
)

from kernel_support import DTYPES, TABLES, without_a_device
from kernel_support.planted import sources
from support import FULL

# Of any kernel in Numba CUDA: registers of a thread; shared memory of a block, to which the linker
# adds 1,024 on sm_90.
NUMBA_REGISTERS, NUMBA_SHARED = 80, 2048 + 1024


def _body(ptx: str) -> str:
    """But for what names the target, and names that numba counts up."""
    return re.sub(r"(?m)^(\.target|//).*$|_ZN08NumbaEnv\w+|_cudapy_smem_\d+", "", ptx)


@without_a_device
@pytest.mark.parametrize("stem", NUMBA_STEMS)
def test_numba_compiles_within_budget(stem: str) -> None:
    """float32 for every target (float64 too in test-full): plain parameters, machine code
    without spills, nothing that calls, flushes to zero or computes in a wider type."""
    for storage in NUMBA_STORAGE if FULL else ("float32",):
        for kernel, function in kernels_of(stem, storage).items():
            for target in TARGETS:
                module = compile_numba(stem, kernel, target, storage)
                where, usage = f"{kernel} in {storage} for {target}", module.usage
                assert list(usage) == re.findall(r"\.entry (\w+)\(", module.ptx) == [kernel], where
                assert f".target {target.rstrip('a')}\n" in module.ptx, where
                assert len(re.findall(r"\.param .*_param_\d+,?\n", module.ptx)) == len(
                    function.__annotations__
                ), where
                assert module.cubin.read_bytes()[:4] == b"\x7fELF", where
                assert usage[kernel].spills == usage[kernel].stack == 0, where
                assert 0 < usage[kernel].registers <= NUMBA_REGISTERS, f"{where}: {usage}"
                assert usage[kernel].shared <= NUMBA_SHARED, f"{where}: {usage}"
                assert not re.search(
                    r"\.local|\batom\.|\bred\.|\bcall|(add|mul|fma|sub)\.(rn\.)?ftz", module.ptx
                ), where
                assert storage == "float64" or ".f64" not in module.ptx, where


@pytest.mark.parametrize("stem", NUMBA_STEMS)
def test_what_is_executed_stands_for_all_targets(stem: str) -> None:
    """sm_80's and sm_90a's PTX is sm_90's, which the tests execute."""
    for storage in NUMBA_STORAGE if FULL else ("float32",):
        for kernel in kernels_of(stem, storage):
            codes = [
                _body(compile_numba(stem, kernel, target, storage).ptx)
                for target in ("sm_80", "sm_90", "sm_90a")
            ]
            assert len(set(codes)) == 1, kernel


def test_numba_has_the_kernels_of_cuda_c() -> None:
    """Under the same names, with as many parameters."""
    for stem in NUMBA_STEMS:
        text = re.sub(r"__launch_bounds__\([\w, ]+\)", "", sources()[stem])
        declared = re.findall(r'extern "C" __global__ void\s+(\w+)\(([^)]*)\)', text)
        found = {
            name: len(kernel.__annotations__)
            for name, kernel in kernels_of(stem, "float32").items()
        }
        assert found == {name: parameters.count(",") + 1 for name, parameters in declared}


def test_errors_of_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    ones = np.ones((1, 2), DTYPES["bfloat16"])
    with pytest.raises(
        TypeError, match="kernels in Numba CUDA take float64 and float32 arrays, got bfloat16"
    ):
        TABLES["numba_cuda"]["swiglu"].forward(ones, ones)
    with pytest.raises(ValueError, match=r"stem must be one of cross_entropy, moe, .*, got adamw"):
        kernels_of("adamw", "float32")
    with pytest.raises(
        ValueError, match="target must be one of sm_80, sm_90, sm_90a, sm_100, got sm_70"
    ):
        compile_numba("rope", "rope_rotate", "sm_70", "float32")

    def broken(y: Any) -> None:
        y.nothing()

    broken.__annotations__ = {
        "y": kernels_of("swiglu", "float32")["swiglu_forward"].__annotations__["y"]
    }
    with pytest.raises(BuildError, match=r"(?s)^broken does not compile for sm_90:.*nothing"):
        build_numba(broken, "sm_90")
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(
        CouldNotRun, match=r"^Numba CUDA needs numba-cuda: pip install -e '\.\[kernels\]' [^\n]*$"
    ):
        kernels_of("rope", "float32")
