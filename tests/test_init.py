"""The names that ``import refimpl`` shows: lazily, with NumPy alone, and with their types."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import refimpl

from support import FULL

ROOT = Path(__file__).parents[1]
MODULES = ("check", "config", "model", "ops")
FUNCTIONS = {"backward": "model", "forward": "model", "preset": "config"}


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_names() -> None:
    """All are listed, and each is what its module has under that name."""
    assert set(refimpl.__all__) == {"__version__", *MODULES, *FUNCTIONS}
    assert set(refimpl.__all__) <= set(dir(refimpl))
    for name in MODULES:
        assert getattr(refimpl, name) is import_module(f"refimpl.{name}")
    for name, module in FUNCTIONS.items():
        assert getattr(refimpl, name) is getattr(import_module(f"refimpl.{module}"), name)
    with pytest.raises(AttributeError, match=r"^module 'refimpl' has no attribute 'nothing'$"):
        refimpl.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_in_use() -> None:
    """The loss of the tiny model and a gradient, by public names alone."""
    from refimpl.parameters import init_parameters

    config = refimpl.preset("tiny")
    params = init_parameters(config, seed=0)
    output, saved = refimpl.forward(params, np.arange(8)[None], config)
    gradients = refimpl.backward(saved)
    assert output.loss > 0
    assert gradients["lm_head.weight"].shape == params["lm_head.weight"].shape
    assert callable(refimpl.check.check)
    assert callable(refimpl.ops.swiglu_forward)


def test_nothing_is_imported_before_it_is_used() -> None:
    """Not even NumPy, nor what the standard library has for types."""
    loaded = "print(*sorted(m for m in sys.modules if m.split('.')[0] in ('refimpl', 'numpy')))"
    assert run(f"import sys, refimpl; dir(refimpl); {loaded}") == "refimpl"
    assert "refimpl.ops" in run(f"import sys, refimpl; refimpl.ops; {loaded}").split()
    assert (
        run("import refimpl; from refimpl import *; print(forward.__module__)") == "refimpl.model"
    )


@pytest.mark.parametrize("name", [*MODULES, *FUNCTIONS])
def test_numpy_alone(name: str) -> None:
    foreign = "{'typer', 'rich', 'cupy', 'cuda', 'numba', 'torch', 'safetensors', 'ml_dtypes'}"
    code = f"import sys, refimpl; refimpl.{name}; print(*{foreign} & set(sys.modules))"
    assert run(code) == ""


def test_a_type_checker_sees_the_names() -> None:
    """What is imported for it alone, which `make check` reads, is what ``__getattr__`` finds."""
    tree = ast.parse(Path(refimpl.__file__).read_text())
    block = next(x for x in tree.body if isinstance(x, ast.If) and isinstance(x.test, ast.Name))
    found = {
        name.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    assert found == FUNCTIONS | dict.fromkeys(MODULES)


@pytest.mark.skipif(not FULL, reason="a type checker takes long; make test-full")
def test_types(tmp_path: Path) -> None:
    """A type checker sees each name as what it is, and that there are no others."""
    pytest.importorskip("mypy")
    (file := tmp_path / "user.py").write_text(
        "import refimpl\n"
        "reveal_type(refimpl.preset('tiny'))\n"
        "reveal_type(refimpl.check.check)\n"
        "refimpl.nothing\n"
    )
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert 'Revealed type is "refimpl.config.ModelConfig"' in done.stdout
    assert "-> refimpl.check." in done.stdout
    assert done.stdout.count("error:") == 1
    assert 'has no attribute "nothing"' in done.stdout
