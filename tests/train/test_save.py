"""A run's folder: a state comes back bit for bit or is refused; whatever breaks while it is
written, the one before is there."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from refimpl.checkpoint import Checkpoint, save_checkpoint
from refimpl.config import preset
from refimpl.errors import CouldNotRun
from refimpl.optimizer import Moments
from refimpl.parameters import is_buffer
from refimpl.train import save
from refimpl.train.machine import open_machine
from refimpl.train.save import RunFolder, expect_place, load_parameters, model_digest
from refimpl.train.step import State

from checkpoint.examples import files, random_parameters
from support import FULL

CONFIG = replace(preset("tiny"), mtp_weight=0.2)
MACHINES = {dtype: open_machine("numpy", "reference", dtype) for dtype in ("float32", "float64")}
MACHINES["bfloat16"] = replace(MACHINES["float32"], dtype="bfloat16")
SETTINGS = "[sft]\nsteps = 3\n"


def state_after(step: int, dtype: str = "float64") -> State:
    real = MACHINES[dtype].real
    params = random_parameters(CONFIG, step, real)
    first = {name: x * 2 for name, x in params.items() if not is_buffer(name)}
    second = {name: x * x for name, x in first.items()}
    master = {name: params[name] for name in first} if dtype == "bfloat16" else {}
    extra = {"reward_head.weight": np.full((1, 3), step, real)}
    moments = Moments(step, first, second, master)
    return State(MACHINES[dtype].placed(params), moments, step, 10 * step, 20 * step, extra)


def opened(path: Path, dtype: str = "float64", *, resume: bool = False) -> RunFolder:
    folder = RunFolder(path, MACHINES[dtype], SETTINGS)
    folder.open(resume=resume)
    return folder


def everything(state: State | None) -> Any:
    assert state is not None
    parts = (state.params, *state.moments[1:], state.extra)
    tensors = [{n: (x.dtype, x.shape, x.tobytes()) for n, x in part.items()} for part in parts]
    return tensors, state.moments.step, state.step, state.tokens, state.position


@pytest.mark.parametrize("dtype", MACHINES)
def test_round_trip(tmp_path: Path, dtype: str) -> None:
    """Every tensor and count, in all types, bfloat16's masters too; the state is writable; the
    metrics are cut back to it; the state before goes."""
    folder = opened(tmp_path / "run", dtype)
    assert folder.latest(CONFIG) is None
    folder.write_metrics({"kind": "step", "step": 9, "loss": 0.1})
    folder.save(state_after(9, dtype), CONFIG)
    folder.write_metrics({"kind": "step", "step": 10, "loss": np.float32(0.1)})
    folder.save(state_after(10, dtype), CONFIG)
    assert [x.name for x in folder.states()] == ["state-000010"]
    folder.write_metrics({"kind": "step", "step": 11, "loss": np.inf, "x": np.array([1, np.nan])})
    again = opened(tmp_path / "run", dtype, resume=True)
    assert again.metrics()[2] == {"kind": "step", "step": 11, "loss": "inf", "x": [1.0, "nan"]}
    found = again.latest(CONFIG)
    assert everything(found) == everything(state_after(10, dtype))
    assert [x["step"] for x in again.metrics()] == [9, 10]
    for x in (*found.params.values(), *found.moments.first.values(), *found.extra.values()):  # type: ignore[union-attr]
        x[...] = 0


def test_twice(tmp_path: Path) -> None:
    """A run has one state after a step: it is not written again over itself."""
    folder = opened(tmp_path)
    place = folder.save(state_after(1), CONFIG)
    before = files(tmp_path)
    folder.write_metrics({"kind": "evaluation", "step": 1})
    assert folder.save(state_after(1), CONFIG) == place
    assert files(tmp_path) == before | {"metrics.jsonl": b'{"kind": "evaluation", "step": 1}\n'}


def test_order(tmp_path: Path) -> None:
    """The latest is that of the most steps, also where their number has more digits."""
    folder = opened(tmp_path)
    for name in ("state-999999", "state-1000000", "state-000002", "stopped-2000000", "state-x"):
        (tmp_path / name).mkdir()
    names = [x.name for x in folder.states()]
    assert names == ["state-000002", "state-999999", "state-1000000"]


def test_not_as_saved(tmp_path: Path) -> None:
    """Any file of a state that is missing, shortened, or has one other byte: one line, which says
    what to do, and nothing changes."""
    folder = opened(tmp_path / "run")
    folder.write_metrics({"step": 1})
    target = folder.save(state_after(1), CONFIG)
    folder.write_metrics({"step": 2})
    names = [x for x in files(target) if x != "state.json"]
    assert sorted(names) == [
        "checkpoint/config.json",
        "checkpoint/model.safetensors",
        "extra.safetensors",
        "moments.safetensors",
    ]
    line = "is not as it was saved: remove .*state-000001 to resume from the state before it"
    for name in names:
        whole = (target / name).read_bytes()
        other = bytearray(whole)
        other[len(whole) // 2] ^= 1
        for content in (bytes(other), whole[:-1], whole[:100], b"", None):
            (target / name).unlink()
            if content is not None:
                (target / name).write_bytes(content)
            before = files(tmp_path)
            with pytest.raises(CouldNotRun, match=f"{name} {line}"):
                folder.latest(CONFIG)
            assert files(tmp_path) == before
            (target / name).write_bytes(whole)
    assert everything(folder.latest(CONFIG)) == everything(state_after(1))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda x: b"{", "is not JSON"),
        (lambda x: b"[]", "must hold format, step, moments, tokens, position, metrics and files"),
        (lambda x: x.replace(b'"step": 1', b'"step": "1"'), "must hold format, step"),
        (lambda x: x.replace(b'"files"', b'"file"'), "metrics and files$"),
        (
            lambda x: x.replace(b'"format": 1', b'"format": 2'),
            "was saved by another version of refimpl: its format is 2, not 1$",
        ),
        (
            lambda x: x.replace(b'"metrics": 12', b'"metrics": 13'),
            r"metrics\.jsonl must have at least 13 bytes, as the state says$",
        ),
    ],
)
def test_foreign_state(tmp_path: Path, change: Callable[[bytes], bytes], line: str) -> None:
    folder = opened(tmp_path)
    folder.write_metrics({"step": 1})
    place = folder.save(state_after(1), CONFIG) / "state.json"
    content = place.read_bytes()
    assert change(content) != content
    place.write_bytes(change(content))
    before = files(tmp_path)
    with pytest.raises(CouldNotRun, match=line):
        folder.latest(CONFIG)
    assert files(tmp_path) == before


def test_other_model(tmp_path: Path) -> None:
    """A state of other shapes than the run's; λ and the conventions, which no file has, are the
    run's."""
    folder = opened(tmp_path)
    folder.save(state_after(1), CONFIG)
    with pytest.raises(CouldNotRun, match="holds a model of other shapes than this run's"):
        folder.latest(replace(CONFIG, width=24))
    assert folder.latest(replace(CONFIG, mtp_weight=0.7)) is not None


