"""Ranks that are threads of one process: the groups of refimpl.parallel without MPI."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError
from typing import Any, TypeVar

T = TypeVar("T")


class Board:
    """Where the ranks of one group lay their values, to be read once all are there."""

    def __init__(self, size: int) -> None:
        self.barrier, self.values = Barrier(size, timeout=60), [None] * size
        self.groups: dict[Any, Board] = {}


class ThreadGroup:
    """A `refimpl.parallel.group.Group` of threads."""

    def __init__(self, board: Board, rank: int, size: int) -> None:
        self.board = board
        self.rank, self.size = rank, size
        self.splits = 0

    def gather(self, value: T) -> list[T]:
        self.board.values[self.rank] = value
        self.board.barrier.wait()
        found = list(self.board.values)
        self.board.barrier.wait()
        return found  # type: ignore[return-value]

    def split(self, color: int) -> ThreadGroup:
        colors, self.splits = self.gather(color), self.splits + 1
        members = [rank for rank, x in enumerate(colors) if x == color]
        if self.rank == members[0]:
            self.board.groups[self.splits, color] = Board(len(members))
        self.gather(None)
        board = self.board.groups[self.splits, color]
        return ThreadGroup(board, members.index(self.rank), len(members))

    def collect(self, value: T) -> list[T] | None:
        found = self.gather(value)
        return None if self.rank else found

    def swap(self, values: list[T]) -> list[T]:
        return [theirs[self.rank] for theirs in self.gather(values)]

    def rotate(self, value: T) -> T:
        return self.gather(value)[self.rank - 1]

    def first(self, work: Callable[[], T]) -> T:
        told: tuple[Any, Exception | None] = (None, None)
        if self.rank == 0:
            try:
                told = work(), None
            except Exception as error:
                told = None, error
        result, failed = self.gather(told)[0]
        if failed is not None:
            raise failed
        return result  # type: ignore[no-any-return]


def in_threads(ranks: int, work: Callable[[Any], T]) -> list[T]:
    """What ``work`` gives on each of so many ranks; the first error that is not of the meeting."""
    board = Board(ranks)

    def do(rank: int) -> T:
        try:
            return work(ThreadGroup(board, rank, ranks))
        except BaseException:
            _break(board)
            raise

    with ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(do, rank) for rank in range(ranks)]
    errors = [e for e in (f.exception() for f in futures) if e is not None]
    for error in sorted(errors, key=lambda e: isinstance(e, BrokenBarrierError)):
        raise error
    return [f.result() for f in futures]


def _break(board: Board) -> None:
    board.barrier.abort()
    for inner in list(board.groups.values()):
        _break(inner)


def each(values: Sequence[T]) -> T:
    """The value that all ranks agree on."""
    assert all(x == values[0] for x in values)
    return values[0]
