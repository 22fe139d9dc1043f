"""``refimpl count`` as a user meets it: printed figures, the JSON file, one line for what could not
run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from refimpl.config import preset
from refimpl.count import count
from refimpl.count_parallel import Plan, count_parallel

from checkpoint.examples import V3_JSON, written
from support import refimpl_here


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["v4"],
            "v4 is neither a preset (tiny, mini, v3, v2, v2-lite, moonlight-16b, kimi-k2, "
            "glm-4.7-flash) nor a file",
        ),
        (["missing.json"], "missing.json is neither a preset"),
        (["."], "config.json can't be read: No such file"),
        (["bad.json"], "bad.json: model_type must be one of deepseek_v2, deepseek_v3, "),
        (["v3", "--length", "1"], "--length must lie in 2…1,000,000,000, got 1"),
        (
            ["v3", "--parallel", "tensor=8"],
            "--parallel tensor=8: tensor is not one of data, expert",
        ),
        (["v3", "--parallel", "data=x"], "--parallel must be data=N,expert=N,context=N,pipeline=N"),
        (["v3", "--parallel", "data=8,expert=3"], "expert must divide data × context = 8, got 3"),
        (["v3", "--parallel", "data=8", "--sequences", "0"], "--sequences must lie in 1…"),
        (["v3", "--sequences", "8"], "--sequences needs --parallel"),
        (["v3", "--json", "no/such/file"], "--json no/such/file can't be written"),
    ],
)
def test_could_not_run(arguments: list[str], message: str, tmp_path: Path) -> None:
    written(tmp_path / "bad.json", {"model_type": "llama"})
    done = refimpl_here("count", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("refimpl: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_printed_text() -> None:
    """V3 is the default, and what it prints holds the figures."""
    done = refimpl_here("count")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for wanted in (
        "187,107,328",
        "44,040,192",
        "11,320,164,352",
        "1,835,008",
        "396,361,728",
        "926,679,040",
        "671,026,404,352",
        "14,848",
        "36.63B",
        "37.55B",
        "36.7B",
        "11.610B",
        "11.507B",
        "13.46B",
        "684,489,845,504",
        "41,540,496",
        "684,531,386,000",
        "70,272 B",
        "98.24 %",
        "93.34 %",
        "82.24 %",
        "81.94 %",
        "2.788M",
        "$5.576M",
        "3 × 18,432 × 7,168",
    ):
        assert wanted in done.stdout, wanted
    assert max(map(len, done.stdout.splitlines())) <= 118
    assert refimpl_here("count", "v3").stdout == done.stdout


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        ("v2", "235.741B"),
        ("v2-lite", "15.706B"),
        ("moonlight-16b", "15.960B"),
        ("tiny", "26,714"),
        ("kimi-k2", "1,026,408,209,408"),
        ("kimi-k2", "1,026,470,727,640"),
        ("glm-4.7-flash", "31,221,488,576"),
    ],
)
def test_printed_text_of_the_others(model: str, wanted: str) -> None:
    done = refimpl_here("count", model, "--length", "100")
    assert done.returncode == 0, done.stderr
    assert wanted in done.stdout
    assert "at length 100" in done.stdout


def test_printed_text_of_a_plan() -> None:
    """The plan that is given, and V3's own; nothing else."""
    done = refimpl_here("count", "v3", "--parallel", "data=256,expert=64,context=8")
    assert done.returncode == 0, done.stderr
    for wanted in (
        "Memory per rank (data=256,expert=64,context=8)",
        "Memory per rank (DeepSeek-V3's own, data=128,expert=64,context=1,pipeline=16)",
        "665,183,059,968 / 256 × 4 × 2 / 16",
        "23,551,721,968 B",
        "23.552G",
        "Sent per rank and step (data=256,expert=64,context=8)",
    ):
        assert wanted in done.stdout, wanted
    assert "KV cache" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 118


def test_json_of_a_plan(tmp_path: Path) -> None:
    arguments = ["--parallel", "expert=2,data=4", "--sequences", "7", "--length", "11"]
    done = refimpl_here("count", "tiny", *arguments, "--json", "out.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    plan = Plan(data=4, expert=2)
    assert (result["parallel"], result["sequences"]) == (plan._asdict(), 7)
    tables = count_parallel(preset("tiny"), plan, sequences=7, length=11)
    assert [table["title"] for table in result["sections"]] == [table.title for table in tables]
    lines = [line._asdict() for table in tables for line in table.lines]
    assert [line for table in result["sections"] for line in table["lines"]] == lines


def test_json(tmp_path: Path) -> None:
    """The file holds the tables; a config.json is counted like its preset; nothing else is left
    behind."""
    written(tmp_path / "config.json", V3_JSON)
    done = refimpl_here(
        "count", "config.json", "--length", "8192", "--json", "out.json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "out.json"]
    result = json.loads((tmp_path / "out.json").read_text())
    assert "parallel" not in result
    assert (result["model"], result["length"], result["config"]["width"]) == (
        "config.json",
        8192,
        7168,
    )
    folder = refimpl_here("count", ".", "--length", "8192", cwd=tmp_path)
    assert folder.stdout.splitlines()[1:] == done.stdout.splitlines()[1:]
    tables = count(preset("v3"), length=8192)
    assert [table["title"] for table in result["sections"]] == [table.title for table in tables]
    lines = [line._asdict() for table in tables for line in table.lines]
    assert [line for table in result["sections"] for line in table["lines"]] == lines
