"""``refimpl bench --cpu`` from end to end, at toy size."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from refimpl.bench.cpu.rows import GROUPS, TOY_ROWS, select_rows

from support import FULL, refimpl_here

TOY = ("bench", "--cpu", "--toy", "--threads", "1")


def test_toy(tmp_path: Path) -> None:
    """All rows in the full run (9 s of CPU time), else one of a kind, by two of our columns: a
    table, figures, a file and pictures."""
    names = [] if FULL else ["swiglu", "attention", "skew"]
    columns = ("--column", "reference", "--column", "numba_cpu")
    done = refimpl_here(*TOY, *names, *columns, "--commit", "abc", "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "r.json").read_text())
    wanted = select_rows(names, toy=True)
    assert [row["name"] for row in content["rows"]] == [row.name for row in wanted]
    assert (content["threads"], content["commit"], len(content["cores"])) == (1, "abc", 1)
    for row in content["rows"]:
        assert list(row["columns"]) == ["reference", "numba_cpu"], row["notes"]
        assert all(0 <= x["error"] < 1e-5 for x in row["columns"].values())
    for group in {row.group for row in wanted}:
        assert GROUPS[group].title in done.stdout
        picture = tmp_path / f"r-{group}.svg"
        assert picture.exists() == bool(GROUPS[group].along)
    assert "memory, exponent of positions: reference " in done.stdout
    assert "time, one-hot ÷ balanced: reference " in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_interrupted(tmp_path: Path) -> None:
    """What was measured is kept and shown, and no worker is left."""
    out = tmp_path / "r.json"
    command = [sys.executable, "-m", "refimpl", *TOY, "--column", "reference", "--json", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not out.exists() and time.monotonic() < end:
        time.sleep(0.01)
    workers = children(process.pid)
    process.send_signal(signal.SIGINT)
    shown, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    rows = json.loads(out.read_text())["rows"]
    assert 1 <= len(rows) < len(TOY_ROWS)
    assert all(row["name"] in shown for row in rows)
    assert len(workers) == 2
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


def children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def test_wrong_arguments(tmp_path: Path) -> None:
    for arguments, message in (
        (("--cpu", "--gpu"), "needs one of --gpu or --cpu"),
        (("--cpu", "softmax"), "unknown row softmax"),
        (("--cpu", "--column", "cuda"), "unknown column cuda"),
        (("--cpu", "--threads", "0"), "--threads must lie in 1…"),
        (("--cpu", "--json", "/nowhere/x.json"), "can't be written"),
    ):
        done = refimpl_here("bench", *arguments)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert message in done.stderr
    assert os.listdir(tmp_path) == []
