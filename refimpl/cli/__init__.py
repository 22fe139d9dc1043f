"""The command line: one file per command.

Exit code 0: it holds; 1: it does not hold; 2: it could not run, and one line says why.
"""

from __future__ import annotations

import io
import os
import sys

import typer

from ..errors import CouldNotRun
from . import (  # each adds its commands to the app
    bench,
    conventions,
    count,
    generate,
    grads,
    kernels,
    memory,
    verify,
)
from .app import UsageError, app, usage_line

__all__ = [
    "app",
    "bench",
    "conventions",
    "count",
    "generate",
    "grads",
    "kernels",
    "main",
    "memory",
    "verify",
]


def main() -> None:
    """Run the command line; what could not run becomes one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # of a character that the terminal lacks
    try:
        try:
            sys.exit(app(prog_name="refimpl", standalone_mode=False))
        finally:
            sys.stdout.flush()
    except CouldNotRun as error:
        print(f"refimpl: {error}", file=sys.stderr)
        sys.exit(2)
    except UsageError as error:
        print(f"refimpl: {usage_line(error)}", file=sys.stderr)
        sys.exit(2)
    except typer.Abort:  # Ctrl-C
        sys.exit(130)
    except OSError as error:  # of files, commands tell themselves
        if error.filename is not None:
            raise
        print(f"refimpl: the output can't be written: {error.strerror}", file=sys.stderr)
        os._exit(2)  # what is left in the buffer has nowhere to go
