"""``refimpl conventions`` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from refimpl.conventions import TRAPS, WHO

from support import refimpl_here


def test_command(tmp_path: Path) -> None:
    done = refimpl_here("conventions", "--json", str(file := tmp_path / "court.json"))
    assert done.returncode == 0, done.stderr
    for number, trap in enumerate(TRAPS, 1):
        assert f"{number:>2}. {trap.title}: " in done.stdout
        for measure, _ in trap.measures:
            assert measure in done.stdout
    rows = json.loads(file.read_text())["traps"]
    assert [row["number"] for row in rows] == list(range(1, 23))
    assert (
        rows[17]["measured"]["pull on a token that the reference finds e³ times likelier"]["k3"]
        > 19
    )
    assert max(map(len, done.stdout.splitlines())) <= 118
    for name in WHO:
        assert name in done.stdout
    one = refimpl_here("conventions", "18").stdout
    assert one.startswith("18. k3")
    assert "17." not in one


@pytest.mark.parametrize(
    "arguments", [["0"], ["23"], ["3", "--markdown"], ["--json", "/nowhere/file.json"]]
)
def test_errors(arguments: list[str]) -> None:
    done = refimpl_here("conventions", *arguments)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
