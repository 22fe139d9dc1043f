"""derivations/porting.md and AGENTS.md: their commands and their code run."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl.ops import mla_forward
from refimpl.port import Truth, compare_folders

from support import ROOT, Done, refimpl_here

PAGE = (ROOT / "derivations" / "porting.md").read_text().replace("\\\n", " ")
TORCH, JAX, PACK, LAYER = re.findall(r"```python\n(.*?)```", PAGE, re.S)
TEXT = [b"The value of a name is the object it refe", b"rs to; an assignment binds the name to it"]

ATTENTION = (
    *("self_attn.q_a_proj", "self_attn.q_a_layernorm", "self_attn.q_b_proj"),
    *("self_attn.kv_a_proj_with_mqa", "self_attn.kv_a_layernorm", "self_attn.kv_b_proj"),
    "self_attn.o_proj",
)


def command(begin: str) -> list[str]:
    """The first command of the page that begins so."""
    return shlex.split(re.findall(rf"^refimpl ({begin} .*)$", PAGE, re.M)[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the page's first command has been run."""
    folder = tmp_path_factory.mktemp("porting")
    (folder / "tests").symlink_to(ROOT / "tests")
    ((code, file),) = re.findall(r"^python -c '(.*?)' > (\S+)$", PAGE, re.M | re.S)
    (folder / file).write_text(subprocess.check_output([sys.executable, "-c", code], text=True))
    assert_runs(refimpl_here(*command("grads"), cwd=folder))
    return folder


def assert_runs(done: Done, code: int = 0) -> None:
    assert done.returncode == code, done.stdout + done.stderr


def run(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **names: Any) -> None:
    monkeypatch.chdir(folder)
    exec(compile(code, "porting.md", "exec"), names)


def test_packed_from_plain_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a C program would have dumped, of one layer; the page's own `check` judges it."""
    spec = importlib.util.spec_from_file_location("layer", ROOT / "examples" / "layer_numpy.py")
    assert spec is not None
    assert spec.loader is not None
    layer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(layer)
    (folder / "dumped").mkdir()
    for name, x in layer.run(Truth.open(folder / "truth"), 1, "float32").items():
        if x.dtype == np.float32:
            x.tofile(folder / "dumped" / f"{name.replace('/', '-', 1)}.bin")
    run(PACK, folder, monkeypatch)
    assert_runs(refimpl_here(*command("check"), "--partial", cwd=folder))
    done = refimpl_here(*command("check"), cwd=folder)
    assert_runs(done, 1)
    assert done.stdout.startswith("INCONCLUSIVE: missing: ")


def test_settings_of_attention(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page reads of layer 1 makes that layer's attention."""
    names: dict[str, Any] = {}
    monkeypatch.chdir(folder)
    exec(compile(LAYER, "porting.md", "exec"), names)
    truth = names["truth"]
    x = names["x"]
    names_of_w = [f"model.layers.1.{name}.weight" for name in ("input_layernorm", *ATTENTION)]
    norm, *w = (truth.checkpoint().tensor(name) for name in names_of_w)
    h = norm * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + truth.config.norm_eps)
    assert np.array_equal(w[-1], names["w"])
    output, _ = mla_forward(h, None, *w, **names["settings"])
    np.savez("attention.npz", **{"act/model.layers.1.self_attn": output.y})
    verdict = compare_folders("attention.npz", "truth", partial=True)
    assert verdict.verdict == "PASS", verdict
    assert names["dy"].shape == x.shape


def test_gradients_of_jax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jax = pytest.importorskip("jax", reason="JAX comes with the extra jax")
    parameters = {"model.norm.weight": jax.numpy.arange(3.0)}
    run(
        JAX,
        tmp_path,
        monkeypatch,
        parameters=parameters,
        loss=lambda p: (p["model.norm.weight"] ** 2).sum(),
    )
    assert np.load(tmp_path / "mine.npz")["grad/model.norm.weight"].tolist() == [0, 2, 4]


def test_tensors_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face's own model in float32, out of the page's hooks, is right."""
    torch = pytest.importorskip("torch", reason="torch comes with the extra oracle")
    pytest.importorskip("transformers", reason="transformers comes with the extra oracle")
    rows = [[byte % 29 for byte in row[:24]] for row in TEXT]
    (tmp_path / "tokens.json").write_text(json.dumps(rows))
    checkpoint = ROOT / "tests" / "golden" / "checkpoints" / "v3"
    options = ["--checkpoint", checkpoint, "--tokens", "tokens.json", "--out", "truth"]
    options += [
        "--convention",
        "hf",
        "--dtype",
        "float64",
        "--activations",
        "*",
        "--units",
        "float32",
    ]
    assert_runs(refimpl_here("grads", *options, cwd=tmp_path))
    run(TORCH, tmp_path, monkeypatch, checkpoint=checkpoint, tokens=torch.tensor(rows))
    verdict = compare_folders(tmp_path / "mine.safetensors", tmp_path / "truth")
    assert verdict.verdict == "PASS", verdict
    assert len(verdict.those("ok")) > 20


def test_the_assistant_s_commands_exist() -> None:
    """Every command and option in AGENTS.md is one of ours."""
    page = (ROOT / "AGENTS.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"refimpl (grads|check|vectors|verify|conventions)\b([^`\n]*)", page)
    assert {name for name, _ in commands} == {"grads", "check", "vectors", "verify", "conventions"}
    for name, rest in commands:
        told = refimpl_here(name, "--help").stdout
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in told, f"refimpl {name} {option}"
