"""Choices of experts: rounding explains ties, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from refimpl.config import ModelConfig, preset
from refimpl.ops.router import select_experts
from refimpl.port.choices import explained

TINY = preset("tiny")  # 8 experts in 4 groups, 2 kept, 3 chosen
ONE = replace(TINY, groups=1, keep_groups=1)
SCORES = np.array([[0.9, 0.5, 0.8, 0.1, 0.499, 0.3, 0.2, 0.0]])


def select(scores: np.ndarray, config: ModelConfig) -> np.ndarray:
    return np.asarray(
        select_experts(scores, config.top_k, config.groups, config.keep_groups, config.group_score)
    )


@pytest.mark.parametrize("config", [TINY, ONE, replace(TINY, group_score="max")])
def test_what_moved_scores_choose_is_explained(config: ModelConfig) -> None:
    """Whatever scores within the slack choose, and nearly never what others do."""
    rng = np.random.default_rng(0)
    scores = rng.uniform(0.1, 0.9, (500, 8))
    moved = scores + rng.uniform(-0.05, 0.05, scores.shape)
    assert not (np.sort(select(scores, config)) == np.sort(select(moved, config))).all()
    assert explained(scores, select(moved, config), 0.05, config).all()
    assert explained(scores, select(scores, config), 0.0, config).all()
    other = select(rng.uniform(0.1, 0.9, scores.shape), config)
    assert explained(scores, other, 0.001, config).mean() < 0.2


def test_a_tie_and_a_mistake() -> None:
    tie, mistake = np.array([[0, 2, 4]]), np.array([[0, 2, 5]])
    assert explained(SCORES, tie, 0.001, ONE).all()
    assert not explained(SCORES, tie, 0.0001, ONE).any()
    assert not explained(SCORES, mistake, 0.001, ONE).any()


def test_groups() -> None:
    """Groups 0 and 1 are kept, with sums 1.4 and 0.9; group 2 has 0.799."""
    assert explained(SCORES, np.array([[0, 1, 2]]), 0.0, TINY).all()
    assert not explained(SCORES, np.array([[0, 1, 4]]), 0.01, TINY).any()
    assert explained(SCORES, np.array([[0, 1, 4]]), 0.06, TINY).all()
    assert not explained(SCORES, np.array([[0, 2, 4]]), 0.1, TINY).any()  # of three groups
    zeros = replace(TINY.conventions, masked_groups="zero")
    assert explained(SCORES, np.array([[5, 6, 7]]), 0.0, replace(TINY, conventions=zeros)).all()
