"""``refimpl recipe``: the whole of it at toy size, killed and interrupted on the way."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple

import jsonschema
import pytest
from threadpoolctl import threadpool_limits

from refimpl.cli import recipe
from refimpl.cli.recipe import live
from refimpl.train import graph, plots
from refimpl.train.recipe import JOBS, toy

from support import Done, refimpl_here
from train.recipe_results import SCHEMA

pytest.importorskip("fcntl")
pytest.importorskip("matplotlib")

# Numba would take longer to begin than a toy's job does
OPTIONS = ("--problems", 8, "--implementation", "reference")


def run(out: Path, *more: object, small: bool = True) -> Done:
    return refimpl_here("recipe", "--out", out, *OPTIONS, *(["--toy"] if small else []), *more)


class Here:
    """A process of a job, run in this one: 31 of them would take longer to begin than to run."""

    def __init__(self, command: Sequence[str], *, stdout: BinaryIO, **given: Any) -> None:
        done = refimpl_here(*command[3:])
        stdout.write((done.stdout + done.stderr).encode())
        self.code = done.returncode

    def poll(self) -> int:
        return self.code


class Whole(NamedTuple):
    out: Path
    done: Done


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """All of the recipe, on one thread as in its processes: others add in another order."""
    out = tmp_path_factory.mktemp("recipe") / "out"
    with pytest.MonkeyPatch.context() as patch, threadpool_limits(1):
        patch.setattr(graph, "subprocess", SimpleNamespace(Popen=Here, DEVNULL=None))
        return Whole(out, run(out))


def test_it_runs_to_its_end(whole: Whole) -> None:
    """Every job, evaluations included; the table says of each claim whether it holds, and of a toy
    that this means nothing."""
    assert whole.done.returncode == 0, whole.done.stderr
    for job in JOBS:
        assert (whole.out / job.name / "checkpoint" / "model.safetensors").exists()
        for kind in job.kinds:
            assert (whole.out / job.name / f"held_out-{kind}.json").exists()
        assert f"{job.name}: begins\n" in whole.done.stderr
        assert re.search(rf"^{job.name}: done in \d+ s$", whole.done.stderr, re.M)
    assert whole.done.stdout.splitlines()[-1].startswith("toy size: this shows that everything")
    assert re.search(r"^ ?held-out loss in nats.* below ≥ 0.5 .*FAILS", whole.done.stdout, re.M)
    seconds = json.loads((whole.out / "seconds.json").read_text())
    assert set(seconds["jobs"]) == {job.name for job in JOBS}


def test_a_finished_one_is_only_reported_anew(whole: Whole) -> None:
    files = ("results.json", "report.md", "pictures/grpo.svg")
    before = [(whole.out / file).read_bytes() for file in files]
    weights = whole.out / "last" / "checkpoint" / "model.safetensors"
    changed = weights.stat().st_mtime_ns
    for file in files:
        (whole.out / file).unlink()
    again = run(whole.out)
    assert (again.returncode, again.stderr) == (0, "")
    assert [(whole.out / file).read_bytes() for file in files] == before
    assert weights.stat().st_mtime_ns == changed


def stopped(out: Path, seen: str, number: signal.Signals) -> tuple[int, str]:
    """The exit code and the errors of a recipe up to the job long, in processes, that got a signal
    once a file was there."""
    command = [sys.executable, "-m", "refimpl", "recipe", "--toy", "--out", str(out)]
    command += [*map(str, OPTIONS), "--only", "long", "--workers", "1"]
    told = out.parent / "errors"
    with told.open("w") as errors:
        process = subprocess.Popen(command, stdout=errors, stderr=errors, start_new_session=True)
        while not (out / seen).exists():
            assert process.poll() is None, told.read_text()
            time.sleep(0.02)
        process.send_signal(number)
        code = process.wait()
    return code, told.read_text()


def test_it_goes_on(whole: Whole, tmp_path: Path) -> None:
    """Killed, interrupted, and run to its end, in processes: no process is left, no job is done
    twice, and the weights are those of a run that was left alone."""
    out = tmp_path / "out"
    code, _ = stopped(out, "base/metrics.jsonl", signal.SIGKILL)
    assert code == -signal.SIGKILL
    code, told = stopped(out, "long/phase-1/metrics.jsonl", signal.SIGINT)
    assert (code, told.splitlines()[-1]) == (130, "stopped: run the same command again to resume")
    for name in ("base", "long"):
        with graph.log_of(out, name).open("ab") as log:
            assert graph.locked(log)
    assert (out / "base" / "result.json").exists()
    assert not (out / "long" / "result.json").exists()
    done = run(out, "--only", "long")
    assert done.returncode == 0
    assert re.sub(r"\d+", "1", done.stderr) == "long: begins\nlong: done in 1 s\n"
    for name in ("base", "long"):
        weights = Path(name, "checkpoint", "model.safetensors")
        assert (out / weights).read_bytes() == (whole.out / weights).read_bytes()
    assert [*json.loads((out / "results.json").read_text())["jobs"]] == ["base", "long"]


def test_results(whole: Whole) -> None:
    results = json.loads((whole.out / "results.json").read_text())
    jsonschema.validate(results, SCHEMA)
    assert [*results["jobs"]] == [job.name for job in JOBS]
    assert results["toy"] is True
    assert results["machine"]["implementation"] == "reference"
    assert results["seconds"] > 0
    assert 2 < results["bigram"] < 4
    assert len(results["claims"]) == 23
    jobs = results["jobs"]
    assert jobs["sft"]["held_out"]["add2"]["greedy"]["problems"] == 8
    assert [jobs["long"]["phases"][0]["lengths"], jobs["long"]["lengths"]] == [
        {"original": 16, "reached": 32},
        {"original": 16, "reached": 64},
    ]
    assert jobs["base"]["loads"].keys() == {"step", "1", "2"}
    assert (whole.out / "results.json").stat().st_size < 200_000


def test_report_and_pictures(whole: Whole) -> None:
    page = (whole.out / "report.md").read_text()
    files = re.findall(r"!\[.*?\]\((.*?)\)", page)
    assert len(files) == len(plots.PICTURES)
    for file in files:
        assert (whole.out / file).stat().st_size < 100_000
    assert "## Samples" in page
    assert "its numbers mean nothing" in page


def test_without_matplotlib(whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says how to install it; the page has its tables."""
    with monkeypatch.context() as without:
        without.setattr(plots, "find_spec", lambda name: None)
        done = run(whole.out)
    assert done.returncode == 0
    assert done.stderr.endswith("pip install 'deepseek-refimpl[plots]'\n")
    page = (whole.out / "report.md").read_text()
    assert "![" not in page
    assert "## Claims" in page
    assert run(whole.out).returncode == 0


