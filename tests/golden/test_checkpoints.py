"""Our model on four checkpoints that transformers saved, against the logits and gradients that it
computed: no torch.

tests/golden/make_checkpoints.py made them; tests/oracle/test_hugging_face.py compares with
transformers itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from refimpl.config import CONVENTIONS, ModelConfig
from refimpl.parameters import is_buffer

from golden.checkpoint_values import (
    GOLDEN,
    LOGITS,
    Arrays,
    assert_agree,
    errors,
    golden_values,
    our_values,
    read_checkpoint,
)

NAMES = sorted(folder.name for folder in GOLDEN.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients(name: str) -> None:
    config, params = read_checkpoint(GOLDEN / name)
    inputs, theirs = golden_values(GOLDEN / name)
    assert_agree(our_values(params, config=config, **inputs), theirs)


def test_four_of_them() -> None:
    assert NAMES == ["v2-greedy", "v2-group-limited", "v3", "v3-moonlight"]
    for name in NAMES:
        assert sum(path.stat().st_size for path in (GOLDEN / name).iterdir()) <= 150_000


OTHERS: list[
    tuple[str, dict[str, Any], dict[str, Any]]
] = [  # checkpoint, changes of the config, of the conventions
    ("v3", {"norm_eps": 1e-5}, {}),
    ("v3", {"top_k": 2}, {}),
    ("v3", {"keep_groups": 3}, {}),
    ("v3", {"group_score": "max"}, {}),
    ("v3", {"normalise_weights": False}, {}),
    ("v3", {"routed_scale": 1.0}, {}),
    ("v3", {"yarn": None}, {}),
    ("v3", {}, {"masked_groups": "zero"}),
    ("v3", {}, {"rope_layout": "halves"}),
    ("v3-moonlight", {"theta": 1e4}, {}),
    ("v2-group-limited", {}, {"softmax_normalise": "unscaled"}),
    ("v2-greedy", {"gate": "sigmoid"}, {}),
    ("v2-group-limited", {"group_score": "top2"}, {}),
]


@pytest.mark.parametrize(("name", "change", "conventions"), OTHERS, ids=str)
def test_another_convention_shows(
    name: str, change: dict[str, Any], conventions: dict[str, Any]
) -> None:
    """The golden values tell the settings apart on which implementations differ."""
    config, params = read_checkpoint(GOLDEN / name)
    config = replace(config, **change, conventions=replace(config.conventions, **conventions))
    assert forward_error(config, params, name) > 1e3 * LOGITS


@pytest.mark.parametrize(
    "scales", [{"mscale_all_dim": 0.0}, {"mscale": 0.9}, {"mscale": 1.0, "mscale_all_dim": 1.0}]
)
def test_mscale_shows(scales: dict[str, float]) -> None:
    config, params = read_checkpoint(GOLDEN / "v3")
    assert config.yarn is not None
    assert (
        forward_error(replace(config, yarn=config.yarn._replace(**scales)), params, "v3")
        > 1e3 * LOGITS
    )


def test_the_bias_shows() -> None:
    config, params = read_checkpoint(GOLDEN / "v3")
    biases = {name: bias for name, bias in params.items() if is_buffer(name)}
    assert all((bias < 0).any() and (bias > 0).any() for bias in biases.values())
    assert (
        forward_error(config, params | {name: np.zeros_like(b) for name, b in biases.items()}, "v3")
        > 1e3 * LOGITS
    )


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("v3-moonlight", "latent_eps"),
        ("v2-greedy", "yarn_when"),
        ("v2-group-limited", "yarn_factor"),
        ("v2-group-limited", "softmax_normalise"),
    ],
)
def test_transformers_is_not_official(name: str, field: str) -> None:
    """Each convention in which transformers differs from DeepSeek shows on one of the
    checkpoints."""
    config, params = read_checkpoint(GOLDEN / name)
    conventions = replace(config.conventions, **{field: getattr(CONVENTIONS["official"], field)})
    assert forward_error(replace(config, conventions=conventions), params, name) > 1e3 * LOGITS


def test_on_v3_transformers_is_official() -> None:
    config, params = read_checkpoint(GOLDEN / "v3")
    assert (
        forward_error(replace(config, conventions=CONVENTIONS["official"]), params, "v3") <= LOGITS
    )


def forward_error(config: ModelConfig, params: Arrays, name: str) -> float:
    inputs, theirs = golden_values(GOLDEN / name)
    return errors(our_values(params, config=config, **inputs), theirs)[0]
