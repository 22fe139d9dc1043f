"""An illegal access on a device is reported with its test and the last launch, and ends its process
alone: tests/device_errors.py on the pretended device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import FULL, ROOT

ERROR = "cudaErrorIllegalAddress: an illegal memory access was encountered"
SOME = f'''
import cupy
import numpy as np
import pytest
from refimpl.kernels.launch import DeviceLaunch
from refimpl.kernels.swiglu import swiglu

@pytest.mark.parametrize("number", range(6))
def test_some(number):
    x = cupy.ones((1, 8), dtype=np.float32)
    swiglu(DeviceLaunch()).forward(x, x)
    if number == 1:
        error = cupy.cuda.runtime.CUDARuntimeError
        with pytest.raises(error):
            raise error("cudaErrorMemoryAllocation, which does not stay")
    if number == 2:
        cupy.cuda.runtime.error = "{ERROR}"
'''


def run_some(tmp_path: Path, *options: str) -> tuple[int, str]:
    (tmp_path / "test_some.py").write_text(SOME)
    plugins = ("-p", "pretended_device", "-p", "device_errors")
    configured = ("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path))
    command = (sys.executable, "-m", "pytest", "-v", *configured, *plugins, *options, str(tmp_path))
    paths = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    environment = os.environ | {"REFIMPL_GPU": "1", "PYTHONPATH": paths, "COLUMNS": "300"}
    environment.pop("PYTEST_XDIST_WORKER", None)  # this test's own
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout


LOST = (
    f"device_errors.DeviceLost: {ERROR} after test_some.py::test_some[2]; last launched: "
    "swiglu_forward in float32 for sm_90, grid (1,), block (256,)"
)


@pytest.mark.skipif(not FULL, reason="test-full")
def test_only_that_worker_ends(tmp_path: Path) -> None:
    """The test fails, with the error and the launch; all others run, some in a worker that takes
    its place."""
    code, said = run_some(tmp_path, "-n", "2")
    assert code == 1
    assert LOST in said
    assert said.count("PASSED") == 5
    summary = said.partition("short test summary info")[2]
    assert "test_some[2] - device_errors.DeviceLost: " in summary
    assert {line.split(" - ")[0][-12:] for line in summary.splitlines() if "FAILED" in line} == {
        "test_some[2]"
    }


def test_a_process_alone_ends(tmp_path: Path) -> None:
    """After the report, and no test runs on what is lost."""
    code, said = run_some(tmp_path)
    assert code == 1
    assert LOST in said
    assert said.count("PASSED") == 2
    assert f"this process has lost the device: {ERROR} after test_some.py::test_some[2]" in said
