"""Compiling for this CPU: said once, kept for the next process, and without a folder all the
same; the exponential's error."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl.errors import CouldNotRun
from refimpl.kernels.cpu import compile as compiling

CODE = """
import numpy as np
from refimpl.kernels.columns import on_cpu
y, _ = on_cpu("numba_cpu").swiglu.forward(np.ones(3, np.float32), np.ones(3, np.float32))
assert abs(y[0] - 0.7310586) < 1e-6
"""
SAYS = "compiling the kernels of numba_cpu for this CPU ("


def run(folder: str) -> str:
    """Standard error of a process that needs one kernel and keeps it in ``folder``."""
    environment = os.environ | {"REFIMPL_KERNELS": folder}
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True, env=environment
    )
    return done.stderr


def test_compiles_once(tmp_path: Path) -> None:
    assert run(str(tmp_path)).startswith(f"{SAYS}kept in {tmp_path}")
    assert run(str(tmp_path)) == ""


def test_no_folder_that_can_be_written(tmp_path: Path) -> None:
    """A file stands where the folder should be: compiled each time, and said."""
    (tmp_path / "file").write_text("")
    said = run(str(tmp_path / "file" / "kernels"))
    assert said.startswith(f"{SAYS}nothing is kept: ")
    assert said.count("\n") == 1


def test_folder_that_others_can_write_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is loaded from it is executed."""
    monkeypatch.setenv("REFIMPL_KERNELS", str(tmp_path))
    place = compiling._place.__wrapped__("float32")
    assert place is not None
    for folder in (place, place.parent, tmp_path):
        folder.chmod(0o777)
        assert compiling._place.__wrapped__("float32") is None
        folder.chmod(0o755)
    assert compiling._place.__wrapped__("float32") == place


def test_every_kernel_compiles_for_both_types() -> None:
    compiling.compile_all()


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(CouldNotRun, match=r"pip install -e '\.\[cpu\]'"):
        compiling.numba.__wrapped__()


@pytest.mark.parametrize("name", ["exp", "exp_or_zero"])
def test_error_of_exp(name: str) -> None:
    """At most 1.2 units in the last place; below the smallest normal number 1 subnormal, or 0; 0 at
    −∞, ∞ above the range."""
    common: Any = importlib.import_module("refimpl.kernels.common_numba_cpu")
    function = getattr(common, name)

    @compiling.numba().njit
    def put(x: Any) -> None:
        for i in range(x.size):
            x[i] = function(x[i])

    x = np.linspace(-110, 88.7, 400_001, dtype=np.float32)
    exact, e = np.exp(x.astype(np.longdouble)), x.copy()
    put(e)
    normal = exact >= (2.0**-126 if name == "exp" else 2.0**-125.49)
    assert np.max(np.abs(e - exact)[normal] / np.spacing(exact.astype(np.float32))[normal]) <= 1.2
    if name == "exp":
        assert np.max(np.abs(e - exact)[~normal]) <= 1.01 * 2.0**-149
    else:
        assert np.all(e[exact < 2.0**-125.51] == 0)
        assert np.min(e[e > 0]) >= 2.0**-126
    ends = np.array([-np.inf, -1e30, 0, 89, np.inf, np.nan], np.float32)
    put(ends)
    np.testing.assert_array_equal(ends, [0, 0, 1, np.inf, np.inf, np.nan])
