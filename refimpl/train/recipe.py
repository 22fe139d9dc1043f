"""The recipe as a graph of jobs: every stage, its controls, and what they are compared with.

A job runs a stage in its own process, then evaluates it on held-out problems. Its folder OUT/<job>
is the stage's, with held_out-<kind>.json in it. `graph` runs the jobs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CouldNotRun
from ..files import read_json, read_text
from .save import PHASE
from .settings import make_settings, to_toml, toml_value
from .stage import digest_line, digest_of
from .stages import STAGES
from .tasks import held_out

__all__ = ["JOBS", "PROBLEMS", "Job", "Recipe", "Task", "chosen", "toy"]

PROBLEMS = 1500  # held-out ones of a kind that are asked, or all if there are fewer
STUDENT = {
    "width": 32,
    "layers": 2,
    "heads": 2,
    "q_latent": 16,
    "kv_latent": 16,
    "nope": 8,
    "rope": 8,
    "value": 8,
    "dense_hidden": 64,
    "experts": 4,
    "expert_hidden": 16,
    "mtp_depth": 0,
}
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


class Task(NamedTuple):
    """A command, and its options: True for one without a value, a list for one given repeatedly."""

    command: str
    options: Mapping[str, Any]


MIXTURE = {"untidy": 0.2, "sloppy": 0.2}
COLD_START = MIXTURE | {"distinct": 1500, "steps": 600}
STOP = {"stop": [0.40, 0.55], "evaluate_every": 15, "problems": 256}
SECOND = {"untidy": 0.5, "steps": 100, "learning_rate": 3e-4, "seed": 1}
HARD = "add3"
HARD_START = STOP | {"kinds": [HARD], "steps": 400, "learning_rate": 4e-3, "evaluate_every": 10}
UPDATES = {"minibatches": 4}  # of GRPO, for the outputs of a step
STUDENT_SFT = {"model": STUDENT, "steps": 800}

JOBS = [  # every job, after those that it needs
    Job("base", "train"),
    Job("unbalanced", "train", settings={"bias_speed": 0.0}),
    Job("long", "extend", {"checkpoint": "base"}),
    Job("sft", "sft", {"checkpoint": "long"}, COLD_START | STOP, ("add2",)),
    *(
        Job(f"grpo-{seed}", "grpo", {"checkpoint": "sft"}, UPDATES | {"seed": seed}, ("add2",))
        for seed in SEEDS
    ),
    Job("permuted", "grpo", {"checkpoint": "sft"}, UPDATES | {"permuted": True}, ("add2",)),
    Job("one-update", "grpo", {"checkpoint": "sft"}, {}, ("add2",)),
    Job("continued", "sft", {"checkpoint": "sft"}, MIXTURE | {"steps": 175, "seed": 1}, ("add2",)),
    Job("sft-hard", "sft", {"checkpoint": "sft"}, HARD_START, (HARD,)),
    Job("grpo-hard", "grpo", {"checkpoint": "sft-hard"}, UPDATES | {"kinds": [HARD]}, (HARD,)),
    Job("reward-model", "reward-model", {"checkpoint": "sft"}),
    Job("second-sft", "sft", {"checkpoint": "grpo-0"}, SECOND, ("add2",)),
    Job(
        "last",
        "grpo",
        {"checkpoint": "second-sft", "reward_model": "reward-model"},
        UPDATES | {"model": 0.2, "steps": 60},
        ("add2",),
    ),
    Job("distilled", "distil", {"teacher": "grpo-0"}, STUDENT_SFT, ("add2",)),
    Job("student-gold", "sft", {}, STUDENT_SFT, ("add2",)),
    Job("student-answers", "sft", {}, STUDENT_SFT | {"solutions": "answers"}, ("add2",)),
    Job("student-grpo", "grpo", {"checkpoint": "student-answers"}, UPDATES, ("add2",)),
]


def toy(jobs: Sequence[Job]) -> list[Job]:
    """The same graph at a size that takes seconds, which shows that it runs and nothing else. Its
    text is this file, and the student learns whatever the teacher says."""
    text, brief = {"text": __file__}, {"problems": 4, "max_tokens": 8}
    sft = {"steps": 2, "batch": 8} | brief
    small: dict[str, dict[str, Any]] = {
        "train": {"tokens": 2048, "length": 16, "batch": 16, "warmup_steps": 2} | text,
        "extend": {"steps": 2, "factors": [2, 4], "batches": [4, 2], "measured": 8} | text,
        "sft": sft,
        "grpo": {"steps": 2, "questions": 2, "group": 4} | brief,
        "reward-model": {"steps": 2, "batch": 4, "problems": 8},
        "distil": sft | {"sampled": 8, "verified": False},
    }
    return [replace(job, settings={**job.settings, **small[job.stage]}) for job in jobs]


def chosen(jobs: Sequence[Job], names: Sequence[str]) -> list[Job]:
    """The jobs of these names and those that they need, in order; all without names."""
    by_name = {job.name: job for job in jobs}
    for name in names:
        if name not in by_name:
            raise CouldNotRun(f"must be one of {', '.join(by_name)}, got {name}", argument="only")
    found = set(names or by_name)
    for job in reversed(jobs):  # a job stands behind those that it needs
        if job.name in found:
            found |= set(job.inputs.values())
    return [job for job in jobs if job.name in found]


@dataclass(frozen=True)
class Recipe:
    """Jobs in a folder.

    ``problems``: held-out ones of a kind that are asked at most. ``common``: settings of every job
    (backend, implementation, dtype).
    """

    out: Path
    jobs: Sequence[Job]
    problems: int = PROBLEMS
    common: Mapping[str, str] = field(default_factory=dict)

    @property
    def needs(self) -> dict[str, set[str]]:
        return {job.name: set(job.inputs.values()) for job in self.jobs}

    def job(self, name: str) -> Job:
        return next(job for job in self.jobs if job.name == name)

    def next_task(self, name: str) -> Task | None:
        """What a job has to do next: its stage, which goes on where it stopped, then an evaluation
        per kind; None when all are done. CouldNotRun if what is done is of other settings."""
        job, place = self.job(name), self.out / name
        if not (place / "result.json").exists():
            options = {"out": place, "set": self.overrides(job), **self.common, "resume": True}
            return Task(job.stage, options)
        self.expect_current(job)
        for kind in job.kinds:
            count = asked(kind, self.problems)
            file = held_out_file(place, kind)
            if (
                not file.exists()
                or read_json(file)["results"][f"{kind} greedy"]["problems"] != count
            ):
                options = {"checkpoint": place, "json": file, "kind": kind, "problems": count}
                most = self.settings(job).max_tokens
                return Task("eval", options | {"max_tokens": most, **self.common})
        return None

    def overrides(self, job: Job) -> list[str]:
        """The job's settings, as ``set`` takes them."""
        inputs = {name: str(self.out / other) for name, other in job.inputs.items()}
        return [f"{name}={toml_value(x)}" for name, x in {**job.settings, **inputs}.items()]

    def settings(self, job: Job) -> Any:
        """All settings of a job."""
        kind = STAGES[job.stage].settings
        return make_settings(kind, job.stage, {}, self.overrides(job), self.common)

    def expect_current(self, job: Job) -> None:
        """CouldNotRun unless a finished job has today's settings and began from what its inputs are
        now: results of several recipes are never mixed."""
        place = self.out / job.name
        first = place / f"{PHASE}1" / "settings.toml"  # of a stage with phases, which began there
        begun = first if first.exists() else place / "settings.toml"
        lines = read_text(begun, str(begun)).splitlines()
        digests = {line for line in lines if line.startswith("# ")}
        written = [line for line in lines if line not in digests]
        now = {
            digest_line(name, digest_of(str(self.out / other)))
            for name, other in job.inputs.items()
        }
        wrong = ""
        if written != to_toml({job.stage: self.settings(job)}).splitlines():
            wrong = "has other settings than this recipe"
        elif not now <= digests:
            wrong = f"began from another {' or '.join(job.inputs.values())} than there is"
        if wrong:
            raise CouldNotRun(
                f"{place} {wrong}: remove it and run the same command again, or take another folder"
            )


def held_out_file(place: Path, kind: str) -> Path:
    """The evaluation of a job on the held-out problems of a kind."""
    return place / f"held_out-{kind}.json"


def asked(kind: str, most: int) -> int:
    """How many of the kind's held-out problems are asked."""
    try:
        return len(held_out(kind, most))
    except ValueError:  # there are fewer
        return len(held_out(kind))
