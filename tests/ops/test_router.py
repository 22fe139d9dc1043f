"""The gate: the protocol, selection by brute force, weights, gradients, load and bias update, and
the errors."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.ops import bias_update, expert_load, router_backward, router_forward, select_experts

from support import HypothesisDraw, property_test

EPS = np.finfo(np.float64).eps
B = 2
T = 5
D = 4
E = 8
K = 3
RANKINGS = "scores", "logits"
SCORES = pytest.mark.parametrize("score", ["sigmoid", "softmax"])


def inputs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(B, T, D)), rng.normal(size=(E, D))


def logits_as_inputs() -> tuple[np.ndarray, np.ndarray]:
    """With the identity as the gate, x are the logits, and dx is their gradient."""
    return np.random.default_rng(0).normal(size=(B, T, E)), np.eye(E)


def test_protocol() -> None:
    property_test("router")


def best_in_plain_python(
    row: list[float],
    top_k: int,
    groups: int,
    keep_groups: int,
    group_score: str,
    masked_groups: str,
) -> list[int]:
    size = len(row) // groups
    members = [row[g * size : (g + 1) * size] for g in range(groups)]
    count = {"top2": 2, "share": top_k // keep_groups, "max": 1}[group_score]
    best = [sum(sorted(m)[-count:]) for m in members]
    kept = sorted(range(groups), key=lambda g: (-best[g], g))[:keep_groups]
    hidden = -math.inf if masked_groups == "-inf" else 0.0
    scores = [s if i // size in kept else hidden for i, s in enumerate(row)]
    return sorted(range(len(row)), key=lambda i: (-scores[i], i))[:top_k]


@given(st.data())
def test_selection_by_brute_force(data: st.DataObject) -> None:
    """Multiples of 1/4 from −1 to 1, so that ties abound and sums are exact: they go to the lower
    index."""
    draw = HypothesisDraw(data)
    groups, size = draw.integer(1, 4), draw.integer(1, 4)
    keep_groups = draw.integer(1, groups)
    top_k = draw.integer(1, keep_groups * size)
    group_score = draw.choice(["top2", "max", "share"] if top_k >= keep_groups else ["top2", "max"])
    how = group_score, draw.choice(["-inf", "zero"])
    biased = draw.rng.integers(-4, 5, (2, 6, groups * size)) / 4
    expected = [
        [best_in_plain_python(row, top_k, groups, keep_groups, *how) for row in rows]
        for rows in biased.tolist()
    ]
    np.testing.assert_array_equal(
        select_experts(biased, top_k, groups, keep_groups, *how), expected
    )


def test_all_equal_chooses_the_first() -> None:
    equal = np.full((1, 8), 0.5)
    np.testing.assert_array_equal(select_experts(equal, 4), [[0, 1, 2, 3]])
    np.testing.assert_array_equal(select_experts(equal, 4, groups=4, keep_groups=2), [[0, 1, 2, 3]])


def test_nan_comes_after_every_number() -> None:
    """After −∞ too, so that of a row of NaN a hidden expert is chosen first: what the kernels must
    do as well."""
    nan, inf = np.nan, np.inf
    assert select_experts(np.array([nan, -inf, 1.0, nan]), 4).tolist() == [2, 1, 0, 3]
    assert select_experts(np.array([nan, nan, 0.0, 1.0]), 1, 2, 1).tolist() == [3]
    assert select_experts(np.full(4, nan), 2, 2, 1).tolist() == [2, 3]


def test_hidden_groups_at_zero_beat_negative_scores() -> None:
    """The convention that Hugging Face had: the kept group is 0, and the experts of group 1 are
    chosen."""
    negative = np.array([[-0.1, -0.2, -0.5, -0.6]])
    np.testing.assert_array_equal(select_experts(negative, 2, 2, 1, masked_groups="-inf"), [[0, 1]])
    np.testing.assert_array_equal(select_experts(negative, 2, 2, 1, masked_groups="zero"), [[2, 3]])


def test_group_score_decides() -> None:
    """The best single expert sits in group 0, the best pair in group 1."""
    scores = np.array([[0.9, 0.0, 0.6, 0.5]])
    np.testing.assert_array_equal(select_experts(scores, 2, 2, 1, group_score="max"), [[0, 1]])
    np.testing.assert_array_equal(select_experts(scores, 2, 2, 1, group_score="top2"), [[2, 3]])
    np.testing.assert_array_equal(
        select_experts(scores, 1, 2, 1, group_score="share"), [[0]]
    )  # K / kept groups = 1
    np.testing.assert_array_equal(select_experts(scores, 2, 2, 1, group_score="share"), [[2, 3]])


def test_ranking_decides_where_scores_are_added() -> None:
    """Scores (0.7, 0 | 0.15, 0.15): the pair of group 0 is the best, the product of group 1's is.
    Without groups both rankings give the same, and the weights are the scores' in both."""
    x, w = np.eye(1), np.log([[0.7], [1e-9], [0.15], [0.15]])
    how = {"top_k": 2, "score": "softmax", "normalise": False}
    grouped = {"groups": 2, "keep_groups": 1}
    by_scores, by_logits = (
        router_forward(x, w, ranking=ranking, **grouped, **how)[0] for ranking in RANKINGS
    )
    np.testing.assert_array_equal(by_scores.indices, [[0, 1]])
    np.testing.assert_array_equal(by_logits.indices, [[2, 3]])
    np.testing.assert_array_equal(by_logits.scores, by_scores.scores)
    np.testing.assert_array_equal(by_logits.weights, by_scores.scores[:, 2:])
    plain = [router_forward(x, w, ranking=ranking, **how)[0] for ranking in RANKINGS]
    np.testing.assert_array_equal(plain[0].indices, plain[1].indices)
    bias = np.array([0.0, 0.0, 0.9, 0.9])  # beside logits of −1.9 it moves less than beside scores
    biased = [
        router_forward(x, w, ranking=ranking, bias=bias, top_k=1, score="softmax")[0].indices
        for ranking in RANKINGS
    ]
    np.testing.assert_array_equal(biased, [[[2]], [[0]]])


