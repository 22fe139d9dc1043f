"""``refimpl memory`` as a user meets it: what it shows, and exit code 1 if a bound is broken.
tests/test_memory.py has the measures themselves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from refimpl.cli.memory import CheckMemory, GradsMemory
from refimpl.memory import AttentionMemory, HeadMemory, ModelMemory

from support import refimpl_here

ATTENTION = [AttentionMemory(1024 * n, 2**20 * n, 2**26 * n * n) for n in (1, 2, 4)]
HEAD = [HeadMemory(1024, 2**20, 2**26), HeadMemory(8192, 2**20, 2**29)]
MODEL = [
    ModelMemory(layers, recompute, 2**20 * layers * (1 if recompute else 9), 2**20 * layers, 1.0)
    for layers in (2, 8)
    for recompute in (False, True)
]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Figures that hold in the place of measures."""
    monkeypatch.setattr("refimpl.cli.memory.attention_memory", lambda: ATTENTION)
    monkeypatch.setattr("refimpl.cli.memory.head_memory", lambda: HEAD)
    monkeypatch.setattr("refimpl.cli.memory.model_memory", lambda: MODEL)
    return monkeypatch


def test_it_holds(measured: pytest.MonkeyPatch) -> None:
    done = refimpl_here("memory")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"T  4096: +4.00 MiB,  4.00 x T 1024, +0.39 % of the prob", done.stdout)
    assert "layers 8:  72.00 MiB, with recompute   8.00 MiB, 1.00 x the time" in done.stdout
    assert done.stdout.endswith("\nholds\n")


@pytest.mark.parametrize(
    ("measure", "figures"),
    [
        ("attention_memory", [*ATTENTION[:2], ATTENTION[2]._replace(peak=5 * 2**20)]),
        ("attention_memory", [*ATTENTION[:2], ATTENTION[2]._replace(probabilities=2**24)]),
        ("head_memory", [HEAD[0], HEAD[1]._replace(peak=2**21)]),
        ("head_memory", [HEAD[0]._replace(logits=2**23), HEAD[1]]),
        ("model_memory", [*MODEL[:3], MODEL[3]._replace(peak=16 * 2**20)]),
    ],
    ids=[
        "not linear",
        "too much of the probabilities",
        "grows with T",
        "too much of the logits",
        "recomputed blocks keep too much",
    ],
)
def test_a_broken_bound(measured: pytest.MonkeyPatch, measure: str, figures: list[object]) -> None:
    measured.setattr(f"refimpl.cli.memory.{measure}", lambda: figures)
    done = refimpl_here("memory")
    assert done.returncode == 1
    assert done.stdout.endswith("\nDOES NOT HOLD\n")


@pytest.mark.parametrize(
    ("peak", "of_check", "code"), [(5.9e9, 0.1e9, 0), (6.1e9, 0.1e9, 1), (5.9e9, 0.3e9, 1)]
)
def test_of_grads(
    peak: float, of_check: float, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a checkpoint that is written and gone again; its bound decides the exit code."""

    def measure(checkpoint: Path, out: Path, *, tokens: int, sync: bool = True) -> GradsMemory:
        assert (checkpoint / "config.json").exists()
        assert tokens == 7
        out.mkdir()
        return GradsMemory(int(peak), 3.0 if sync else 2.0, 26_714)

    checked = CheckMemory(int(of_check), 4.0, 840_000_000, 6_700_000_000)
    monkeypatch.setattr("refimpl.cli.memory.grads_memory", measure)
    monkeypatch.setattr("refimpl.cli.memory.check_memory", lambda truth: checked)
    arguments = "--grads", "--model", "tiny", "--layers", 2, "--tokens", 7, "--folder", tmp_path
    done = refimpl_here("memory", *arguments)
    assert (done.returncode, done.stderr) == (code, "")
    assert "refimpl grads: tiny, 2 of 3 layers, 1×7 tokens" in done.stdout
    assert f"peak RssAnon {peak / 1e9:.2f} GB" in done.stdout
    assert "written through to the disk (fsync) 3.0 s, without 2.0 s" in done.stdout
    assert f"check of these gradients: peak RssAnon {of_check / 1e9:.2f} GB, 4 s;" in done.stdout
    assert "the largest tensor has 0.84 GB, all 6.70 GB; bound 0.2 GB" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "0"], "--layers must lie in 1…27 and --tokens be at least 2, got 0, 256"),
        (["--tokens", "1"], "--layers must lie in 1…27 and --tokens be at least 2, got 4, 1"),
        (["--model", "v4"], "v4 is neither a preset"),
        (["--model", "tiny", "--layers", "1", "--folder", "no/such"], "--folder no/such can't be"),
    ],
)
def test_could_not_run(arguments: list[str], message: str) -> None:
    done = refimpl_here("memory", "--grads", *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr
