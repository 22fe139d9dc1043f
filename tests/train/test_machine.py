"""Machines: the names that are refused, the types of parameters; stages under a pretended CuPy give
NumPy's results."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl.checkpoint.tensor_file import read_tensor_file
from refimpl.errors import CouldNotRun
from refimpl.generate.sampler import to_numpy
from refimpl.kernels.cpu.adamw import FusedAdamW
from refimpl.kernels.mla_absorbed import MLA_ABSORBED
from refimpl.ops import IMPLEMENTATIONS, REFERENCE
from refimpl.optimizer import AdamW
from refimpl.parameters import init_parameters, is_buffer
from refimpl.train import machine, run
from refimpl.train.grpo import GRPO, GRPOSettings
from refimpl.train.machine import Machine, open_machine
from refimpl.train.pretrain import Pretrain, PretrainSettings, new_config
from refimpl.train.results import TIMES
from refimpl.train.reward_model import RewardModelSettings, RewardModelStage
from refimpl.train.run import Guard
from refimpl.train.settings import toml_value
from refimpl.train.sft import SFT, SFTSettings, begin_sft
from refimpl.train.stage import Begin
from refimpl.train.step import copied
from refimpl.train.vocabulary import make_vocabulary

from kernel_support import InterpreterLaunch
from kernel_support.on_cupy import use_cuda
from pretended_cupy import Pretended, ndarray
from support import FULL, ROOT, refimpl_here
from train.kill import by_hash

MODEL = {
    "width": 16,
    "layers": 2,
    "heads": 2,
    "q_latent": 8,
    "kv_latent": 8,
    "nope": 4,
    "rope": 4,
    "value": 4,
    "dense_hidden": 16,
    "experts": 4,
    "expert_hidden": 8,
}


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (("cuda",), "backend must be numpy or cupy, got cuda"),
        (("numpy", "quick"), "implementation must be fastest or one of "),
        (("numpy", "cuda"), "backend must be cupy for the implementation cuda, got numpy"),
        (("numpy", "numba_cuda"), "backend must be cupy for the implementation numba_cuda"),
        (("cupy", "numba_cpu"), "backend must be numpy for the implementation numba_cpu, got cupy"),
        (
            ("numpy", "fastest", "bfloat16"),
            "dtype bfloat16 needs the implementation cuda and the backend cupy, got the implement",
        ),
        (
            ("numpy", "reference", "float16"),
            "dtype must be one of float32, float64, bfloat16, got float16",
        ),
        (
            ("numpy", "reference", "float32", "bits=14"),
            "fp8 needs the implementation fp8, got reference",
        ),
        (("numpy", "fp8", "float32", "bits=1"), "fp8 bits must lie in 2…24, or be 0 for float32"),
    ],
)
def test_refused(given: tuple[str, ...], line: str) -> None:
    with pytest.raises(CouldNotRun) as error:
        open_machine(*given)
    assert str(error.value).startswith(line)


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CuPy, and with CuPy that finds no device."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(CouldNotRun, match=r"^backend cupy needs CuPy: pip install"):
        open_machine("cupy", "reference")
    cupy = Pretended("cupy")
    cupy.cuda.runtime = type("None", (), {"getDeviceCount": lambda: 0, "CUDARuntimeError": OSError})
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with pytest.raises(CouldNotRun, match=r"^backend cupy needs a GPU, found none$"):
        open_machine("cupy", "reference")


def test_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables, and the optimizer, of each implementation on NumPy; fastest is what is there."""
    found = open_machine("numpy", "reference")
    assert (found.ops, found.optimizer) == (REFERENCE, AdamW)
    assert found.decode["mla"] is IMPLEMENTATIONS["absorbed"].mla
    fused = open_machine()
    assert (fused.implementation, fused.optimizer) == ("numba_cpu", FusedAdamW)
    with monkeypatch.context() as patch:  # where there is a device
        patch.setattr(machine, "placement", lambda backend: np.array)
        for module in ("refimpl.train.machine", "refimpl.kernels.columns"):
            patch.setattr(f"{module}.table_of", lambda name, recipe: REFERENCE)
        patch.setattr("refimpl.kernels.columns.device_launch", InterpreterLaunch)
        patch.setattr(machine, "optimizer_of", lambda name: AdamW)
        device = open_machine("cupy")
        narrow = open_machine("cupy", dtype="bfloat16")
    assert device.implementation == "cuda"
    assert device.ops == device.prefill == REFERENCE
    for on_device in (device, narrow):
        assert on_device.decode["mla"] is MLA_ABSORBED
        assert on_device.decode["attention"] != REFERENCE["attention"]
    assert [x.real for x in (found, device, narrow)] == ["float32"] * 3
    assert open_machine("numpy", "reference", "float64").real == "float64"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert open_machine().implementation == "reference"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_types(dtype: str) -> None:
    """Parameters are of the machine's type; the gates' biases float32 always, as files have
    them; the same as `init_parameters` draws."""
    machine = open_machine("numpy", "reference", dtype)
    config = new_config("mini", MODEL, vocabulary=261)
    params = machine.parameters(config, seed=3, std=0.05)
    expected = init_parameters(config, seed=3, std=0.05, dtype=dtype)
    for name, x in params.items():
        assert x.dtype == ("float32" if is_buffer(name) else dtype)
        np.testing.assert_array_equal(x, expected[name])
    assert any(map(is_buffer, params))
    given = {name: x.astype("float64") for name, x in params.items()}
    assert all(x.dtype == params[name].dtype for name, x in machine.placed(given).items())
    assert machine.fetched(params)["model.norm.weight"] is params["model.norm.weight"]


def test_a_device_for_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    cupy = Pretended("cupy")
    cupy.cuda.runtime = type("Two", (), {"getDeviceCount": lambda: 2})
    cupy.cuda.Device = lambda n: type("Device", (), {"use": lambda self: used.append(n)})()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    for rank in range(3):
        machine.use_own_device(rank)
    assert used == [0, 1, 0]


def text(folder: Path) -> str:
    path = folder / "text.txt"
    path.write_text("".join(f"The cat sat on mat {i} of {i * 7 % 13}.\n" for i in range(45)))
    return str(path)


def pretrain(machine: Machine, folder: Path) -> Any:
    settings = PretrainSettings(
        model=MODEL, text=text(folder), tokens=200, length=8, batch=4, warmup_steps=1, rows=3
    )
    return Pretrain(settings, machine)


def sft(machine: Machine, folder: Path) -> Any:
    settings = SFTSettings(model=MODEL, steps=2, batch=3, problems=3, max_tokens=4)
    return SFT(settings, machine, begin_sft(settings, machine))


def begin(machine: Machine) -> Begin:
    vocabulary = make_vocabulary()
    config = new_config("mini", MODEL, vocabulary=vocabulary.size)
    return Begin(machine.parameters(config, seed=0, std=0.3), config, vocabulary)


def grpo(machine: Machine, folder: Path) -> Any:
    settings = GRPOSettings(
        questions=2,
        group=3,
        problems=3,
        max_tokens=5,
        minibatches=2,
        replay_routes=True,
        steps=2,
        reference_every=1,
        loss={"kl_weight": 0.1},
        overlong="penalty",
    )
    return GRPO(settings, machine, begin(machine))


def reward_model(machine: Machine, folder: Path) -> Any:
    settings = RewardModelSettings(steps=2, batch=3, problems=3)
    return RewardModelStage(settings, machine, begin(machine))


def trained(make: Callable[[Machine, Path], Any], machine: Machine, folder: Path) -> Any:
    """Two steps of a stage, and in make test-full an evaluation: what it told, and its model."""
    stage = make(machine, folder)
    state = stage.start()
    told = []
    for _ in range(2):
        state, metrics = stage.step(state, Guard(stage.jump))
        told.append(metrics)
    if FULL:
        told.append(stage.evaluate(state))
    assert all(
        isinstance(x, ndarray if machine.backend == "cupy" else np.ndarray)
        for x in [*state.params.values(), *state.moments.first.values()]
    )
    return told, machine.fetched({**state.params, **state.extra})


def close(found: Any, expected: Any, bound: float) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            close(found[name], expected[name], bound)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            close(*pair, bound)
    elif isinstance(expected, (float, np.ndarray)):
        np.testing.assert_allclose(found, expected, rtol=bound, atol=bound)
    else:
        assert found == expected


