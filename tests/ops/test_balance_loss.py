"""Balance loss: the protocol, its values, identities and padding, and its errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl.ops import balance_loss_backward, balance_loss_forward

from support import property_test

EPS = np.finfo(np.float64).eps
B = 2
T = 6
E = 4
K = 2


def scores() -> np.ndarray:
    return np.random.default_rng(0).uniform(0.05, 0.95, (B, T, E))


def test_protocol() -> None:
    property_test("balance_loss")


def test_value_by_hand() -> None:
    """Two tokens, three experts, K = 2: counts 2 1 1, so f = 3/(2·2) · counts; P = (5/12, 7/24,
    7/24)."""
    s = np.array([[[0.5, 0.25, 0.25], [0.2, 0.2, 0.2]]])
    counted = np.array([[[0, 1], [0, 2]]])
    loss, _ = balance_loss_forward(s, alpha=0.8, top_k=2, counted=counted)
    p = (s[0, 0] + 1 / 3) / 2
    np.testing.assert_allclose(
        loss, 0.8 * (0.75 * 2 * p[0] + 0.75 * p[1] + 0.75 * p[2]), rtol=4 * EPS
    )


def test_uniform_scores_give_alpha() -> None:
    """P_i = 1/E and Σ f_i = E, whichever K are counted: the least that perfect balance reaches."""
    loss, _ = balance_loss_forward(np.full((B, T, E), 0.3), alpha=0.7, top_k=K)
    np.testing.assert_allclose(loss, 0.7, rtol=B * T * EPS)


def test_equal_counts_give_alpha_and_no_gradient() -> None:
    """f = 1 for all: Σ P_i = 1 whatever the scores."""
    counted = np.array([[[0, 1], [2, 3], [1, 2], [3, 0], [0, 2], [1, 3]]] * B)
    loss, saved = balance_loss_forward(scores(), alpha=0.7, top_k=K, counted=counted)
    np.testing.assert_allclose(loss, 0.7, rtol=B * T * EPS)
    assert np.max(np.abs(balance_loss_backward(np.float64(1), saved))) <= 4 * E * EPS


def test_collapse_costs_e_over_k() -> None:
    """All tokens to the same K experts, whose scores are nearly all there is: α E/K."""
    s = np.full((B, T, E), 1e-20)
    s[..., [1, 3]] = 1.0
    loss, _ = balance_loss_forward(s, alpha=0.7, top_k=K)
    np.testing.assert_allclose(loss, 0.7 * E / K, rtol=B * T * EPS)


def test_gradient_is_orthogonal_to_the_scores() -> None:
    """Scaling a token's scores changes nothing, so Σ_i ds_i s_i = 0 for every token."""
    s = scores()
    loss, saved = balance_loss_forward(s, alpha=0.7, top_k=K)
    products = balance_loss_backward(np.float64(1.3), saved) * s
    assert np.max(np.abs(products.sum(axis=-1))) <= 4 * E * EPS * np.max(np.abs(products))
    assert np.max(np.abs(products)) > 1e-3
    scaled, _ = balance_loss_forward(s * np.linspace(0.1, 9, T)[:, None], alpha=0.7, top_k=K)
    np.testing.assert_allclose(scaled, loss, rtol=B * T * EPS)


def test_counts_the_best_unless_told_otherwise() -> None:
    """The K best of the given scores, ties to the lower index; and f is per sequence, not over the
    batch."""
    s = np.random.default_rng(0).integers(1, 4, (B, T, E)) / 4
    best = np.argsort(-s, axis=-1, kind="stable")[..., :K]
    last = (
        E - 1 - np.argsort(-s[..., ::-1], axis=-1, kind="stable")[..., :K]
    )  # ties to the higher index
    given, _ = balance_loss_forward(s, alpha=0.7, top_k=K, counted=best)
    chosen, _ = balance_loss_forward(s, alpha=0.7, top_k=K)
    other, _ = balance_loss_forward(s, alpha=0.7, top_k=K, counted=last)
    assert given == chosen
    assert abs(other - chosen) > 1e-3
    each = [balance_loss_forward(s[b : b + 1], alpha=0.7, top_k=K)[0] for b in range(B)]
    np.testing.assert_allclose(chosen, np.mean(each), rtol=B * T * EPS)


