"""Starting several ranks, and joining them.

``refimpl train --ranks 4`` replaces itself by ``mpiexec -n 4 refimpl train …``; under mpiexec, a
process joins the others. Errors end all ranks: a Python exception on one of them would leave the
others waiting for it.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ..errors import CouldNotRun
from .grid import make_grid
from .group import TIMEOUT, Group, Watch, import_mpi, stop_all
from .ranks import Ranks

__all__ = ["end_all", "is_rank", "join", "start"]

SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")  # how MPICH's and Open MPI's mpiexec tell a process
RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK")


def is_rank() -> bool:
    """Whether mpiexec started this process."""
    return any(name in os.environ for name in SIZES)


def told(names: tuple[str, ...], default: int) -> int:
    """What mpiexec told this process by one of these names, before MPI is there."""
    return int(next((os.environ[name] for name in names if name in os.environ), default))


def start(ranks: int, arguments: list[str]) -> NoReturn:
    """Become ``mpiexec -n ranks refimpl arguments…``: the virtual environment's, or that on the
    path. CouldNotRun without one."""
    import_mpi_there()
    beside = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        raise CouldNotRun("several ranks need mpiexec: pip install -e '.[parallel]'")
    threads = str(max((os.cpu_count() or 1) // ranks, 1))
    for library in ("OMP", "OPENBLAS", "NUMBA"):  # each rank would take all cores
        os.environ.setdefault(f"{library}_NUM_THREADS", threads)
    sys.stdout.flush()
    command = [mpiexec, "-n", str(ranks), sys.executable, "-m", "refimpl", *arguments]
    os.execv(mpiexec, command)


def import_mpi_there() -> None:
    """CouldNotRun without mpi4py, which is not imported: this process is no rank."""
    from importlib.util import find_spec

    if find_spec("mpi4py") is None:
        raise CouldNotRun("several ranks need MPI: pip install -e '.[parallel]'")


def join(
    ranks: int | None = None,
    *,
    data: int | None = None,
    context: int = 1,
    expert: int = 1,
    timeout: float = TIMEOUT,
) -> Ranks:
    """The ranks that mpiexec started, this one among them, in a grid (`make_grid`). The first rank
    prints which process on which machine each rank is: the names that mpiexec uses.

    Args:
        ranks: how many there must be; None: as many as there are.
        timeout: seconds that a rank waits for another before all end.
    """
    mpi = import_mpi(timeout)
    comm = mpi.COMM_WORLD
    size = comm.Get_size()
    if size != (begun := told(SIZES, size)):
        raise CouldNotRun(
            f"mpiexec started {begun} processes, and mpi4py's MPI sees {size}: it must be the "
            "mpiexec of that MPI"
        )
    if ranks not in (None, size):
        raise CouldNotRun(
            f"must be {size}, the number that mpiexec started, got {ranks}", argument="ranks"
        )
    grid = make_grid(size, data=data, context=context, expert=expert)
    sys.excepthook = partial(_end_all_of, sys.excepthook)
    world = Group(comm, Watch(comm.Get_rank(), timeout))
    places = world.gather((os.getpid(), socket.gethostname()))
    if world.rank == 0:
        named = ", ".join(f"{i} is process {pid} on {host}" for i, (pid, host) in enumerate(places))
        print(f"refimpl: {size} ranks: {named}", file=sys.stderr, flush=True)
    return Ranks(grid, world)


def _end_all_of(shown: Callable[..., Any], kind: type[BaseException], *error: Any) -> None:
    """After an error that nobody caught: its traceback, and the end of all ranks."""
    shown(kind, *error)
    end_all(f"{kind.__name__}: {error[0]}", 1)


def end_all(line: str, code: int) -> NoReturn:
    """Of a rank that can't go on: print a line that names it, and end all ranks.

    The first rank goes first: where all have the same error, one line tells of it.
    """
    rank = told(RANKS, 0)
    if rank:
        with suppress(CouldNotRun):
            import_mpi()  # which waits for the others to be there
        time.sleep(0.5)
    stop_all(f"refimpl: rank {rank} (process {os.getpid()}): {line}", code)
