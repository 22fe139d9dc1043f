"""The command line: one file a command.

Exit code 0: it holds; 1: it does not hold; 2: it could not run, and one line says why.
"""

from __future__ import annotations

import sys

from ..errors import CouldNotRun
from . import bench, conventions, count, generate, grads, memory, verify  # each adds its commands to the app
from .app import app

__all__ = ["app", "bench", "conventions", "count", "generate", "grads", "main", "memory", "verify"]


def main() -> None:
    """Run the command line; what could not run becomes one line and exit code 2."""
    try:
        app()
    except CouldNotRun as error:
        print(f"refimpl: {error}", file=sys.stderr)
        sys.exit(2)
