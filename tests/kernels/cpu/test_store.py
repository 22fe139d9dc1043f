"""Memory that is used again: never while an array refers to it, and never more than was in use."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.kernels.cpu import memory
from refimpl.kernels.cpu.memory import LARGE, LINE, Store, release

REAL = np.dtype(np.float32)
MANY = LARGE // 4


def address(x: np.ndarray) -> int:
    return int(x.__array_interface__["data"][0])


def test_lent_again() -> None:
    """To the next array of nearly its size, from the beginning of a line of the cache on."""
    store = Store()
    x = store.array((MANY,), REAL)
    place, kept = address(x), x
    assert place % LINE == 0
    del x
    assert address(store.array((MANY,), REAL)) != place
    del kept
    y = store.array((MANY // 2, 2), REAL)
    assert address(y) == place
    assert y.shape == (MANY // 2, 2)
    assert y.flags.c_contiguous
    assert y.flags.writeable


def test_small_arrays_are_numpys() -> None:
    store = Store()
    assert store.array((3,), REAL).base is None
    assert store.lent == 0


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[5:7],
        lambda x: x.reshape(2, -1).T[3:],
        lambda x: x.view(np.uint8)[::7],
        lambda x: memoryview(x),
        lambda x: np.from_dlpack(x),
        lambda x: np.broadcast_to(x[:1], (3, 1)),
    ],
)
def test_a_view_keeps_it(view: Any) -> None:
    store = Store()
    x = store.array((MANY,), REAL)
    x[:] = 1
    part = view(x)
    before = np.asarray(part).copy()
    del x
    gc.collect()
    others = [store.array((MANY,), REAL) for _ in range(3)]
    for other in others:
        other[:] = 2
    assert (np.asarray(part) == before).all()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=60))
def test_never_two_owners_and_never_more_than_was_lent(steps: list[tuple[int, int]]) -> None:
    store = Store()
    held: list[np.ndarray] = []
    for k, (size, drop) in enumerate(steps):
        if drop < len(held):
            del held[drop]
        x = store.array((MANY + size * MANY // 3,), REAL)
        x[:] = k
        assert not any(np.shares_memory(x, other) for other in held)
        held.append(x)
        del x
        assert store.lent + store.kept <= store.most
    assert len({float(x[0]) for x in held}) == len(held)
    assert all((x == x[0]).all() for x in held)
    held.clear()
    store.release()
    assert (store.lent, store.kept, store.most) == (0, 0, 0)


def test_threads() -> None:
    store, wrong = Store(), []

    def work(own: int) -> None:
        for _ in range(200):
            x = store.array((MANY,), REAL)
            x[::1000] = own
            y = store.array((MANY, 2), REAL)
            y[::1000] = own
            if not ((x[::1000] == own).all() and (y[::1000] == own).all()):
                wrong.append(own)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    assert store.lent + store.kept <= store.most


def test_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits is given back first; what can't be had is not counted."""
    store = Store()
    x = store.array((MANY,), REAL)
    del x
    aligned, asked = memory.aligned, []

    def refuses_once(size: int) -> np.ndarray:
        asked.append(size)
        if len(asked) == 1:
            raise MemoryError
        return aligned(size)

    monkeypatch.setattr(memory, "aligned", refuses_once)
    y = store.array((2 * MANY,), REAL)
    assert (len(asked), store.kept, store.lent) == (2, 0, y.nbytes)
    del y
    store.release()

    def refuses(size: int) -> np.ndarray:
        raise MemoryError

    monkeypatch.setattr(memory, "aligned", refuses)
    with pytest.raises(MemoryError):
        store.array((MANY,), REAL)
    assert store.lent == 0


@contextmanager
def interrupt_before(line: int) -> Iterator[None]:
    """Ctrl-C before the so-many-th line of the store's methods."""
    seen = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal seen
        code = frame.f_code
        if code.co_filename == memory.__file__ and code.co_name != "come_back" and event == "line":
            seen += 1
            if seen == line:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        with suppress(KeyboardInterrupt):
            yield
    finally:
        sys.settrace(None)


def test_an_interrupt_breaks_nothing() -> None:
    """Memory may be lost, and is never lent twice."""
    for line in range(60):
        store = Store()
        held = [store.array((MANY + k % 2 * MANY,), REAL) for k in range(4)]
        del held[1:]
        with interrupt_before(line):
            held.append(store.array((MANY,), REAL))
        held += [store.array((MANY + k % 2 * MANY,), REAL) for k in range(4)]
        for k, x in enumerate(held):
            x[:] = k
        assert all((x == k).all() for k, x in enumerate(held))


def test_may_be_made_writable_again() -> None:
    x = Store().array((MANY,), REAL)
    x.setflags(write=False)
    x.setflags(write=True)


def test_release() -> None:
    memory.STORE.array((MANY,), REAL)
    release()
    assert memory.STORE.kept == 0


ROUNDS = """
import resource
import numpy as np
from refimpl.kernels.cpu.memory import keep_freed
print(KEEP and keep_freed())
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arrays = [np.ones(2**20 * 2) for _ in range(6)]
    del arrays
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool, **environment: str) -> tuple[bool, int]:
    """Whether the setting was made, and how many pages the sixth round of the same arrays maps."""
    clean = {k: v for k, v in os.environ.items() if k not in memory.MALLOC_IS_SET} | environment
    run = [sys.executable, "-c", ROUNDS.replace("KEEP", str(keep))]
    said, count = subprocess.check_output(run, env=clean, text=True).split()
    return said == "True", int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_malloc_keeps_what_arrays_leave() -> None:
    """Six arrays of 16 MiB, round after round: without the setting they go back to the system."""
    (made, kept), (_, mapped) = faults(True), faults(False)
    assert made
    assert kept < 10 < mapped


@pytest.mark.parametrize("name", memory.MALLOC_IS_SET)
def test_a_user_s_setting_of_malloc_stays(name: str) -> None:
    value = "glibc.malloc.trim_threshold=131072" if name == "GLIBC_TUNABLES" else "131072"
    assert not faults(True, **{name: value})[0]
