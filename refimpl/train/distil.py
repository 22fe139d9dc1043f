"""Distillation: a student is fine-tuned on solutions that a teacher samples and the rules accept
(DeepSeek-R1, 2501.12948, section 2.4)."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import CouldNotRun
from .draws import seed_of_rows
from .evaluate import answers
from .machine import Machine
from .rewards import score
from .settings import expect_setting
from .sft import SFTSettings, in_turn
from .stage import begin_from

__all__ = ["DistilSettings", "sample_solutions"]

TEACHING = 10**6 + 1  # the number of the draw that the teacher is given


@dataclass(frozen=True)
class DistilSettings(SFTSettings):
    """Settings of `refimpl distil`; fields of `SFTSettings` are those of the student."""

    teacher: str = ""  # a checkpoint
    sampled: int = 8192  # problems given to the teacher; the same one may occur twice
    temperature: float = 1.0  # of the teacher
    verified: bool = True  # keep only solutions that the rules accept; False: keep all

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_setting(self.sampled >= 1, "sampled", "be at least 1", self.sampled)
        expect_setting(self.temperature >= 0, "temperature", "be at least 0", self.temperature)
        for name in ("solutions", "distinct", "untidy", "sloppy"):
            default, given = getattr(SFTSettings, name), getattr(self, name)
            own = given == default
            expect_setting(own, name, "be left out: the solutions are the teacher's", given)


def sample_solutions(
    settings: DistilSettings, machine: Machine
) -> tuple[list[tuple[str, str]], int]:
    """Prompts with the teacher's completions that the rules accept (right, and in the format), or
    with all of them, each once; and how many were accepted, the same one twice among them."""
    teacher = begin_from(settings.teacher, machine, mtp=False)
    problems = in_turn(settings.kinds, settings.seed, TEACHING, settings.sampled)
    found = answers(
        teacher.params,
        teacher.config,
        teacher.vocabulary,
        machine,
        [problem.prompt for problem in problems],
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
        seed=seed_of_rows(settings.seed, "teacher"),
    )
    accepted = [
        (problem.prompt, text)
        for problem, (text, ended, _) in zip(problems, found, strict=True)
        if not settings.verified or all(score(text, problem.answer, ended=ended).values())
    ]
    if not accepted:
        raise CouldNotRun(f"the teacher has no right solution to {len(problems)} problems")
    return list(dict.fromkeys(accepted)), len(accepted)
