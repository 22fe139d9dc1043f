"""All that a GPU can prove of the kernels, from a plain checkout: ``python tests/gpu.py``, or
``make gpu``. A second command, ``python tests/gpu.py --more`` (``make gpu-more``), has what takes
longer or needs tools.

The stages stand in tests/gpu_plan.py, in the order of value, each with a time limit; their time on
a device is estimated and printed first. ``<out>/log`` has what they print, as it comes,
``<out>/summary`` the verdicts, ``<out>/run.json`` these and device, versions, commit, date and the
benchmark's results; both are written before and after each stage. A stage that fails, or is
stopped, stops no other. Arguments:

names of stages    all of the list by default
--more             the second list: beside torch, compute-sanitizer, the whole model
--minutes M        in all (9); a stage gets what is left
--out FOLDER       build/gpu, build/gpu-more, build/gpu-pretend
--results FOLDER   where the benchmark's file and run.json are kept (benchmarks/results)
--commit C         of this checkout, where git can't say
--plan             print the plan and run nothing
--pretend          every stage, with one example, on tests/pretended_device.py: no GPU
--only-look        run nothing; exit 3 if there is no GPU

Without a GPU it says so and exits 0; 1 if something does not hold or was stopped, CuPy's absence
too. Nothing needs to be installed but NumPy, CuPy, cuda-bindings, numba-cuda, ml_dtypes,
safetensors, typer, rich, pytest and hypothesis.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

if TYPE_CHECKING:
    from gpu_plan import Stage

ROOT = Path(__file__).resolve().parents[1]
# what compute-sanitizer says on machines that hide the GPU from debuggers
REFUSED = "Device not supported"
MINUTES = 9.0
LEAST = 10  # seconds: a stage with less left is not begun
GRACE = 10  # seconds of a stage's limit, from asking it to end to ending it
BAD = ("DOES NOT HOLD", "STOPPED", "NOT RUN", "RUNNING")
LOST = re.compile(r"DeviceLost: (.*)")  # tests/device_errors.py


class Outcome(NamedTuple):
    verdict: str  # ``holds``, one of `BAD`, or why it could not run
    notes: tuple[str, ...] = ()


def gpus() -> list[str]:
    """As nvidia-smi lists them; none if there is no such command, or it finds none."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    except OSError:
        return []
    return (
        [line for line in done.stdout.splitlines() if line.startswith("GPU")]
        if done.returncode == 0
        else []
    )


def signalled(process: subprocess.Popen[str], number: int) -> None:
    """The whole group: pytest's workers and torch's compilers too."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def ended(process: subprocess.Popen[str], seconds: float) -> bool:
    """Wait so long at most."""
    try:
        process.wait(max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        return False
    return True


class Reader(threading.Thread):
    """Shows and keeps what a stage prints. A thread, so that a process which left the group and
    holds the pipe keeps nobody waiting."""

    def __init__(self, pipe: TextIO, log: TextIO) -> None:
        super().__init__(daemon=True)
        self.pipe, self.log = pipe, log
        self.refused = False
        self.notes: dict[str, None] = {}  # each once, in order
        self.start()

    def run(self) -> None:
        with self.pipe, suppress(ValueError):  # the log may be closed before a straggler's line
            for line in self.pipe:
                print(line, end="", flush=True)
                print(line, end="", file=self.log, flush=True)
                self.refused |= REFUSED in line
                if found := LOST.search(line):
                    self.notes[f"the device was lost: {found[1]}"] = None


def execute(stage: Stage, log: TextIO, seconds: float) -> Outcome:
    """Run it for so long at most, show and keep its output. It is asked to end a little before, so
    that pytest says what failed so far; then its group is ended."""
    told = " ".join([*(f"{k}={v}" for k, v in stage.environment.items()), *stage.command])
    for out in (sys.stdout, log):
        print(f"== {stage.shows}, at most {seconds:.0f} s: {told}", file=out, flush=True)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    added = {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    added["COLUMNS"] = "300"  # so that pytest's summary says why
    process = subprocess.Popen(
        stage.command,
        cwd=ROOT,
        env=os.environ | added | stage.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        process_group=0,
    )
    assert process.stdout is not None
    reader, end = Reader(process.stdout, log), time.monotonic() + seconds
    try:
        stopped = not ended(process, seconds - min(GRACE, seconds / 4))
        if stopped:
            signalled(process, signal.SIGINT)
            ended(process, end - time.monotonic())
    finally:
        signalled(process, signal.SIGKILL)
        gone = ended(process, 5)  # a process that waits in the driver can't be ended
        reader.join(1)
    if stopped or not gone:
        stays = () if gone else ("its process could not be ended",)
        return Outcome("STOPPED", (*reader.notes, *stays))
    if process.returncode == 0:
        return Outcome("holds", (*reader.notes,))
    if reader.refused and "sanitizer" in stage.shows:
        return Outcome(f"could not run: {REFUSED}")
    return Outcome("DOES NOT HOLD", (*reader.notes,))


def read(path: Path) -> Any:
    """A JSON file; None if it is not there or not whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


