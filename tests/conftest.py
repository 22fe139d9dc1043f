"""On a GPU (``REFIMPL_GPU=1``): a lost device ends its process, and tests that only compile stay
out, since they say the same on any machine."""

from __future__ import annotations

import os

collect_ignore: list[str] = []

if os.environ.get("REFIMPL_GPU") == "1":
    from device_errors import pytest_runtest_call, pytest_runtest_logfinish

    __all__ = ["pytest_runtest_call", "pytest_runtest_logfinish"]
    collect_ignore += [
        "kernels/test_compile.py",
        "kernels/test_ladder.py",
        "kernels/test_numba_cuda.py",
    ]
