"""``refimpl train`` and the other stages: options, settings, exit codes, what is printed."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from refimpl.train.run import Interrupted
from refimpl.train.stages import STAGES

from small_stage import MODEL
from support import Done, refimpl_here

SMALL = (
    "--set",
    f"model={{ {', '.join(f'{name} = {x}' for name, x in MODEL.items())} }}",
    "--set",
    "tokens=200",
    "--set",
    "length=16",
    "--set",
    "batch=5",
    "--set",
    "warmup_steps=1",
    "--implementation",
    "reference",
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_text("the cat sat on the mat, the rat on the hat\n" * 60)
    return file


def train(text: Path, out: Path, *more: object) -> Done:
    return refimpl_here("train", "--text", text, "--out", out, *SMALL, *more)


def test_a_run(text: Path, tmp_path: Path) -> None:
    """A line per evaluation on standard error; the result, and where it is, on standard output."""
    done = train(text, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [line.split(": held out ")[0] for line in lines] == ["train 0", "train 4"]
    last, where = done.stdout.splitlines()
    assert last.startswith("train: 4 steps, held out ")
    assert ", bigram " in last
    assert where == f"the result is {tmp_path / 'out' / 'checkpoint'}"
    run = ("generate", "--checkpoint", tmp_path / "out", "--prompt", "the", "--max-tokens", 1)
    assert refimpl_here(*run).returncode == 0
    assert (tmp_path / "out" / "checkpoint" / "config.json").exists()
    for more in ((), ("--resume",)):
        again = train(text, tmp_path / "out", *more)
        assert (again.returncode, again.stdout) == (2, "")
        assert again.stderr.endswith("holds a finished run: nothing was changed\n")


def test_settings_come_in_order(text: Path, tmp_path: Path) -> None:
    """The file's table, over it --set, over it the options; all are written down."""
    file = tmp_path / "s.toml"
    file.write_text("[train]\nseed = 3\nbias_speed = 0.5\nmax_norm = 2.0\n[sft]\nsteps = 9\n")
    out = tmp_path / "out"
    more = ("--settings", file, "--set", "bias_speed=0.25", "--set", "seed=4", "--seed", 5)
    more += ("--implementation", "fp8", "--set", "fp8=scale=ue8m0,bits=14", "--fp8", "scale=ue8m0")
    done = train(text, out, *more)
    assert done.returncode == 0, done.stderr
    found = tomllib.loads((out / "settings.toml").read_text())["train"]
    names = ("seed", "bias_speed", "max_norm", "tokens", "text", "fp8")
    assert [found[name] for name in names] == [5, 0.25, 2.0, 200, str(text), "scale=ue8m0"]


def test_a_table_of_one_stage(text: Path, tmp_path: Path) -> None:
    """A file without a stage's name may have a setting that is a table."""
    file = tmp_path / "s.toml"
    file.write_text("steps = 1\n[loss]\nclip = [0.1, 0.9]\nfoo = 1\n")
    done = refimpl_here("grpo", "--checkpoint", "x", "--out", tmp_path / "o", "--settings", file)
    assert done.returncode == 2
    assert "loss has no setting foo; there are clip, " in done.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_help(stage: str) -> None:
    """Names every setting with its default, and only options that the stage has."""
    done = refimpl_here(stage, "--help")
    assert done.returncode == 0
    words = " ".join(done.stdout.split())
    for setting in STAGES[stage].settings.__dataclass_fields__:
        assert f" {setting}=" in words
    assert "seed=0," in words
    for option in ("checkpoint", "teacher", "text"):
        has = option in STAGES[stage].settings.__dataclass_fields__
        assert (f"--{option} " in words) == has, option


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "--set", "foo=1"), "train has no setting foo; there are "),
        (("train", "--set", "batch"), "--set must be name=value, got 'batch'"),
        (("train", "--set", "batch=0"), "batch must be at least 1, got 0"),
        (
            ("train", "--dtype", "float16"),
            "--dtype must be one of float32, float64, bfloat16, got float16",
        ),
        (("train", "--settings", "/none.toml"), "/none.toml can't be read"),
        (
            ("train", "--implementation", "fp8", "--fp8", "bits=1"),
            "--fp8 bits must lie in 2…24, or be 0 for float32, got 1",
        ),
        (("train", "--text", "/none"), "--text /none can't be read"),
        (("sft", "--checkpoint", "/none"), "/none"),
        (("grpo",), "--checkpoint must name the checkpoint to begin with, got ''"),
        (("distil", "--set", "model.foo=1"), "model has no setting foo; there are width, "),
        (("extend", "--teacher", "x"), "no such option: --teacher"),
    ],
)
def test_what_cannot_be(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    """One line, exit code 2, and nothing in the folder."""
    done = refimpl_here(*arguments, "--out", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("refimpl: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list((tmp_path / "out").glob("*"))


def test_interrupted(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Says how to go on, and leaves with 130."""

    def stopped(*given: object, **options: object) -> None:
        raise Interrupted("stopped after step 3: the same command with")

    monkeypatch.setattr("refimpl.cli.train.run_stage", stopped)
    done = train(text, tmp_path / "out")
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "refimpl: stopped after step 3: the same command with --resume\n"
