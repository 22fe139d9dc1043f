"""fsync, which takes milliseconds, does nothing here: no test's files need to survive a power loss,
and tests of it put their own in its place.

On a GPU (``REFIMPL_GPU=1``): a lost device ends its process, and tests that only compile stay
out, since they say the same on any machine.
"""

from __future__ import annotations

import os

import pytest

collect_ignore: list[str] = []

if os.environ.get("REFIMPL_GPU") == "1":
    from device_errors import pytest_runtest_call, pytest_runtest_logfinish

    __all__ = ["pytest_runtest_call", "pytest_runtest_logfinish"]
    collect_ignore += [
        "kernels/test_compile.py",
        "kernels/test_ladder.py",
        "kernels/test_numba_cuda.py",
    ]


@pytest.fixture(autouse=True, scope="session")
def no_power_loss() -> None:
    os.fsync = lambda descriptor: None