@pytest.mark.parametrize(
    ("score", "value"), [("sigmoid", [0.5, 0.75, 0.25]), ("softmax", [3 / 13, 9 / 13, 1 / 13])]
)
def test_values(score: str, value: list[float]) -> None:
    x, w = np.array([[0.0, math.log(3), -math.log(3)]]), np.eye(3)
    output, _ = router_forward(x, w, top_k=2, score=score, scale=2.5, normalise=False)
    np.testing.assert_allclose(output.scores, [value], rtol=8 * EPS)
    np.testing.assert_array_equal(output.indices, [[1, 0]])
    np.testing.assert_array_equal(output.weights, 2.5 * output.scores[:, [1, 0]])


@SCORES
def test_normalised_weights_sum_to_scale(score: str) -> None:
    (x, w), k_eps = inputs(), 2 * K * EPS
    (weights, scores, indices), _ = router_forward(x, w, top_k=K, score=score, scale=2.5)
    np.testing.assert_allclose(weights.sum(axis=-1), 2.5, rtol=k_eps)
    chosen = np.take_along_axis(scores, indices, axis=-1)
    np.testing.assert_allclose(
        weights[..., 0] / weights[..., 1], chosen[..., 0] / chosen[..., 1], rtol=k_eps
    )
    total = chosen.sum(axis=-1)
    damped, _ = router_forward(x, w, top_k=K, score=score, scale=2.5, epsilon=0.1)
    np.testing.assert_allclose(damped.weights.sum(axis=-1), 2.5 * total / (total + 0.1), rtol=k_eps)


@SCORES
def test_bias_moves_the_selection_and_nothing_else(score: str) -> None:
    x, w = inputs()
    bias = np.array([0, 0, 0, 0, 0, -9.0, 9.0, 0])
    (weights, scores, indices), _ = router_forward(x, w, top_k=K, score=score, bias=bias, scale=2.5)
    plain, _ = router_forward(x, w, top_k=K, score=score)
    np.testing.assert_array_equal(scores, plain.scores)
    assert np.all(indices[..., 0] == 6)
    assert not np.any(indices == 5)
    chosen = np.take_along_axis(scores, indices, axis=-1)
    np.testing.assert_allclose(
        weights, 2.5 * chosen / chosen.sum(axis=-1, keepdims=True), rtol=2 * K * EPS
    )
    shifted, _ = router_forward(x, w, top_k=K, score=score, bias=bias + 4)
    np.testing.assert_array_equal(shifted.indices, indices)


