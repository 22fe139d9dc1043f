"""The pool of threads: all tasks run, on several threads; what one raises; BLAS's setting."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from functools import partial
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from refimpl.kernels.cpu.pool import blocks_of, run, serial_blas, threads


def blas_threads() -> list[int]:
    return [lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"]


def add(x: list[int], i: int, n: int = 1) -> None:
    x[i] += n


def test_tasks_run_on_several_threads() -> None:
    """Both threads are needed: each task waits for the other. Again after all have slept."""
    with threads(2):
        for _ in range(3):
            meet, seen = threading.Barrier(2, timeout=10), set[int]()

            def task(meet: threading.Barrier = meet, seen: set[int] = seen) -> None:
                meet.wait()
                seen.add(threading.get_ident())

            run([task, task])
            assert len(seen) == 2
            assert threading.get_ident() in seen


def test_every_task_runs_once() -> None:
    for count in (1, 2, 5):
        with threads(count):
            done = [0] * 50
            run([partial(add, done, i) for i in range(50)])
            assert done == [1] * 50
            run([])


def test_what_a_task_raises_comes_out() -> None:
    """And the pool goes on working."""
    with threads(3):

        def fails() -> None:
            raise KeyError("here")

        for _ in range(3):
            with pytest.raises(KeyError, match="here"):
                run([lambda: time.sleep(0.001), fails, lambda: None])
        found: list[int] = []
        run([lambda: found.append(1)] * 4)
        assert found == [1] * 4


def test_the_first_error_comes_out_and_an_interrupt_before_any_other() -> None:
    """Each task meets the other; then one raises, and the other after it."""
    with threads(2):
        for first, second, wanted in (
            (KeyError, ValueError, KeyError),
            (KeyError, KeyboardInterrupt, KeyboardInterrupt),
            (KeyboardInterrupt, KeyError, KeyboardInterrupt),
        ):
            meet, gone = threading.Barrier(2, timeout=10), threading.Event()

            def one(error: type[BaseException] = first, meet: Any = meet, gone: Any = gone) -> None:
                meet.wait()
                threading.Timer(0.02, gone.set).start()
                raise error

            def other(
                error: type[BaseException] = second, meet: Any = meet, gone: Any = gone
            ) -> None:
                meet.wait()
                gone.wait(10)
                raise error

            with pytest.raises(wanted):
                run([one, other])


def test_an_interrupt_waits_for_the_helpers() -> None:
    """They write arrays of the caller's, with BLAS at one thread."""
    with threads(2), threadpool_limits(2, user_api="blas"):
        meet, seen = threading.Barrier(2, timeout=10), list[list[int]]()
        caller = threading.get_ident()

        def task() -> None:
            meet.wait()
            if threading.get_ident() == caller:
                raise KeyboardInterrupt
            time.sleep(0.05)
            seen.append(blas_threads())

        with pytest.raises(KeyboardInterrupt):
            run([task, task])
        assert seen == [[1] * len(blas_threads())]
        assert blas_threads() == [2] * len(blas_threads())


def test_tasks_have_the_callers_context() -> None:
    with threads(2), np.errstate(divide="raise"):
        meet, seen = threading.Barrier(2, timeout=10), list[str]()

        def task() -> None:
            meet.wait()
            seen.append(np.geterr()["divide"])

        run([task, task])
        assert seen == ["raise", "raise"]


def test_no_more_threads_than_wanted() -> None:
    """Also after a run with more."""
    with threads(6):
        run([lambda: time.sleep(0.001)] * 12)
    for count in (2, 3):
        ran = set[int]()
        with threads(count):
            run([lambda ran=ran: (time.sleep(0.002), ran.add(threading.get_ident()))] * 20)  # type: ignore[misc]
        assert len(ran) <= count


def test_a_task_that_runs_tasks_leaves_the_others_theirs() -> None:
    """Two outer tasks meet, though the first has run inner ones before."""
    with threads(2):
        meet = threading.Barrier(2, timeout=10)
        run([lambda: run([lambda: None] * 2), lambda: None, meet.wait, meet.wait])


def test_a_task_may_run_tasks() -> None:
    with threads(2):
        found: list[int] = []
        run([lambda: run([lambda: found.append(1)] * 3)] * 3)
        assert len(found) == 9


def test_two_callers_at_once() -> None:
    """Each gets its own tasks done, and BLAS's setting comes back after the last."""
    before, sums = blas_threads(), {}

    def caller(name: int) -> None:
        for _ in range(100):
            parts = [0] * 4
            run([partial(add, parts, i, name * i) for i in range(4)])
            sums[name] = sum(parts)

    with threads(2):
        callers = [threading.Thread(target=caller, args=(name,)) for name in (1, 2)]
        for thread in callers:
            thread.start()
        for thread in callers:
            thread.join(timeout=60)
    assert sums == {1: 6, 2: 12}
    assert blas_threads() == before


def test_blas_has_one_thread_inside_and_its_own_outside() -> None:
    """Also when something is raised; and as many tasks run at a time as it had threads."""
    with threadpool_limits(2, user_api="blas"):
        seen: list[int] = []
        run([lambda: seen.extend(blas_threads())])
        assert seen == [1] * len(blas_threads()) != []
        with serial_blas() as count, serial_blas() as again:
            assert count == again == 2
        with pytest.raises(ZeroDivisionError), serial_blas():
            raise ZeroDivisionError
        assert blas_threads() == [2] * len(blas_threads())


FORK = """
import os, threading
from refimpl.kernels.cpu.pool import run, threads
with threads(2):
    run([lambda: None] * 2)
    child = os.fork()
    meet = threading.Barrier(2, timeout=20)
    run([meet.wait, meet.wait])
    if child:
        assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_works_after_a_fork() -> None:
    """Threads do not survive one; the child makes new ones. In a process of its own, since other
    libraries of this one may not stand it."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True)


def test_blocks_cover_all() -> None:
    for length in range(1, 20):
        for size in range(1, 22):
            blocks = blocks_of(length, size)
            assert [i for b in blocks for i in range(length)[b]] == list(range(length))
            sizes = {b.stop - b.start for b in blocks}
            assert max(sizes) <= size
            assert max(sizes) - min(sizes) <= 1
    assert blocks_of(0, 4) == (slice(0, 0),)


def test_a_thread_is_needed() -> None:
    with pytest.raises(ValueError, match="count must be at least 1, got 0"), threads(0):
        pass


def test_products_on_views() -> None:
    """Strided, transposed and column blocks: what NumPy gives."""
    from refimpl.kernels.cpu.host import products

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(70, 2, 60))[:, 1], rng.normal(size=(50, 60)).T
    for left, right in ((a, b), (b.T, a.T)):
        out = np.full((2, left.shape[0], right.shape[1]), np.nan)[1]
        run(products(left, right, out))
        assert np.allclose(out, left @ right, rtol=1e-13, atol=1e-13)
