"""A stage that several ranks run: the files of one process, and runs that go on with others."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from refimpl.errors import CouldNotRun
from refimpl.files import held
from refimpl.generate.sampler import to_numpy
from refimpl.optimizer import AdamW, Moments
from refimpl.parallel.grid import Grid
from refimpl.parallel.ranks import Ranks
from refimpl.train import shared
from refimpl.train.machine import Machine, open_machine
from refimpl.train.pretrain import Pretrain, PretrainSettings
from refimpl.train.reward_model import RewardModelSettings
from refimpl.train.run import Guard, Interrupted
from refimpl.train.save import RunFolder
from refimpl.train.sft import SFTSettings
from refimpl.train.shared import SharedFolder, SharedStage, own_state, whole_state
from refimpl.train.stages import run_stage
from refimpl.train.step import NotTaken, State, train_step

from parallel.threads import in_threads
from pretended_cupy import Pretended, ndarray
from random_parameters import random_parameters
from small_stage import COMMON, CONFIG, MACHINE, MODEL, far, same

GRID = Grid(data=2, context=2, expert=2)
MODEL_SMALL = MODEL | {"layers": 2}


def settings(stage: str, folder: Path) -> Any:
    if stage == "sft":
        answers = {"problems": 4, "max_tokens": 8, "evaluate_every": 3}
        return SFTSettings(**COMMON, **answers, model=MODEL_SMALL, steps=3, batch=5)
    text = folder / "text.txt"
    text.write_text("the cat sat on the mat, the rat on the hat\n" * 40)
    return PretrainSettings(
        **COMMON,
        model=MODEL_SMALL,
        text=str(text),
        tokens=5 * 64,
        length=8,
        batch=9,
        warmup_steps=2,
        save_every=2,
        evaluate_every=3,
    )


def run(stage: str, path: Path, given: Any, grid: Grid | None = None, **how: Any) -> Any:
    """The stage by one process, or by ranks that are threads."""
    if grid is None:
        return run_stage(stage, path, given, **how)

    def work(group: Any) -> Any:
        return run_stage(stage, path, given, ranks=Ranks(grid, group), **how)

    return in_threads(grid.ranks, work)[0]


def metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ["train", "sft"])
def test_the_same_run(stage: str, tmp_path: Path) -> None:
    """Checkpoint, metrics and result of one process, to rounding."""
    given = settings(stage, tmp_path)
    wanted = run(stage, tmp_path / "alone", given)
    found = run(stage, tmp_path / "shared", given, GRID)
    files = [load_file(tmp_path / x / "checkpoint/model.safetensors") for x in ("shared", "alone")]
    assert far(*files) <= 1e-10
    assert {x.name for x in (tmp_path / "shared").iterdir()} == {
        x.name for x in (tmp_path / "alone").iterdir()
    }
    for a, b in zip(*(metrics(tmp_path / x) for x in ("shared", "alone")), strict=True):
        assert a.keys() == b.keys()
        numbers = [x for x in b if x not in ("seconds", "tokens_per_second")]
        for name in numbers:
            if isinstance(b[name], (int, float)):
                assert abs(a[name] - b[name]) <= 1e-9 * max(abs(b[name]), 1.0), name
    assert found["steps"] == wanted["steps"]


def test_other_ranks_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks stop, two go on, and one process ends it."""
    given = settings("train", tmp_path)
    run("train", tmp_path / "alone", given)
    saved = shared.SharedFolder.save
    for grid in (GRID, Grid(2)):

        def save_and_stop(folder: Any, *args: Any, **how: Any) -> Any:
            saved(folder, *args, **how)
            raise KeyboardInterrupt

        monkeypatch.setattr(shared.SharedFolder, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run("train", tmp_path / "shared", given, grid, resume=True)
    states = sorted(x.name for x in (tmp_path / "shared").glob("state-*"))
    assert states == ["state-000004"]
    run("train", tmp_path / "shared", given, resume=True)
    files = [load_file(tmp_path / x / "checkpoint/model.safetensors") for x in ("shared", "alone")]
    assert far(*files) <= 1e-10


def test_the_first_rank_alone_cuts_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow rank would cut off what the first has written since."""
    cut = []
    monkeypatch.setattr(RunFolder, "_cut_metrics", lambda folder, _: cut.append(folder.ranks.rank))
    run("train", tmp_path / "run", settings("train", tmp_path), Grid(2))
    assert cut == [0]


def test_a_state_there_and_back() -> None:
    """What ranks hold of a state, put together, has the same bits; and they hold no more than
    their share of experts and moments."""
    params = random_parameters(CONFIG)
    draw = np.random.default_rng(0).normal
    kept = ({name: draw(size=x.shape) for name, x in params.items()} for _ in range(2))
    state = State(params, Moments(7, *kept), step=7)

    def there_and_back(group: Any) -> Any:
        ranks = Ranks(GRID, group)
        own = own_state(state, CONFIG, ranks)
        numbers = sum(x.size for x in own.moments.first.values())
        return numbers, whole_state(own, ranks)

    found = in_threads(4, there_and_back)
    whole = found[0][1]
    assert same(whole.params, params)
    assert whole.moments.step == 7
    assert all(
        same(dict(a), dict(b)) for a, b in zip(whole.moments[1:], state.moments[1:], strict=True)
    )
    assert sum(numbers for numbers, _ in found) == sum(x.size for x in params.values())


def test_the_parameter_that_is_not_finite(tmp_path: Path) -> None:
    """That of an expert of the second rank, not a gradient that it makes NaN on the first."""
    name, lines = "model.layers.1.mlp.experts.up_proj.weight", []

    def work(group: Any) -> None:
        machine = replace(MACHINE, ranks=Ranks(Grid(2, expert=2), group))
        params = random_parameters(CONFIG)
        params[name][-1] = np.nan
        state = own_state(State(params, Moments()), CONFIG, machine.ranks)
        tokens = np.arange(40).reshape(2, 20)
        with pytest.raises(NotTaken) as error:
            train_step(state, {"tokens": tokens}, CONFIG, machine, AdamW(), learning_rate=0.1)
        lines.append(str(error.value))

    in_threads(2, work)
    assert lines == [f"the loss is nan, and {name} is not finite"] * 2


def test_ranks_that_read_different_texts(tmp_path: Path) -> None:
    """As on two machines whose CPythons ship different ones: no rank trains."""
    texts = [tmp_path / name for name in ("0", "1")]
    given = settings("train", tmp_path)
    for path in texts:
        path.mkdir()
        (path / "text.txt").write_text(Path(given.text).read_text() + path.name)

    def work(group: Any) -> None:
        ranks = Ranks(Grid(2), group)
        own = replace(given, text=str(texts[ranks.rank] / "text.txt"))
        with pytest.raises(
            CouldNotRun, match=r"^ranks differ: rank 1 has # text: \w+, the first # text: "
        ):
            run_stage("train", tmp_path / "run", own, ranks=ranks)

    in_threads(2, work)


def test_an_interrupt_of_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All stop after the same step; only the first shows lines."""
    given, shown = settings("train", tmp_path), []
    monkeypatch.setattr(
        SharedFolder,
        "agreed",
        lambda self, _, agreed=SharedFolder.agreed: agreed(self, self.ranks.rank == 1),
    )
    monkeypatch.setattr("sys.stderr", SimpleNamespace(write=shown.append, flush=int, isatty=bool))
    with pytest.raises(Interrupted, match=r"^stopped after step 0, which is saved"):
        run("train", tmp_path / "run", given, Grid(2))
    assert [x.name for x in (tmp_path / "run").glob("state-*")] == ["state-000000"]
    assert len(shown) == 1


def test_a_folder_in_use(tmp_path: Path) -> None:
    with held(tmp_path / "run"), pytest.raises(CouldNotRun, match=r"is in use by another run$"):
        run("train", tmp_path / "run", settings("train", tmp_path), Grid(2))


def test_a_stage_for_one_process(tmp_path: Path) -> None:
    given = RewardModelSettings(**COMMON, checkpoint=str(tmp_path))

    def work(group: Any) -> Any:
        return run_stage("reward-model", tmp_path / "run", given, ranks=Ranks(Grid(2), group))

    with pytest.raises(CouldNotRun, match=r"^ranks must be left out: train, sft take it, got "):
        in_threads(2, work)


def test_an_error_on_the_first_rank_is_everyones(tmp_path: Path) -> None:
    """A folder that can't be used: all ranks stop, with the same line."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "other").write_text("")
    given, lines = settings("train", tmp_path), []

    def work(group: Any) -> None:
        with pytest.raises(CouldNotRun) as error:
            run_stage("train", tmp_path / "run", given, ranks=Ranks(Grid(2), group))
        lines.append(str(error.value))

    in_threads(2, partial(work))
    assert len(lines) == 2
    assert {*lines} == {f"{tmp_path / 'run'} is not empty and holds no run: nothing was changed"}


def test_on_a_pretended_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of ranks whose arrays don't mix with NumPy's; what they send is theirs again."""
    given = settings("train", tmp_path)

    def two_steps(machine: Machine) -> State:
        stage = Pretrain(given, machine)
        state = (stage if machine.ranks is None else SharedStage(stage, machine.ranks)).start()
        for _ in range(2):
            state, _ = stage.step(state, Guard(stage.jump))
        return state

    def shared_steps(group: Any) -> State:
        machine = replace(open_machine("cupy", "reference", "float64"), ranks=Ranks(GRID, group))
        return whole_state(two_steps(machine), machine.ranks)

    wanted = two_steps(open_machine("numpy", "reference", "float64"))
    monkeypatch.setitem(sys.modules, "cupy", Pretended("cupy"))
    found = in_threads(4, shared_steps)[0]
    assert all(isinstance(x, ndarray) for x in found.params.values())
    assert far({n: to_numpy(x) for n, x in found.params.items()}, wanted.params) <= 1e-9
