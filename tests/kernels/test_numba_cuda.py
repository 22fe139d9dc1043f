"""`refimpl.kernels.numba_cuda`: the kernels in Numba CUDA compile within their budget, under the
names of those in CUDA C; errors."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl.errors import CouldNotRun
from refimpl.kernels import SOURCE, numba_cuda
from refimpl.kernels.compile import TARGETS, BuildError
from refimpl.kernels.numba_cuda import (
    NUMBA_STEMS,
    NUMBA_STORAGE,
    as_numba_cuda_knows_numpy,
    build_numba,
    compile_numba,
    kernels_of,
    numba_versions,
)

from kernel_support import DTYPES, TABLES, without_a_device
from kernel_support.planted import sources
from support import FULL

# Of any kernel in Numba CUDA: registers of a thread, most in attention's forward for sm_80 (a block
# of 256 threads has room for 255 each); shared memory of a block, most in attention's gradients,
# two arrays of 256 float64, to which the linker adds 1,024 on sm_90.
NUMBA_REGISTERS, NUMBA_SHARED = 130, 4096 + 1024


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
            for target in TARGETS if FULL else TARGETS[:-1]:
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
    """sm_80's and sm_90a's PTX is sm_90's, which the tests execute; and so, in test-full, sm_120's
    is sm_100's."""
    for storage in NUMBA_STORAGE if FULL else ("float32",):
        for kernel in kernels_of(stem, storage):
            codes = [
                _body(compile_numba(stem, kernel, target, storage).ptx)
                for target in ("sm_80", "sm_90", "sm_90a")
            ]
            assert len(set(codes)) == 1, kernel
            if FULL:
                blackwell = [
                    _body(compile_numba(stem, kernel, target, storage).ptx)
                    for target in ("sm_100", "sm_120")
                ]
                assert len(set(blackwell)) == 1, kernel


def test_numba_has_the_kernels_of_cuda_c() -> None:
    """Under the same names, with as many parameters."""
    for stem in NUMBA_STEMS:
        text = re.sub(r"__launch_bounds__\([\w, *]+\)", "", sources()[stem])
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
    known = r"stem must be one of cross_entropy, flash_attention, .*, got adamw"
    with pytest.raises(ValueError, match=known):
        kernels_of("adamw", "float32")
    with pytest.raises(ValueError, match=f"target must be one of {', '.join(TARGETS)}, got sm_70"):
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


def test_one_file_of_device_code_names_the_compiler() -> None:
    """So numba-cuda's successor takes the place of numba-cuda by two lines."""
    for path in SOURCE.glob("*_numba_cuda.py"):
        modules = {
            node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        own = {"numba", "numba.cuda.types"} if path.stem.startswith("common") else set()
        assert modules - {"math", "common_numba_cuda"} == own, path.name


@pytest.mark.parametrize("old", [True, False])
def test_numpy_is_as_numba_cuda_knows_it(old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the name row_stack and without that warning, no other; then as it was."""
    monkeypatch.delattr(np, "row_stack", raising=False)
    if old:
        monkeypatch.setattr(np, "row_stack", len, raising=False)
    for _ in range(2):
        with as_numba_cuda_knows_numpy():
            assert vars(np)["row_stack"] is (len if old else np.vstack)
            about = "The 'generic' unit for NumPy timedelta is deprecated, and will raise an error"
            warnings.warn(about, DeprecationWarning, stacklevel=1)
            with pytest.raises(DeprecationWarning, match="another"):
                warnings.warn("another", DeprecationWarning, stacklevel=1)
        assert vars(np).get("row_stack") is (len if old else None)


@without_a_device
@pytest.mark.skipif(not FULL, reason="another process: make test-full")
def test_numba_compiles_under_a_numpy_without_row_stack(tmp_path: Path) -> None:
    code = (
        "import numpy; vars(numpy).pop('row_stack', None); "
        "from refimpl.kernels.numba_cuda import compile_numba; "
        "print(compile_numba('swiglu', 'swiglu_forward', 'sm_90', 'float32').target); "
        "assert not hasattr(numpy, 'row_stack')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env={"REFIMPL_KERNELS": str(tmp_path / "kernels"), "PATH": "/usr/bin:/bin"},
    )
    assert done.stdout == "sm_90\n", done.stderr


@without_a_device
def test_compiled_kernels_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one machine compiled, another loads that has no numba and no NVVM; nothing else."""
    monkeypatch.setenv("REFIMPL_KERNELS", str(tmp_path / "kernels"))
    uncached = compile_numba.__wrapped__
    made = uncached("swiglu", "swiglu_forward", "sm_90", "float32")
    assert made.cubin.parent.name.endswith(f"-{numba_versions()}")
    assert re.search(
        r"-numba\d[\d.]+-numba-cuda\d[\d.]+-nvvm\d+\.\d+\.\d+-nvjitlink\d+\.\d+$",
        made.cubin.parent.name,
    )
    numba_versions.cache_clear()
    with monkeypatch.context() as hidden:
        hidden.setitem(sys.modules, "numba", None)
        hidden.setitem(sys.modules, "cuda.bindings.nvjitlink", None)
        assert uncached("swiglu", "swiglu_forward", "sm_90", "float32") == made
        with pytest.raises(CouldNotRun, match=r"^Numba CUDA needs numba-cuda: [^\n]*$"):
            uncached("swiglu", "swiglu_forward", "sm_80", "float32")
    monkeypatch.setattr(numba_cuda, "numba_versions", lambda: "another")
    monkeypatch.setattr(numba_cuda, "build_numba", lambda *_: (b"ptx", b"cubin", b"log"))
    assert uncached("swiglu", "swiglu_forward", "sm_90", "float32").ptx == "ptx"
