"""`make mutants`: mutation testing on a seeded sample, for whoever asks which line no test needs.

Each mutant of tests/mutants.py runs under the tests that concern its file (`first`) and, once all
have, those that these let pass under more (`second`): in a fork of a process that has imported the
libraries, on a copy of the tree. One that no test kills is looked up in tests/mutants.json, which
says why it may live; what is not there is printed. Outcomes are appended to a file in build/mutants
as they come, and a run that was interrupted resumes there. Tests that read our source (tests/house
and the like) are left out: they would see an edit and not what it does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import array_api_strict
import hypothesis.strategies
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import typer.testing

from mutants import PACKAGE, SAMPLE, SEED, Mutant, population, sample

ROOT = Path(__file__).parents[1]
KNOWN = ROOT / "tests" / "mutants.json"
CONFIGS = "tests/checkpoint/test_config_json.py"
WORKERS = 2
MOST_MEMORY = 12 * 2**30  # bytes of addresses, of a process
LEAST_DISK = 8 * 2**30  # bytes; a mutant that leaves less is stopped
LIBRARIES = (array_api_strict, hypothesis, ml_dtypes, np, safetensors, typer)  # every fork has them


def first(file: str) -> list[str]:
    """The tests that concern a file, the cheapest first."""
    folder, _, name = file.rpartition("/")
    stem = name.removesuffix(".py")
    if folder == "ops":
        return ["tests/golden/test_golden.py", f"tests/ops/test_{stem}.py"]
    if folder == "checkpoint":
        return ["tests/golden/test_checkpoints.py", "tests/checkpoint", "tests/cli/test_grads.py"]
    if folder == "grads":
        return ["tests/grads", "tests/cli/test_grads.py"]
    if folder == "generate":
        return ["tests/generate", "tests/cli/test_generate.py"]
    return ["tests/golden/test_golden.py", f"tests/test_{stem}.py"]


def second(file: str) -> list[str]:
    """Those that come near it besides."""
    folder, _, name = file.rpartition("/")
    core = ["tests/test_backends.py", "tests/test_model.py"]
    files = ["tests/grads", "tests/cli/test_grads.py", "tests/cli/test_generate.py"]
    wider = {
        "ops": [*core, "tests/ops", "tests/generate", *files, CONFIGS],
        "grads": ["tests/checkpoint", "tests/test_batch.py", "tests/ops/test_moe.py"],
        "checkpoint": ["tests/cli/test_count.py", "tests/test_config.py", *files],
        "generate": [*core, "tests/train"],
        "": [*core, *files, "tests/golden/test_checkpoints.py", "tests/test_count.py"],
    }[folder]
    if name in ("model.py", "batch.py", "parameters.py"):
        wider += ["tests/generate", "tests/checkpoint/test_names.py"]
    return [*(path for path in wider if path not in first(file)), "tests/cli/test_conventions.py"]


LISTS = (first, second)
SLOW = (  # not in the second list: they take seconds for what others here see
    "tests/test_backends.py::test_verify_needs_nothing_that_cupy_refuses",
    "tests/test_model.py::test_protocol",
    "tests/generate/test_generation.py::test_speculation",
    "tests/generate/test_generation.py::test_what_generate_drafts",
    "tests/checkpoint/test_reader.py::test_memory_of_loading",
    "tests/cli/test_grads.py::test_conventions_that_matter",
)


class Witness:
    """Notes the first test that fails, and the seconds of each file of tests."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.failed = ""
        self.seconds: Counter[str] = Counter()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.failed = self.failed or (report.nodeid if report.failed else "")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed = self.failed or (report.nodeid if report.failed else "")
        self.seconds[report.nodeid.partition("::")[0]] += report.duration

    def pytest_sessionfinish(self) -> None:
        self.place.write_text(json.dumps([self.failed, self.seconds]))


def copy_of_tree(folder: Path) -> Path:
    """What git would commit, in a fresh folder."""
    shutil.rmtree(folder, ignore_errors=True)
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def plant(folder: Path, file: str, source: bytes) -> None:
    """Write a file of the copy's refimpl/, and forget what was compiled of it."""
    path = folder / PACKAGE.name / file
    path.write_bytes(source)
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()


