"""What stages share: settings that can't be, checkpoints that can't be read, digests of what a run
reads; and every fault of the command line, one line each, with nothing written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl.checkpoint import save_checkpoint
from refimpl.config import preset
from refimpl.errors import CouldNotRun
from refimpl.parameters import init_parameters
from refimpl.train.machine import open_machine
from refimpl.train.save import RunFolder
from refimpl.train.settings import toml_value
from refimpl.train.sft import SFTSettings
from refimpl.train.stage import (
    BaseSettings,
    begin_from,
    checkpoint_of,
    digest_of,
    expect_kinds,
    open_run,
    texts_digest,
    told_metrics,
)
from refimpl.train.step import Told
from refimpl.train.vocabulary import write_vocabulary

from checkpoint.examples import files
from small_stage import CONFIG, MODEL
from support import refimpl_here

MACHINE = open_machine("numpy", "reference")
COMMON = ("--implementation", "reference")
SHORT = ("steps=1", "problems=2")
ANSWERS = (*SHORT, "max_tokens=4")
GIVEN: dict[str, tuple[str, ...]] = {
    "train": ("text=text.txt", "tokens=32", "batch=2", "length=8", f"model={toml_value(MODEL)}"),
    "extend": (
        "text=text.txt",
        "steps=1",
        "factors=[2]",
        "batches=[1]",
        "measured=2",
        "checkpoint=base",
    ),
    "sft": (*ANSWERS, "batch=2", "checkpoint=base"),
    "grpo": (*ANSWERS, "questions=1", "group=2", "checkpoint=base"),
    "reward-model": (*SHORT, "batch=2", "checkpoint=base"),
    "distil": (*ANSWERS, "batch=2", "sampled=2", "teacher=base", f"model={toml_value(MODEL)}"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a checkpoint, and some that are none."""
    folder = tmp_path_factory.mktemp("made")
    lines = (f"The cat sat on mat {i} and had {i * 7 % 13} dogs.\n" for i in range(99))
    (folder / "text.txt").write_text("".join(lines))
    for name in ("base", "foreign", "cut"):
        params = init_parameters(CONFIG, seed=0, std=0.06, dtype="float32")
        save_checkpoint(params, CONFIG, folder / name, dtype="float32")
    for name in ("base", "cut"):
        write_vocabulary(folder / name)
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    small = replace(CONFIG, vocabulary=256)
    save_checkpoint(init_parameters(small), small, folder / "bytes", dtype="float32")
    write_vocabulary(folder / "bytes")
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "settings.toml").write_text("")
    (folder / "letter").mkdir()
    (folder / "letter" / "letter.txt").write_text("Dear Sir")
    (folder / "file").write_text("x")
    return folder


def line_of(made: Path, stage: str, *more: str, out: str = "out") -> list[str]:
    settings = [x for setting in (*GIVEN[stage], *more) for x in ("--set", setting)]
    return [stage, "--out", out, *COMMON, *settings]


NO = "No such file or directory"
FAULTS = [  # stage, a setting, the line
    ("train", "model.top_k=99", "impossible model: top_k must be at most 8, experts / groups ×"),
    ("train", "model.width=1.5", "model.width must be an integer, got 1.5"),
    ("train", "model.vocabulary=5", "model has no setting vocabulary; there are width, layers, "),
    ("train", "model.q_latent=a", "model.q_latent must be an integer, got 'a'"),
    ("train", "model.max_positions=4", "model must have a context of at least 8, got 4"),
    ("train", "model.mtp_depth=8", "model.mtp_depth must be below 8, the length, got 8"),
    ("train", "model.gate=softmax", "config.json can't express gate='softmax'"),
    ("train", "preset=big", "impossible model: preset must be one of tiny, mini, "),
    ("train", "length=0", "length must be at least 2, got 0"),
    ("train", "length=100000", "length must be below "),
    ("train", "tokens=0", "tokens must be at least 1, got 0"),
    ("train", "std=0", "std must be positive, got 0.0"),
    ("train", "vocabulary=5", "vocabulary must be at least 261, or 0 for bytes, got 5"),
    ("train", "text=nowhere", f"--text nowhere can't be read: {NO}"),
    ("train", "steps=3", "train has no setting steps; there are backend, batch, "),
    ("train", "steps", "--set must be name=value, got 'steps'"),
    ("train", "learning_rate=nan", "learning_rate must be finite, got nan"),
    ("train", "beta1=1", "beta1 must be at least 0 and below 1, got 1.0"),
    ("train", "seed=-1", "--seed must be at least 0, got -1"),
    ("train", "dtype=half", "--dtype must be one of float32, float64, bfloat16, got half"),
    ("train", "backend=tpu", "--backend must be numpy or cupy, got tpu"),
    ("extend", "factors=[4, 2]", "factors must be integers above 1 that rise, got (4, 2)"),
    ("extend", "factors=[9999]", "length must be below "),
    ("extend", "beta_fast=0", "impossible settings: yarn.beta_fast must be a finite number above"),
    ("sft", "kinds=[]", "kinds must be among add2, add3, sort4, sort5, got ()"),
    ("sft", "checkpoint=nowhere", "nowhere does not exist"),
    ("sft", "checkpoint=letter", f"letter/config.json can't be read: {NO}"),
    ("sft", "checkpoint=foreign", "foreign has no tokenizer.json: give a checkpoint that has one"),
    ("sft", "checkpoint=bytes", "bytes/tokenizer.json has 261 tokens, and the model of "),
    ("sft", "checkpoint=cut", "cut/model.safetensors is cut off or not a safetensors file: "),
    ("sft", "checkpoint=unfinished", "unfinished holds an unfinished run: finish it first"),
    ("sft", "solutions=nowhere", f"nowhere can't be read: {NO}"),
    ("sft", "solutions=text.txt", "text.txt, line 1: must be a JSON object with prompt and"),
    ("grpo", "checkpoint=", "--checkpoint must name the checkpoint to begin with, got ''"),
    ("grpo", "minibatches=3", "minibatches must divide questions × group = 2, got 3"),
    ("grpo", "loss.x=1", "loss has no setting x; "),
    (
        "grpo",
        "reward_model=base",
        "reward_model base is not a reward model: it has no reward_head.safetensors",
    ),
    ("reward-model", "problems=99999", "problems: count must be at most 1215 for"),
    ("distil", "teacher=", "--teacher must name a checkpoint, got ''"),
]


