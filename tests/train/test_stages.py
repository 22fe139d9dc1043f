"""Every stage from its settings, one after the other on one another's results; and folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from refimpl.errors import CouldNotRun
from refimpl.train import distil
from refimpl.train.rewards import score
from refimpl.train.stage import begin_from
from refimpl.train.stages import STAGES, run_stage

from small_stage import COMMON, MACHINE, MODEL

SFT: dict[str, Any] = {"steps": 2, "batch": 3, "problems": 3, "max_tokens": 6, "evaluate_every": 2}
SMALL: dict[str, dict[str, Any]] = {
    "train": {"model": MODEL, "tokens": 4 * 96, "length": 16, "batch": 6, "warmup_steps": 1},
    "extend": {"factors": (2, 4), "batches": (2, 1), "steps": 2, "measured": 4},
    "sft": SFT,
    "grpo": {"steps": 2, "questions": 2, "group": 2, "problems": 3, "max_tokens": 6},
    "reward-model": {"steps": 2, "batch": 3, "problems": 4},
    "distil": SFT | {"sampled": 6, "model": MODEL},
}


def settings(stage: str, **changed: Any) -> Any:
    return STAGES[stage].settings(**COMMON | SMALL[stage] | changed)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_text("the cat sat on the mat, the rat on the hat\n" * 60)
    return str(file)


@pytest.fixture(scope="module")
def runs(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pre-trained, extended, fine-tuned."""
    out = tmp_path_factory.mktemp("runs")
    run_stage("train", out / "base", settings("train", text=text))
    run_stage("extend", out / "long", settings("extend", text=text, checkpoint=str(out / "base")))
    run_stage("sft", out / "sft", settings("sft", checkpoint=str(out / "long")))
    return out


def test_extended(runs: Path) -> None:
    """Two phases, each a run; the checkpoints have the longer context."""
    lengths = {"base": 16, "long/phase-1": 32, "long": 64, "sft": 64}
    for name, length in lengths.items():
        config = begin_from(str(runs / name), MACHINE).config
        assert config.context == length
        factor = None if config.yarn is None else config.yarn.factor
        assert factor == {16: None, 32: 2.0, 64: 4.0}[length]
    told = [json.loads(line) for line in (runs / "long" / "metrics.jsonl").read_text().splitlines()]
    assert [x["kind"] for x in told] == ["evaluation", "step", "step", "evaluation"]
    assert len(told[0]["by_position"]) == 64


