"""Multi-token prediction: the protocol, its identities, which positions meet which tokens, and the
errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl.ops import linear_forward, mtp_backward, mtp_forward, mtp_pairs, rms_norm_forward

from support import property_test

EPS = np.finfo(np.float64).eps
B = 2
T = 3
D = 5
NAMES = ["hidden", "embedding", "w_hnorm", "w_enorm", "w_proj"]
ORDERS = pytest.mark.parametrize("order", ["embedding_hidden", "hidden_embedding"])


def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        n: rng.normal(size=s)
        for n, s in zip(NAMES, ((B, T, D), (B, T, D), D, D, (D, 2 * D)), strict=True)
    }


def run(arrays: dict[str, np.ndarray], **kwargs: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    y, saved = mtp_forward(**arrays, **({"eps": 0.3} | kwargs))
    return y, dict(
        zip(
            NAMES, mtp_backward(np.random.default_rng(1).normal(size=(B, T, D)), saved), strict=True
        )
    )


def assert_close(got: np.ndarray, wanted: np.ndarray) -> None:
    """Sums of 2 D = 10 terms behind sums of 5: 50 eps of the largest entry."""
    np.testing.assert_allclose(got, wanted, rtol=0, atol=50 * EPS * np.abs(wanted).max())


def test_protocol() -> None:
    property_test("mtp")


@ORDERS
def test_is_made_of_its_pieces(order: str) -> None:
    arrays = inputs()
    h, _ = rms_norm_forward(arrays["hidden"], arrays["w_hnorm"], eps=0.3)
    e, _ = rms_norm_forward(arrays["embedding"], arrays["w_enorm"], eps=0.3)
    joined = np.concatenate((e, h) if order == "embedding_hidden" else (h, e), axis=-1)
    y, _ = mtp_forward(**arrays, eps=0.3, order=order)
    np.testing.assert_array_equal(y, linear_forward(joined, arrays["w_proj"])[0])


def test_embedding_first_is_the_default() -> None:
    arrays = inputs()
    y, _ = run(arrays)
    np.testing.assert_array_equal(y, run(arrays, order="embedding_hidden")[0])
    assert np.abs(y - run(arrays, order="hidden_embedding")[0]).max() > 0.1


def test_other_order_swaps_the_halves_of_the_projection() -> None:
    arrays = inputs()
    y, grads = run(arrays)
    swapped = arrays | {"w_proj": np.roll(arrays["w_proj"], D, axis=1)}
    same, moved = run(swapped, order="hidden_embedding")
    assert_close(same, y)
    for name in NAMES:
        assert_close(
            moved[name], np.roll(grads[name], D, axis=1) if name == "w_proj" else grads[name]
        )


@ORDERS
def test_stretching_either_input_changes_nothing(order: str) -> None:
    """At eps = 0, so ⟨a, da⟩ = 0 in every row of both."""
    arrays = inputs()
    _, grads = run(arrays, eps=0.0, order=order)
    for name in ("hidden", "embedding"):
        products = arrays[name] * grads[name]
        assert np.max(np.abs(products.sum(axis=-1))) <= 50 * EPS * np.max(np.abs(products))
        assert np.max(np.abs(products)) > 0.1


@ORDERS
def test_identities(order: str) -> None:
    """y is linear in w_proj, and in the two norms' weights together: each of these has a share of
    ⟨dy, y⟩."""
    arrays = inputs()
    y, grads = run(arrays, order=order)
    total = np.random.default_rng(1).normal(size=(B, T, D)) * y
    product = {name: arrays[name] * grads[name] for name in NAMES[2:]}
    bound = 50 * EPS * np.abs(product["w_proj"]).sum()
    assert abs(product["w_proj"].sum() - total.sum()) <= bound
    assert abs(product["w_hnorm"].sum() + product["w_enorm"].sum() - total.sum()) <= bound
    first = product["w_enorm" if order == "embedding_hidden" else "w_hnorm"]
    assert abs(product["w_proj"][:, :D].sum() - first.sum()) <= bound


TOKENS = np.array([[10, 11, 12, 13, 14], [20, 21, 22, 23, 24]])
TARGETS = TOKENS + 1
MASK = np.array([[1, 1, 1, 1, 0], [1, 0, 1, 1, 1]], bool)


@pytest.mark.parametrize(
    ("depth", "tokens", "mask"),
    [
        (1, [[11, 12, 13, 14], [21, 22, 23, 24]], [[1, 1, 1, 0], [0, 1, 1, 1]]),
        (2, [[12, 13, 14], [22, 23, 24]], [[1, 1, 0], [1, 1, 1]]),
        (4, [[14], [24]], [[0], [1]]),
    ],
)
def test_pairs(depth: int, tokens: list[list[int]], mask: list[list[int]]) -> None:
    """Position i reads token i + depth and predicts the target of that token, if that counts."""
    *found, takes_part = mtp_pairs(TOKENS, TARGETS, MASK, depth)
    assert takes_part is None
    for got, wanted in zip(
        found, (tokens, np.array(tokens) + 1, np.array(mask, bool)), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)
    assert found[2].dtype == bool


def test_pairs_within_one_document() -> None:
    """Documents of 2, 3 and of 1, 4 tokens: at depth 2 only pairs within the longer ones are
    left."""
    segments = np.array([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    everything = np.ones_like(MASK)
    np.testing.assert_array_equal(
        mtp_pairs(TOKENS, TARGETS, everything, 1, segments)[2], [[1, 0, 1, 1], [0, 1, 1, 1]]
    )
    tokens, targets, mask, takes_part = mtp_pairs(TOKENS, TARGETS, everything, 2, segments)
    np.testing.assert_array_equal(takes_part, mask)
    np.testing.assert_array_equal(mask, [[0, 0, 1], [0, 1, 1]])
    np.testing.assert_array_equal(tokens, TOKENS[:, 2:])
    np.testing.assert_array_equal(targets, TARGETS[:, 2:])
    np.testing.assert_array_equal(
        mtp_pairs(TOKENS, TARGETS, MASK, 1, segments)[2], [[1, 0, 1, 0], [0, 1, 1, 1]]
    )


@pytest.mark.parametrize("depth", [0, -1, 5, 6])
def test_depth_errors(depth: int) -> None:
    with pytest.raises(ValueError, match=f"depth must lie in 1…T−1=4, got {depth}"):
        mtp_pairs(TOKENS, TARGETS, MASK, depth)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"embedding": np.ones((B, T + 1, D))},
            ValueError,
            r"embedding must have shape hidden.shape=\(2, 3, 5\), got",
        ),
        (
            {"embedding": np.ones((B, 1, D))},
            ValueError,
            r"embedding must have shape .*=\(2, 3, 5\), got \(2, 1, 5\)",
        ),
        (
            {"w_proj": np.ones((2 * D, D))},
            ValueError,
            r"w_proj must have shape \(D, 2D\)=\(5, 10\), got \(10, 5\)",
        ),
        ({"w_hnorm": np.ones(D + 1)}, ValueError, r"w must have shape \(D,\)=\(5,\), got \(6,\)"),
        ({"w_enorm": np.ones(1)}, ValueError, r"w must have shape \(D,\)=\(5,\), got \(1,\)"),
        (
            {"order": "eh"},
            ValueError,
            "order must be one of embedding_hidden, hidden_embedding, got 'eh'",
        ),
        ({"hidden": np.ones((B, T, D), int)}, TypeError, "hidden must be float32 or wider"),
        (
            {"embedding": np.ones((B, T, D), np.float16)},
            TypeError,
            "embedding must be float32 or wider",
        ),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mtp_forward(**(inputs() | {"eps": 0.3} | change))


@pytest.mark.parametrize(
    "change",
    [{"targets": TARGETS[:, 1:]}, {"mask": MASK[:, :1]}, {"segments": np.zeros((1, 5), int)}],
)
def test_pairs_of_other_shapes(change: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="must have shape"):
        mtp_pairs(**({"tokens": TOKENS, "targets": TARGETS, "mask": MASK, "depth": 1} | change))


@np.errstate(all="ignore")
def test_range_of_validity() -> None:
    """Both inputs are normed: where the squares of one overflow y and all that reaches it are NaN;
    tiny ones end in eps, and float32 is right."""
    arrays = {name: x.astype(np.float32) for name, x in inputs().items()}
    for name in ("hidden", "embedding"):
        y, gradients = run(arrays | {name: np.float32(1e20) * arrays[name]})
        assert np.isnan(y).all()
        assert np.isnan(gradients[name]).all()
        assert np.isnan(gradients["w_proj"]).any()
        small = arrays | {name: np.float32(1e-30) * arrays[name]}
        right, _ = run({n: x.astype(float) for n, x in small.items()})
        np.testing.assert_allclose(run(small)[0], right, rtol=1e-4, atol=1e-6)
