"""The trainings in examples/ learn, and are short enough to be read at once."""

from __future__ import annotations

import runpy
from typing import Any

import pytest

from support import ROOT

EXAMPLES = ROOT / "examples"


def main(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / name))["main"]


@pytest.mark.parametrize("name", ["train.py", "grpo.py"])
def test_short(name: str) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) < 60


def test_train(capsys: pytest.CaptureFixture[str]) -> None:
    """Held-out text gets nearer; a line of progress, what it says at the end."""
    run = main("train.py")
    first, last = run(steps=1, rows=8, length=16), run(steps=12, rows=8, length=16)
    assert last < 5 < first < 6
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("a bigram model: 2.")
    assert lines[-2].startswith("step 12: loss ")
    assert lines[-1].startswith("The value ")


def test_grpo(capsys: pytest.CaptureFixture[str]) -> None:
    """It copies solutions (tests/train/test_grpo.py shows that GRPO learns), and tells every step's
    reward by part."""
    rewards = main("grpo.py")(copied=50, steps=3, questions=4, group=4)
    first, *lines = capsys.readouterr().out.splitlines()
    assert float(first.removeprefix("copied 50 batches: loss ")) < 1.5
    for step, (reward, line) in enumerate(zip(rewards, lines, strict=True), 1):
        name, right, form = line.split(", ")
        assert name == f"{step}: reward {reward:.2f}"
        parts = float(right.split()[1]) + 0.2 * float(form.split()[1])
        assert abs(reward - parts) < 0.01
