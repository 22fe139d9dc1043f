"""Ports of FP8 with a mistake, drawn and written beside ours: `refimpl check` names it, and names
none of a right one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refimpl import fp8
from refimpl.check.planted import PLANTED_IN_FP8, plant
from refimpl.checkpoint import Checkpoint, save_checkpoint
from refimpl.config import preset
from refimpl.fp8 import DEFAULT, Recipe, Tiled, fp8_table
from refimpl.grads import Request, write_gradients
from refimpl.grads.rounded import nudged
from refimpl.model import Route
from refimpl.ops import Ops
from refimpl.parameters import init_parameters
from refimpl.port import recipes
from refimpl.port.truth import Truth
from refimpl.port.verdict import compare_folders

from support import refimpl_here

UE8M0 = Recipe(scale="ue8m0")
quantised, product = fp8.quantised, fp8.product
linear_backward, scales = fp8.linear_backward, fp8.scales


# Mistakes, each written another way than `PLANTED_IN_FP8`


def one_scale(x: Any, tile: Any, recipe: Recipe = DEFAULT, *, e5m6: bool = False) -> Tiled:
    whole = quantised(x, x.shape, recipe, e5m6=e5m6)
    tiles = (-(-size // each) for size, each in zip(x.shape, tile, strict=True))
    return Tiled(whole.numbers, np.full((*tiles,), whole.scale[0, 0]), tile)


def inverted(a: Tiled, b: Tiled, recipe: Recipe) -> Any:
    return product(*(x._replace(scale=1 / x.scale) for x in (a, b)), recipe)


def not_again(dy: Any, saved: fp8.LinearSaved) -> Any:
    dx, _ = linear_backward(dy, saved)
    rows = dy.reshape(-1, dy.shape[-1])
    return dx, quantised(rows, (1, 128), saved.recipe).values().T @ fp8.kept(saved.x)


def rounded_down(*args: Any, power_of_two: bool) -> Any:
    found = scales(*args, power_of_two=power_of_two)
    return found if not power_of_two else np.where(np.frexp(found)[0] == 0.5, found / 2, found)


def other_sums(a: Tiled, b: Tiled, recipe: Recipe) -> Any:
    return np.matmul(a.values().astype(float), b.values().T.astype(float)).astype(np.float32)


MISTAKES: dict[str, dict[str, Any]] = {
    "no promotion": {"recipe": {"bits": 14, "promote": 0}},
    "one scale per tensor": {"quantised": one_scale},
    "re-tiling left out": {"linear_backward": not_again},
    "scale inverted": {"product": inverted},
    "UE8M0 rounded down": {"scales": rounded_down},
}


@contextmanager
def port_of(ours: Recipe, seed: int, changed: dict[str, Any]) -> Iterator[Ops]:
    """The table of a port, whose float32 results are a little other than ours."""
    changed = dict(changed)
    with pytest.MonkeyPatch.context() as patch:
        table = fp8_table(replace(ours, **changed.pop("recipe", {})))
        for name, x in changed.items():
            patch.setattr(fp8, name, x)
        yield table | {name: nudged(op, seed) for name, op in table.items()}


class Example:
    """A truth on a drawn model of one block, dense or of experts, and ports beside it."""

    def __init__(self, place: Path, recipe: Recipe, seed: int, dense: int = 1) -> None:
        rng = np.random.default_rng(seed)
        config = replace(
            preset("tiny"),
            width=int(rng.integers(132, 200)),
            expert_hidden=int(rng.integers(130, 180)),
            layers=1,
            dense_layers=dense,
            dense_hidden=int(rng.integers(130, 180)),
            experts=3,
            groups=1,
            keep_groups=1,
            top_k=2,
            shared_experts=1,
            mtp_depth=0,
            norm_eps=1e-6,
        )
        params = init_parameters(config, std=0.08, dtype="float32", seed=seed)
        save_checkpoint(params, config, place / "checkpoint", dtype="float32")
        self.place, self.recipe = place, recipe
        self.seed = seed
        self.source = Checkpoint.open(place / "checkpoint", dtype="float32")
        tokens = rng.integers(0, config.vocabulary, (2, 20))
        request = Request(tokens, implementation="fp8", fp8=recipe, activations="*")
        self.request = replace(request, units=("float32",))
        write_gradients(self.source, self.request, place / "truth", origin=place / "checkpoint")
        self.truth = Truth.open(place / "truth")
        self.request = replace(self.request, units=())
        if not dense:
            route = Route(self.truth.array("aux/routes.0"), None)
            self.request = replace(self.request, routes={0: route})

    def port(self, **changed: Any) -> Path:
        """The file of a port's tensors."""
        number = len(list(self.place.glob("port-*")))
        folder = self.place / f"port-{number}"
        with (
            port_of(self.recipe, self.seed + 7, changed) as table,
            pytest.MonkeyPatch.context() as patch,
            np.errstate(all="ignore"),
        ):
            patch.setattr(Request, "table", lambda self: table)
            write_gradients(self.source, self.request, folder)
        found = {n: x for f in folder.glob("*.safetensors") for n, x in load_file(f).items()}
        save_file(found, file := folder / "port.safetensors")
        return file