def test_another_text(
    runs: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line says, once, that the checkpoint was trained on another text; nothing is said of the
    same text, or where nobody knows."""
    other = tmp_path / "b.txt"
    other.write_text(Path(text).read_text() * 2)
    shutil.copytree(runs / "base" / "checkpoint", tmp_path / "copy")
    for name, checkpoint, given, lines in (
        ("other", runs / "base", other, 1),
        ("inside", runs / "base" / "checkpoint", other, 1),
        ("same", runs / "base", text, 0),
        ("unknown", tmp_path / "copy", other, 0),
    ):
        chosen = settings("extend", text=str(given), checkpoint=str(checkpoint))
        run_stage("extend", tmp_path / name, chosen)
        said = capsys.readouterr().err
        assert (
            said.count("extend: this is another text than the checkpoint was trained on") == lines
        )


def test_reinforced(runs: Path, tmp_path: Path) -> None:
    """GRPO, a reward model, and GRPO with it: settings.toml has the digest of each input."""
    sft = str(runs / "sft")
    run_stage("grpo", tmp_path / "grpo", settings("grpo", checkpoint=sft))
    run_stage("reward-model", tmp_path / "rm", settings("reward-model", checkpoint=sft))
    changed = {"checkpoint": sft, "reward_model": str(tmp_path / "rm"), "model": 0.5}
    result = run_stage("grpo", tmp_path / "last", settings("grpo", **changed))
    assert (result["stage"], result["steps"]) == ("grpo", 2)
    lines = (tmp_path / "last" / "settings.toml").read_text().splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["# checkpoint", "# reward_model"]
    steps = [json.loads(x) for x in (tmp_path / "last" / "metrics.jsonl").read_text().splitlines()]
    told = steps[1]
    reward = told["accuracy"] + 0.2 * told["format"] + 0.5 * told["model"]
    assert told["reward"] == pytest.approx(reward, rel=1e-12)


def test_distilled(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher is asked once: a run that goes on reads what it said."""
    right = {"accuracy": 1.0, "format": 1.0}
    monkeypatch.setattr(distil, "score", lambda text, answer, *, ended: right)
    given = settings("distil", teacher=str(runs / "sft"), length=24)
    result = run_stage("distil", tmp_path / "out", given)
    assert (result["stage"], result["steps"]) == ("distil", 2)
    lines = (tmp_path / "out" / "solutions.jsonl").read_text().splitlines()
    assert 0 < len(lines) <= 6
    assert json.loads(lines[0]).keys() == {"prompt", "completion"}
    monkeypatch.setattr(distil, "score", score)
    (tmp_path / "out" / "result.json").unlink()
    assert run_stage("distil", tmp_path / "out", given, resume=True)["steps"] == 2
    with pytest.raises(CouldNotRun, match="teacher must name a checkpoint, got ''"):
        run_stage("distil", tmp_path / "other", settings("distil"))


def test_settings_that_cannot_be_leave_nothing(runs: Path, text: str, tmp_path: Path) -> None:
    """No run is begun: at most an empty folder is there."""
    base, long = str(runs / "base"), str(runs / "long")
    for stage, changed in (
        ("train", {"text": text, "length": 10**6}),
        ("extend", {"text": text, "checkpoint": base, "factors": (2, 4000)}),
        ("train", {"text": text, "bias_speed": -1.0}),
        ("extend", {"text": text, "checkpoint": base, "bias_speed": -1.0}),
        ("extend", {"text": text, "checkpoint": base, "mtp_weight": -1.0}),
        ("sft", {"mtp_weight": -1.0}),
        ("sft", {"checkpoint": base}),
        ("sft", {"max_tokens": 10**4}),
        ("grpo", {"checkpoint": base, "max_tokens": 10**4}),
        ("distil", {"teacher": base, "checkpoint": base, "length": 64, "verified": False}),
        ("grpo", {}),
        ("grpo", {"checkpoint": str(tmp_path / "none")}),
        ("grpo", {"checkpoint": base, "reward_model": base}),
        ("reward-model", {"checkpoint": base, "problems": 10**6}),
        ("distil", {"teacher": base, "model": {"foo": 1}}),
        ("distil", {}),
        ("distil", {"teacher": str(tmp_path / "none")}),
        ("distil", {"teacher": base, "length": 64}),  # none of its solutions is right
        ("distil", {"teacher": base, "length": 64, "max_tokens": 11}),  # no room in its context
        # longer than a row, where the context has room
        ("distil", {"teacher": long, "checkpoint": long, "length": 9, "verified": False}),
        ("sft", {"checkpoint": long, "length": 9, "distinct": 1}),
    ):
        with pytest.raises(CouldNotRun):
            run_stage(stage, tmp_path / "out", settings(stage, **changed))
        assert not list((tmp_path / "out").glob("*")), stage


def test_folders_of_others(runs: Path, text: str, tmp_path: Path) -> None:
    """A phase is not begun in a folder that holds something else."""
    given = settings("extend", text=text, checkpoint=str(runs / "base"))
    (tmp_path / "mine").write_text("")
    for resume in (False, True):
        with pytest.raises(CouldNotRun, match="nothing was changed"):
            run_stage("extend", tmp_path, given, resume=resume)
    assert [x.name for x in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(CouldNotRun, match="nothing was changed"):
        run_stage("extend", runs / "long", given)
    with pytest.raises(CouldNotRun, match="holds a finished run: nothing was changed"):
        run_stage("extend", runs / "long", given, resume=True)


def test_a_phase_that_was_stopped(
    runs: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goes on in its own folder, and the first one is not run again: the same result."""
    given = settings("extend", text=text, checkpoint=str(runs / "base"))
    run_stage("extend", tmp_path / "out", given)
    wanted = (tmp_path / "out" / "checkpoint" / "model.safetensors").read_bytes()
    assert wanted == (runs / "long" / "checkpoint" / "model.safetensors").read_bytes()
    (tmp_path / "out" / "result.json").unlink()
    first = (tmp_path / "out" / "phase-1" / "metrics.jsonl").stat().st_mtime_ns
    run_stage("extend", tmp_path / "out", given, resume=True)
    assert (tmp_path / "out" / "phase-1" / "metrics.jsonl").stat().st_mtime_ns == first
    assert (tmp_path / "out" / "checkpoint" / "model.safetensors").read_bytes() == wanted
