"""What is kept of a run's metrics, and the file of all results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from refimpl.files import read_json
from refimpl.train import results
from refimpl.train.recipe import Job, Recipe
from refimpl.train.results import gather, machine_of, octaves, record_commit, run_of, write_results

from train.recipe_results import SCHEMA, example


def written(place: Path, steps: int, stage: str = "train") -> Path:
    """A finished run: the loss of step n is n, expert 0 has n of 8 tokens."""
    place.mkdir(parents=True)
    lines: list[dict[str, Any]] = [{"kind": "evaluation", "step": 0, "held_out": 5.5}]
    for n in range(1, steps + 1):
        line = {"kind": "step", "step": n, "loss": n + 1e-7, "mtp": [n * 2.0], "seconds": 0.5}
        line["tokens_per_second"] = 64
        lines.append(line | {"loads": {"1": [n % 8, 8 - n % 8]}})
    last = {"held_out": 1.23456789, "accepted": 0.5, "by_position": [3.0, 2.0, 1.0]}
    lines.append(
        {"kind": "evaluation", "step": steps, "samples_greedy": [["a", "[1, \n  2]"]]} | last
    )
    (place / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    result = {"stage": stage, "steps": steps, "tokens": 32 * steps, "evaluation": {}}
    (place / "result.json").write_text(json.dumps(result))
    return place


def test_a_run(tmp_path: Path) -> None:
    """Curves are means of neighbours, as many as are allowed; ends are means of the last fifth."""
    found = run_of(written(tmp_path / "a", 120))
    assert (found["steps"], found["tokens"], found["tokens_per_second"]) == (120, 3840, 64)
    curves = found["curves"]
    assert curves["step"] == [*range(2, 121, 2)]
    assert curves["loss"] == [n + 0.5 for n in range(1, 121, 2)]
    assert curves["mtp 1"] == [2 * n + 1 for n in range(1, 121, 2)]
    assert not {"seconds", "tokens_per_second"} & curves.keys()
    assert found["begin"]["loss"] == pytest.approx(np.arange(1, 13).mean())
    assert found["end"]["loss"] == pytest.approx(np.arange(97, 121).mean())
    assert found["loads"]["step"] == curves["step"]
    assert found["loads"]["1"][:2] == [[0.375, 1.625], [0.875, 1.125]]  # of 1 and 2, 3 and 4
    evaluations = {"step": [0, 120], "held_out": [5.5, 1.2346], "accepted": [None, 0.5]}
    assert found["evaluations"] == evaluations
    assert found["samples"] == {"last": {"samples_greedy": [["a", "[1, \n  2]"]]}}
    assert [*found["positions"]] == ["last"]
    assert "lengths" not in found


def test_a_short_run(tmp_path: Path) -> None:
    found = run_of(written(tmp_path / "a", 3))
    assert found["curves"]["step"] == [1, 2, 3]
    assert found["begin"]["loss"] == pytest.approx(1)
    assert found["end"]["loss"] == pytest.approx(3)


def test_positions() -> None:
    """Every position counts once; single ones first, and no sliver at the end."""
    for count in (3, 100, 128, 512, 513):
        losses = np.arange(1.0, count + 1)
        found = octaves(losses.tolist())
        places, means = np.array(found["position"]), np.array(found["loss"])
        assert (np.diff(places) > 0).all()
        assert places[-1] <= count
        assert means[0] == 1
        # spans are whole: the sum of mean × width is the sum of all
        edges = [1.0]
        for mean in means:
            edges.append(2 * mean - edges[-1] + 1)  # a mean of a, …, b - 1 is (a + b - 1) / 2
        assert edges[-1] == count + 1
        assert count < 100 or edges[-1] - edges[-2] >= 4


def test_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished jobs alone; inputs and settings are the job's, seconds the file's."""
    jobs = [Job("a", "sft", {}, {"steps": 5}, ("add2",)), Job("b", "sft", {"checkpoint": "a"})]
    written(tmp_path / "a", 5, "sft")
    measured = {"problems": 4, "accuracy": 0.5, "low": 0.1, "high": 0.9, "format": 1.0, "tokens": 3}
    told = {"results": {f"add2 {how}": measured | {"samples": []} for how in ("greedy", "sampled")}}
    (tmp_path / "a" / "held_out-add2.json").write_text(json.dumps(told))
    seconds = {"jobs": {"a": 1.25, "b": 7.0}, "total": 8.04}
    (tmp_path / "seconds.json").write_text(json.dumps(seconds))
    commits = iter(["aa", "aa", "bb-dirty"])
    asked = []
    monkeypatch.setattr(results, "commit_of_checkout", lambda *x: asked.append(x) or next(commits))
    for _ in range(3):  # begun, and gone on twice
        record_commit(tmp_path, "a")
    assert asked == [("refimpl", "kernels")] * 3
    recipe = Recipe(tmp_path, jobs, 4, {"implementation": "reference", "dtype": "float64"})
    found = gather(recipe, workers=3, toy=True)
    jsonschema.validate(found, SCHEMA)
    assert [*found["jobs"]] == ["a"]
    job = found["jobs"]["a"]
    assert (job["stage"], job["settings"], job["seconds"]) == ("sft", {"steps": 5}, 1.2)
    assert (job["commits"], found["commit"]) == (["aa", "bb-dirty"], "aa, bb-dirty")
    assert job["held_out"] == {"add2": {"greedy": measured, "sampled": measured}}
    assert (found["seconds"], found["toy"], found["bigram"]) == (8.0, True, None)
    machine = found["machine"]
    assert (machine["workers"], machine["dtype"], machine["NumPy"]) == (
        3,
        "float64",
        np.__version__,
    )
    assert machine["implementation"] == "reference"


def test_machine_knows_what_fastest_was() -> None:
    assert machine_of({})["implementation"] in ("numba_cpu", "reference")


def test_file(tmp_path: Path) -> None:
    """What is written is read again; a list of numbers stands on one line, and nothing inside a
    text changes."""
    made = example() | {"text": 'a [1,  2]\n"é', "empty": [{}, [], None]}
    path = tmp_path / "results.json"
    write_results(path, made)
    assert read_json(path) == json.loads(json.dumps(made))
    assert '"step": [10, 20, 30, 40]' in path.read_text()
    jsonschema.validate(example(), SCHEMA)
    longest = max(path.read_text().splitlines(), key=len)
    assert len(longest) < 400
