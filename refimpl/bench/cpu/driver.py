"""Starting the workers, asking them, and ending them."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

__all__ = ["Ended", "Process", "Refused", "Team"]

LIMIT = 600.0  # seconds that one request may take, and with a compiler
LIBRARIES = ("OMP", "OPENBLAS", "MKL", "NUMBA")


class Refused(Exception):
    """The worker's answer is why it can't."""


class Ended(Exception):
    """The worker is dead: it died, or took longer than `LIMIT` and was killed."""


@contextmanager
def bound_to(cores: Sequence[int]) -> Iterator[None]:
    """Inside, what this thread starts runs on these cores alone, where the system can say so."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Process:
    """A worker, from outside."""

    def __init__(self, column: str, cores: Sequence[int], command: Sequence[str] = ()) -> None:
        own = [sys.executable, "-m", f"{__package__}.worker", column]
        count = {f"{name}_NUM_THREADS": str(len(cores)) for name in LIBRARIES}
        self.said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        with bound_to(cores):  # its libraries start threads before its own first line
            self.process = subprocess.Popen(
                [*(command or own)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.said,
                env=os.environ | count | {"JAX_PLATFORMS": "cpu"},
            )
        self.rest = b""  # of what it has answered
        try:
            self.answer(LIMIT)
        except BaseException:
            self.end()
            raise

    def ask(self, request: str, **given: Any) -> dict[str, Any]:
        """The answer; Refused or Ended."""
        line = json.dumps({"do": request, **given}).encode() + b"\n"
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except OSError as error:
            raise Ended(self.last_words()) from error
        return self.answer(LIMIT)

    def answer(self, limit: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        end, file = time.monotonic() + limit, self.process.stdout.fileno()
        while b"\n" not in self.rest:
            if not select.select([file], [], [], max(end - time.monotonic(), 0))[0]:
                self.end()
                raise Ended(f"no answer in {limit:.0f} s")
            found = os.read(file, 2**16)
            if not found:
                raise Ended(self.last_words())
            self.rest += found
        line, _, self.rest = self.rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise Refused(answer["failed"])
        return answer

    def last_words(self) -> str:
        """Why it is dead, as far as is known."""
        code = self.process.wait()
        self.said.seek(0)
        lines = [line for line in self.said.read().splitlines() if line.strip()]
        return f"its process ended with {code}" + (f": {lines[-1]}" if lines else "")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.said):
            if file is not None:
                file.close()


class Team:
    """The workers, each started when it is first needed, all killed at the end of a ``with``."""

    def __init__(self, cores: Sequence[int]) -> None:
        self.cores = cores
        self.processes: dict[str, Process] = {}
        self.dead: dict[str, str] = {}  # and why

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.end()
        self.processes.clear()

    def ask(self, column: str, request: str, **given: Any) -> Mapping[str, Any]:
        """Its answer; Refused, or Ended, also for a worker that has died before."""
        if column in self.dead:
            raise Ended(self.dead[column])
        try:
            if column not in self.processes:
                self.processes[column] = Process(column, self.cores)
            return self.processes[column].ask(request, **given)
        except Ended as error:
            self.dead[column] = str(error)
            if column in self.processes:
                self.processes.pop(column).end()
            raise

    def pids(self) -> list[int]:
        return [process.process.pid for process in self.processes.values()]
