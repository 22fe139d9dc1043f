"""fsync, which takes milliseconds, does nothing here: no test's files need to survive a power loss,
and tests of it put their own in its place. The kernels for a CPU are compiled before workers start,
which would each compile them. With ``REFIMPL_TEST_PART=2/4`` the second of four parts is run.

On a GPU (``REFIMPL_GPU=1``): a lost device ends its process, and tests that only compile, or run on
a CPU, stay out, since they say the same on any machine.
"""

from __future__ import annotations

import gc
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from parts import in_part

collect_ignore: list[str] = []

if os.environ.get("REFIMPL_GPU") == "1":
    from device_errors import pytest_runtest_call, pytest_runtest_logfinish

    __all__ = ["pytest_runtest_call", "pytest_runtest_logfinish"]
    collect_ignore += [
        "kernels/cpu",
        "kernels/test_compile.py",
        "kernels/test_ladder.py",
        "kernels/test_numba_cuda.py",
    ]


def pytest_configure(config: pytest.Config) -> None:
    in_workers = config.getoption("numprocesses", None)  # not said in a worker
    if in_workers and os.environ.get("REFIMPL_GPU") != "1":
        from refimpl.kernels.cpu.compile import compile_all

        with ProcessPoolExecutor(2, get_context("spawn")) as processes:
            list(processes.map(compile_all, ("float32", "float64")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if part := os.environ.pop("REFIMPL_TEST_PART", ""):  # not for tests that run pytest themselves
        chosen = {item: in_part(item.nodeid, part) for item in items}
        config.hook.pytest_deselected(items=[item for item in items if not chosen[item]])
        items[:] = [item for item in items if chosen[item]]


def pytest_collection_finish() -> None:
    """Thousands of tests wait in a process: collections of garbage need not visit them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def no_power_loss() -> None:
    os.fsync = lambda descriptor: None
