"""The worked example of derivations/porting.md runs, on the command that it names."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import ROOT

PAGE = (ROOT / "derivations" / "porting.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the page's command has been run."""
    folder = tmp_path_factory.mktemp("porting")
    (folder / "tests").symlink_to(ROOT / "tests")
    text = [
        b"The value of a name is the object it refe",
        b"rs to; an assignment binds the name to it",
    ]
    (folder / "tokens.json").write_text(json.dumps([list(row) for row in text]))
    (command,) = re.findall(r"^refimpl (grads .*)$", PAGE, re.M)
    arguments = [sys.executable, "-m", "refimpl", *shlex.split(command)]
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def port(folder: Path, monkeypatch: pytest.MonkeyPatch, change: tuple[str, str] = ("", "")) -> None:
    code = "".join(CODE)
    assert change[0] in code
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(compile(code.replace(*change, 1), "porting.md", "exec"), names)


def test_the_port_agrees(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port(folder, monkeypatch)


@pytest.mark.parametrize(
    ("right", "wrong", "where"),
    [
        ("np.mean(dn * n, axis=-1, keepdims=True)", "0", "cot/model.layers.2"),
        ("even * cos - odd * sin", "even * cos + odd * sin", "act/model.layers.0.self_attn"),
        (" * yarn_softmax_factor(c.active_yarn)", "", "act/model.layers.0.self_attn"),
        (
            "np.sum(dk[..., c.nope:], axis=2, keepdims=True)",
            "dk[..., :1, c.nope:]",
            "kv_a_proj_with_mqa",
        ),
        ("c.routed_scale * chosen / chosen", "chosen / chosen", "aux/weights.1"),
        ("np.sum(dweights * chosen, axis=-1, keepdims=True)", "0", "grad/model.layers.1.mlp.gate"),
        ("(e, h)", "(h, e)", "act/model.layers.3"),
    ],
)
def test_a_wrong_port_shows_where(
    folder: Path, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str, where: str
) -> None:
    with pytest.raises(AssertionError, match=where):
        port(folder, monkeypatch, (right, wrong))
