"""The command line: one file a command.

Exit code 0: it holds; 1: it does not hold; 2: it could not run, and one line says why.
"""

from __future__ import annotations

import io
import os
import sys

from ..errors import CouldNotRun
from . import (
    bench,
    conventions,
    count,
    generate,
    grads,
    memory,
    verify,
)  # each adds its commands to the app
from .app import app

__all__ = ["app", "bench", "conventions", "count", "generate", "grads", "main", "memory", "verify"]


def main() -> None:
    """Run the command line; what could not run becomes one line and exit code 2."""
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # a terminal that lacks a character shows another one in its place
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except CouldNotRun as error:
        print(f"refimpl: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # of files, commands tell themselves
        if error.filename is not None:
            raise
        print(f"refimpl: the output can't be written: {error.strerror}", file=sys.stderr)
        os._exit(2)  # what is left in the buffer has nowhere to go
