"""``refimpl conventions`` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from refimpl.conventions import SYMPTOMS, TRAPS, WHO

from support import refimpl_here


def test_command(tmp_path: Path) -> None:
    done = refimpl_here("conventions", "--json", str(file := tmp_path / "court.json"))
    assert done.returncode == 0, done.stderr
    for number, trap in enumerate(TRAPS, 1):
        assert f"{number:>2}. {trap.title}: " in done.stdout
        for measure, _ in trap.measures:
            assert measure in done.stdout
    rows = json.loads(file.read_text())["traps"]
    assert [row["number"] for row in rows] == list(range(1, len(TRAPS) + 1))
    assert (
        rows[17]["measured"]["pull on a token that the reference finds e³ times likelier"]["k3"]
        > 19
    )
    assert max(map(len, done.stdout.splitlines())) <= 118
    for name in WHO:
        assert name in done.stdout
    said = rows[1]["who"]["vLLM"]
    assert (said["how"], said["version"]) == ("read", "vLLM 03356f8")
    assert rows[2]["who"]["HF"]["test"].startswith("tests/oracle/")
    assert done.stdout.count("    from outside") == len(TRAPS)
    for line in ("(read, vLLM 03356f8)", "(run, transformers 5.24.0)", "(told)"):
        assert line in " ".join(done.stdout.split())
    one = refimpl_here("conventions", "18").stdout
    assert one.startswith("18. k3")
    assert "17." not in one


def test_by_word_and_by_symptom() -> None:
    found = refimpl_here("conventions", "rope", "2").stdout
    starts = [line.split(".")[0].strip() for line in found.splitlines() if line[:2].strip()]
    assert starts == ["7", "8", "20", "22", "27", "2"]
    index = " ".join(refimpl_here("conventions", "--symptoms").stdout.split())
    assert "27. RoPE's layout; 8. YaRN's mscale" in index
    assert all(symptom.split()[0] in index for symptom in SYMPTOMS)


@pytest.mark.parametrize(
    "arguments",
    [
        ["0"],
        [str(len(TRAPS) + 1)],
        ["quantum"],
        ["3", "--markdown"],
        ["3", "--symptoms"],
        ["--symptoms", "--markdown"],
        ["--json", "/nowhere/file.json"],
    ],
)
def test_errors(arguments: list[str]) -> None:
    done = refimpl_here("conventions", *arguments)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