def start(
    folder: Path, tests: Sequence[str], left_out: Sequence[str] = (), *, compiled: bool = False
) -> int:
    """The number of a fork that runs tests in the copy; it exits 0 if all pass, and leaves
    ``witness``. Python's compiled files are kept if ``compiled``."""
    if number := os.fork():
        return number
    try:
        os.setsid()
        os.nice(10)
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor, opened in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
            os.dup2(opened, descriptor)
        os.chdir(folder)
        real = (str(ROOT), str(ROOT / "tests"))
        sys.path[:] = [str(folder), *(place for place in sys.path if place not in real)]
        os.environ |= {"PYTHONPATH": str(folder)} | (
            {} if compiled else {"PYTHONDONTWRITEBYTECODE": "1"}
        )
        sys.dont_write_bytecode = not compiled
        options = ["-x", "-q", "--basetemp", str(folder / "tmp")]
        options += [f"--deselect={test}" for test in left_out]
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # hypothesis is imported
        code = pytest.main([*options, *tests], [Witness(folder / "witness")])
        ours = Path(sys.modules["refimpl"].__file__ or "").is_relative_to(folder)
        os._exit(code if ours else 99)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(98)


@dataclass
class Job:
    """A mutant in a worker's folder, under one of the lists."""

    mutant: Mutant
    stage: int
    folder: Path
    began: float = field(default_factory=time.monotonic)
    late: bool = False

    def tests(self) -> list[str]:
        return LISTS[self.stage](self.mutant.file)

    def must_end(self, seconds: Mapping[str, float]) -> bool:
        """Whether it takes longer than its tests should, or fills the disk."""
        wanted = sum(s for file, s in seconds.items() if file.startswith(tuple(self.tests())))
        late = time.monotonic() - self.began > 30 + 5 * wanted
        return late or shutil.disk_usage(self.folder).free < LEAST_DISK


def results(
    todo: Sequence[Mutant], folders: Sequence[Path], seconds: Mapping[str, float]
) -> Iterator[tuple[Mutant, str, str]]:
    """Each mutant, its end ("first" or "second", the list; "timeout", "survived", or "" if the
    first list let it pass and the second is to come) and the test that failed."""
    waiting = deque((mutant, 0) for mutant in todo)
    free = list(folders)
    busy: dict[int, Job] = {}
    try:
        while waiting or busy:
            while waiting and free:
                job = Job(*waiting.popleft(), free.pop())
                plant(job.folder, job.mutant.file, job.mutant.source())
                busy[start(job.folder, job.tests(), SLOW if job.stage else ())] = job
            number, status = os.waitpid(-1, os.WNOHANG)
            if not number:
                for number, job in busy.items():
                    if not job.late and job.must_end(seconds):
                        job.late = True
                        os.killpg(number, signal.SIGKILL)
                time.sleep(0.02)
                continue
            job = busy.pop(number)
            free.append(job.folder)
            with suppress(ProcessLookupError):  # what the tests left running
                os.killpg(number, signal.SIGKILL)
            shutil.rmtree(job.folder / "tmp", ignore_errors=True)
            plant(job.folder, job.mutant.file, (PACKAGE / job.mutant.file).read_bytes())
            code = os.waitstatus_to_exitcode(status)
            if code > pytest.ExitCode.INTERNAL_ERROR:
                raise SystemExit(f"{job.mutant}: exit {code}, see {job.folder / 'log'}")
            if code == 0 and job.stage + 1 < len(LISTS):
                waiting.append((job.mutant, job.stage + 1))
                yield job.mutant, "", ""
                continue
            by = json.loads((job.folder / "witness").read_text())[0] if code > 0 else ""
            end = "timeout" if job.late else LISTS[job.stage].__name__ if code else "survived"
            yield job.mutant, end, by
    finally:
        for number in busy:
            os.killpg(number, signal.SIGKILL)


