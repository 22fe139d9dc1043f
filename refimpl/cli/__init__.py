"""The command line: one file per command.

Exit code 0: it holds; 1: it does not hold; 2: it could not run, and one line says why; 70: a fault
of ours, and one line asks for a report (REFIMPL_TRACEBACK=1 shows where); 130: Ctrl-C; 141: the
program that read the output has stopped.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import numpy as np
import typer

from ..errors import CouldNotRun, printable
from ..kernels.cpu.memory import keep_freed
from ..parallel.launch import end_all, is_rank
from . import (  # each adds its commands to the app
    bench,
    check,
    conventions,
    count,
    eval,
    generate,
    grads,
    kernels,
    memory,
    power,
    recipe,
    reward,
    train,
    vectors,
    verify,
)
from .app import OutputClosed, UsageError, app, usage_line

__all__ = [
    "app",
    "bench",
    "check",
    "conventions",
    "count",
    "eval",
    "generate",
    "grads",
    "kernels",
    "main",
    "memory",
    "vectors",
    "power",
    "recipe",
    "reward",
    "train",
    "verify",
]


def main() -> None:
    """Run the command line; every error becomes an exit code, and at most one line."""
    if sys.stderr is None:  # closed, as by 2>&-
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # of a character that the terminal lacks
    try:
        if sys.stdout is None:
            raise CouldNotRun("the output can't be written: standard output is closed")
        keep_freed()
        try:
            with np.errstate(all="ignore"):  # what is not finite is found and told by the commands
                sys.exit(app(prog_name="refimpl", standalone_mode=False))
        finally:
            sys.stdout.flush()
    except (SystemExit, KeyboardInterrupt):
        raise
    except (CouldNotRun, UsageError) as error:
        leave(2, usage_line(error) if isinstance(error, UsageError) else str(error))
    except typer.Abort:  # Ctrl-C
        if is_rank():
            end_all("interrupted", 130)  # others may be waiting for this one
        sys.exit(130)
    except (OutputClosed, BrokenPipeError):
        os._exit(141)  # as a shell calls SIGPIPE; what is left in the buffer has nowhere to go
    except MemoryError as error:
        leave(2, f"not enough memory{f' ({error})' if str(error) else ''}")
    except OSError as error:
        leave_without_output(error)
    except BaseException as error:  # a panic of a library in Rust is no Exception
        leave_with_fault(error)


def leave(code: int, line: str) -> NoReturn:
    if is_rank():
        end_all(printable(line), code)
    print(f"refimpl: {printable(line)}", file=sys.stderr)
    sys.exit(code)


def leave_without_output(error: OSError) -> NoReturn:
    """For an error of a file that the command did not report, or of the output."""
    if error.filename is not None:
        leave(2, f"{error.filename} can't be used: {error.strerror}")
    print(f"refimpl: the output can't be written: {error.strerror}", file=sys.stderr)
    os._exit(2)  # what is left in the buffer has nowhere to go


def leave_with_fault(error: BaseException) -> NoReturn:
    """A crash never exits 1, which says that something does not hold."""
    if os.environ.get("REFIMPL_TRACEBACK") == "1":
        traceback.print_exception(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = (
        f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "an unknown place"
    )
    leave(
        70,
        f"a fault of refimpl itself, please report it: {type(error).__name__} at {place}: {error} "
        "(REFIMPL_TRACEBACK=1 shows the traceback)",
    )
