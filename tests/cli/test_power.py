"""``refimpl power`` on a short catalogue."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from refimpl.check.planted import PLANTED
from refimpl.cli import power
from refimpl.port import power as service

from support import refimpl_here

FEW = tuple(bug for bug in PLANTED if bug.op in ("linear", "swiglu", "bias_update"))


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "PLANTED", FEW)
    monkeypatch.setattr(service, "PLANTED", FEW)
    ops = {op: service.CASES[op] for op in ("linear", "swiglu")}
    monkeypatch.setattr(service, "CASES", ops)
    monkeypatch.setattr(service, "EXAMPLES", 2)


def test_the_table(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    done = refimpl_here("power", "--draws", "2", "--clean", "1", "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert "linear              weight gradient over one batch row" in done.stdout
    assert "allclose 1e-2" in done.stdout
    assert re.search(r"false alarms of the checker: 0 of \d clean examples", done.stdout)
    assert f"{len(FEW) - 1} of {len(FEW)} planted bugs caught" in done.stdout
    told = json.loads(file.read_text())
    assert len(told["bugs"]) == len(FEW)
    assert {row["op"] for row in told["draws"]["bugs"]} == {"linear", "swiglu"}
    assert told["false_alarms"]["checker"] == 0
    assert len(told["clean_runs"]) == 6


def test_a_survivor_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "kill", lambda bug: service.Row(bug, frozenset(), ()))
    done = refimpl_here("power", "--draws", "1", "--clean", "1")
    assert done.returncode == 1


def test_a_false_alarm_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "clean_runs", lambda draws: [("linear", "float32", 4.5)])
    done = refimpl_here("power", "--draws", "1")
    assert done.returncode == 1
    assert "1 of 1 clean runs" in done.stdout


def test_numbers_that_mean_nothing() -> None:
    done = refimpl_here("power", "--draws", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "refimpl: --draws must be at least 1, got 0\n"
