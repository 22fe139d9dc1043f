"""The loop: a run that was stopped anywhere and goes on has the bits of one that was not; losses
that are not finite or jump; Ctrl-C; the live line; kills of every stage."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from refimpl.files import held
from refimpl.train.machine import open_machine
from refimpl.train.run import RECENT, Guard, Live, shown
from refimpl.train.save import RunFolder, load_parameters
from refimpl.train.sft import SFT
from refimpl.train.stage import begin_from
from refimpl.train.step import NotTaken, not_finite

from support import FULL, Done, refimpl_here
from train.kill import MODEL, content

HERE = Path(__file__).parent
LINE = ["sft", "--implementation", "reference", "--set", MODEL]
SETTINGS = {
    "steps": 4,
    "batch": 2,
    "problems": 2,
    "max_tokens": 4,
    "save_every": 2,
    "evaluate_every": 3,
}


def sft(out: Path, *more: str, resume: bool = False, **changed: Any) -> Done:
    line = [*LINE, "--out", str(out), *more]
    for name, value in {**SETTINGS, **changed}.items():
        line += ["--set", f"{name}={value}"]
    return refimpl_here(*line, *(["--resume"] if resume else []))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing stops."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = sft(out)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^sft: 4 steps, greedy 0,.*\nthe result is .*run/checkpoint\n$", done.stdout)
    return out


class PowerCut(Exception):
    """Where a test stops a run."""


def test_metrics(whole: Path) -> None:
    """A line per step and evaluation, in order; the result is the last evaluation."""
    lines = RunFolder(whole, open_machine(), "").metrics()
    kinds = [(x["kind"], x["step"]) for x in lines]
    assert kinds == [
        ("evaluation", 0),
        ("step", 1),
        ("step", 2),
        ("step", 3),
        ("evaluation", 3),
        ("step", 4),
        ("evaluation", 4),
    ]
    result = json.loads((whole / "result.json").read_text())
    assert result["evaluation"] | {"kind": "evaluation", "step": 4} == lines[-1]
    assert (result["stage"], result["steps"]) == ("sft", 4)
    steps = [x for x in lines if x["kind"] == "step"]
    assert all(x["seconds"] > 0 for x in steps)
    tokens = sum(x["tokens_per_second"] * x["seconds"] for x in steps)
    assert tokens == pytest.approx(result["tokens"], abs=sum(x["seconds"] for x in steps))
    assert sorted(x.name for x in whole.iterdir()) == [
        "checkpoint",
        "metrics.jsonl",
        "result.json",
        "settings.toml",
    ]


@pytest.mark.parametrize("number", [0, 1, 3, 5, 6])
def test_interrupted(
    whole: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before each line of the metrics, once before any state was saved; then it goes
    on."""
    write, left = RunFolder.write_metrics, [number]

    def cut(folder: RunFolder, line: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise PowerCut
        write(folder, line)

    monkeypatch.setattr(RunFolder, "write_metrics", cut)
    assert sft(tmp_path / "run").returncode == 70
    monkeypatch.undo()
    states = [x.name for x in (tmp_path / "run").glob("state-*")]
    assert states == ([] if number < 3 else [f"state-{number // 6 * 2 + 2:06d}"])
    assert sft(tmp_path / "run", resume=True).returncode == 0
    assert content(tmp_path / "run") == content(whole)


@pytest.mark.parametrize("number", [1, 4, 5])
def test_ctrl_c(whole: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step, or the evaluation, ends; its state is saved; the line says how to go on; the run
    that goes on has the same bits."""
    write, lines = RunFolder.write_metrics, [0]

    def interrupt(folder: RunFolder, line: Any) -> None:
        write(folder, line)
        lines[0] += 1
        if lines[0] == number:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunFolder, "write_metrics", interrupt)
    done = sft(tmp_path / "run")
    monkeypatch.undo()
    step = {1: 0, 4: 3, 5: 3}[number]
    assert done.returncode == 130
    line = f"refimpl: stopped after step {step}, which is saved: "
    line += "to resume, run the same command with --resume"
    assert done.stderr.splitlines()[-1] == line
    assert [x.name for x in (tmp_path / "run").glob("state-*")] == [f"state-{step:06d}"]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == number
    assert sft(tmp_path / "run", resume=True).returncode == 0
    assert content(tmp_path / "run") == content(whole)


def test_ctrl_c_at_the_end(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """During the last evaluation nothing is left to be stopped."""
    evaluate = SFT.evaluate

    def interrupt(stage: SFT, state: Any) -> Any:
        if state.step == 4:
            signal.raise_signal(signal.SIGINT)
        return evaluate(stage, state)

    monkeypatch.setattr(SFT, "evaluate", interrupt)
    assert sft(tmp_path / "run").returncode == 0
    assert content(tmp_path / "run") == content(whole)
    handler = signal.getsignal(signal.SIGINT)
    assert handler is signal.default_int_handler  # as before the run


def test_ctrl_c_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one waits for nothing; what was saved before stays."""

    def interrupt(stage: SFT, state: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(SFT, "evaluate", interrupt)
    assert sft(tmp_path / "run").returncode == 130
    assert [x.name for x in (tmp_path / "run").iterdir()] == ["settings.toml"]


def test_process(whole: Path, tmp_path: Path) -> None:
    """Ctrl-C of a process of its own, whose folder a second process meanwhile can't use."""
    out = tmp_path / "run"
    line = [sys.executable, "-m", "refimpl", *LINE, "--out", str(out)]
    for name, value in (SETTINGS | {"steps": 10**6}).items():
        line += ["--set", f"{name}={value}"]
    metrics = out / "metrics.jsonl"
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size > 500):
            time.sleep(0.01)
        second = sft(out, resume=True, steps=10**6)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert (second.returncode, second.stderr) == (2, f"refimpl: {out} is in use by another run\n")
    assert process.returncode == 130
    last = told.splitlines()[-1]
    step = int(
        re.findall(
            "stopped after step ([0-9]+), which is saved: to resume, run the same command with "
            "--resume",
            last,
        )[0]
    )
    assert (out / f"state-{step:06d}" / "state.json").exists()
    lines = [json.loads(x) for x in metrics.read_text().splitlines()]
    assert sum(x["kind"] == "step" for x in lines) == step


def test_in_use(whole: Path, tmp_path: Path) -> None:
    """The second process is told before it reads, cuts or writes anything."""
    assert sft(tmp_path / "run", steps=3).returncode == 0
    before = content(tmp_path)
    with held(tmp_path / "run"):
        done = sft(tmp_path / "run", resume=True, steps=3)
    assert done == Done(2, "", f"refimpl: {tmp_path / 'run'} is in use by another run\n")
    assert content(tmp_path) == before


def test_full_disk(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the state after step 4 or a line of the metrics is written: the state after step 2
    is kept, and the line says what to do."""
    fsync, left = os.fsync, [0]

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    save = RunFolder.save

    def save_on_full(folder: RunFolder, state: Any, *args: Any) -> Path:
        left[0] = 3 if state.step == 4 else 1000
        return save(folder, state, *args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        patch.setattr(RunFolder, "save", save_on_full)
        left[0] = 1000
        done = sft(tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"refimpl: {tmp_path / 'run'} can't be written: No space left on device; state-000002 is "
        "kept: remove the cause, and resume with --resume"
    )
    opened = Path.open

    def open_full(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "metrics.jsonl" and "a" in args:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return opened(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_full)
        done = sft(tmp_path / "run", resume=True)
    assert done.returncode == 2
    assert "No space left on device; state-000002 is kept" in done.stderr
    assert sft(tmp_path / "run", resume=True).returncode == 0
    assert content(tmp_path / "run") == content(whole)


def test_not_finite(tmp_path: Path) -> None:
    """A learning rate that is far too high: the run stops with step, tensor and a saved state; when
    it goes on, at the same place; the state opens, as a checkpoint to look into."""
    out = tmp_path / "run"
    wild = {"learning_rate": 1e300, "warmup_steps": 1, "evaluate_every": 9, "dtype": "float64"}
    done = sft(out, **wild)
    saved = out / "stopped-000001"
    line = (
        r"refimpl: stopped at step 2: the loss is nan, and (the gradient of )?model\.\S+ is not "
        f"finite; the state is saved in {saved}\n"
    )
    assert done.returncode == 2
    assert re.search(line + "$", done.stderr)
    before = content(out)
    again = sft(out, resume=True, **wild)
    assert (again.returncode, again.stderr.splitlines()[-1]) == (2, done.stderr.splitlines()[-1])
    assert content(out) == before
    machine = open_machine("numpy", "reference", "float64")
    begin = begin_from(str(saved), machine)
    assert max(float(abs(x).max()) for x in begin.params.values()) > 1e290
    assert begin.vocabulary.size == 261


def test_model_not_finite(tmp_path: Path) -> None:
    """A model that can't be evaluated, since a step took it too far, stops the run too."""
    wild = {"learning_rate": 3e38, "warmup_steps": 1, "evaluate_every": 1, "weight_decay": 1e30}
    done = sft(tmp_path / "run", **wild)
    assert done.returncode == 2
    assert re.search(
        r"stopped at the model after step 1: model\.embed_tokens\.weight is not finite; the state "
        r"is saved in \S+/stopped-000001\n$",
        done.stderr,
    )
    params, _ = load_parameters(tmp_path / "run" / "stopped-000001" / "checkpoint", open_machine())
    assert not_finite(params) == "model.embed_tokens.weight"


def test_fault_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ValueError that no number explains is a fault of ours, exit code 70."""

    def wrong(stage: SFT, state: Any) -> None:
        raise ValueError("x must have shape (2,), got (3,)")

    monkeypatch.setattr(SFT, "evaluate", wrong)
    done = sft(tmp_path / "run")
    assert done.returncode == 70
    assert not list((tmp_path / "run").glob("stopped-*"))


def test_jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that jumps above the median of the last 20 steps; the run that goes on from a state
    in between knows them too, and stops at the same step."""
    step, jumps = SFT.step, [23]

    def jump(stage: SFT, state: Any, guard: Guard) -> Any:
        if state.step + 1 == jumps[0]:
            guard(100.0)
        return step(stage, state, guard)

    monkeypatch.setattr(SFT, "step", jump)
    wide = {"steps": 30, "save_every": 9, "evaluate_every": 99, "jump": 2.5}
    done = sft(tmp_path / "run", **wide)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert re.fullmatch(
        r"refimpl: stopped at step 23: the loss jumps to 100, 9\d\.?\d* above the median of the "
        r"last 20 steps \(allowed: jump=2\.5\); the state is saved in \S+/stopped-000022",
        line,
    )
    before = content(tmp_path / "run")
    assert "run/state-000018" in content(tmp_path)
    again = sft(tmp_path / "run", resume=True, **wide)
    assert (again.returncode, again.stderr.splitlines()[-1]) == (2, line)
    assert content(tmp_path / "run") == before


def test_guard() -> None:
    """Nothing before 20 steps; then the median of the last 20 and the jump are the bound."""
    guard = Guard(2.0, range(RECENT - 1))
    guard(1e9)
    guard.recent.append(19.0)
    guard(11.5)
    guard(float("nan"))  # for apply_gradients to say
    guard(float("inf"))
    with pytest.raises(NotTaken, match=r"jumps to 11\.51, 2\.01 above the median of the last 20"):
        guard(11.51)
    guard.recent.append(100.0)
    guard(12.5)  # the first one is forgotten
    assert len(guard.recent) == RECENT


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal a line that moves, at most five times a second; elsewhere a line per
    evaluation."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for stream, moves in ((Terminal(), True), (io.StringIO(), False)):
        with Live("sft", stream) as live:
            for step in range(1, 4):
                clock[0] += 0.15
                told = {"loss": 1.23456, "loads": {"1": [1]}, "seconds": 0.5}
                told |= {"tokens_per_second": 12345}
                live.step(step, told, 12.4 if step > 1 else None)
            live.tell({"kind": "evaluation", "step": 3, "held_out": 2.5, "samples": ["x"]})
        text = stream.getvalue()
        assert "sft 3: held out 2.5\n" in text
        assert text.count("loss 1.235, tokens per second 12,345") == (2 if moves else 0)
        assert ("12 s left" in text) == moves
    with Live("sft", None) as live:
        live.tell({"step": 1})
    assert (
        shown({"loss": 0.00012345, "tokens": 1000, "seconds": 1.0})
        == "loss 0.0001234, tokens 1,000"
    )


def test_kills() -> None:
    """SIGKILL at a random time, or before a random write: tests/train/kill.py."""
    kill_stages("sft,reward-model", 1, "--implementation", "reference", "--fork")


@pytest.mark.skipif(not FULL, reason="a minute: kills of every stage; make test-full")
@pytest.mark.parametrize(
    ("stages", "implementation"),
    [("train,extend", "reference"), ("sft,grpo", "fastest"), ("reward-model,distil", "reference")],
)
def test_all_kills(stages: str, implementation: str) -> None:
    """A few of each; ``kill.py --kills 20`` is the long run, by hand."""
    kill_stages(stages, 4, "--implementation", implementation)


def kill_stages(stages: str, kills: int, *options: str) -> None:
    line = [sys.executable, str(HERE / "kill.py"), "--stages", stages, "--kills", str(kills)]
    done = subprocess.run([*line, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in stages.split(","):
        assert f"{stage}: {kills} runs killed, the same bits" in done.stdout
