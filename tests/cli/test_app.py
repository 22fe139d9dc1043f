"""What all commands share: files never half written, output that can't be written, terminals."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from support import refimpl_here, refimpl_process


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    """A result that is there already is replaced in one step, never truncated first."""
    out = tmp_path / "r.json"
    out.write_text("old")
    assert refimpl_here("verify", "linear", "--examples", "1", "--json", str(out)).returncode == 0
    assert json.loads(out.read_text())["ok"] is True


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_output_that_cannot_be_written() -> None:
    with open("/dev/full", "w") as full:
        done = refimpl_process("conventions", "1", stdout=full)
    assert done.returncode == 2
    assert done.stderr == "refimpl: the output can't be written: No space left on device\n"


def test_terminal_without_greek() -> None:
    done = refimpl_process("conventions", "18", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "ln(?_ref/?)" in done.stdout or "KL(?_ref??)" in done.stdout
