"""``refimpl kernels``: all kernels in one folder, which serves where there is no compiler."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from refimpl.cli import kernels
from refimpl.kernels.compile import compile_kernel
from refimpl.kernels.numba_cuda import compile_numba, numba_versions

from kernel_support import without_a_device
from support import refimpl_here

compile_afresh, compile_numba_afresh = compile_kernel.__wrapped__, compile_numba.__wrapped__


@without_a_device
def test_all_kernels_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stem and a target; a second run compiles nothing."""
    monkeypatch.setenv("REFIMPL_KERNELS", str(tmp_path / "kernels"))
    monkeypatch.setattr(kernels, "compile_kernel", compile_afresh)
    monkeypatch.setattr(kernels, "compile_numba", compile_numba_afresh)
    for name, some in (
        ("TARGETS", ("sm_90a",)),
        ("STEMS", ("rope",)),
        ("STORAGE", ("float32", "bfloat16")),
        ("NUMBA_STEMS", ("rope",)),
        ("NUMBA_STORAGE", ("float32",)),
    ):
        monkeypatch.setattr(kernels, name, some)
    shown = re.compile(
        rf"3 modules for sm_90a: \d\.\d MB\nkept in {re.escape(str(tmp_path / 'kernels'))}\n"
    )
    first = refimpl_here("kernels")
    assert first.returncode == 0, first.stderr
    assert shown.fullmatch(first.stdout)
    made = sorted((tmp_path / "kernels").iterdir())
    assert len(made) == 3
    monkeypatch.setattr("refimpl.kernels.compile._run", lambda *_: pytest.fail("compiled again"))
    monkeypatch.setattr(
        "refimpl.kernels.numba_cuda.build_numba", lambda *_: pytest.fail("compiled again")
    )
    assert shown.fullmatch(refimpl_here("kernels").stdout)
    assert sorted((tmp_path / "kernels").iterdir()) == made
    for hidden in ("numba", "cuda.bindings", "cuda.bindings.nvjitlink"):
        monkeypatch.setitem(sys.modules, hidden, None)
    numba_versions.cache_clear()
    loaded = compile_afresh("rope", "sm_90a", "bfloat16")
    assert loaded.cubin.parent in made
    loaded = compile_numba_afresh("rope", "rope_rotate", "sm_90a", "float32")
    assert loaded.cubin.parent in made
