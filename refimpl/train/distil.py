"""Distillation: solutions that a teacher samples and the rules accept, for a smaller student to
learn (DeepSeek-R1, 2501.12948, section 2.4: no reinforcement of the student)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import CouldNotRun
from ..files import write_text
from .evaluate import answers
from .machine import Machine
from .rewards import score
from .settings import expect_setting
from .sft import SFTSettings
from .stage import begin_from
from .tasks import draw

__all__ = ["DistilSettings", "sample_solutions"]


@dataclass(frozen=True)
class DistilSettings(SFTSettings):
    teacher: str = ""  # a checkpoint
    sampled: int = 8192  # problems that the teacher is given
    temperature: float = 1.0
    verified: bool = True  # only solutions that the rules accept; False: all

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_setting(self.sampled >= 1, "sampled", "be at least 1", self.sampled)


def sample_solutions(settings: DistilSettings, machine: Machine, path: Path) -> tuple[int, int]:
    """Write the teacher's completions that the rules accept (right, and in the format), or all, as
    JSONL; how many, of how many."""
    teacher = begin_from(settings.teacher, machine, mtp=False)
    lines, asked = [], 0
    for kind in settings.kinds:
        problems = draw(kind, settings.seed, TEACHING, settings.sampled // len(settings.kinds))
        found = answers(
            teacher.params,
            teacher.config,
            teacher.vocabulary,
            machine,
            [problem.prompt for problem in problems],
            temperature=settings.temperature,
            max_tokens=settings.max_tokens,
            seed=settings.seed,
        )
        asked += len(problems)
        for problem, (text, ended, _) in zip(problems, found, strict=True):
            judged = score(text, problem.answer, ended=ended)
            if not settings.verified or (judged["accuracy"] and judged["format"]):
                lines.append(json.dumps({"prompt": problem.prompt, "completion": text}))
    if not lines:
        raise CouldNotRun(f"the teacher has no right solution to {asked} problems")
    write_text(path, "\n".join(lines) + "\n")
    return len(lines), asked


TEACHING = 10**6 + 1  # the number of the draw that the teacher is given
