"""The whole recipe: every stage, its controls, and what each shows, as a graph of commands.

A job is a stage in a process of its own, with one thread, as many at a time as there are cores; a
finished job is not run again, an interrupted one goes on where it stopped. What the jobs wrote is
gathered in results.json, from which pictures and report are made.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CouldNotRun
from .settings import toml_value

__all__ = ["JOBS", "Job", "commands", "run_jobs", "toy"]

STUDENT = {"width": 32, "layers": 2, "heads": 2, "q_latent": 16, "kv_latent": 16, "nope": 8,
           "rope": 8, "value": 8, "dense_hidden": 64, "experts": 4, "expert_hidden": 16,
           "mtp_depth": 0}  # fmt: skip
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Job:
    """A stage with settings that differ from its defaults.

    ``inputs``: settings that are the folders of other jobs. ``kinds``: of the held-out problems
    that the result is evaluated on, none for a model that answers none.
    """

    name: str
    stage: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()


MIXTURE = {"untidy": 0.2, "sloppy": 0.2}
COLD_START = MIXTURE | {"distinct": 520, "steps": 450}
STOP = {"stop": [0.40, 0.55]}
SECOND = {"untidy": 0.5, "steps": 100, "learning_rate": 3e-4, "seed": 1}
HARD = "add3"
STUDENT_SFT = {"model": STUDENT, "steps": 800}

JOBS = [
    Job("base", "train"),
    Job("unbalanced", "train", settings={"bias_speed": 0.0}),
    Job("long", "extend", {"checkpoint": "base"}),
    Job("sft", "sft", {"checkpoint": "long"}, COLD_START | STOP, ("add2",)),
    *(
        Job(f"grpo-{seed}", "grpo", {"checkpoint": "sft"}, {"seed": seed}, ("add2",))
        for seed in SEEDS
    ),
    Job("permuted", "grpo", {"checkpoint": "sft"}, {"permuted": True}, ("add2",)),
    Job("continued", "sft", {"checkpoint": "sft"}, MIXTURE | {"steps": 175, "seed": 1}, ("add2",)),
    Job("sft-hard", "sft", {"checkpoint": "sft"}, STOP | {"kinds": [HARD], "steps": 400}, (HARD,)),
    Job("grpo-hard", "grpo", {"checkpoint": "sft-hard"}, {"kinds": [HARD]}, (HARD,)),
    Job("reward-model", "reward-model", {"checkpoint": "sft"}),
    Job("second-sft", "sft", {"checkpoint": "grpo-0"}, SECOND, ("add2",)),
    Job(
        "last",
        "grpo",
        {"checkpoint": "second-sft", "reward_model": "reward-model"},
        {"model": 0.2, "steps": 60},
        ("add2",),
    ),
    Job("distilled", "distil", {"teacher": "grpo-0"}, STUDENT_SFT, ("add2",)),
    Job("student-gold", "sft", {}, STUDENT_SFT, ("add2",)),
    Job("student-answers", "sft", {}, STUDENT_SFT | {"solutions": "answers"}, ("add2",)),
    Job("student-grpo", "grpo", {"checkpoint": "student-answers"}, {}, ("add2",)),
]


def toy(jobs: Sequence[Job]) -> list[Job]:
    """The same graph at a size that takes seconds, which shows that it runs and nothing else."""
    small: dict[str, dict[str, Any]] = {
        "train": {"tokens": 4096, "batch": 16, "warmup_steps": 2, "evaluate_every": 4},
        "extend": {"steps": 2, "factors": [2, 4], "batches": [4, 2]},
        "sft": {"steps": 3, "batch": 8, "problems": 8, "max_tokens": 12, "evaluate_every": 2},
        "grpo": {"steps": 2, "questions": 2, "group": 4, "problems": 8, "max_tokens": 12},
        "reward-model": {"steps": 2, "batch": 4, "problems": 8},
    }
    small["distil"] = small["sft"] | {"sampled": 8}
    return [
        Job(job.name, job.stage, job.inputs, {**job.settings, **small[job.stage]}, job.kinds)
        for job in jobs
    ]


def commands(job: Job, out: Path, problems: int, common: Sequence[str]) -> list[list[str]]:
    """What runs a job: its stage, which goes on where it stopped, and its evaluation."""
    begin = [sys.executable, "-m", "refimpl"]
    place = out / job.name
    line = [*begin, job.stage, "--out", str(place), *common]
    for name, value in job.settings.items():
        line += ["--set", f"{name}={toml_value(value)}"]
    for name, other in job.inputs.items():
        line += ["--set", f"{name}={toml_value(str(out / other))}"]
    if (place / "settings.toml").exists():
        line.append("--resume")
    found = [] if (place / "result.json").exists() else [line]
    if job.kinds and not (out / f"{job.name}.json").exists():
        kinds = [part for kind in job.kinds for part in ("--kind", kind)]
        result = str(out / f"{job.name}.json")
        line = [*begin, "eval", "--checkpoint", str(place), "--problems", str(problems)]
        found.append([*line, *kinds, "--json", result, *common])
    return found


def run_jobs(
    jobs: Sequence[Job],
    out: Path,
    *,
    workers: int,
    problems: int,
    common: Sequence[str] = (),
    tell: Callable[[str], None] = print,
) -> None:
    """Run all jobs, each as soon as those that it needs are done, ``workers`` at a time.

    What a job prints goes to OUT/<job>.log. CouldNotRun names the job that failed, with its last
    line; the others that had begun are ended, and resume. Ctrl-C is handed to all.
    """
    out.mkdir(parents=True, exist_ok=True)
    waiting, done = list(jobs), set[str]()
    running: dict[str, Running] = {}
    try:
        while waiting or running:
            for job in list(waiting):
                if len(running) < workers and set(job.inputs.values()) <= done:
                    waiting.remove(job)
                    running[job.name] = Running(job, commands(job, out, problems, common), out)
                    tell(f"{job.name}: begins")
            for name, process in list(running.items()):
                if process.over():
                    del running[name]
                    done.add(name)
                    tell(f"{name}: done in {process.seconds:.0f} s")
            time.sleep(0.05)
    finally:
        for process in running.values():
            process.stop()


class Running:
    """The commands of a job, one after the other; the time that each took is kept beside."""

    def __init__(self, job: Job, lines: list[list[str]], out: Path) -> None:
        self.job = job
        self.lines = lines
        self.out = out
        self.begin = time.monotonic()
        self.process: subprocess.Popen[bytes] | None = None
        self.seconds = 0.0

    def over(self) -> bool:
        """Whether all commands are done; begins the next one."""
        if self.process is not None:
            if (code := self.process.poll()) is None:
                return False
            if code:
                log = (self.out / f"{self.job.name}.log").read_text(errors="replace")
                last = log.strip().splitlines()[-1:] or ["it printed nothing"]
                raise CouldNotRun(f"{self.job.name} ended with exit code {code}: {last[0]}")
        if not self.lines:
            self.seconds = time.monotonic() - self.begin
            return True
        self._start(self.lines.pop(0))
        return False

    def _start(self, line: list[str]) -> None:
        """One thread each: the cores are the jobs'."""
        one = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        with (self.out / f"{self.job.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                line, stdout=log, stderr=log, env=os.environ | one, start_new_session=False
            )

    def stop(self) -> None:
        """End it; it resumes from its last state."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()
