"""Kill every stage with SIGKILL, go on, kill again, and compare the end with that of a run that was
never killed: checkpoint and results byte for byte, metrics but for their times.

``python tests/train/kill.py --kills 20`` kills each stage 20 times: by turns after a random time in
the last two thirds of a run, and just before a random write, at which a process kills itself (a
file put on the disk or into its place, a folder removed, a line of metrics, of which half is
written). A killed process is a fork of this one that runs the command line; the run that is not
killed is ``python -m refimpl``. A model of this size solves nothing, so in grpo, whose runs are all
forks, a hash of the answer says what is right.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # this process, with one thread, may fork

from refimpl.cli import main
from refimpl.train import grpo
from refimpl.train.results import TIMES
from refimpl.train.save import RunFolder

MODEL = (
    "model={width=16,layers=2,heads=2,q_latent=8,kv_latent=8,nope=4,rope=4,value=4,"
    "dense_hidden=16,experts=4,expert_hidden=8,mtp_depth=1}"
)
SMALL = ("steps=4", "problems=4", "evaluate_every=2")
ANSWERS = (*SMALL, "max_tokens=8", "save_every=1")
STAGES: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {  # what each begins with, settings
    "train": (
        {"text": "text.txt"},
        (
            *(MODEL, "tokens=512", "batch=8", "length=16", "warmup_steps=2"),
            *("evaluate_every=3", "save_every=2", "rows=3"),
        ),
    ),
    "extend": (
        {"text": "text.txt", "checkpoint": "train"},
        (
            *("steps=3", "factors=[2, 8]", "batches=[4, 2]", "measured=8"),
            *("evaluate_every=2", "save_every=1"),
        ),
    ),
    "sft": ({}, (*ANSWERS, MODEL, "batch=4", "untidy=0.3")),
    "grpo": (
        {"checkpoint": "sft"},
        (*ANSWERS, "questions=2", "group=4", "minibatches=2", "reference_every=2"),
    ),
    "reward-model": ({"checkpoint": "sft"}, (*SMALL, "batch=4", "save_every=1")),
    "distil": ({"teacher": "sft"}, (*ANSWERS, MODEL, "batch=4", "sampled=8", "verified=false")),
}
IMPLEMENTATION = "REFIMPL_KILL_IMPLEMENTATION"
WRITES = ("fsync", "replace", "rename", "unlink", "truncate")  # of os


def arguments(stage: str, inputs: Path, *, resume: bool = False) -> list[str]:
    given, settings = STAGES[stage]
    found = [stage, "--out", "run", "--implementation", os.environ[IMPLEMENTATION]]
    for name, place in given.items():
        found += [f"--{name}", str(inputs / place)]
    for setting in settings:
        found += ["--set", setting]
    return [*found, "--resume"] if resume else found


def write_text(folder: Path) -> None:
    lines = (f"The cat sat on mat number {i} and had {i * 7 % 13} dogs.\n" for i in range(99))
    (folder / "text.txt").write_text("".join(lines))


def by_hash(text: str, answer: str, *, ended: bool) -> dict[str, float]:
    """What `score` gives, at random."""
    return dict.fromkeys(("accuracy", "format"), float(zlib.crc32(text.encode()) % 2))


def forked(folder: Path, line: list[str], before: Callable[[], Any] = lambda: None) -> int:
    """A process that runs the command line in ``folder``; it calls ``before`` first."""
    if pid := os.fork():
        return pid
    code = 70
    try:
        os.chdir(folder)
        with (folder / "log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.argv = ["refimpl", *line]
        os.environ["REFIMPL_TRACEBACK"] = "1"
        grpo.score = by_hash
        before()
        try:
            main()
            code = 0
        except SystemExit as left:
            code = int(left.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(pid: int) -> int:
    """The exit code, −9 after SIGKILL."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Writes:
    """Counts a process's writes; before the ``deadly``-th it kills itself."""

    def __init__(self, deadly: int) -> None:
        self.count, self.deadly = 0, deadly

    def __call__(self) -> None:
        self.count += 1
        if self.count == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        """From here on, in this process."""
        for name in WRITES:
            setattr(os, name, self.after_counting(getattr(os, name)))
        shutil.rmtree = self.after_counting(shutil.rmtree)
        write = RunFolder.write_metrics

        def half_and_all(folder: RunFolder, line: Any) -> None:
            """Half a line, then, if the process still lives, the whole one."""
            path = folder.path / "metrics.jsonl"
            before = path.read_bytes() if path.exists() else b""
            write(folder, line)
            whole = path.read_bytes()
            path.write_bytes(whole[: (len(before) + len(whole)) // 2])
            self()
            path.write_bytes(whole)

        RunFolder.write_metrics = half_and_all  # type: ignore[method-assign]

    def after_counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self()
            return function(*args, **kwargs)

        return counted

    def counted(self, folder: Path, line: list[str]) -> int:
        """How many writes the whole run has."""

        def before() -> None:
            self.watch()
            leave = os._exit

            def tell_and_leave(code: int) -> None:
                Path("writes").write_text(str(self.count))
                leave(code)

            os._exit = tell_and_leave  # type: ignore[assignment]

        assert ended(forked(folder, line, before)) == 0, (folder / "log").read_text()
        return int((folder / "writes").read_text())


def content(run: Path) -> dict[str, Any]:
    """Every file of a run by its name: bytes, but lines of metrics without their times, and
    state.json without their size."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        found[name] = None if path.is_dir() else path.read_bytes()
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: x for k, x in line.items() if k not in TIMES} for line in lines]
        if path.name == "state.json":
            found[name] = json.loads(path.read_text()) | {"metrics": 0}
    return found


def step_of(run: Path) -> str:
    """Where a killed run stood."""
    places = {path.parent: path for path in sorted(run.rglob("metrics.jsonl"))}
    last = next(iter(places.values()), None)
    count = last.read_bytes().count(b'"kind": "step"') if last else 0
    states = [x.name for x in sorted(run.rglob("state-*"))]
    return f"{count} steps, {', '.join(states) or 'nothing'} saved"


def killed(stage: str, inputs: Path, number: int, seconds: float, writes: int) -> tuple[Path, str]:
    """Run a stage, killed once or more often, to its end: the folder, where it was killed."""
    draw = random.Random(f"{stage} {number}")
    folder = inputs / f"{stage}-{number}"
    folder.mkdir()
    told = []
    code = -signal.SIGKILL
    while code == -signal.SIGKILL and not (folder / "run" / "result.json").exists():
        line = arguments(stage, inputs, resume=(folder / "run").exists())
        if told and draw.random() < 0.7:  # to the end
            code = ended(forked(folder, line))
        elif number % 2:
            pid = forked(folder, line)
            time.sleep(draw.uniform(seconds / 3, seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            code = ended(pid)
        else:
            code = ended(forked(folder, line, Writes(draw.randint(1, writes)).watch))
        told.append(step_of(folder / "run") if code == -signal.SIGKILL else "the end")
    if code == -signal.SIGKILL:  # finished, but for what it was about to remove
        for rest in [*(folder / "run").glob("state-*"), *(folder / "run").glob("*.partial")]:
            (shutil.rmtree if rest.is_dir() else os.unlink)(rest)
        code = 0
    assert code == 0, f"{stage}: exit code {code}\n{(folder / 'log').read_text()}"
    return folder / "run", " | ".join(told)


def uninterrupted(stage: str, inputs: Path, *, fork: bool = False) -> Path:
    """The run that nothing stops."""
    folder = inputs / f"{stage}-whole"
    folder.mkdir()
    line = arguments(stage, inputs)
    if fork or stage == "grpo":
        assert ended(forked(folder, line)) == 0, (folder / "log").read_text()
    else:
        subprocess.run([sys.executable, "-m", "refimpl", *line], cwd=folder, check=True, stderr=-3)
    (inputs / stage).symlink_to(folder / "run")
    return folder / "run"


@contextlib.contextmanager
def place(given: Path | None) -> Iterator[Path]:
    with contextlib.ExitStack() as stack:
        yield given or Path(stack.enter_context(tempfile.TemporaryDirectory()))


def kill_stages(stages: list[str], kills: int, folder: Path, *, fork: bool = False) -> None:
    """AssertionError if one of them ends otherwise than the run that was not killed."""
    write_text(folder)
    for stage in STAGES:
        if not needed(stage, stages):
            continue
        whole = uninterrupted(stage, folder, fork=fork)
        if stage not in stages:
            continue
        other = folder / f"{stage}-counted"
        other.mkdir()
        begin = time.monotonic()
        writes = Writes(0).counted(other, arguments(stage, folder))
        seconds = time.monotonic() - begin
        for number in range(kills):
            run, told = killed(stage, folder, number, seconds, writes)
            print(f"{stage} {number}: {told}", flush=True)
            expected, found = content(whole), content(run)
            assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
            differ = [name for name in expected if found[name] != expected[name]]
            assert not differ, f"{stage} {number}: {', '.join(differ)} differ in {run}"
            shutil.rmtree(run)
        print(f"{stage}: {kills} runs killed, the same bits (of {writes} writes)", flush=True)


def needed(stage: str, stages: list[str]) -> bool:
    """Whether a stage is asked for, or one that begins with it."""
    users = [other for other, (given, _) in STAGES.items() if stage in given.values()]
    return stage in stages or any(needed(other, stages) for other in users)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="of each stage")
    parser.add_argument("--stages", default=",".join(STAGES), help="which, separated by commas")
    parser.add_argument("--implementation", default="fastest", help="of the ops")
    parser.add_argument("--fork", action="store_true", help="also those that are not killed")
    parser.add_argument("--folder", type=Path, help="kept; by default one that is removed")
    given = parser.parse_args()
    chosen = mock.patch.dict(os.environ, {IMPLEMENTATION: given.implementation})
    with place(given.folder) as folder, chosen:
        kill_stages(given.stages.split(","), given.kills, folder.resolve(), fork=given.fork)