@pytest.mark.parametrize(("stage", "setting", "told"), FAULTS, ids=lambda x: str(x)[:40])
def test_faults(made: Path, tmp_path: Path, stage: str, setting: str, told: str) -> None:
    """Exit code 2, one line, and no run begun: corrected, the command has its folder."""
    out = tmp_path / "out"
    done = refimpl_here(*line_of(made, stage, setting, out=str(out)), cwd=made)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"refimpl: {told}")
    assert done.stderr.count("\n") == 1
    assert files(tmp_path) == {}


PLACES = [
    ("letter", "letter is not empty and holds no run: nothing was changed"),
    ("file", "file can't be written: File exists"),
    ("file/out", "file/out can't be written: Not a directory"),
    ("unfinished", "unfinished holds a run already: resume it with --resume"),
]


@pytest.mark.parametrize(("out", "told"), PLACES)
@pytest.mark.parametrize("stage", ["train", "extend"])
def test_places(made: Path, stage: str, out: str, told: str) -> None:
    """Where no run can begin; nothing is written or changed."""
    before = files(made)
    done = refimpl_here(*line_of(made, stage, out=out), cwd=made)
    assert (done.returncode, done.stderr) == (2, f"refimpl: {told}\n")
    assert files(made) == before


def test_resume(made: Path, tmp_path: Path) -> None:
    """A run that is finished, or that had other settings or another input, is not gone on with; one
    that isn't there yet begins."""
    out = tmp_path / "out"
    given = tmp_path / "base"
    shutil.copytree(made / "base", given)
    line = line_of(made, "sft", f"checkpoint={given}", out=str(out))
    assert refimpl_here(*line, "--resume", cwd=made).returncode == 0
    before = files(out)

    def told(line: list[str]) -> str:
        done = refimpl_here(*line, cwd=made)
        assert done.returncode == 2
        return done.stderr

    finished = f"refimpl: {out} holds a finished run: nothing was changed\n"
    assert told([*line, "--resume"]) == told(line) == finished
    assert files(out) == before
    (out / "result.json").unlink()
    assert told(line) == f"refimpl: {out} holds a run already: resume it with --resume\n"
    other = f"refimpl: {out / 'settings.toml'} has other settings than this run "
    assert told([*line, "--set", "steps=2", "--resume"]).startswith(f"{other}(steps = 2): give")
    (given / "generation_config.json").write_text('{"eos_token_id": 256, "top_p": 1}')
    assert told([*line, "--resume"]).startswith(f"{other}(# checkpoint: ")
    assert {**before, "result.json": b""} == {**files(out), "result.json": b""}