def test_a_claim_that_fails(whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1, but for a toy."""
    monkeypatch.setattr(recipe, "JOBS", toy(JOBS))
    done = run(whole.out, small=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert "FAILS" in done.stdout
    assert "toy" not in done.stdout
    assert "mean nothing" not in (whole.out / "report.md").read_text()
    assert run(whole.out, "--only", "long", small=False).returncode == 1
    monkeypatch.setattr("refimpl.train.claims.PARTS", ())
    assert run(whole.out, small=False).returncode == 0


def test_another_recipe_in_the_folder(whole: Whole) -> None:
    done = run(whole.out, small=False)
    line = f"refimpl: {whole.out / 'base'} has other settings than this recipe: remove it and run"
    assert done.returncode == 2
    assert done.stderr.startswith(line)


def test_a_job_that_fails(tmp_path: Path) -> None:
    """One line: the job, its last line, its log; nothing of another's folder changed."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "mine").write_text("")
    done = run(tmp_path, "--only", "base")
    lines = done.stderr.splitlines()
    assert (done.returncode, lines[0], len(lines)) == (2, "base: begins", 2)
    assert lines[1] == (
        f"refimpl: base failed with exit code 2: refimpl: {tmp_path / 'base'} is not empty and "
        f"holds no run: nothing was changed (all of it: {tmp_path / 'base.log'}); run the same "
        "command again to resume"
    )
    assert [x.name for x in (tmp_path / "base").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--out must name the folder of the jobs"),
        (("--out", "x", "--workers", 0), "--workers must be at least 1, got 0"),
        (("--out", "x", "--problems", 0), "--problems must be at least 1, got 0"),
        (("--out", "x", "--only", "y"), "--only must be one of base, unbalanced, "),
        (
            ("--out", "x", "--dtype", "int8"),
            "--dtype must be one of float32, float64, bfloat16, got int8",
        ),
    ],
)
def test_what_cannot_be(arguments: tuple[object, ...], said: str, tmp_path: Path) -> None:
    done = refimpl_here("recipe", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"refimpl: {said}")
    assert done.stderr.count("\n") == 1
    assert not [*tmp_path.iterdir()]


def test_list() -> None:
    """Without a folder."""
    done = refimpl_here("recipe", "--list", "--only", "long")
    assert (done.returncode, done.stderr) == (0, "")
    names = [line.split()[:2] for line in done.stdout.splitlines()]
    assert names == [["job", "stage"], ["base", "train"], ["long", "extend"]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the running jobs move, those that are told stay; nothing a log holds is obeyed."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with live() as (tell, show):
        show(["1 of 17 jobs done, 0:07", "sft 0:03: [red]loss\x1b[2J 1.5"])
        tell("base: done in 7 s")
        time.sleep(0.3)  # it moves five times a second
    shown = screen.getvalue()
    assert "base: done in 7 s\n" in shown
    assert "sft 0:03: [red]loss\\x1b[2J 1.5" in shown
    assert "\x1b[2J" not in shown
    assert "\x1b[1A" in shown  # a cursor that goes up


def test_lines_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with live() as (tell, show):
        show(["1 of 17 jobs done"])
        tell("base: begins")
    assert capsys.readouterr().err == "base: begins\n"
