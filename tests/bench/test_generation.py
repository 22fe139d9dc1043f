"""benchmarks/generation.py at toy size: a line per column, and the same tokens in each."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refimpl.checkpoint import write_random
from refimpl.config import preset

from support import ROOT

# grouped_mm wants rows of a multiple of 16 bytes
CONFIG = replace(preset("tiny"), width=32, expert_hidden=16, mtp_depth=0)
SIZE = ["--prompt", 9, "--tokens", 6, "--rounds", 2]


def lines_of(out: Path, *columns: str) -> dict[str, dict[str, Any]]:
    """What the script measures, by column and way to run the experts."""
    folder = out.with_name("checkpoint")
    write_random(CONFIG, folder, std=0.3)
    command = [sys.executable, ROOT / "benchmarks" / "generation.py", "--folder", folder, *SIZE]
    command += ["--json", out]
    command += [option for column in columns for option in ("--column", column)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = json.loads(out.read_text())["lines"]
    assert len(done.stdout.splitlines()) == 2 + len(lines)
    for line in lines:
        assert len(line["tokens"]) == 6
        assert len(line["first"]) == len(line["rest"]) == 2
        assert min(line["first"] + line["rest"]) > 0
        assert 10e6 < line["anonymous"] < line["resident"] < 4e9
    return {f"{line['column']} {line['experts']}".strip(): line for line in lines}


def test_ours(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    lines = lines_of(tmp_path / "out.json", "reference", "numba_cpu")
    assert list(lines) == ["reference", "numba_cpu"]
    assert lines["reference"]["tokens"] == lines["numba_cpu"]["tokens"]


def test_beside_transformers(tmp_path: Path) -> None:
    """Its greedy tokens are ours, too."""
    pytest.importorskip("transformers")
    lines = lines_of(tmp_path / "out.json", "reference", "transformers float32")
    columns = ["transformers float32 eager", "transformers float32 grouped_mm"]
    assert list(lines) == ["reference", *columns]
    for column in columns:
        assert lines[column]["tokens"] == lines["reference"]["tokens"]