class Record:
    """Summary and run.json of one run, written again after every change."""

    def __init__(self, out: Path, about: dict[str, Any]) -> None:
        self.out, self.about = out, about
        self.stages: list[dict[str, Any]] = []

    def begin(self, stage: Stage, seconds: float) -> None:
        entry = {"name": stage.name, "shows": stage.shows, "limit": round(seconds)}
        self.stages.append(entry | {"estimate": round(stage.estimate())})
        self.set("RUNNING", (), 0)

    def set(self, verdict: str, notes: Sequence[str], seconds: float) -> None:
        """Of the stage that was begun last."""
        self.stages[-1] |= {"verdict": verdict, "notes": list(notes), "seconds": round(seconds, 1)}
        self.write()

    def lines(self) -> str:
        return "".join(
            f"{s['verdict']}: {s['name']}, {s['shows']} ({s['seconds']:.0f} s)\n"
            + "".join(f"    {note}\n" for note in s["notes"])
            for s in self.stages
        )

    def content(self) -> dict[str, Any]:
        """With what the stages wrote."""
        parts = self.out / "parts"
        found: dict[str, Any] = self.about | {"stages": self.stages, "probe": None}
        found["probe"] = read(parts / "probe.json")
        for name in ("bench", "torch"):
            found[name] = next(filter(None, map(read, sorted((parts / name).glob("*.json")))), None)
        return found

    def write(self) -> None:
        (self.out / "summary").write_text(self.lines())
        fresh = self.out / "run.json.fresh"
        fresh.write_text(json.dumps(self.content(), indent=1) + "\n")
        fresh.replace(self.out / "run.json")

    def keep(self, results: Path, name: str) -> None:
        """The benchmark's file, unless one of that day has more rows, and run.json."""
        for path in sorted((self.out / "parts").glob("*/*.json")):
            ours, theirs = (read(file) or {} for file in (path, results / path.name))
            if len(ours.get("rows", ())) >= max(1, len(theirs.get("rows", ()))):
                results.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, results / path.name)
        runs = results / "runs"
        runs.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.out / "run.json", runs / f"{name}.json")


def run(todo: Sequence[Stage], record: Record, minutes: float) -> int:
    """The exit code. Whatever ends this process ends the stage's group too."""
    end = time.monotonic() + 60 * minutes
    with (record.out / "log").open("w") as log:
        for stage in todo:
            start = time.monotonic()
            seconds = min(stage.limit, end - start)
            record.begin(stage, max(seconds, 0))
            done = execute(stage, log, seconds) if seconds > LEAST else Outcome("NOT RUN")
            record.set(done.verdict, done.notes, time.monotonic() - start)
    return int(any(stage["verdict"] in BAD for stage in record.stages))


def arguments_of(arguments: Sequence[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description="All that a GPU can prove of the kernels.")
    parser.add_argument("stages", nargs="*", help="default: all of the list")
    parser.add_argument("--more", action="store_true", help="the second list")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="in all")
    parser.add_argument("--out", type=Path, help="folder of log, summary and run.json")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--commit", help="of this checkout, where git can't say")
    parser.add_argument("--plan", action="store_true", help="print the plan and run nothing")
    parser.add_argument("--pretend", action="store_true", help="without a GPU, one example each")
    parser.add_argument("--only-look", action="store_true")
    return parser, parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """The exit code; a summary last."""
    parser, chosen = arguments_of(arguments)
    found = [] if chosen.pretend or chosen.plan else gpus()
    if not found and not chosen.pretend and not chosen.plan:
        print("no GPU: nvidia-smi lists none; nothing was run")
        return 3 if chosen.only_look else 0
    if chosen.only_look:
        return 0
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from gpu_plan import WORKERS, Machine, stages, table  # to look for a GPU takes no NumPy

    name = "gpu-pretend" if chosen.pretend else "gpu-more" if chosen.more else "gpu"
    out = (chosen.out or ROOT / "build" / name).resolve()
    xdist = importlib.util.find_spec("xdist") is not None
    workers = (2 if chosen.pretend else WORKERS) if xdist else 1
    sanitizer = shutil.which("compute-sanitizer")
    plan = stages(
        Machine(sys.executable, sanitizer, workers, chosen.pretend), out / "parts", chosen.commit
    )
    listed = [*plan.first, *plan.more, *plan.named]
    if unknown := set(chosen.stages) - {stage.name for stage in listed}:
        there = ", ".join(stage.name for stage in listed)
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {there}")
    by_default = listed if chosen.pretend else plan.more if chosen.more else plan.first
    todo = [s for s in listed if s.name in chosen.stages] if chosen.stages else by_default
    print("\n".join([*found, table(todo)]), end="", flush=True)
    if chosen.plan:
        return 0
    shutil.rmtree(out / "parts", ignore_errors=True)  # of the run before
    (out / "parts").mkdir(parents=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `execute` ends its group
    record = Record(out, about(found, chosen.commit))
    try:
        code = run(todo, record, chosen.minutes)
    finally:
        record.write()
        print(record.lines(), end="")
        if sanitizer is None and not chosen.pretend and todo is plan.more:
            print("not run: compute-sanitizer is not there")
        print(f"log, summary and run.json: {out}")
    if not chosen.pretend:
        record.keep(chosen.results, run_name(record, name))
    return code


def about(found: Sequence[str], commit: str | None) -> dict[str, Any]:
    """What run.json begins with."""
    from refimpl.bench.run import commit_of_checkout

    return {
        "gpus": [re.sub(r" \(UUID.*", "", line) for line in found],
        "commit": commit or commit_of_checkout(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def run_name(record: Record, name: str) -> str:
    """``nvidia-h200-2026-11-30-gpu``."""
    from refimpl.bench.results import file_name

    device = (record.about["gpus"] or ["GPU"])[0].partition(": ")[2] or "gpu"
    return file_name(device, record.about["date"]).removesuffix(".json") + f"-{name}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
