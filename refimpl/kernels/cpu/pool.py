"""One pool of threads for everything that the column does, with BLAS at one thread meanwhile.

A product of many rows is cut into blocks here, not in BLAS: two pools of threads that spin while
they wait take the cores from each other, so only one may be awake. Each task writes arrays, or
parts of them, that no other task of its call touches, and how sums are cut depends on shapes alone:
so results have the same bits for any number of threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from functools import cache, lru_cache, partial
from itertools import pairwise
from queue import SimpleQueue
from typing import Any

import numpy as np

from ...errors import CouldNotRun

__all__ = [
    "NEEDS",
    "Task",
    "blas_libraries",
    "blocks_of",
    "in_turn",
    "run",
    "run_kernels",
    "serial_blas",
    "thread_count",
    "threads",
]

# the error's text where a package is missing
NEEDS = "numba_cpu needs Numba and threadpoolctl: pip install -e '.[cpu]'"
Task = Callable[[], object]  # what a thread is given to do


class Job:
    """Tasks that several threads take one by one: the caller, and helpers."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = iter(tasks)  # next() of it is atomic
        self.lock = threading.Lock()
        self.helpers = 0  # at work
        self.closed = False  # no helper may begin
        self.none_left = threading.Lock()  # released by the last helper of a closed job
        self.none_left.acquire()
        self.error: BaseException | None = None  # the first, but an interrupt before any other

    def work(self) -> None:
        """Do tasks until there are none, or one has failed."""
        try:
            for task in self.tasks:
                if self.error is not None:
                    break
                task()
        except BaseException as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        with self.lock:
            if self.error is None or isinstance(error, KeyboardInterrupt):
                self.error = error

    def help(self) -> None:
        with self.lock:
            if self.closed:
                return
            self.helpers += 1
        self.work()
        with self.lock:
            self.helpers -= 1
            if self._is_over():
                self.none_left.release()

    def _is_over(self) -> bool:
        return self.closed and self.helpers == 0

    def close(self) -> None:
        """Wait for the helpers, whatever comes: they write arrays of the caller's."""
        with self.lock:
            self.closed = True
            if self.helpers == 0:
                return
        while True:
            try:
                self.none_left.acquire()
                return
            except KeyboardInterrupt as error:
                self.fail(error)


class Pool:
    """Threads that help whoever calls `run`; they sleep in between, and end with the process."""

    def __init__(self) -> None:
        self.jobs: SimpleQueue[Any] = SimpleQueue()  # an entry per helper that is asked for
        self.threads = 0

    def run(self, tasks: Sequence[Task], threads: int) -> None:
        """Do all tasks on the calling thread and up to ``threads`` − 1 others, in its context;
        raises what a task raised first. Tasks may call `run`."""
        helpers = min(threads, len(tasks)) - 1
        if helpers < 1:
            for task in tasks:
                task()
            return
        while self.threads < helpers:
            self.threads += 1
            threading.Thread(target=self._help, args=(self.jobs,), daemon=True).start()
        job = Job(tasks)
        try:
            for _ in range(helpers):
                self.jobs.put(partial(copy_context().run, job.help))
            job.work()
        except BaseException as error:  # an interrupt between the lines
            job.fail(error)
        finally:
            job.close()
        if job.error is not None:
            raise job.error

    @staticmethod
    def _help(jobs: SimpleQueue[Any]) -> None:
        while True:
            jobs.get()()


class _State:
    """The pool, and what BLAS was set to before the calls that are inside."""

    def __init__(self) -> None:
        self.pool = Pool()
        self.lock = threading.Lock()
        self.inside = 0
        self.outside: list[int] = []  # by library


STATE = _State()
WANTED: ContextVar[int | None] = ContextVar("threads", default=None)


def _after_fork() -> None:
    """Threads do not survive a fork, nor does who held a lock."""
    inside, outside = STATE.inside, STATE.outside
    STATE.__init__()  # type: ignore[misc]
    STATE.inside, STATE.outside = inside, outside


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def run(tasks: Sequence[Task]) -> None:
    """Do all tasks, each on one thread, as many at a time as BLAS may use threads."""
    with serial_blas() as count:
        STATE.pool.run(tasks, count)


def run_kernels(tasks: Sequence[Task]) -> None:
    """The same of tasks that do not call BLAS, whose setting need not be changed and put back."""
    STATE.pool.run(tasks, thread_count())


def in_turn(first: Sequence[Task], then: Sequence[Task]) -> list[Task]:
    """One task of each pair: that of ``first``, then that of ``then``, which needs no other."""

    def both(one: Task, other: Task) -> None:
        one()
        other()

    return [partial(both, *pair) for pair in zip(first, then, strict=True)]


class serial_blas:
    """Inside, BLAS uses one thread. Gives the number of threads that it used before: the user's own
    setting (OPENBLAS_NUM_THREADS, threadpoolctl), which comes back at the end. A step of training
    may stand inside as a whole; then nothing is switched in between."""

    def __enter__(self) -> int:
        self.counted = False
        try:
            with STATE.lock:
                if STATE.inside == 0:
                    STATE.outside = [library.get_num_threads() for library in blas_libraries()]
                STATE.inside += 1
                self.counted = True
                if STATE.inside == 1:
                    _set_blas(1)
            return thread_count()
        except BaseException:
            self._leave()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            self._leave()
        except KeyboardInterrupt:
            self._leave()
            raise

    def _leave(self) -> None:
        with STATE.lock:
            if self.counted:
                if STATE.inside == 1:
                    _set_blas(None)
                self.counted = False
                STATE.inside -= 1


def _set_blas(count: int | None) -> None:
    """As many threads, or None: as outside."""
    for library, outside in zip(blas_libraries(), STATE.outside, strict=True):
        if outside != 1:
            library.set_num_threads(count or outside)


def thread_count() -> int:
    """As many as `run` uses: what `threads` says, else what BLAS is set to."""
    wanted = WANTED.get()
    if wanted is not None:
        return wanted
    with STATE.lock:
        inside, outside = STATE.inside > 0, STATE.outside
    if not inside:
        outside = [library.get_num_threads() for library in blas_libraries()]
    return max(outside) if outside else _cores()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, so many threads, whatever BLAS is set to; ValueError below 1."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    before = WANTED.set(count)
    try:
        yield
    finally:
        WANTED.reset(before)


@lru_cache(maxsize=4096)
def blocks_of(length: int, size: int) -> tuple[slice, ...]:
    """Slices of at most ``size`` that cover 0 … length, of nearly equal lengths."""
    count = max(1, -(-length // size))
    edges = [length * i // count for i in range(count + 1)]
    return tuple(slice(a, b) for a, b in pairwise(edges))


@cache
def blas_libraries() -> list[Any]:
    """The BLAS that NumPy has loaded, by one controller that is kept: to make one takes 0.2 ms.
    CouldNotRun without threadpoolctl."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError as error:
        raise CouldNotRun(f"{NEEDS} ({error})") from error
    np.ones((1, 1)) @ np.ones((1, 1))  # loaded by now
    return list(ThreadpoolController().select(user_api="blas").lib_controllers)


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
