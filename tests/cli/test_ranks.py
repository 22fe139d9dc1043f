"""The options of several ranks: which commands have them, and what is refused before any starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from refimpl.cli import ranks
from refimpl.parallel.launch import SIZES

from support import refimpl_here


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SIZES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--ranks", "3", "--context-parallel", "2"], "--context-parallel must divide the 3 ranks"),
        (["--ranks", "2", "--data-parallel", "3"], "--data-parallel must be 2, the 2 ranks over "),
        (["--expert-parallel", "2"], "--expert-parallel must divide the 1 ranks, got 2"),
        (["--ranks", "0"], "--ranks must be at least 1, got 0"),
        (["--ranks", "2", "--timeout", "-1"], "--timeout must be positive, got -1"),
    ],
)
def test_refused(arguments: list[str], line: str, tmp_path: Path) -> None:
    done = refimpl_here("train", "--out", str(tmp_path / "run"), *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"refimpl: {line}")
    assert not (tmp_path / "run").exists()


def test_which_commands() -> None:
    for command in ("train", "sft", "grads"):
        assert "--context-parallel" in refimpl_here(command, "--help").stdout
    for command in ("extend", "grpo", "distil"):
        assert "--context-parallel" not in refimpl_here(command, "--help").stdout


def test_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[int, list[str]]] = []
    monkeypatch.setattr(ranks, "start", lambda count, line: begun.append((count, line)))
    monkeypatch.setattr("sys.argv", ["refimpl", "train", "--ranks", "4"])
    assert ranks.joined(4, None, 2, 1, 300.0) is None
    assert ranks.joined(None, None, 1, 1, 300.0) is None  # one process
    assert begun == [(4, ["train", "--ranks", "4"])]
