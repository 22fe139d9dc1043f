"""Tensors' names are spelled in refimpl/parameters.py and refimpl/checkpoint/names.py alone; the
rest of the package takes them from there."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

from refimpl.checkpoint.names import layer_of
from refimpl.config import preset
from refimpl.parameters import HEAD, layer_name, parameter_shapes

PACKAGE = Path(__file__).parents[1] / "refimpl"
PLACES = {"parameters.py", "checkpoint/names.py"}
EXCEPT = {  # and why
    "conventions/traps.py": "the prose of derivations/conventions.md"
}
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def names() -> set[str]:
    """Whole names outside the layers, the beginning of those in a layer, and what follows it."""
    tiny, found = preset("tiny"), {layer_name("", "").rstrip("."), HEAD.removesuffix(".weight")}
    for config in (tiny, replace(tiny, q_latent=None), replace(tiny, dense_layers=3)):
        for name in parameter_shapes(config):
            layer = layer_of(name)
            found.add(name if layer is None else name.removeprefix(layer_name(layer, "")))
    return found


NAME = re.compile(rf"(?<![a-z_])({'|'.join(map(re.escape, sorted(names())))})")


def spelled(source: str) -> list[str]:
    """The strings of the code, docstrings left out, that hold a tensor's name."""
    tree = ast.parse(source)
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    strings = [x for x in ast.walk(tree) if isinstance(x, ast.Constant) and x not in docstrings]
    return [x.value for x in strings if isinstance(x.value, str) and NAME.search(x.value)]


@pytest.mark.parametrize("file", [file for file in FILES if file not in PLACES | EXCEPT.keys()])
def test_no_other_file_spells_a_name(file: str) -> None:
    assert not spelled((PACKAGE / file).read_text())


@pytest.mark.parametrize("file", EXCEPT)
def test_every_exception_is_needed(file: str) -> None:
    assert spelled((PACKAGE / file).read_text())


def test_names_are_found() -> None:
    """Whole, in a layer, as part of a formatted string; not in a docstring or another word."""
    for code in (
        "x = params['lm_head.weight']",
        "f'model.layers.{layer}.mlp'",
        "name.endswith('.eh_proj.weight')",
        "shapes['self_attn.q_proj.weight']",
        "w = 'mlp.experts.up_proj.weight', 1",
    ):
        assert spelled(code), code
    for code in ("'model.norm.weight'", "x = 'my_eh_proj.weight'", "x = 'mlp'"):
        assert not spelled(code), code
