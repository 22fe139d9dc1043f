"""One pool of threads for everything that the column does, with BLAS at one thread meanwhile.

A product of many rows is cut into blocks here, not in BLAS: two pools of threads that spin while
they wait take the cores from each other, so only one may be awake. Each task writes arrays, or
parts of them, that no other task of its call touches, and what the tasks are depends on shapes
alone: so results have the same bits for any number of threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import pairwise
from typing import Any

from ...errors import CouldNotRun

__all__ = ["Task", "blocks_of", "in_turn", "run", "serial_blas", "threads"]

Task = Callable[[], object]


class Job:
    """Tasks that several threads take one by one."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = iter(tasks)  # next() of it is atomic
        self.left = len(tasks)
        self.lock = threading.Lock()
        self.done = threading.Lock()
        self.done.acquire()
        self.error: BaseException | None = None

    def work(self) -> None:
        """Do tasks until none is left to begin."""
        for task in self.tasks:
            try:
                if self.error is None:
                    task()
            except BaseException as error:
                self.error = error
            with self.lock:
                self.left -= 1
                last = self.left == 0
            if last:
                self.done.release()


class Pool:
    """Threads that help whoever calls `run`; they sleep in between, and end with the process."""

    def __init__(self) -> None:
        self.job: Job | None = None
        self.wake = threading.Semaphore(0)
        self.helpers = 0
        self.process = os.getpid()

    def run(self, tasks: Sequence[Task], threads: int) -> None:
        """Do all tasks on the calling thread and ``threads`` − 1 others; raises what a task
        raised first. Tasks may call `run`."""
        helpers = min(threads, len(tasks)) - 1
        if helpers < 1:
            for task in tasks:
                task()
            return
        self._grow(helpers)
        self.job = job = Job(tasks)
        for _ in range(helpers):
            self.wake.release()
        job.work()
        job.done.acquire()  # for those that others have begun
        self.job = None
        if job.error is not None:
            raise job.error

    def _grow(self, helpers: int) -> None:
        if self.process != os.getpid():  # threads do not survive a fork
            self.wake = threading.Semaphore(0)
            self.helpers, self.process = 0, os.getpid()
        while self.helpers < helpers:
            threading.Thread(target=self._help, args=(self.wake,), daemon=True).start()
            self.helpers += 1

    def _help(self, wake: threading.Semaphore) -> None:
        while True:
            wake.acquire()
            job = self.job
            if job is not None:
                job.work()
                del job  # its tasks hold arrays


POOL = Pool()


class _State:
    """What BLAS is set to outside, and how many calls are inside."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.outside: list[int] = []  # by library
        self.wanted: int | None = None  # by `threads`


STATE = _State()


def run(tasks: Sequence[Task]) -> None:
    """Do all tasks, each on one thread, as many at a time as BLAS may use threads."""
    with serial_blas() as count:
        POOL.run(tasks, count)


def in_turn(first: Sequence[Task], then: Sequence[Task]) -> list[Task]:
    """Tasks of a task of ``first`` and the one at its place of ``then``, which needs no other."""

    def both(one: Task, other: Task) -> None:
        one()
        other()

    return [partial(both, *pair) for pair in zip(first, then, strict=True)]


class serial_blas:
    """Inside, BLAS uses one thread. Gives the number of threads that it used before: the user's own
    setting (OPENBLAS_NUM_THREADS, threadpoolctl), which comes back at the end. A step of training
    may stand inside as a whole; then nothing is switched in between."""

    def __enter__(self) -> int:
        with STATE.lock:
            if STATE.inside == 0:
                STATE.outside = [library.get_num_threads() for library in _libraries()]
                self._set(1)
            STATE.inside += 1
        return STATE.wanted or max(STATE.outside, default=_cores())

    def __exit__(self, *_: object) -> None:
        with STATE.lock:
            STATE.inside -= 1
            if STATE.inside == 0:
                self._set(None)

    def _set(self, count: int | None) -> None:
        for library, outside in zip(_libraries(), STATE.outside, strict=True):
            if outside != 1:
                library.set_num_threads(count or outside)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, so many threads, whatever BLAS is set to; ValueError below 1."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    before, STATE.wanted = STATE.wanted, count
    try:
        yield
    finally:
        STATE.wanted = before


@cache
def blocks_of(length: int, size: int) -> tuple[slice, ...]:
    """Slices of at most ``size`` that cover 0 … length, of nearly equal lengths."""
    count = max(1, -(-length // size))
    edges = [length * i // count for i in range(count + 1)]
    return tuple(slice(a, b) for a, b in pairwise(edges))


@cache
def _libraries() -> list[Any]:
    """The BLAS that NumPy has loaded, by one controller that is kept: to make one takes 0.2 ms."""
    import numpy as np  # loads it

    try:
        from threadpoolctl import ThreadpoolController
    except ImportError as error:
        raise CouldNotRun(
            f"numba_cpu needs Numba and threadpoolctl: pip install -e '.[cpu]' ({error})"
        ) from error
    del np
    return list(ThreadpoolController().select(user_api="blas").lib_controllers)


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
