"""Jobs as processes: order, how many at a time, failures, Ctrl-C, resumption. The commands here
are short programs that write a file."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from refimpl.errors import CouldNotRun
from refimpl.train import graph
from refimpl.train.graph import Seconds, last_line, log_of, run_graph

fcntl = pytest.importorskip("fcntl")

WORK = """
import pathlib, sys, time
out, name, seconds = pathlib.Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
begin = time.monotonic()
time.sleep(seconds)
(out / f"{name}.done").write_text(f"{begin} {time.monotonic()}")
"""
# Until it is interrupted; says so, and whether that came twice
PATIENT = """
import pathlib, signal, sys, time
out, name = pathlib.Path(sys.argv[1]), sys.argv[2]
came = []
signal.signal(signal.SIGINT, lambda *_: came.append(1))
(out / f"{name}.ready").write_text("")
begin = time.monotonic()
while not came and time.monotonic() - begin < 30:
    time.sleep(0.01)
time.sleep(0.2)
(out / f"{name}.saved").write_text(str(len(came)))
sys.exit(130)
"""
DEAF = PATIENT.replace("not came and ", "")


def commands(
    out: Path, texts: Mapping[str, str] | None = None, seconds: float = 0.0
) -> Callable[[str], list[str] | None]:
    """The command of a job until its file is there."""

    def next_command(name: str) -> list[str] | None:
        if (out / f"{name}.done").exists():
            return None
        text = (texts or {}).get(name, WORK)
        return [sys.executable, "-S", "-E", "-c", text, str(out), name, str(seconds)]

    return next_command


def spans(out: Path) -> dict[str, tuple[float, float]]:
    """When each job began and ended."""
    found = {}
    for file in out.glob("*.done"):
        begin, end = map(float, file.read_text().split())
        found[file.stem] = (begin, end)
    return found


@contextmanager
def interrupting(ready: Callable[[], bool], times: int = 1) -> Iterator[None]:
    """Ctrl-C in this process, so many times, as soon as it is ready."""
    left = [times]

    def look(*_: object) -> None:
        if left[0] and ready():
            left[0] -= 1
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_order(tmp_path: Path) -> None:
    """None before those that it needs, two at a time, and the time of each is kept."""
    needs: dict[str, set[str]] = {"a": set(), "b": {"a"}, "c": {"a"}, "d": {"b", "c"}, "e": {"a"}}
    told: list[str] = []
    shown: list[list[str]] = []
    begun: list[str] = []

    def begins(name: str) -> None:
        assert not log_of(tmp_path, name).exists()
        begun.append(name)

    run_graph(
        needs,
        commands(tmp_path, seconds=0.15),
        tmp_path,
        workers=2,
        begins=begins,
        tell=told.append,
        show=shown.append,
    )
    found = spans(tmp_path)
    assert set(found) == set(needs)
    assert sorted(begun) == sorted(needs)
    for name, others in needs.items():
        assert all(found[other][1] <= found[name][0] for other in others)
    at_once = [
        sum(begin <= moment < end for begin, end in found.values()) for moment, _ in found.values()
    ]
    assert max(at_once) == 2
    assert told[0] == "a: begins"
    assert {f"{name}: done in 0 s" for name in needs} < set(told)
    assert any(lines[0].startswith("0 of 5 jobs done, 0:0") and len(lines) == 2 for lines in shown)
    seconds = json.loads((tmp_path / "seconds.json").read_text())
    assert set(seconds["jobs"]) == set(needs)
    assert all(x >= 0.15 for x in seconds["jobs"].values())
    assert 0.6 <= seconds["total"] <= sum(seconds["jobs"].values()) + 1


def test_one_worker(tmp_path: Path) -> None:
    run_graph({"a": (), "b": ()}, commands(tmp_path, seconds=0.1), tmp_path, workers=1)
    found = spans(tmp_path)
    assert found["a"][1] <= found["b"][0]


def test_what_is_done_is_not_run_again(tmp_path: Path) -> None:
    """Not even the time changes; with another job, both sessions count."""
    run_graph({"a": ()}, commands(tmp_path, seconds=0.2), tmp_path, workers=2)
    before = (spans(tmp_path), (tmp_path / "seconds.json").read_text())
    run_graph({"a": ()}, commands(tmp_path), tmp_path, workers=2)
    assert (spans(tmp_path), (tmp_path / "seconds.json").read_text()) == before
    run_graph({"a": (), "b": {"a"}}, commands(tmp_path, seconds=0.2), tmp_path, workers=2)
    after = Seconds(tmp_path / "seconds.json")
    assert set(after.jobs) == {"a", "b"}
    assert after.before >= 0.4


def test_several_commands(tmp_path: Path) -> None:
    """One after the other, asked for anew each time, one log, and their seconds are added."""

    def next_command(name: str) -> list[str] | None:
        for part in ("first", "second"):
            if not (tmp_path / f"{part}.done").exists():
                text = f"print('{part}')\n{WORK}"
                return [sys.executable, "-S", "-E", "-c", text, str(tmp_path), part, "0.1"]
        return None

    run_graph({"a": ()}, next_command, tmp_path, workers=2)
    assert log_of(tmp_path, "a").read_text() == "first\nsecond\n"
    assert last_line(log_of(tmp_path, "a")) == "second"
    assert Seconds(tmp_path / "seconds.json").jobs["a"] >= 0.2


def test_one_thread_and_a_session_of_its_own(tmp_path: Path) -> None:
    """The cores are the jobs'; a terminal's Ctrl-C is ours to hand on."""
    text = f"import os\nprint([os.environ[x] for x in {[*graph.ONE_THREAD]}])\n"
    text += f"print(os.getsid(0) == os.getpid())\n{WORK}"
    run_graph({"a": ()}, commands(tmp_path, {"a": text}), tmp_path, workers=1)
    assert log_of(tmp_path, "a").read_text() == "['1', '1', '1']\nTrue\n"


def test_failure(tmp_path: Path) -> None:
    """It is named with its last line; what runs beside is interrupted once and has ended; the same
    call goes on."""
    wait = """