@pytest.mark.parametrize("content", [0.5, 1e-9, 1e9])
def test_padding_equals_cutting(content: float) -> None:
    """Whatever the padding holds; masked tokens have exactly no gradient."""
    s, mask = scores(), np.ones((B, T), bool)
    mask[:, 4:] = False
    s[:, 4:] = content
    loss, saved = balance_loss_forward(s, alpha=0.7, top_k=K, mask=mask)
    cut, cut_saved = balance_loss_forward(s[:, :4], alpha=0.7, top_k=K)
    ds, cut_ds = (balance_loss_backward(np.float64(1.3), x) for x in (saved, cut_saved))
    np.testing.assert_allclose(loss, cut, rtol=B * T * EPS)
    np.testing.assert_allclose(ds[:, :4], cut_ds, rtol=4 * EPS)
    assert np.all(ds[:, 4:] == 0)


def test_sequence_of_padding_alone() -> None:
    """It adds 0, exactly and without 0/0, and still counts in the batch's mean."""
    s, mask = scores(), np.ones((B, T), bool)
    mask[0] = False
    loss, saved = balance_loss_forward(s, alpha=0.7, top_k=K, mask=mask)
    alone, _ = balance_loss_forward(s[1:], alpha=0.7, top_k=K)
    np.testing.assert_allclose(loss, alone / 2, rtol=B * T * EPS)
    ds = balance_loss_backward(np.float64(1), saved)
    assert np.all(ds[0] == 0)
    assert np.all(np.isfinite(ds))
    nothing, saved = balance_loss_forward(s, alpha=0.7, top_k=K, mask=np.zeros((B, T), bool))
    assert nothing == 0
    assert np.all(balance_loss_backward(np.float64(1), saved) == 0)


@pytest.mark.parametrize(
    ("s", "error", "message"),
    [
        (
            np.ones((T, E)),
            ValueError,
            r"scores must have shape \(B, T, E\)=\('any', 'any', 'any'\), got \(6, 4\)",
        ),
        (np.ones((B, T, E), int), TypeError, "scores must be float32 or wider"),
    ],
)
def test_errors(s: np.ndarray, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        balance_loss_forward(s, alpha=0.7, top_k=K)


@pytest.mark.parametrize(
    "change",
    [
        {"mask": np.ones((B, T))},
        {"mask": np.ones((B, T + 1), bool)},
        {"counted": np.zeros((B, T + 1, K), int)},
    ],
)
def test_arrays_that_do_not_fit(change: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        balance_loss_forward(scores(), alpha=0.7, top_k=K, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"mask": np.ones((B, 1), bool)},
        {"counted": np.zeros((B, 1, K), int)},
        {"counted": np.full((B, T, K), -1)},
        {"counted": np.full((B, T, K), E)},
        {"top_k": E + 1},
    ],
)
def test_wrong_in_silence(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        balance_loss_forward(scores(), **({"alpha": 0.7, "top_k": K} | change))


def test_all_experts_chosen() -> None:
    """K = E: f is 1 for every expert, and what is left is α Σ p = α."""
    loss, _ = balance_loss_forward(scores(), alpha=0.7, top_k=E)
    np.testing.assert_allclose(loss, 0.7, rtol=1e-15)


@np.errstate(all="ignore")
def test_range_of_validity() -> None:
    """Scores of any size have the same loss; where their sum overflows, or is 0, it is NaN."""
    s = scores().astype(np.float32)
    settings: Any = {"alpha": 0.1, "top_k": K}
    right, _ = balance_loss_forward(s, **settings)
    for scale in (1e-30, 5e37):
        loss, _ = balance_loss_forward(np.float32(scale) * s, **settings)
        np.testing.assert_allclose(loss, right, rtol=1e-6)
    for scale in (3e38, 0):
        loss, saved = balance_loss_forward(np.float32(scale) * (s / s), **settings)
        assert np.isnan(loss)
        assert np.isnan(balance_loss_backward(np.float32(1), saved)).all()


def test_what_stands_at_padding_does_not_count() -> None:
    """NaN included: it is absent from the loss and from every gradient."""
    s, mask = scores(), np.array([[True] * T, [True] * (T - 1) + [False]])
    settings: Any = {"alpha": 0.1, "top_k": K, "mask": mask}
    right, saved = balance_loss_forward(s, **settings)
    right_ds = balance_loss_backward(1.0, saved)
    for anything in (np.nan, np.inf, 0.0):
        loss, saved = balance_loss_forward(np.where(mask[..., None], s, anything), **settings)
        assert loss == right
        np.testing.assert_array_equal(balance_loss_backward(1.0, saved), right_ds)
    assert not right_ds[~mask].any()


def test_no_positions() -> None:
    with pytest.raises(ValueError, match=r"scores must have at least 1 entry along each axis"):
        balance_loss_forward(np.ones((1, 0, 4)), alpha=1.0, top_k=1)