def clean(folder: Path, files: Sequence[str]) -> dict[str, float]:
    """The seconds of each file of tests, all of which must pass without a mutant."""
    tests = dict.fromkeys(test for file in files for tests in LISTS for test in tests(file))
    _, status = os.waitpid(start(folder, [*tests], compiled=True), 0)
    shutil.rmtree(folder / "tmp", ignore_errors=True)  # has sparse files of gigabytes
    if status:
        raise SystemExit(f"tests fail without a mutant, see {folder / 'log'}")
    found: dict[str, float] = json.loads((folder / "witness").read_text())[1]
    return found


def run(todo: Sequence[Mutant], files: Sequence[str], build: Path, log: Path) -> None:
    """Run mutants, and append each and its end to the log."""
    folders = [build / str(worker) for worker in range(WORKERS)]
    seconds = clean(copy_of_tree(folders[0]), files)
    print(f"the tests pass without a mutant, in {sum(seconds.values()):.0f} s", flush=True)
    for folder in folders[1:]:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(folders[0], folder)  # with the compiled files
    began = time.monotonic()
    for mutant, end, by in results(todo, folders, seconds):
        if end:
            with log.open("a") as file:
                print(json.dumps([*mutant, end, by], ensure_ascii=False), file=file)
        took = f"{time.monotonic() - began:.0f} s: {end or 'passed the first list'}"
        print(f"{took}: {mutant.told()} {by}", flush=True)


def main() -> int:
    """Run the sample; 1 if there are survivors that tests/mutants.json does not explain."""
    parser = argparse.ArgumentParser(description="Mutation testing on a seeded sample.")
    parser.add_argument("--sample", type=int, default=SAMPLE)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--again", action="store_true", help="run the survivors again")
    given = parser.parse_args()
    everything = population()
    size = sum(map(len, everything.values()))
    chosen = sample(everything, given.seed, given.sample)
    build = ROOT / "build" / "mutants"
    build.mkdir(parents=True, exist_ok=True)
    log = build / f"{given.seed}-{given.sample}.jsonl"
    done = ends(log)
    again = ("survived",) if given.again else ()
    todo = [mutant for mutant in chosen if mutant not in done or done[mutant] in again]
    print(f"{len(todo)} of {len(chosen)} mutants to run, of {size:,}", flush=True)
    if todo:
        run(todo, [*everything], build, log)
        done = ends(log)
    counts = Counter(done[mutant] for mutant in chosen)
    told = {end: counts[end] for end in ("first", "second", "timeout", "survived")}
    print(", ".join(f"{end}: {count}" for end, count in told.items()))
    known = json.loads(KNOWN.read_text())
    reasons = {(s["file"], s["code"], s["edit"]): s["why"] for s in known["survivors"]}
    alive = sorted(mutant for mutant in chosen if done[mutant] == "survived")
    if (given.seed, given.sample) == (SEED, SAMPLE):
        command = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
        survivors = [
            {"file": m.file, "code": m.code, "edit": m.edit, "why": reasons.get(m.key(), "")}
            for m in alive
        ]
        write(
            {"commit": commit, "python": platform.python_version(), "seed": SEED}
            | {"sample": SAMPLE, "of": size, "ends": told}
            | {"holes": known["holes"], "survivors": survivors}
        )
    new = [mutant for mutant in alive if not reasons.get(mutant.key())]
    for mutant in new:
        print(f"not explained: {mutant.told()}")
    return int(bool(new))


def ends(log: Path) -> dict[Mutant, str]:
    """What became of the mutants that have run; the last time, if more often."""
    lines = log.read_text().splitlines() if log.exists() else []
    return {Mutant(*fields): end for *fields, end, _ in map(json.loads, lines)}


def write(content: dict[str, Any]) -> None:
    """tests/mutants.json, with one line per mutant."""
    lines = []
    for key, value in content.items():
        if isinstance(value, list):
            rows = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in value)
            lines.append(f' "{key}": [\n{rows}\n ]' if value else f' "{key}": []')
        else:
            lines.append(f' "{key}": {json.dumps(value)}')
    KNOWN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    sys.exit(main())