import pathlib, sys, time
while not (pathlib.Path(sys.argv[1]) / "b.ready").exists(): time.sleep(0.01)
print("one"); print("it broke"); sys.exit(3)
"""
    needs: dict[str, set[str]] = {"a": set(), "b": set(), "c": {"a"}}
    with pytest.raises(CouldNotRun) as error:
        run_graph(needs, commands(tmp_path, {"a": wait, "b": PATIENT}), tmp_path, workers=2)
    assert str(error.value) == (
        f"a failed with exit code 3: it broke (all of it: {tmp_path / 'a.log'}); "
        "run the same command again to resume"
    )
    assert (tmp_path / "b.saved").read_text() == "1"
    assert not spans(tmp_path)
    assert set(Seconds(tmp_path / "seconds.json").jobs) == {"a", "b"}
    run_graph(needs, commands(tmp_path), tmp_path, workers=2)
    assert set(spans(tmp_path)) == {"a", "b", "c"}


def test_without_its_result(tmp_path: Path) -> None:
    """A command that ends well and leaves nothing is not begun for ever."""
    with pytest.raises(CouldNotRun, match=r"^a ended without its result; see .*a\.log$"):
        run_graph({"a": ()}, commands(tmp_path, {"a": "pass"}), tmp_path, workers=1)


def test_interrupted(tmp_path: Path) -> None:
    """Every process is interrupted once, and waited for."""
    texts = {"a": PATIENT, "b": PATIENT}

    def ready() -> bool:
        return all((tmp_path / f"{name}.ready").exists() for name in texts)

    with pytest.raises(KeyboardInterrupt), interrupting(ready):
        run_graph({"a": (), "b": ()}, commands(tmp_path, texts), tmp_path, workers=2)
    assert [(tmp_path / f"{name}.saved").read_text() for name in texts] == ["1", "1"]


def test_interrupted_twice(tmp_path: Path) -> None:
    """A process that does not listen is killed by the second one."""
    begin = time.monotonic()
    ready = (tmp_path / "a.ready").exists
    with pytest.raises(KeyboardInterrupt), interrupting(ready, times=2):
        run_graph({"a": ()}, commands(tmp_path, {"a": DEAF}), tmp_path, workers=1)
    assert time.monotonic() - begin < 10
    with log_of(tmp_path, "a").open("ab") as log:
        assert graph.locked(log)  # nobody else holds it: the process is gone


def test_a_process_that_outlived_its_graph(tmp_path: Path) -> None:
    """It is waited for, not run beside; when it has ended, the job goes on from what it left."""
    log = log_of(tmp_path, "a").open("ab")
    assert graph.locked(log)
    told: list[str] = []
    shown: list[list[str]] = []

    def show(lines: list[str]) -> None:
        shown.append(lines)
        if len(shown) == 3:
            (tmp_path / "a.done").write_text("1 2")
            log.close()

    run_graph({"a": ()}, commands(tmp_path), tmp_path, workers=1, tell=told.append, show=show)
    assert told[1] == "a: waits for a process that still runs it"
    assert len(told) == 3  # said once
    assert shown[0][1] == "a waits: nothing printed yet"
    assert spans(tmp_path) == {"a": (1, 2)}


def test_the_lock_is_the_processes(tmp_path: Path) -> None:
    """A log is locked for as long as what writes it lives, whatever becomes of who began it."""
    seen = []

    def show(lines: list[str]) -> None:
        with log_of(tmp_path, "a").open("ab") as log:
            seen.append(graph.locked(log))

    run_graph({"a": ()}, commands(tmp_path, seconds=0.3), tmp_path, workers=1, show=show)
    assert seen[0] is False
    with log_of(tmp_path, "a").open("ab") as log:
        assert graph.locked(log)


@pytest.mark.parametrize("text", ["[]", '{"jobs": {"a": "x"}, "total": 1}', '{"jobs": {}}'])
def test_seconds_that_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "seconds.json").write_text(text)
    with pytest.raises(CouldNotRun, match=r"seconds\.json must hold the seconds of jobs"):
        run_graph({"a": ()}, commands(tmp_path), tmp_path, workers=1)
    assert not spans(tmp_path)


def test_last_line(tmp_path: Path) -> None:
    """Of a long log too, whatever its bytes."""
    log = tmp_path / "a.log"
    for data, wanted in (
        (b"", "nothing printed yet"),
        (b"x\n" * 9999 + b"\xff y \n\n", "\ufffd y"),
    ):
        log.write_bytes(data)
        assert last_line(log) == wanted