def test_bias_gets_no_gradient() -> None:
    """Differentiable arguments are positional: x and w."""
    kinds = [
        p.name
        for p in inspect.signature(router_forward).parameters.values()
        if p.kind != p.KEYWORD_ONLY
    ]
    _, saved = router_forward(*inputs(), top_k=K, bias=np.ones(E))
    assert kinds == ["x", "w"]
    assert len(router_backward((np.ones((B, T, K)), None), saved)) == 2


def test_experts_that_were_not_chosen_get_nothing_from_the_weights() -> None:
    """Sigmoid scores are independent: their logits' gradient is exactly 0; a softmax couples them
    all."""
    x, w = logits_as_inputs()
    dweights = np.random.default_rng(1).normal(size=(B, T, K))
    for score in ("sigmoid", "softmax"):
        output, saved = router_forward(x, w, top_k=K, score=score, normalise=False)
        dlogits, _ = router_backward((dweights, None), saved)
        chosen = np.any(output.indices[..., None] == np.arange(E), axis=-2)
        assert np.all(dlogits[chosen] != 0)
        assert np.all((dlogits[~chosen] == 0) == (score == "sigmoid"))


def test_gradient_is_blind_to_a_common_factor() -> None:
    """Normalised weights do not change if all chosen scores are scaled: Σ_k c_k dc_k = 0 at epsilon
    0."""
    x, w = logits_as_inputs()
    output, saved = router_forward(x, w, top_k=K, scale=2.5)
    dlogits, _ = router_backward((np.random.default_rng(1).normal(size=(B, T, K)), None), saved)
    products = dlogits / (1 - output.scores)  # dlogits = ds s (1 − s)
    assert np.max(np.abs(products.sum(axis=-1))) <= 8 * K * EPS
    assert np.max(np.abs(products)) > 0.1


def test_softmax_gradient_sums_to_zero() -> None:
    """A constant added to a row's logits changes nothing."""
    rng, (x, w) = np.random.default_rng(1), logits_as_inputs()
    _, saved = router_forward(x, w, top_k=K, score="softmax", normalise=False)
    dlogits, _ = router_backward((rng.normal(size=(B, T, K)), rng.normal(size=(B, T, E))), saved)
    assert np.max(np.abs(dlogits.sum(axis=-1))) <= 4 * E * EPS
    assert np.max(np.abs(dlogits)) > 0.1


@SCORES
def test_both_cotangents_add_up(score: str) -> None:
    rng = np.random.default_rng(1)
    _, saved = router_forward(*inputs(), top_k=K, score=score, scale=2.5)
    dweights, dscores = rng.normal(size=(B, T, K)), rng.normal(size=(B, T, E))
    both = router_backward((dweights, dscores), saved)
    parts = (
        router_backward((dweights, None), saved),
        router_backward((0 * dweights, dscores), saved),
    )
    for whole, a, b in zip(both, *parts, strict=True):
        np.testing.assert_allclose(
            whole, a + b, rtol=0, atol=8 * (E + B * T) * EPS * np.abs(whole).max()
        )


@SCORES
def test_replay_of_own_routes_is_bitwise_equal(score: str) -> None:
    x, w = inputs()
    kwargs: dict[str, Any] = {
        "top_k": K,
        "score": score,
        "bias": np.linspace(-1, 1, E),
        "groups": 4,
        "keep_groups": 2,
    }
    output, saved = router_forward(x, w, **kwargs)
    again, again_saved = router_forward(x, w, **kwargs, routes=output.indices)
    dy = np.ones((B, T, K)), np.linspace(0, 1, B * T * E).reshape(B, T, E)
    pairs = [
        *zip(output, again, strict=True),
        *zip(router_backward(dy, saved), router_backward(dy, again_saved), strict=True),
    ]
    for a, b in pairs:
        assert a.tobytes() == b.tobytes()


