"""Kimi-K2, GLM-4.7-Flash and fused experts, as transformers wrote them, against what it computed
from them in float64: no torch.

tests/golden/make_model_types.py made the files; a gradient is held by eight weighted sums of it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from refimpl.config import ModelConfig

from golden.checkpoint_values import (
    GRADIENT,
    LOGITS,
    MODEL_TYPES,
    SUMS,
    Arrays,
    Values,
    assert_agree,
    errors,
    our_values,
    read_checkpoint,
    relative_error,
    sketch,
)
from support import refimpl_here

NAMES = ["fused-experts", "glm4_moe_lite", "kimi_k2"]
ALL = np.ones(SUMS, bool)
END = 1  # config.json's eos_token_id


def stored(name: str) -> Arrays:
    return load_file(MODEL_TYPES / name / "outputs.safetensors")


def theirs(name: str) -> Values:
    outputs = stored(name)
    grads = {n.removeprefix("grad/"): x for n, x in outputs.items() if n.startswith("grad/")}
    return Values(outputs["out/logits"], float(outputs["out/loss"]), grads)


def ours(name: str, config: ModelConfig, params: Arrays) -> Values:
    values = our_values(params, np.load(MODEL_TYPES / name / "tokens.npy"), config)
    grads = {parameter: sketch(gradient) for parameter, gradient in values.grads.items()}
    return Values(sketch(values.logits), values.loss, grads)


def test_three_of_them() -> None:
    assert sorted(folder.name for folder in MODEL_TYPES.iterdir()) == NAMES
    assert sum(path.stat().st_size for path in MODEL_TYPES.rglob("*")) <= 300_000


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients(name: str) -> None:
    config, params = read_checkpoint(MODEL_TYPES / name)
    assert_agree(ours(name, config, params), theirs(name), ALL)


@pytest.mark.parametrize("name", NAMES)
def test_grads(name: str, tmp_path: Path) -> None:
    """The command's loss, loss of each token and logits, and every gradient of a layer's norms."""
    how = ["--tokens", MODEL_TYPES / name / "tokens.npy", "--convention", "hf"]
    how += ["--dtype", "float64", "--out", tmp_path]
    done = refimpl_here("grads", "--checkpoint", MODEL_TYPES / name, *how)
    assert done.returncode == 0, done.stderr
    assert "conventions: hf; the same as hf here\n" in done.stdout
    found: Arrays = {}
    for file in tmp_path.glob("*.safetensors"):
        found |= load_file(file)
    wanted = stored(name)
    assert (
        relative_error(found["out/loss_per_token"][:, :-1], wanted["out/loss_per_token"]) <= LOGITS
    )
    assert relative_error(sketch(found["out/logits"]), wanted["out/logits"]) <= LOGITS
    norms = [key for key in wanted if key.startswith("grad/") and "norm" in key]
    assert len(norms) == 13
    for key in norms:
        assert relative_error(sketch(found[key]), wanted[key]) <= GRADIENT, key


OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("kimi_k2", {"yarn": None}),
    ("kimi_k2", {"theta": 1e4}),
    ("kimi_k2", {"routed_scale": 2.5}),
    ("glm4_moe_lite", {"theta": 1e4}),
    ("glm4_moe_lite", {"norm_eps": 1e-6}),
    ("glm4_moe_lite", {"routed_scale": 2.5}),
    ("glm4_moe_lite", {"top_k": 3}),
    ("fused-experts", {"routed_scale": 1.0}),
    ("fused-experts", {"normalise_weights": False}),
]


@pytest.mark.parametrize(("name", "change"), OTHERS, ids=str)
def test_another_model_shows(name: str, change: dict[str, Any]) -> None:
    config, params = read_checkpoint(MODEL_TYPES / name)
    assert (
        errors(ours(name, replace(config, **change), params), theirs(name), ALL)[0] > 1e3 * LOGITS
    )


def test_the_halves_of_fused_experts_show() -> None:
    """`gate_up_proj` holds the gate's rows first."""
    config, params = read_checkpoint(MODEL_TYPES / "fused-experts")
    swapped = dict(params)
    for name in [name for name in params if ".experts.gate_proj." in name]:
        other = name.replace("gate_proj", "up_proj")
        swapped[name], swapped[other] = params[other], params[name]
    assert swapped.keys() == params.keys()
    assert errors(ours("fused-experts", config, swapped), theirs("fused-experts"), ALL)[0] > 1e-3


def test_one_element_shows_in_a_sketch() -> None:
    """Wherever it is: no element has a small weight in all eight sums."""
    x = np.random.default_rng(0).standard_normal(3000)
    for place in range(x.size):
        weights = np.abs(np.cos(np.arange(1, SUMS + 1) * place))
        assert weights.max() > 0.5
    y = x.copy()
    y[1234] += 1e-7
    assert relative_error(sketch(y), sketch(x)) > 10 * GRADIENT


@pytest.mark.parametrize("name", NAMES)
def test_count(name: str) -> None:
    """Of a folder, as many as transformers' `num_parameters`."""
    done = refimpl_here("count", MODEL_TYPES / name)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("main model")]
    assert f" {int(stored(name)['aux/parameters']):,} " in f"{lines[0]} "


@pytest.mark.parametrize("name", NAMES)
def test_generate(name: str) -> None:
    """The next tokens of each row are those that transformers chooses, up to the end's."""
    given = ["--checkpoint", MODEL_TYPES / name, "--tokens", MODEL_TYPES / name / "tokens.npy"]
    done = refimpl_here(
        "generate", *given, "--max-tokens", 8, "--convention", "hf", "--dtype", "float64"
    )
    assert done.returncode == 0, done.stderr
    wanted = set()
    for number, row in enumerate(stored(name)["out/greedy"].tolist()):
        ids = row[: row.index(END) + 1] if END in row else row
        wanted.add(f"[{number}] {' '.join(map(str, ids))}")
    assert set(done.stdout.splitlines()) == wanted
