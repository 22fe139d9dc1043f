"""A peer's code from a checkout, which an environment variable names."""

from __future__ import annotations

import os
import sys
import warnings
from importlib import import_module
from typing import Any

import pytest


def modules(variable: str, source: str, needs: str, *names: str) -> list[Any]:
    """Its modules of these names; skips, with what to do, where there is no checkout or a package
    that it needs is missing."""
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} must name a checkout of {source}", allow_module_level=True)
    sys.path.insert(0, folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it would rather have
            return [import_module(name) for name in names]
    except ImportError as error:
        pytest.skip(f"{folder} needs {error.name}: {needs}", allow_module_level=True)
