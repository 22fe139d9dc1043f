"""`make mutants`: mutation testing on a seeded sample, for whoever asks which line no test needs.

A mutant is one small edit of a file: a comparison moved, a sign turned, a keyword left out, a
statement dropped. Each runs under the tests that concern its file (`first`), then, if these pass,
under `SECOND`, in a fork of a process that has imported the libraries, on a copy of the tree. One
that no test kills is looked up in tests/mutants.json, which says why it changes nothing; what is
not there is printed. Outcomes are appended to build/mutants.jsonl as they come, and a run that was
interrupted resumes there. Tests that read our source (tests/house and the like) are left out: they
would see an edit and not what it does.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import array_api_strict
import hypothesis.strategies
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import typer.testing

ROOT = Path(__file__).parents[1]
KNOWN = ROOT / "tests" / "mutants.json"
SEED = 12
SAMPLE = 600
WORKERS = 2
MOST_MEMORY = 12 * 2**30  # bytes of addresses, of a process
LEAST_DISK = 8 * 2**30  # bytes; a mutant that leaves less is stopped
LIBRARIES = (array_api_strict, hypothesis, ml_dtypes, np, safetensors, typer)  # every fork has them
FILES = ("ops/*.py", "grads/*.py", "checkpoint/*.py")
MODULES = ("model", "optimizer", "parameters", "batch", "generate")

COMPARED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
COMPUTED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "floor": "ceil", "ceil": "floor",
         "maximum": "minimum", "zeros_like": "ones_like"}  # fmt: skip


class Mutant(NamedTuple):
    """One edit of a file of refimpl/."""

    file: str
    start: int  # of the bytes that `text` replaces
    stop: int
    text: str
    line: int
    code: str  # the line, as it was
    edit: str  # what became what

    def source(self) -> bytes:
        """The file with the edit."""
        before = (ROOT / "refimpl" / self.file).read_bytes()
        return before[: self.start] + self.text.encode() + before[self.stop :]

    def key(self) -> tuple[str, str, str]:
        """What names it when lines have moved."""
        return self.file, self.code, self.edit


def edits(node: ast.AST) -> Iterator[ast.AST | str]:
    """What may stand in the place of a node: other nodes, or text."""
    match node:
        case ast.Compare(ops=[*ops]):
            for i, op in enumerate(ops):
                changed = copy.deepcopy(node)
                changed.ops[i] = COMPARED[type(op)]()
                yield changed
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in COMPUTED:
            changed = copy.deepcopy(node)
            changed.op = COMPUTED[type(op)]()
            yield changed
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield from (ast.Constant(node.value + step) for step in (1, -1))
        case ast.Constant(value=str(text)) if text and " " not in text:  # no message
            yield ast.Constant(f"{text}x")
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert()):
            yield node.operand
        case ast.BoolOp(op=op):
            yield ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), node.values)
        case ast.Name(id=name) if name in NAMES:
            yield ast.Name(NAMES[name])
        case ast.Attribute(attr=name) if name in NAMES:
            yield ast.Attribute(node.value, NAMES[name])
        case ast.Call(keywords=[*keywords]):
            for i, keyword in enumerate(keywords):
                if keyword.arg not in (None, "strict"):  # zip's: a guard against ourselves
                    yield ast.Call(node.func, node.args, keywords[:i] + keywords[i + 1 :])
        case ast.Break():
            yield "continue"
        case ast.Continue():
            yield "break"
        case ast.Return(value=ast.AST() as value) if not is_constant(value, None):
            yield "return None"
    match node:  # beside the above
        case ast.Expr(value=ast.Call() | ast.Yield()) | ast.AugAssign() | ast.Raise():
            yield "pass"
        case ast.Assign(targets=[ast.Subscript() | ast.Attribute()]):
            yield "pass"
        case ast.Assign(targets=[ast.Name(id=name)]) if name in names(node.value):
            yield "pass"


def is_constant(node: ast.AST | None, *values: Any) -> bool:
    return isinstance(node, ast.Constant) and any(node.value is value for value in values)


def names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def visited(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """The nodes that may change, and ``condition`` or ``bound`` for those that are one. Left out:
    docstrings, annotations, imports, the names of ``__all__``, the texts of errors."""
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or field in ("annotation", "returns", "ctx"):
                continue
            if isinstance(child, ast.Import | ast.ImportFrom | ast.JoinedStr):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue
            if isinstance(child, ast.Assign) and ast.unparse(child.targets[0]) == "__all__":
                continue
            role = ""
            if field in ("test", "ifs"):
                role = "condition"
            elif isinstance(node, ast.Slice):
                role = "bound"
            yield child, role
            if not isinstance(child, ast.Raise):
                yield from visited(child)


def mutants(file: str) -> list[Mutant]:
    """Every mutant of refimpl/``file``, in the order of the source."""
    source = (ROOT / "refimpl" / file).read_text()
    lines = source.encode().splitlines(keepends=True)
    begins = [0]
    for line in lines:
        begins.append(begins[-1] + len(line))
    found = {}
    for node, role in visited(ast.parse(source)):
        changes = list(edits(node)) if hasattr(node, "lineno") else []
        if role == "condition" and not isinstance(node, ast.Compare | ast.UnaryOp):
            changes.append(ast.UnaryOp(ast.Not(), node))
        if role == "bound" and not isinstance(node, ast.Constant | ast.UnaryOp):
            changes.append(ast.BinOp(node, ast.Add(), ast.Constant(1)))
        for change in changes:
            start = begins[node.lineno - 1] + node.col_offset
            stop = begins[node.end_lineno - 1] + node.end_col_offset
            text = change if isinstance(change, str) else ast.unparse(change)
            if isinstance(change, ast.expr):
                text = f"({text})"
            edit = described(node, change)
            code = lines[node.lineno - 1].decode().strip()
            found[start, stop, text] = Mutant(file, start, stop, text, node.lineno, code, edit)
    return [found[place] for place in sorted(found)]


def described(old: ast.AST, new: ast.AST | str) -> str:
    """The edit in a few words."""
    if isinstance(old, ast.Call) and isinstance(new, ast.Call):
        (gone,) = {k.arg for k in old.keywords} - {k.arg for k in new.keywords}
        return f"{ast.unparse(old.func)}(…) without {gone}"
    if new == "pass":
        return "left out"
    texts = [part if isinstance(part, str) else ast.unparse(part) for part in (old, new)]
    before, after = (text if len(text) <= 60 else f"{text[:28]} … {text[-28:]}" for text in texts)
    return f"{before} → {after}"


def compiles(mutant: Mutant) -> bool:
    try:
        compile(mutant.source(), mutant.file, "exec")
    except SyntaxError:
        return False
    return True


def population() -> dict[str, list[Mutant]]:
    """Every mutant, by file."""
    package = ROOT / "refimpl"
    paths = [path for pattern in FILES for path in sorted(package.glob(pattern))]
    paths += [package / f"{module}.py" for module in MODULES]
    files = [path.relative_to(package).as_posix() for path in paths]
    return {file: found for file in files if (found := mutants(file))}


def sample(everything: dict[str, list[Mutant]], seed: int, size: int) -> list[Mutant]:
    """``size`` mutants, of each file in proportion to those it has (largest remainders)."""
    total = sum(map(len, everything.values()))
    shares = {file: size * len(found) / total for file, found in everything.items()}
    counts = {file: int(share) for file, share in shares.items()}
    for file in sorted(shares, key=lambda file: counts[file] - shares[file])[
        : size - sum(counts.values())
    ]:
        counts[file] += 1
    rng = random.Random(seed)
    chosen = []
    for file, found in everything.items():
        drawn = (mutant for mutant in rng.sample(found, len(found)) if compiles(mutant))
        chosen += [mutant for mutant, _ in zip(drawn, range(counts[file]), strict=False)]
    rng.shuffle(chosen)  # so that a part of a run is a sample too
    return chosen


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
    if stem == "generate":
        return ["tests/cli/test_generate.py", "tests/test_generate.py"]
    return ["tests/golden/test_golden.py", f"tests/test_{stem}.py"]


def second(file: str) -> list[str]:
    """Those that come near it besides."""
    folder, _, name = file.rpartition("/")
    core = ["tests/test_backends.py", "tests/test_model.py"]
    files = ["tests/grads", "tests/cli/test_grads.py", "tests/cli/test_generate.py"]
    wider = {
        "ops": [*core, "tests/ops", "tests/test_generate.py", *files],
        "grads": ["tests/checkpoint", "tests/test_batch.py", "tests/cli/test_memory.py"],
        "checkpoint": ["tests/cli/test_count.py", "tests/test_config.py", *files],
        "": [*core, *files, "tests/golden/test_checkpoints.py", "tests/test_count.py"],
    }[folder]
    if name in ("model.py", "batch.py", "parameters.py"):
        wider += ["tests/test_generate.py", "tests/checkpoint/test_names.py"]
    return [*(path for path in wider if path not in first(file)), "tests/cli/test_conventions.py"]


LISTS = (first, second)
LEFT_OUT = (  # they read our source, or take seconds for what others here see
    "tests/cli/test_app.py",
    "tests/test_backends.py::test_verify_needs_nothing_that_cupy_refuses",
    "tests/checkpoint/test_reader.py::test_memory_of_loading",
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
    path = folder / "refimpl" / file
    path.write_bytes(source)
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()


def start(folder: Path, tests: Sequence[str], *, compiled: bool = False) -> int:
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
        left_out = [option for place in LEFT_OUT for option in ("--deselect", place)]
        options = ["-x", "-q", "--basetemp", str(folder / "tmp"), *left_out]
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
    folder: Path
    stage: int = 0
    began: float = 0.0
    late: bool = False


def results(
    todo: Sequence[Mutant], folders: Sequence[Path], seconds: Mapping[str, float]
) -> Iterator[tuple[Mutant, str, str]]:
    """Each mutant as its end is known; "first", "second" (list), "timeout" or "survived"; the test
    that failed."""
    waiting = list(reversed(todo))
    free = list(folders)
    busy: dict[int, Job] = {}

    def go(job: Job) -> None:
        job.began = time.monotonic()
        busy[start(job.folder, LISTS[job.stage](job.mutant.file))] = job

    try:
        while waiting or busy:
            while waiting and free:
                job = Job(waiting.pop(), free.pop())
                plant(job.folder, job.mutant.file, job.mutant.source())
                go(job)
            number, status = os.waitpid(-1, os.WNOHANG)
            if not number:
                for number, job in busy.items():
                    tests = LISTS[job.stage](job.mutant.file)
                    took = sum(s for file, s in seconds.items() if file.startswith(tuple(tests)))
                    late = time.monotonic() - job.began > 30 + 5 * took
                    if not job.late and (late or shutil.disk_usage(ROOT).free < LEAST_DISK):
                        job.late = True
                        os.killpg(number, signal.SIGKILL)
                time.sleep(0.02)
                continue
            job = busy.pop(number)
            with suppress(ProcessLookupError):  # what the tests left running
                os.killpg(number, signal.SIGKILL)
            shutil.rmtree(job.folder / "tmp", ignore_errors=True)
            code = os.waitstatus_to_exitcode(status)
            if code > pytest.ExitCode.INTERNAL_ERROR:
                raise SystemExit(f"{job.mutant}: exit {code}, see {job.folder / 'log'}")
            if code == 0 and job.stage + 1 < len(LISTS):
                job.stage += 1
                go(job)
                continue
            plant(job.folder, job.mutant.file, (ROOT / "refimpl" / job.mutant.file).read_bytes())
            free.append(job.folder)
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


def main() -> int:
    """Run the sample; 1 if there are survivors that tests/mutants.json does not explain."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=SAMPLE)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--again", action="store_true", help="run the survivors again")
    given = parser.parse_args()
    build = ROOT / "build" / "mutants"
    log = build / f"{given.seed}-{given.sample}.jsonl"
    everything = population()
    chosen = sample(everything, given.seed, given.sample)
    done = {}
    if log.exists():
        for line in log.read_text().splitlines():
            *fields, end, by = json.loads(line)
            done[Mutant(*fields)] = (end, by)
    todo = [
        mutant
        for mutant in chosen
        if mutant not in done or (given.again and done[mutant][0] == "survived")
    ]
    folders = [build / str(worker) for worker in range(WORKERS)]
    if todo:
        print(
            f"{len(todo)} of {len(chosen)} mutants to run, of {sum(map(len, everything.values()))}"
        )
        seconds = clean(copy_of_tree(folders[0]), [*everything])
        print(f"the tests pass without a mutant, in {sum(seconds.values()):.0f} s", flush=True)
        for folder in folders[1:]:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(folders[0], folder)  # with the compiled files
        began = time.monotonic()
        for count, (mutant, end, by) in enumerate(results(todo, folders, seconds), 1):
            done[mutant] = (end, by)
            with log.open("a") as file:
                print(json.dumps([*mutant, end, by], ensure_ascii=False), file=file)
            took = time.monotonic() - began
            where = f"{mutant.file}:{mutant.line}"
            print(f"{count}/{len(todo)} {took:.0f} s: {end} {where} {mutant.edit} {by}", flush=True)
    counts = Counter(done[mutant][0] for mutant in chosen)
    print(", ".join(f"{end}: {count}" for end, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
