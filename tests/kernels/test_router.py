"""The kernels of the router."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from refimpl import ops
from refimpl.kernels.columns import COLUMNS

from kernel_support import (
    ALL,
    QUICK_TYPES,
    TABLE,
    TABLES,
    WIDE,
    rounded,
    to_device,
    to_host,
    without_a_device,
)
from kernel_support.planted import PLANTED, PLANTED_IN_NUMBA, assert_seen, plant, plant_in_numba

# bfloat16 scores are computed as float32's
ROUTED = [case for case in QUICK_TYPES if ALL or case != ("cuda", "bfloat16")]


@pytest.mark.parametrize(("column", "storage"), ROUTED)
def test_router_chooses_exactly_the_same(column: str, storage: str) -> None:
    """Scores full of ties: the ids are those of `select_experts` on the same scores, in every
    grouping; replayed, they give the same bits."""
    rng = np.random.default_rng(0)
    for experts, groups, keep, top_k, group_score, hidden in (
        (8, 1, 1, 3, "max", "-inf"),
        (64, 8, 4, 8, "top2", "-inf"),
        (64, 8, 4, 8, "share", "zero"),
        (33, 3, 2, 6, "top2", "zero"),
        (6, 6, 5, 5, "top2", "-inf"),
        (1, 1, 1, 1, "max", "-inf"),
        (60, 20, 7, 8, "top2", "-inf"),
        (100, 5, 2, 9, "share", "-inf"),
        (40, 2, 2, 32, "top2", "-inf"),
        (48, 4, 1, 6, "share", "-inf"),
    ):
        x = np.eye(5)[rng.integers(0, 5, 6)]
        w, bias = rng.integers(-2, 3, (experts, 5)) / 2.0, rng.integers(-3, 2, experts) / 4.0
        bias = bias.astype(WIDE[storage])  # a wider one is added by the host, which then chooses
        for score in ("sigmoid", "softmax"):
            forward = partial(
                TABLES[column]["router"].forward,
                *(rounded(a, storage) for a in (x, w)),
                bias=bias,
                top_k=top_k,
                groups=groups,
                keep_groups=keep,
                group_score=group_score,
                masked_groups=hidden,
                score=score,
            )
            output, _ = forward()
            biased = output.scores + bias
            wanted = ops.select_experts(biased, top_k, groups, keep, group_score, hidden)
            assert np.array_equal(output.indices, wanted), (experts, groups, score)
            if score == "softmax":  # whose sum's order the groups decide
                replayed, _ = forward(routes=output.indices)
                assert [a.tobytes() for a in replayed] == [a.tobytes() for a in output], (
                    experts,
                    groups,
                )


@pytest.mark.parametrize(("column", "storage"), ROUTED)
def test_router_ranks_logits(column: str, storage: str) -> None:
    """Of multiples of 1/4, which no type rounds: the ids of `select_experts` on logits and bias,
    and the weights of those experts' scores."""
    rng = np.random.default_rng(0)
    x, w = np.eye(5)[rng.integers(0, 5, 6)], rng.integers(-20, 21, (16, 5)) / 4.0
    bias = (rng.integers(-3, 4, 16) / 4.0).astype(WIDE[storage])
    selection = {"top_k": 3, "groups": 4, "keep_groups": 2}
    forward = partial(
        TABLES[column]["router"].forward,
        *(rounded(a, storage) for a in (x, w)),
        bias=bias,
        score="softmax",
        **selection,
    )
    found, _ = forward(ranking="logits")
    wanted = ops.select_experts(x @ w.T + bias, **selection)
    assert np.array_equal(found.indices, wanted)
    assert not np.array_equal(forward()[0].indices, wanted)
    replayed, _ = forward(routes=found.indices)
    assert [a.tobytes() for a in replayed] == [a.tobytes() for a in found]


