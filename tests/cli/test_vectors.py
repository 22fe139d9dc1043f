"""``refimpl vectors`` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support import refimpl_here


def test_vectors(tmp_path: Path) -> None:
    done = refimpl_here("vectors", tmp_path / "v", "--op", "rms_norm", "--op", "bias_update")
    assert done.returncode == 0, done.stderr
    assert "5 cases (1 wrong on purpose), " in done.stdout
    index = json.loads((tmp_path / "v" / "index.json").read_text())
    assert set(index["files"]) == {"rms_norm.safetensors", "bias_update.safetensors"}
    done = refimpl_here("vectors", "w", "--op", "rope", "--size", "v3-shaped", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    index = json.loads((tmp_path / "w" / "index.json").read_text())
    assert index["tensors"]["rope-v3-1/in/x"]["shape"] == [2, 4, 4, 64]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["v", "--op", "nothing"], "unknown op nothing; there are linear, "),
        (["v", "--size", "large"], "--size must be one of small, v3-shaped, got large"),
        (["full"], "full exists already: give another folder"),
        (["full/file"], "full/file exists already: give another folder"),
        (["full/file/v", "--op", "linear"], "full/file/v can't be written: Not a directory"),
    ],
)
def test_could_not_run(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    done = refimpl_here("vectors", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