def test_other_text(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that changed in between is another input."""
    told = {"steps": 0, "evaluation": {}}
    monkeypatch.setattr("refimpl.train.stages.run", lambda stage, folder, live: told)
    text = tmp_path / "text.txt"
    shutil.copy(made / "text.txt", text)
    line = line_of(made, "train", f"text={text}", out=str(tmp_path / "out"))
    assert refimpl_here(*line, cwd=made).returncode == 0
    text.write_text(text.read_text() + "x")
    done = refimpl_here(*line, "--resume", cwd=made)
    assert "has other settings than this run (# text: " in done.stderr
    assert texts_digest(["a", "b\nc"]) != texts_digest(["a", "b", "c"])
    assert texts_digest(["a", "b\nc"]) != texts_digest(["a\nb", "c"])


INPUTS = {"train": ["text"], "extend": ["checkpoint", "text"], "distil": ["teacher"]}


@pytest.mark.parametrize("stage", GIVEN)
def test_inputs(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """settings.toml has the digests of all that a stage reads."""
    told = {"steps": 0, "evaluation": {}}
    monkeypatch.setattr("refimpl.train.stages.run", lambda stage, folder, live: told)
    line = line_of(made, stage, out=str(tmp_path / "out"))
    if stage == "distil":
        line += ["--set", "verified=false"]
    assert refimpl_here(*line, cwd=made).returncode == 0
    lines = (tmp_path / "out" / "settings.toml").read_text().splitlines()
    found = [x.split()[1].rstrip(":") for x in lines if x.startswith("# ")]
    assert found == INPUTS.get(stage, ["checkpoint"])


@pytest.mark.parametrize("stage", ["extend", "sft", "grpo", "reward-model"])
def test_unfinished(made: Path, tmp_path: Path, stage: str) -> None:
    """Options are settings, and go before --set; the folder of an unfinished run is no checkpoint
    to any stage."""
    line = line_of(made, stage, out=str(tmp_path / "out"))
    done = refimpl_here(*line, "--checkpoint", "unfinished", cwd=made)
    told = "refimpl: unfinished holds an unfinished run: finish it first\n"
    assert (done.returncode, done.stderr) == (2, told)


def test_base_settings() -> None:
    """Bounds of what every stage has."""
    for wrong in (
        {"save_every": 0},
        {"evaluate_every": 0},
        {"seed": -1},
        {"rows": -1},
        {"jump": 0.0},
        {"learning_rate": -1.0},
        {"weight_decay": -0.1},
        {"max_norm": 0.0},
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"learning_rate": "x"},
        {"jump": float("inf")},
    ):
        with pytest.raises(CouldNotRun, match=rf"^{next(iter(wrong))} must be "):
            BaseSettings(**wrong)  # type: ignore[arg-type]
    settings = BaseSettings(beta1=0.5, weight_decay=0.0)
    optimizer = settings.optimizer(settings.machine())
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.5, 0.95, 0.0)
    expect_kinds(("add2", "sort4"))
    with pytest.raises(CouldNotRun, match=r"^kinds must be among add2, .*, got \('add2', 'x'\)$"):
        expect_kinds(("add2", "x"))


def test_checkpoints(made: Path, tmp_path: Path) -> None:
    """A path means a checkpoint, the result of a finished run, or a saved state."""
    assert checkpoint_of(made / "base") == made / "base"
    run = tmp_path / "run"
    shutil.copytree(made / "base", run / "checkpoint")
    assert checkpoint_of(run) == run / "checkpoint"
    (run / "settings.toml").write_text("")
    with pytest.raises(CouldNotRun, match="unfinished run"):  # though its checkpoint is whole
        checkpoint_of(run)
    (run / "result.json").write_text("{}")
    assert checkpoint_of(run) == run / "checkpoint"
    begin = begin_from(str(run), MACHINE)
    assert begin.config == replace(CONFIG, mtp_weight=begin.config.mtp_weight)
    assert begin.vocabulary.size == 261
    assert set(begin_from(str(run), MACHINE, mtp=False).params) < set(begin.params)
    assert digest_of(str(run)) == digest_of(str(made / "base"))
    assert digest_of(str(made / "text.txt")) != digest_of(str(made / "file"))
    with pytest.raises(CouldNotRun, match=f"nowhere can't be read: {NO}"):
        digest_of("nowhere")


def test_open_run(tmp_path: Path) -> None:
    """The settings of the run, with the digests of what it reads."""
    folder = open_run(tmp_path, MACHINE, "sft", SFTSettings(), {"text": "ab"}, resume=False)
    assert isinstance(folder, RunFolder)
    lines = (tmp_path / "settings.toml").read_text().splitlines()
    assert lines[:3] == ["# text: ab", "[sft]", "seed = 0"]
    open_run(tmp_path, MACHINE, "sft", SFTSettings(), {"text": "ab"}, resume=True)
    with pytest.raises(CouldNotRun, match=r"\(# text: ac\)"):
        open_run(tmp_path, MACHINE, "sft", SFTSettings(), {"text": "ac"}, resume=True)


def test_told() -> None:
    """The violation is that of the worst layer of the main model; loads of MTP modules are told,
    and all is JSON."""
    config = replace(preset("tiny"), layers=3)
    loads = {1: np.array([2, 2]), 2: np.array([3, 1]), 3: np.array([4, 0])}
    told = told_metrics(Told(3.0, 2.0, [0.5], 0.1, loads, 1.5), 1e-3, config)
    expected: dict[str, Any] = {
        "loss": 3.0,
        "main": 2.0,
        "mtp": [0.5],
        "balance": 0.1,
        "norm": 1.5,
        "learning_rate": 1e-3,
        "violation": 0.5,
        "loads": {"1": [2, 2], "2": [3, 1], "3": [4, 0]},
    }
    assert json.loads(json.dumps(told)) == expected
    assert told_metrics(Told(3.0, 2.0, [], 0.0, {}), 1e-3, config)["violation"] == 0
