"""`refimpl.grads.loss_and_grads`: what the command writes, as arrays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from refimpl.checkpoint import Checkpoint
from refimpl.errors import CouldNotRun
from refimpl.grads import GRPO, gradient_shapes, loss_and_grads
from refimpl.model import backward, forward

from support import ROOT

TRAINED = ROOT / "tests" / "golden" / "trained"
TOKENS = np.arange(20).reshape(2, 10) * 7


def test_the_whole_loss() -> None:
    source = Checkpoint.open(TRAINED, dtype="float64")
    config = replace(source.config, balance_weight=0.1)
    output, saved = forward(source.load(), TOKENS, config)
    loss, gradients = loss_and_grads(TRAINED, TOKENS, mtp=True, balance_alpha=0.1)
    assert loss == output.loss
    assert list(gradients) == list(gradient_shapes(config))
    for name, x in backward(saved).items():
        if ".experts." in name:
            x, name = x[3], name.replace(".experts.", ".experts.3.")
        assert np.array_equal(gradients[name], x)


def test_options() -> None:
    """Types, conventions, patterns, other losses."""
    single, _ = loss_and_grads(TRAINED, TOKENS, dtype="float32", only="model.norm.weight")
    double, found = loss_and_grads(TRAINED, TOKENS, only="model.norm.weight")
    assert list(found) == ["model.norm.weight"]
    assert single is not None
    assert double is not None
    assert 0 < abs(single / double - 1) < 1e-6
    assert loss_and_grads(TRAINED, TOKENS, convention="hf", only="model.norm.weight")[0] != double
    mask = np.arange(10) < [[9], [5]]
    policy = GRPO(mask, np.array([1.0, -1.0]), settings={"kl_weight": 0.0})
    assert loss_and_grads(TRAINED, TOKENS, grpo=policy)[0] == pytest.approx(0)
    width = Checkpoint.open(TRAINED).config.vocabulary
    loss, _ = loss_and_grads(TRAINED, TOKENS, dlogits=np.ones((2, 10, width)))
    assert loss is None


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"convention": "mine"}, ValueError, "^convention must be one of official, paper, hf"),
        ({"dtype": "float16"}, CouldNotRun, "^dtype must be float32 or float64"),
        ({"layers": 9}, ValueError, "^layers must lie in 1…3"),
        ({"colour": 1}, TypeError, "colour"),
    ],
)
def test_errors(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        loss_and_grads(TRAINED, TOKENS, **given)
