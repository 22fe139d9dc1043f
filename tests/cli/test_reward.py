"""``refimpl reward``: the rules of training on a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support import refimpl_here

GOOD = "<think>5+3=8</think><answer>8</answer>"
LINES: list[dict[str, Any]] = [
    {"prompt": "5+3=", "completion": GOOD, "answer": "8"},
    {"completion": GOOD, "answer": "9"},
    {"completion": "5+3=8<answer> 8 </answer>", "answer": "8", "more": [1]},
    {"completion": GOOD, "answer": "8", "ended": False},
]


def written(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_scores(tmp_path: Path) -> None:
    """Means in the table and the JSON, each line's parts in --out."""
    file = written(tmp_path / "a.jsonl", LINES)
    out, told = tmp_path / "o.jsonl", tmp_path / "r.json"
    done = refimpl_here("reward", file, "--out", out, "--json", told)
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split()[:2] for line in done.stdout.splitlines()]
    assert rows[:4] == [
        ["part", "mean"],
        ["accuracy", "0.7500"],
        ["format", "0.5000"],
        ["both", "0.2500"],
    ]
    assert done.stdout.splitlines()[4:] == ["4 completions"]
    parts = [tuple(json.loads(line).values()) for line in out.read_text().splitlines()]
    assert parts == [(1, 1, 1), (0, 1, 0), (1, 0, 0), (1, 0, 0)]
    means = {"accuracy": 0.75, "format": 0.5, "both": 0.25}
    assert json.loads(told.read_text()) == {"file": str(file), "completions": 4, "means": means}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is not JSON: "),
        ("", "line 2 is not JSON: "),
        ("7", "line 2 must be a JSON object"),
        ('{"completion": "x"}', 'line 2: "answer" is missing'),
        ('{"completion": "x", "answer": 8}', 'line 2: "answer" must be a text'),
        ('{"completion": "x", "answer": ""}', 'line 2: "answer" must not be empty'),
        ('{"completion": null, "answer": "8"}', 'line 2: "completion" must be a text'),
        ('{"completion": "x", "answer": "8", "ended": 1}', 'line 2: "ended" must be true or false'),
        ('{"answer": "8", "answer": "9"}', 'line 2: "answer" is given twice'),
    ],
)
def test_bad_lines(line: str, said: str, tmp_path: Path) -> None:
    """They are named, and nothing is written."""
    file = tmp_path / "a.jsonl"
    file.write_text(f"{json.dumps(LINES[0])}\n{line}\n{json.dumps(LINES[0])}\n")
    done = refimpl_here("reward", file, "--out", tmp_path / "o.jsonl")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"refimpl: {file}, {said}")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "o.jsonl").exists()


def test_files_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    good = written(tmp_path / "a.jsonl", LINES)
    for arguments, said in (
        ([tmp_path / "empty"], f"{tmp_path / 'empty'} holds no completion"),
        ([tmp_path / "none"], f"{tmp_path / 'none'} can't be read: No such file or directory"),
        ([good, "--out", tmp_path], f"--out {tmp_path} can't be written: not a regular file"),
    ):
        done = refimpl_here("reward", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"refimpl: {said}\n"
