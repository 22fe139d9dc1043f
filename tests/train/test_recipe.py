"""The recipe's graph and its commands: what is next for a job, and what is out of date."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from refimpl.errors import CouldNotRun
from refimpl.train.recipe import JOBS, Job, Recipe, asked, chosen, toy
from refimpl.train.settings import make_settings, to_toml
from refimpl.train.stage import digest_line, digest_of
from refimpl.train.stages import STAGES
from refimpl.train.tasks import KINDS

CHECKPOINT = {"config.json": "{}", "model.safetensors": "weights"}


def finished(recipe: Recipe, name: str) -> Path:
    """The folder of a job as its stage leaves it."""
    place, job = recipe.out / name, recipe.job(name)
    (place / "checkpoint").mkdir(parents=True)
    for file, text in CHECKPOINT.items():
        (place / "checkpoint" / file).write_text(f"{name} {text}")
    lines = [
        digest_line(key, digest_of(str(recipe.out / other))) for key, other in job.inputs.items()
    ]
    settings = to_toml({job.stage: recipe.settings(job)})
    (place / "settings.toml").write_text("\n".join([*lines, settings]))
    (place / "result.json").write_text("{}")
    return place


@pytest.mark.parametrize("jobs", [JOBS, toy(JOBS)], ids=["whole", "toy"])
def test_the_graph_is_sound(jobs: list[Job], tmp_path: Path) -> None:
    """Names once, needs before; every setting exists and is valid, and the inputs are settings."""
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    for place, job in enumerate(jobs):
        assert set(job.inputs.values()) <= set(names[:place])
        assert set(job.kinds) <= set(KINDS)
        settings = Recipe(tmp_path, jobs, common={"dtype": "float64"}).settings(job)
        assert isinstance(settings, STAGES[job.stage].settings)
        for name, other in job.inputs.items():
            assert getattr(settings, name) == str(tmp_path / other)
        assert settings.dtype == "float64"
    assert {job.stage for job in jobs} == set(STAGES)


def test_controls_differ_by_what_they_control(tmp_path: Path) -> None:
    """Paired runs have the same settings but for the one that is looked at."""
    recipe = Recipe(tmp_path, JOBS)

    def differing(a: str, b: str) -> set[str]:
        first, second = (vars(recipe.settings(recipe.job(name))) for name in (a, b))
        return {name for name in first if name in second and first[name] != second[name]}

    assert differing("base", "unbalanced") == {"bias_speed"}
    assert differing("grpo-0", "permuted") == {"permuted"}
    assert differing("grpo-0", "grpo-1") == differing("grpo-0", "grpo-2") == {"seed"}
    assert differing("student-gold", "student-answers") == {"solutions"}
    assert differing("distilled", "student-gold") == set()


def test_chosen() -> None:
    """Those that are needed come too, in the order of the whole."""
    jobs = [
        Job("a", "train"),
        Job("b", "train"),
        Job("c", "extend", {"checkpoint": "a"}),
        Job("d", "sft", {"checkpoint": "c"}),
        Job("e", "grpo", {"checkpoint": "d", "reward_model": "b"}),
        Job("f", "sft"),
    ]
    for names, wanted in (
        ([], "abcdef"),
        (["d"], "acd"),
        (["f", "c"], "acf"),
        (["e"], "abcde"),
        (["a", "a"], "a"),
    ):
        assert "".join(job.name for job in chosen(jobs, names)) == wanted
    with pytest.raises(CouldNotRun, match=r"^only must be one of base, .*, got x$"):
        chosen(JOBS, ["x"])


def test_asked() -> None:
    """No more than there are: add2 has 1,215 held-out problems."""
    assert [asked("add2", most) for most in (20, 1500)] == [20, 1215]
    assert asked("add3", 1500) == 1500


def test_next_task(tmp_path: Path) -> None:
    """The stage, which goes on where it stopped; an evaluation, again for more problems; done."""
    jobs = [Job("a", "sft"), Job("b", "grpo", {"checkpoint": "a"}, {"max_tokens": 9}, ("add2",))]
    recipe = Recipe(tmp_path, jobs, 40, {"dtype": "float64"})
    finished(recipe, "a")
    assert recipe.next_task("a") is None
    place = tmp_path / "b"
    task = recipe.next_task("b")
    assert task is not None
    sets = ["max_tokens=9", f'checkpoint="{tmp_path / "a"}"']
    options = {"out": place, "set": sets, "dtype": "float64", "resume": True}
    assert task == ("grpo", options)
    assert make_settings(
        STAGES["grpo"].settings, "grpo", {}, sets, {"dtype": "float64"}
    ) == recipe.settings(jobs[1])
    finished(recipe, "b")
    options = {"checkpoint": place, "json": place / "held_out-add2.json", "kind": "add2"}
    options |= {"problems": 40, "max_tokens": 9, "dtype": "float64"}
    assert recipe.next_task("b") == ("eval", options)
    for problems, again in ((39, True), (40, False)):
        told = {"results": {"add2 greedy": {"problems": problems}}}
        (place / "held_out-add2.json").write_text(json.dumps(told))
        assert (recipe.next_task("b") is not None) == again


@pytest.mark.parametrize("phases", [False, True])
def test_what_is_out_of_date(phases: bool, tmp_path: Path) -> None:
    """A finished job of other settings, or from another input, is refused, not mixed in."""
    jobs: list[Job] = [Job("a", "sft"), Job("b", "extend", {"checkpoint": "a"}, {"steps": 3})]
    recipe = Recipe(tmp_path, jobs)
    finished(recipe, "a")
    place = finished(recipe, "b")
    if phases:  # then the first phase began from the input, the last from the phase before
        (place / "phase-1").mkdir()
        (place / "settings.toml").rename(place / "phase-1" / "settings.toml")
        (place / "settings.toml").write_text("# checkpoint: another\n[extend]\n")
    assert recipe.next_task("b") is None

    def refused(changed: Recipe) -> str:
        with pytest.raises(CouldNotRun) as error:
            changed.next_task("b")
        return str(error.value)

    end = ": remove it and run the same command again, or take another folder"
    settings: dict[str, Any]
    for settings in ({"steps": 4}, {"steps": 3, "learning_rate": 2e-3}, {}):
        other = Recipe(tmp_path, [jobs[0], Job("b", "extend", {"checkpoint": "a"}, settings)])
        assert refused(other) == f"{place} has other settings than this recipe{end}"
    assert "has other settings" in refused(Recipe(tmp_path, jobs, common={"dtype": "float64"}))
    (tmp_path / "a" / "checkpoint" / "model.safetensors").write_text("other weights")
    assert refused(recipe) == f"{place} began from another a than there is{end}"