@pytest.mark.parametrize(("column", "storage"), ROUTED)
def test_router_with_scores_that_are_no_numbers(column: str, storage: str) -> None:
    """NaN in scores, bias, whole groups and all of them: the very ids of `select_experts`, where
    NaN comes after every number, the −∞ of a hidden group too; the scores are NaN where the
    reference's are."""
    rng = np.random.default_rng(0)
    inf = np.inf
    nan = np.nan
    for experts, groups, keep, top_k, group_score, hidden in (
        (8, 1, 1, 5, "max", "-inf"),
        (12, 3, 1, 4, "max", "zero"),
        (12, 3, 2, 6, "top2", "-inf"),
        (40, 8, 4, 9, "top2", "-inf"),
    ):
        settings = {
            "top_k": top_k,
            "groups": groups,
            "keep_groups": keep,
            "group_score": group_score,
        }
        first, some = np.arange(experts) < experts // groups, rng.random(experts) < 0.4
        x, w = np.eye(4)[[0, 1, 2]], rng.integers(-2, 3, (experts, 4)) / 2.0
        x[0], bias = nan, rng.integers(-3, 2, experts) / 4.0
        infinite = np.where(rng.random(experts) < 0.5, inf, -inf)
        cases: tuple[tuple[str, Any, Any], ...] = (
            ("sigmoid", some, bias),
            ("sigmoid", first, np.where(some, nan, bias)),
            ("sigmoid", some, np.where(first, infinite, bias)),
            ("sigmoid", ~first, infinite),
            ("softmax", some, bias),
            ("softmax", first & ~first, np.where(some, nan, bias)),
            ("softmax", first & ~first, np.where(~first | some, nan, infinite)),
        )
        for score, strange, of_experts in cases:
            bias_ = of_experts.astype(WIDE[storage])  # a wider one would choose on the host
            given = [rounded(a, storage) for a in (x, np.where(strange[:, None], nan, w))]
            with np.errstate(invalid="ignore"):
                found, _ = TABLES[column]["router"].forward(
                    *given, bias=bias_, score=score, masked_groups=hidden, **settings
                )
                biased = found.scores + bias_
                wanted = ops.select_experts(biased, top_k, groups, keep, group_score, hidden)
                exact, _ = ops.router_forward(
                    *(a.astype(np.float64) for a in given), top_k=top_k, score=score, routes=wanted
                )
            assert np.array_equal(found.indices, wanted), (settings, hidden, score, biased)
            assert np.array_equal(np.isnan(found.scores), np.isnan(exact.scores))
            assert np.array_equal(np.isnan(found.weights), np.isnan(exact.weights))


@pytest.mark.parametrize("column", COLUMNS)
def test_router_adds_as_the_reference_does(column: str) -> None:
    """Groups whose 12 best add up to the same but for a rounding: which is kept depends on the
    order of the sum, which is CuPy's own on a device."""
    rng = np.random.default_rng(0)
    group = rng.normal(size=(40, 16))
    logits = np.concatenate([group, group + 1e-7 * rng.normal(size=group.shape)], axis=1).astype(
        np.float32
    )
    kwargs: dict[str, Any] = {"top_k": 12, "groups": 2, "keep_groups": 1, "group_score": "share"}
    output, _ = TABLES[column]["router"].forward(
        np.eye(40, dtype=np.float32), np.ascontiguousarray(logits.T), **kwargs
    )
    wanted = to_host(ops.select_experts(to_device(output.scores), 12, 2, 1, "share"))
    assert np.array_equal(output.indices, wanted)


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.int64, np.float16])
@pytest.mark.parametrize("column", COLUMNS)
def test_router_with_a_bias_of_another_type(column: str, dtype: type) -> None:
    """Scores of float32 that a bias of 3 makes equal in float32, and not in float64, which integers
    of 32 bits make."""
    logits = 1 + 1e-7 * np.arange(16).reshape(1, 16)
    x, w = np.ones((1, 1), np.float32), np.ascontiguousarray(logits.T.astype(np.float32))
    bias = np.full(16, 3, dtype)
    output, _ = TABLES[column]["router"].forward(x, w, top_k=4, bias=bias)
    assert np.array_equal(output.indices, ops.select_experts(output.scores + bias, 4))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"top_k must lie in 1…4"):
        TABLE["router"].forward(np.ones((1, 2)), np.ones((4, 2)), top_k=5)
    for experts, groups, top_k in ((66, 33, 1), (1020, 17, 1), (1025, 1, 1), (40, 1, 33)):
        with pytest.raises(
            ValueError,
            match=r"top_k and groups must be at most 32, experts 1024 \(.*got \d+, \d+ and",
        ):
            TABLE["router"].forward(
                np.ones((1, 2)), np.ones((experts, 2)), top_k=top_k, groups=groups
            )


@pytest.mark.parametrize("column", COLUMNS)
def test_arguments_that_a_kernel_would_misread(column: str) -> None:
    bias = np.array([0, 1e-12, 0, 2e-12])  # which float32 scores of 1/2 would lose
    found, _ = TABLES[column]["router"].forward(
        np.zeros((1, 3), np.float32), np.zeros((4, 3), np.float32), top_k=1, bias=bias
    )
    assert found.indices.tolist() == [[3]]


@without_a_device
@pytest.mark.parametrize("name", PLANTED["router"])
def test_planted_mistakes_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant("router", name, monkeypatch)
    assert_seen("router", partial(test_router_chooses_exactly_the_same, "cuda", "float64"))


@without_a_device
@pytest.mark.parametrize("name", PLANTED_IN_NUMBA["router"])
def test_planted_mistakes_in_numba_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_in_numba("router", name, monkeypatch)
    assert_seen(
        "router",
        partial(test_router_chooses_exactly_the_same, "numba_cuda", "float64"),
        column="numba_cuda",
    )