def test_replay_of_other_routes() -> None:
    """Weights follow the given routes, slot by slot."""
    routes = np.broadcast_to(np.array([7, 0, 3]), (B, T, K))
    output, _ = router_forward(*inputs(), top_k=K, routes=routes, normalise=False)
    np.testing.assert_array_equal(output.weights, output.scores[..., [7, 0, 3]])
    np.testing.assert_array_equal(output.indices, routes)


@SCORES
def test_huge_logits(score: str) -> None:
    """±1e4: scores of 0 and 1, no overflow (warnings are errors), finite gradients."""
    x = np.array([[1e4, -1e4, 0.0, -1e4]])
    output, saved = router_forward(x, np.eye(4), top_k=2, score=score)
    np.testing.assert_array_equal(output.scores, [[1, 0, 0.5 if score == "sigmoid" else 0, 0]])
    assert all(
        np.all(np.isfinite(g)) for g in router_backward((np.ones((1, 2)), np.ones((1, 4))), saved)
    )


def test_scores_that_all_underflow() -> None:
    """0/0 without an epsilon, which numpy reports; with Hugging Face's 1e-20 the weights are 0."""
    x = np.full((1, 4), -1e4)
    output, saved = router_forward(x, np.eye(4), top_k=2, epsilon=1e-20)
    np.testing.assert_array_equal(output.weights, [[0, 0]])
    assert np.all(np.isfinite(router_backward((np.ones((1, 2)), None), saved)[0]))
    with pytest.warns(RuntimeWarning, match="invalid value"):
        router_forward(x, np.eye(4), top_k=2)


@pytest.mark.parametrize("masked", [False, True])
def test_expert_load(masked: bool) -> None:
    rng = np.random.default_rng(0)
    indices = rng.integers(1, E, (B, 40, K))  # expert 0 gets none
    mask = rng.random((B, 40)) < 0.5 if masked else None
    load = expert_load(indices, E, mask)
    np.testing.assert_array_equal(
        load, np.bincount(indices[mask if masked else ...].reshape(-1), minlength=E)
    )
    assert np.issubdtype(load.dtype, np.integer)
    assert load[0] == 0
    np.testing.assert_array_equal(expert_load(indices, E, np.zeros((B, 40), bool)), np.zeros(E))


def test_bias_update() -> None:
    """Up where the load is below the mean (here 4), down above, untouched at the mean; centred, the
    mean stays."""
    bias, load = np.array([1.0, 2, 3, 4, 5]), np.array([0, 4, 12, 1, 3])
    moved = bias_update(bias, load, 0.5)
    np.testing.assert_array_equal(moved, [1.5, 2, 2.5, 4.5, 5.5])
    np.testing.assert_array_equal(bias, [1, 2, 3, 4, 5])
    centred = bias_update(bias, load, 0.5, centre=True)
    np.testing.assert_allclose(centred, moved - 0.2, rtol=2 * EPS)
    assert centred.mean() == pytest.approx(3, abs=4 * EPS)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"w": np.ones((E, D + 1))},
            ValueError,
            r"w must have shape \(E, D\)=\('any', 4\), got \(8, 5\)",
        ),
        ({"score": "relu"}, ValueError, "score must be one of sigmoid, softmax, got 'relu'"),
        (
            {"routes": np.zeros((B, T, K + 1), int)},
            ValueError,
            r"routes must have shape \(…, K\)=\(2, 5, 3\), got",
        ),
        ({"routes": np.full((B, T, K), -1)}, ValueError, "routes must lie in 0…7, got -1…-1"),
        ({"routes": np.full((B, T, K), E)}, ValueError, "routes must lie in 0…7, got 8…8"),
        (
            {"groups": 3},
            ValueError,
            "groups must divide E=8, keep_groups lie in 1…groups, got 3, 1",
        ),
        (
            {"groups": 0},
            ValueError,
            "groups must divide E=8, keep_groups lie in 1…groups, got 0, 1",
        ),
        ({"groups": 2, "keep_groups": 3}, ValueError, "keep_groups lie in 1…groups, got 2, 3"),
        ({"groups": 2, "keep_groups": 0}, ValueError, "keep_groups lie in 1…groups, got 2, 0"),
        (
            {"group_score": "sum"},
            ValueError,
            "group_score must be one of top2, share, max, got 'sum'",
        ),
        (
            {"masked_groups": "nan"},
            ValueError,
            "masked_groups must be one of -inf, zero, got 'nan'",
        ),
        ({"ranking": "bias"}, ValueError, "ranking must be one of scores, logits, got 'bias'"),
        ({"top_k": 0}, ValueError, r"top_k must lie in 1…8 \(kept experts\), got 0"),
        ({"groups": 4, "top_k": 3}, ValueError, r"top_k must lie in 1…2 \(kept experts\), got 3"),
        ({"x": np.ones((B, T, D), int)}, TypeError, "x must be float32 or wider"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    x, w = inputs()
    with pytest.raises(error, match=message):
        router_forward(**({"x": x, "w": w, "top_k": K} | change))


def test_errors_of_the_bias_update() -> None:
    with pytest.raises(ValueError, match=r"load must have shape \(E,\)=\(3,\), got \(1,\)"):
        bias_update(np.zeros(3), np.ones(1, int), 0.1)


@pytest.mark.parametrize("shape", [(1,), (T, 1), (B, T, E)])
def test_bias_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"bias must have shape \(E,\)=\(8,\)"):
        router_forward(*inputs(), top_k=K, bias=np.ones(shape))


