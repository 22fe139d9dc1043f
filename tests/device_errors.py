"""After an illegal access every CUDA call of the process fails, so one bad kernel would look like
many: the device is waited for after each test, and an error that stays ends this process, after
the test and the last launch are reported.

A pytest plugin for ``REFIMPL_GPU=1``, which tests/conftest.py loads. With workers (pytest-xdist)
only the worker ends; another takes its place, and the tests that it had left go on.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import cupy
import pytest

from refimpl.kernels import launch

runtime = cupy.cuda.runtime  # CuPy's own, whatever a test puts in CuPy's place
NOTHING = "no kernel of ours"
last = NOTHING  # launched in this process
lost: str | None = None  # why this process must end


class DeviceLost(RuntimeError):
    """No further call of CUDA works in this process."""


def remembering(call: Any) -> Any:
    """A launch that notes what it is about to launch."""

    def launched(self: Any, module: Any, kernel: str, grid: Any, block: Any, *more: Any, **kw: Any):
        global last
        last = f"{kernel} in {module.storage} for {module.target}, grid {grid}, block {block}"
        return call(self, module, kernel, grid, block, *more, **kw)

    return launched


launch.DeviceLaunch.__call__ = remembering(launch.DeviceLaunch.__call__)  # type: ignore[method-assign]


def wait(where: str) -> None:
    """For the device; DeviceLost if it answers with an error. One that CUDA has forgotten again (a
    launch that was refused, no memory left) is the test's own and ends nothing."""
    global lost
    try:
        runtime.deviceSynchronize()
    except runtime.CUDARuntimeError as error:
        lost = f"{error} after {where}; last launched: {last}"
        raise DeviceLost(lost) from error


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    global last
    last = NOTHING
    try:
        return (yield)
    finally:
        wait(item.nodeid)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_logfinish(nodeid: str) -> Generator[None, Any, Any]:
    """The test's report is out: leave."""
    done = yield
    if lost is None:
        return done
    if "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)  # not pytest.exit, with which xdist ends the whole run
    pytest.exit(f"this process has lost the device: {lost}", returncode=1)