def test_metrics(tmp_path: Path) -> None:
    """Lines that are no JSON are refused, not passed over."""
    folder = opened(tmp_path)
    assert folder.metrics() == []
    folder.write_metrics({"loss": 0.1 + 0.2})
    assert folder.metrics() == [{"loss": 0.1 + 0.2}]
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1}\n{"los')
    with pytest.raises(CouldNotRun, match=r"metrics\.jsonl, line 2 is not JSON"):
        folder.metrics()


PLACES: dict[str, tuple[tuple[str, ...], str | None, str | None]] = {
    # what is there; the line without --resume, and with it
    "new": ((), None, None),
    "interrupted": (("settings.toml.0123.partial",), None, None),
    "foreign": (("letter.txt",), "is not empty and holds no run", "is not empty and holds no run"),
    "hidden": ((".git",), "is not empty and holds no run", "is not empty and holds no run"),
    "run": (("settings.toml",), "holds a run already: resume it with resume", None),
    "phase": (("phase-1",), "holds a run already: resume it with resume", None),
    "finished": (
        ("settings.toml", "result.json"),
        "holds a finished run: nothing was changed",
        "holds a finished run: nothing was changed",
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_places(tmp_path: Path, place: str) -> None:
    names, *lines = PLACES[place]
    for name in names:
        (tmp_path / name).write_text("x")
    before = files(tmp_path)
    for resume, line in zip((False, True), lines, strict=True):
        if line is None:
            expect_place(tmp_path, resume=resume)
        else:
            with pytest.raises(CouldNotRun, match=line):
                expect_place(tmp_path, resume=resume)
            with pytest.raises(
                CouldNotRun, match=line if place != "finished" else "other settings"
            ):
                opened(tmp_path, resume=resume)
    assert files(tmp_path) == before
    with pytest.raises(CouldNotRun, match="can't be used: Not a directory"):
        expect_place(Path(__file__), resume=False)


def test_open(tmp_path: Path) -> None:
    """Settings are written once; others are refused by the first line that differs; half-written
    files and folders of a killed process go, and nothing else."""
    opened(tmp_path / "a" / "b")
    place = tmp_path / "a" / "b" / "settings.toml"
    assert place.read_text() == SETTINGS
    other = RunFolder(place.parent, MACHINES["float32"], SETTINGS.replace("3", "4"))
    with pytest.raises(CouldNotRun, match=r"has other settings than this run \(steps = 4\): give"):
        other.open(resume=True)
    fewer = RunFolder(place.parent, MACHINES["float32"], "[sft]\n")
    with pytest.raises(CouldNotRun, match=r"\(fewer\)"):
        fewer.open(resume=True)
    (place.parent / "state-000001.0123.partial" / "checkpoint").mkdir(parents=True)
    (place.parent / "settings.toml.0123.partial").write_text("x")
    (place.parent / "stopped-000001").mkdir()
    opened(place.parent, resume=True)
    assert sorted(x.name for x in place.parent.iterdir()) == ["settings.toml", "stopped-000001"]


def test_unwritable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CouldNotRun) as error:
        opened(tmp_path / "run")
    assert str(error.value) == (
        f"{tmp_path / 'run'} can't be written: Permission denied; no state is saved yet: remove "
        "the cause, and resume with resume"
    )


class Full:
    """A disk that is full from the ``number``-th write on: of bytes, a folder, or a name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.left = number
        for place, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "mkdir")):
            monkeypatch.setattr(place, name, self.limited(getattr(place, name)))

    def limited(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **kwargs)

        return call


@pytest.mark.parametrize("what", ["state", "stopped", "result"])
def test_full_disk(tmp_path: Path, what: str) -> None:
    """Wherever a save fails, the line says so, the state before is whole, and nothing half-written
    stays; when there is room, the same save works."""
    folder = opened(tmp_path / "run")
    folder.save(state_after(1), CONFIG)
    before = files(tmp_path)

    def write() -> None:
        if what == "result":
            folder.finish(state_after(2), CONFIG, {"steps": 2})
        else:
            folder.save(state_after(2), CONFIG, "stopped-000002" if what == "stopped" else None)

    number, failed = 0, True
    while failed:
        with pytest.MonkeyPatch.context() as patch:
            failed = False
            Full(patch, number)
            try:
                write()
            except CouldNotRun as error:
                failed, line = True, str(error)
        if not failed:
            break
        number += 1 if FULL else 3
        assert "can't be written: No space left on device; state-00000" in line
        assert line.endswith("is kept: remove the cause, and resume with resume")
        rest = files(tmp_path)
        assert not [name for name in rest if "partial" in name]
        if "run/result.json" not in rest:
            assert {name: rest[name] for name in before} == before
            assert everything(folder.latest(CONFIG))[2] in (1, 2)
    assert number > 10
    assert folder.finished == (what == "result")
    left = [] if what == "result" else ["state-000001" if what == "stopped" else "state-000002"]
    assert [x.name for x in folder.states()] == left


def die_at(number: int, work: Callable[[], Any]) -> NoReturn:
    """Do the work in this process until the ``number``-th write, and end at once: nothing is
    cleaned up."""
    left = [number]

    def cut(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            return os._exit(9) if left[0] < 0 else function(*args, **kwargs)

        return call

    try:
        for name in ("fsync", "rename", "replace", "unlink"):
            setattr(os, name, cut(getattr(os, name)))
        shutil.rmtree = cut(shutil.rmtree)  # type: ignore[assignment]
        work()
        os._exit(0)
    finally:
        os._exit(70)


@pytest.mark.filterwarnings("ignore:This process")  # of Python 3.12: has threads, and forks
@pytest.mark.filterwarnings("ignore:os.fork")  # of JAX, where another test has imported it
@pytest.mark.parametrize("what", ["state", "result"])
def test_power_cut(tmp_path: Path, what: str) -> None:
    """A process that ends at any point of a save or of the end leaves a folder that opens: with
    this state, the one before, or the result."""
    start = opened(tmp_path / "run")
    start.write_metrics({"step": 1})
    start.save(state_after(1), CONFIG)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    start.write_metrics({"step": 2})
    found = []

    def finish() -> None:
        start.finish(state_after(2), CONFIG, {"steps": 2})

    def save_state() -> None:
        start.save(state_after(2), CONFIG)

    for number in range(0, 200, 1 if FULL else 5):
        if (pid := os.fork()) == 0:
            die_at(number, finish if what == "result" else save_state)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if (tmp_path / "run" / "result.json").exists():
            params, _ = load_parameters(tmp_path / "run" / "checkpoint", MACHINES["float64"])
            assert everything(state_after(2)._replace(params=params)) == everything(state_after(2))
            found.append(3)
        else:
            folder = opened(tmp_path / "run", resume=True)
            state = folder.latest(CONFIG)
            assert state is not None
            assert everything(state) == everything(state_after(state.step))
            assert len(folder.metrics()) == state.step
            found.append(state.step)
        assert code in (0, 9)
        if code == 0:
            break
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "copy", tmp_path / "run")
        start.write_metrics({"step": 2})
    assert found == sorted(found)
    assert {1, found[-1]} == set(found)
    assert len(found) > 5


def test_finish(tmp_path: Path) -> None:
    """The result: a checkpoint with what the stage puts beside it, result.json, no states; what is
    there from a process that was stopped just before is written anew."""
    folder = opened(tmp_path / "run")
    folder.save(state_after(1), CONFIG)
    (folder.path / "checkpoint").mkdir()
    (folder.path / "checkpoint" / "old.json").write_text("{}")
    state = state_after(2)
    result = {"steps": np.int64(2), "loss": float("nan")}
    folder.finish(state, CONFIG, result, lambda place: (place / "x.txt").write_text("x") and None)
    assert sorted(files(folder.path)) == [
        "checkpoint/config.json",
        "checkpoint/model.safetensors",
        "checkpoint/x.txt",
        "result.json",
        "settings.toml",
    ]
    assert json.loads((folder.path / "result.json").read_text()) == {"steps": 2, "loss": "nan"}
    found = Checkpoint.open(folder.path / "checkpoint", dtype="float64")
    assert all(found.tensor(name).tobytes() == x.tobytes() for name, x in state.params.items())


def test_stopped(tmp_path: Path) -> None:
    """A state to look into stands beside the others and is not gone on from; it is written anew
    each time, with what the stage puts beside the weights."""
    folder = opened(tmp_path / "run")
    folder.save(state_after(1), CONFIG)
    for text in ("x", "y"):
        place = folder.save(
            state_after(2),
            CONFIG,
            "stopped-000002",
            lambda place, text=text: (place / "x.txt").write_text(text) and None,  # type: ignore[misc]
        )
        assert (place / "checkpoint" / "x.txt").read_text() == text
    latest = folder.latest(CONFIG)
    assert latest is not None
    assert latest.step == 1
    params, _ = load_parameters(place / "checkpoint", MACHINES["float64"])
    assert everything(state_after(2)._replace(params=params)) == everything(state_after(2))
    assert {"checkpoint/x.txt"} < set(json.loads((place / "state.json").read_text())["files"])


def test_digest(tmp_path: Path) -> None:
    """Of weights and configuration, whatever else is beside them."""
    save_checkpoint(random_parameters(CONFIG), CONFIG, tmp_path / "a", dtype="float64")
    save_checkpoint(random_parameters(CONFIG), CONFIG, tmp_path / "b", dtype="float64")
    (tmp_path / "b" / "README.md").write_text("x")
    assert model_digest(tmp_path / "a") == model_digest(tmp_path / "b")
    (tmp_path / "b" / "generation_config.json").write_text("{}")
    assert model_digest(tmp_path / "a") != model_digest(tmp_path / "b")
    assert save.FORMAT == 1
