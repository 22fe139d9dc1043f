"""``refimpl eval``: the table, its JSON, what can't be evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from refimpl.checkpoint import save_checkpoint
from refimpl.train.evaluate import interval, measured
from refimpl.train.machine import open_machine
from refimpl.train.stage import begin_from
from refimpl.train.tasks import held_out
from refimpl.train.vocabulary import write_vocabulary

from small_stage import begin
from support import Done, refimpl_here


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    start = begin()
    save_checkpoint(start.params, start.config, folder, dtype="float32")
    write_vocabulary(folder)
    return folder


def evaluated(checkpoint: Path, *more: object) -> Done:
    return refimpl_here("eval", "--checkpoint", checkpoint, "--implementation", "reference", *more)


def test_table_and_json(checkpoint: Path, tmp_path: Path) -> None:
    """The numbers of `measured` on held-out problems: greedy, sampled, of each kind."""
    file = tmp_path / "r.json"
    more = ("--kind", "add2", "--kind", "sort4", "--kind", "add2", "--problems", 5, "--seed", 2)
    done = evaluated(checkpoint, *more, "--max-tokens", 7, "--json", file)
    assert (done.returncode, done.stderr) == (0, "")
    head, *rows = [line.split() for line in done.stdout.splitlines()]
    assert head == ["problems", "answers", "right", "95", "%", "interval", "format", "tokens"]
    assert [row[:3] for row in rows] == [
        ["5", kind, how] for kind in ("add2", "sort4") for how in ("greedy", "sampled")
    ]
    told = json.loads(file.read_text())
    assert (told["checkpoint"], told["seed"]) == (str(checkpoint), 2)
    machine = open_machine("numpy", "reference")
    start = begin_from(str(checkpoint), machine, mtp=False)
    for row, (name, found) in zip(rows, told["results"].items(), strict=True):
        kind, how = name.split()
        wanted = measured(
            start.params,
            start.config,
            start.vocabulary,
            machine,
            held_out(kind, 5),
            temperature={"greedy": 0.0, "sampled": 1.0}[how],
            max_tokens=7,
            seed=2,
        )
        assert found == json.loads(json.dumps(wanted._asdict()))
        low, high = interval(wanted.accuracy * 5, 5)
        assert row[3:] == [
            f"{wanted.accuracy:.3f}",
            f"{low:.3f}…{high:.3f}",
            f"{wanted.format:.3f}",
            f"{wanted.tokens:.1f}",
        ]
    assert told["results"]["add2 greedy"]["tokens"] > 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--kind", "add9"), "--kind must be one of add2, add3, sort4, sort5, got add9"),
        (("--problems", 5000), "--problems must be at most 1215 for add2, got 5000"),
        (("--problems", -1), "invalid value for '--problems'"),
        (("--max-tokens", 59), "--max-tokens must leave room for a prompt of 6 tokens in the cont"),
        (("--max-tokens", 0), "invalid value for '--max-tokens'"),
        (("--seed", -1), "invalid value for '--seed'"),
        (("--dtype", "float16"), "--dtype must be one of float32, float64, bfloat16, got float16"),
        (("--json", "/none/r.json"), "--json /none/r.json can't be written"),
    ],
)
def test_what_cannot_be(arguments: tuple[object, ...], said: str, checkpoint: Path) -> None:
    done = evaluated(checkpoint, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"refimpl: {said}")
    assert done.stderr.count("\n") == 1


def test_no_model(tmp_path: Path) -> None:
    """A folder without one, and a run that is not finished."""
    done = evaluated(tmp_path / "none")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    (tmp_path / "settings.toml").write_text("")
    done = evaluated(tmp_path)
    assert done.returncode == 2
    assert "holds an unfinished run: finish it first" in done.stderr