@pytest.mark.parametrize("make", [pretrain, sft, grpo, reward_model])
def test_pretended(
    make: Callable[[Machine, Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps on a pretended CuPy, whose arrays don't mix with NumPy's and whose sums have
    another order, tell what NumPy tells, in float64 to 1e-9: texts, accuracies and loads too."""
    monkeypatch.setattr("refimpl.train.grpo.score", by_hash)
    expected = trained(make, open_machine("numpy", "reference", "float64"), tmp_path)
    monkeypatch.setitem(sys.modules, "cupy", Pretended("cupy"))
    close(trained(make, open_machine("cupy", "reference", "float64"), tmp_path), expected, 1e-9)


@pytest.mark.parametrize("make", [pretrain, sft, grpo, reward_model] if FULL else [pretrain])
def test_bfloat16(
    make: Callable[[Machine, Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps in bfloat16 through the kernels, under the interpreter: parameters are bfloat16 and
    the rounding of their masters, and the loss is that of float32 but for rounding, since a
    step is smaller than a unit of most parameters; an update without masters would be another."""
    use_cuda(monkeypatch, attention=FULL and make is pretrain)
    monkeypatch.setattr("refimpl.train.grpo.score", by_hash)
    told, masters = dict[str, Any](), dict[str, Any]()
    start = dict[str, Any]()
    for dtype in ("float32", "bfloat16"):
        machine = open_machine("cupy", "cuda", dtype)
        stage = make(machine, tmp_path)
        state = stage.start()
        before = machine.fetched(copied(state).params)
        for _ in range(2 if FULL else 1):
            state, told[dtype] = stage.step(state, Guard(stage.jump))
        if FULL and dtype == "bfloat16":
            stage.evaluate(state)
        params = {**state.params, **state.extra}
        assert {x for x in params if str(params[x].dtype) != dtype} <= {
            x for x in params if is_buffer(x) or x in state.extra or dtype == "float32"
        }
        held = {name: state.moments.master.get(name, params[name]) for name in state.moments.first}
        assert {str(x.dtype) for x in held.values()} == {"float32"}
        for name, x in machine.fetched(held).items():
            np.testing.assert_array_equal(to_numpy(params[name]), x.astype(params[name].dtype))
        masters[dtype], start[dtype] = machine.fetched(held), before
    close(told["bfloat16"]["loss"], told["float32"]["loss"], 0.02)
    moved = [
        np.linalg.norm(masters["bfloat16"][n] - start["bfloat16"][n].astype("float32"))
        / np.linalg.norm(masters["float32"][n] - start["float32"][n])
        for n in start["float32"]
        if n in masters["float32"]
    ]
    # lost in a unit it would be 0; GRPO's samples differ, and with them its gradients
    assert np.median(moved) == pytest.approx(1, abs=0.2)


@pytest.mark.skipif(not FULL, reason="kernels under the interpreter; make test-full")
def test_bfloat16_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in bfloat16 that is interrupted between two steps ends with the bits of one that is
    not: its saved state has the masters. The model's file is bfloat16."""
    use_cuda(monkeypatch)
    model = MODEL | {"layers": 1, "dense_layers": 0, "mtp_depth": 0}
    options = ["--backend", "cupy", "--dtype", "bfloat16"]
    for setting in (
        *("tokens=32", "length=8", "batch=1", "warmup_steps=1", "save_every=1"),
        f"model={toml_value(model)}",
        f"text={toml_value(text(tmp_path))}",
    ):
        options += ["--set", setting]
    assert refimpl_here("train", "--out", tmp_path / "whole", *options).returncode == 0
    step, taken = run._step, list[int]()

    def interrupted(*given: Any) -> Any:
        taken.append(1)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return step(*given)

    monkeypatch.setattr(run, "_step", interrupted)
    assert refimpl_here("train", "--out", tmp_path / "parts", *options).returncode == 130
    state = read_tensor_file(tmp_path / "parts" / "state-000002" / "moments.safetensors")[0]
    assert {str(x.dtype) for x in state.values()} == {"float32"}
    assert sum(name.startswith("master/") for name in state) == len(state) / 3
    monkeypatch.setattr(run, "_step", step)
    again = refimpl_here("train", "--out", tmp_path / "parts", "--resume", *options)
    assert again.returncode == 0, again.stderr
    files = [tmp_path / x / "checkpoint" / "model.safetensors" for x in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    types = {str(x.dtype) for x in read_tensor_file(files[0])[0].values()}
    assert types == {"bfloat16", "float32"}  # the gates' biases


def run_on(backend: str, out: Path, stage: str, *settings: str) -> list[dict[str, Any]]:
    """A stage by the command line, on NumPy or by the kernels of CUDA C under the interpreter: its
    metrics, times left out."""
    device = [] if backend == "numpy" else ["-m", "pretended_device"]
    implementation = "reference" if backend == "numpy" else "cuda"
    module = "train.hashed" if stage == "grpo" else "refimpl"
    line = [sys.executable, *device, "-m", module, stage, "--out", str(out)]
    line += ["--backend", backend, "--implementation", implementation]
    line += [part for setting in settings for part in ("--set", setting)]
    subprocess.run(line, cwd=ROOT / "tests", check=True, capture_output=True)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(x) | dict.fromkeys(TIMES, 0) for x in lines]


@pytest.mark.skipif(not FULL, reason="kernels under the interpreter; make test-full")
def test_kernels(tmp_path: Path) -> None:
    """Pre-training and GRPO through the kernels of CUDA C, under the interpreter, end near NumPy's:
    in float32 their numbers differ by rounding, and the outputs that are sampled are the same."""
    model = MODEL | {"layers": 1, "dense_layers": 0, "mtp_depth": 0}
    settings = ["tokens=32", "length=16", "batch=1", "warmup_steps=1"]
    settings += [f"model={toml_value(model)}", f"text={toml_value(text(tmp_path))}"]
    found = {x: run_on(x, tmp_path / x, "train", *settings) for x in ("numpy", "cupy")}
    assert len(found["cupy"]) == 4
    close(found["cupy"], found["numpy"], 1e-5)
    settings = ["steps=1", "questions=1", "group=4", "max_tokens=4", "problems=1"]
    settings += [f"checkpoint={toml_value(str(tmp_path / 'numpy'))}", "kl_weight=0.1"]
    found = {x: run_on(x, tmp_path / f"{x}-grpo", "grpo", *settings) for x in found}
    assert len(found["cupy"]) == 3
    assert found["numpy"][1]["norm"] > 1e-3
    close(found["cupy"], found["numpy"], 1e-4)
