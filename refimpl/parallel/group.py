"""Ranks that meet, and what ends a meeting to which one of them does not come.

Everything travels as Python values over mpi4py, large arrays as they lie in memory; an array of a
GPU goes through host memory, since that is how it is pickled. A group's methods are collective: all
its ranks must call the same one.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NoReturn, TypeVar

from ..errors import CouldNotRun

__all__ = ["Group", "Watch", "import_mpi", "stop_all"]

T = TypeVar("T")
TIMEOUT = 300.0  # seconds that a rank waits for another before all end


def import_mpi(timeout: float = TIMEOUT) -> Any:
    """mpi4py's module ``MPI``; CouldNotRun without it. The first import joins this process to the
    others that mpiexec started, for which it waits at most ``timeout`` seconds.

    Where there are more of them than processors, a rank that waits leaves its own to the others (a
    setting of MPICH's, which otherwise makes it spin).
    """
    if int(os.environ.get("PMI_SIZE", 1)) > (os.cpu_count() or 1):
        os.environ.setdefault("MPIR_CVAR_POLLS_BEFORE_YIELD", "1")
        os.environ.setdefault("MPIR_CVAR_ENABLE_HEAVY_YIELD", "1")
    try:
        with nullcontext() if "mpi4py.MPI" in sys.modules else _starting(timeout):
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise CouldNotRun(
            f"several ranks need MPI: pip install -e '.[parallel]' ({error})"
        ) from error
    return MPI


@contextmanager
def _starting(timeout: float) -> Iterator[None]:
    """Inside, Ctrl-C ends this process at once, and so does the time, with a traceback: the start
    of MPI waits for all ranks, also for one that has ended, and lets no Python run meanwhile."""
    faulthandler.dump_traceback_later(min(timeout, threading.TIMEOUT_MAX), exit=True)
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        faulthandler.cancel_dump_traceback_later()


def stop_all(line: str, code: int) -> NoReturn:
    """Print a line, and end every rank with this exit code; without MPI this process alone."""
    with suppress(OSError):  # who would read the line may have ended before
        print(line, file=sys.stderr, flush=True)
    time.sleep(0.2)  # for mpiexec to read it, before the end
    with suppress(CouldNotRun):
        import_mpi().COMM_WORLD.Abort(code)
    os._exit(code)


class Watch:
    """Ends all ranks when this one has waited for others for more than ``timeout`` seconds: a rank
    that hangs would otherwise hang them all."""

    def __init__(self, rank: int, timeout: float) -> None:
        self.rank, self.timeout = rank, timeout
        self.since: float | None = None
        self.what = ""
        threading.Thread(target=self._look, daemon=True).start()

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Inside, this rank waits for others, to ``what``."""
        self.what, self.since = what, time.monotonic()
        try:
            yield
        except import_mpi().Exception as error:
            said = str(error).splitlines()[0]
            raise CouldNotRun(f"another rank seems to have ended ({what}: {said})") from error
        finally:
            self.since = None

    def _look(self) -> None:
        while True:
            time.sleep(min(self.timeout / 10, 1.0))
            since = self.since
            if since is not None and time.monotonic() - since > self.timeout:
                stop_all(
                    f"refimpl: rank {self.rank} (process {os.getpid()}) has waited "
                    f"{self.timeout:g} s to {self.what}; another rank hangs, or needs a longer "
                    "timeout",
                    code=2,
                )


class Group:
    """The ranks of a communicator, in its order; an `Exchange` of `refimpl.splits`."""

    def __init__(self, comm: Any, watch: Callable[[str], Any]) -> None:
        self.comm, self.watch = comm, watch
        self.rank, self.size = comm.Get_rank(), comm.Get_size()

    def split(self, color: int) -> Group:
        """Those of its ranks that give the same ``color``, in the same order."""
        return Group(self.comm.Split(color, self.rank), self.watch)

    def gather(self, value: T) -> list[T]:
        """Everyone's value, by rank."""
        with self.watch("gather"):
            return list(self.comm.allgather(value))

    def collect(self, value: T) -> list[T] | None:
        """Everyone's value, by rank, on the first rank; None on the others."""
        with self.watch("collect on the first rank"):
            found: list[T] | None = self.comm.gather(value)
        return found

    def swap(self, values: list[T]) -> list[T]:
        """One value for each rank; returns what each rank has for this one. Its own adjoint is the
        swap back."""
        with self.watch("swap"):
            return list(self.comm.alltoall(values))

    def rotate(self, value: T) -> T:
        """Give a value to the next rank, the last to the first; returns that of the rank before."""
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        with self.watch("rotate"):
            found: T = self.comm.sendrecv(value, dest=after, source=before)
        return found

    def first(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on the first rank, on all; or its error."""
        told: tuple[T | None, Exception | None] = (None, None)
        if self.rank == 0:
            try:
                told = work(), None
            except Exception as error:
                told = None, error
        with self.watch("hear from the first rank"):
            result, failed = self.comm.bcast(told)
        if failed is not None:
            raise failed
        return result  # type: ignore[no-any-return]