@pytest.mark.parametrize(("recipe", "dense"), [(DEFAULT, 1), (UE8M0, 0)])
def test_each_mistake_is_told_apart(recipe: Recipe, dense: int, tmp_path: Path) -> None:
    """By name, whatever the units say; and a right port has none, nor one whose sums run in another
    order."""
    example = Example(tmp_path, recipe, 12, dense)
    for name, changed in MISTAKES.items():
        if name == "UE8M0 rounded down" and recipe.scale != "ue8m0":
            continue
        verdict = compare_folders(example.port(**changed), example.truth)
        assert verdict.verdict == "FAIL", name
        assert verdict.reason.startswith(f"the blocks compute FP8's mistake: {name}; "), name
        assert verdict.diagnosis is not None
        assert [bug.name for bug in verdict.diagnosis.named] == [name]
    for changed in ({}, {"product": other_sums}):
        verdict = compare_folders(example.port(**changed), example.truth)
        assert verdict.verdict == "PASS", str(verdict)
        assert verdict.not_excluded == []


def test_another_choice_is_named(tmp_path: Path) -> None:
    """By the command line: what the weight's gradient is quantised from, within the units here."""
    example = Example(tmp_path, DEFAULT, 2)
    port = example.port(recipe={"weight_input": "exact"})
    found = refimpl_here(
        "check", port, "--against", example.truth.folder, "--json", tmp_path / "j.json"
    )
    assert found.returncode == 1
    assert "another choice than the truth's: weight_input=exact" in found.stdout
    assert "hint: the truth with the choice weight_input=exact" in found.stdout
    diagnosis = json.loads((tmp_path / "j.json").read_text())["diagnosis"]
    assert diagnosis["bugs"] == []


def test_what_is_not_known(tmp_path: Path) -> None:
    """Without activations nothing is told; a mistake of an op is none of FP8's."""
    example = Example(tmp_path, DEFAULT, 0)
    gradients = {n: x for n, x in load_file(example.port()).items() if n.startswith("grad/")}
    save_file(gradients, file := tmp_path / "gradients.safetensors")
    verdict = compare_folders(file, example.truth)
    assert verdict.verdict == "PASS"
    assert len(verdict.not_excluded) == len(PLANTED_IN_FP8)
    assert "told from act/ and cot/: the port does not give cot/model.layers.0" in str(verdict)
    turned = {n: -x if n.endswith("o_proj.weight") else x for n, x in gradients.items()}
    save_file(load_file(example.port()) | turned, file)
    verdict = compare_folders(file, example.truth)
    assert (verdict.verdict, verdict.diagnosis and verdict.diagnosis.named) == ("FAIL", [])
    assert "hint: the sign is wrong" in str(verdict)
    assert "hold the port in float32 against a truth in float32 first" in str(verdict)


def test_a_truth_that_does_not_say_its_recipe(tmp_path: Path) -> None:
    example = Example(tmp_path, DEFAULT, 4)
    example.truth.metadata["request"].pop("fp8")
    found = recipes.judge(example.truth, lambda name: None)
    assert found is not None
    assert "does not say its recipe of FP8: 'fp8'" in found.note


@pytest.mark.parametrize("bug", PLANTED_IN_FP8, ids=lambda bug: bug.name)
def test_every_mistake_changes_the_module(bug: Any) -> None:
    """Each edit finds its place, and the product of two tiles, or what is made of it, moves."""
    module = plant(bug)
    recipe = UE8M0 if "UE8M0" in bug.name else DEFAULT
    rng = np.random.default_rng(0)
    x, w, dy = (
        rng.normal(size=shape).astype(np.float32) for shape in ((3, 300), (140, 300), (3, 140))
    )
    found = []
    for code in (module, fp8):
        y, saved = code.linear_forward(x, w, recipe)  # type: ignore[union-attr]
        found.append((y, *code.linear_backward(dy, saved)))  # type: ignore[union-attr]
    assert any(not np.array_equal(a, b) for a, b in zip(*found, strict=True))