@pytest.mark.parametrize("index", [-1, E])
def test_load_of_an_expert_that_does_not_exist(index: int) -> None:
    with pytest.raises(ValueError, match="indices must lie in 0…7"):
        expert_load(np.array([[0, index]]), E)


@np.errstate(all="ignore")
def test_range_of_validity() -> None:
    """A sigmoid gate's logits that overflow have the scores 1 and 0 of numbers so large; a softmax
    gate's +∞ is NaN. Where all chosen scores underflow, 0/0 is NaN without ε and 0 with it."""
    w = np.array([[1e25], [-1e25], [0.0]], np.float32)
    big = np.full((1, 1), 1e25, np.float32)
    output, saved = router_forward(big, w, top_k=2)
    assert output.scores.tolist() == [[1, 0, 0.5]]
    assert output.indices.tolist() == [[0, 2]]
    np.testing.assert_allclose(output.weights, [[2 / 3, 1 / 3]], rtol=1e-6)
    assert np.isfinite(router_backward((np.array([[1, 2]], np.float32), None), saved)[1]).all()
    output, saved = router_forward(big, w, top_k=2, score="softmax")
    assert np.isnan(output.weights).all()
    assert np.isnan(router_backward((np.ones((1, 2), np.float32), None), saved)[0]).all()
    low = np.full((1, 1), -200, np.float32)
    for epsilon, wanted in ((0.0, np.nan), (1e-20, 0.0)):
        output, _ = router_forward(low, np.ones((3, 1), np.float32), top_k=2, epsilon=epsilon)
        np.testing.assert_array_equal(output.weights, np.full((1, 2), wanted, np.float32))
    close = np.array([[-100.0], [-101.0]], np.float32)  # their sigmoids have five bits
    got, right = (
        router_forward(np.ones((1, 1), t), close.astype(t), top_k=2)[0].weights
        for t in (np.float32, np.float64)
    )
    assert 1e-4 < np.abs(got - right).max() < 0.1


@pytest.mark.parametrize("name", ["scale", "epsilon"])
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_settings_that_cannot_be_right(name: str, value: float) -> None:
    with pytest.raises(ValueError, match="scale must be a finite number and epsilon one of at le"):
        router_forward(np.ones((2, 3)), np.ones((4, 3)), top_k=1, **{name: value})


@pytest.mark.parametrize(("x", "w"), [((2, 0), (4, 0)), ((2, 3), (0, 3))])
def test_no_width_or_experts(x: tuple[int, ...], w: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must have a(t least 1| last axis of at least 1) entry"):
        router_forward(np.ones(x), np.ones(w), top_k=1, score="softmax")
