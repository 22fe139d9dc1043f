"""What attention and flash attention both promise: their errors and their range of validity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

GOOD: dict[str, Any] = {
    "q": np.ones((2, 3, 4, 5)),
    "k": np.ones((2, 6, 4, 5)),
    "v": np.ones((2, 6, 4, 7)),
    "scale": 1.0,
}
ERRORS = [
    ({"q": np.ones((2, 3, 5))}, ValueError, r"q must have shape \(B, T, H, X\), got \(2, 3, 5\)"),
    (
        {"k": np.ones((2, 6, 5))},
        ValueError,
        r"k must have shape \(B, S, H or 1, X\)=\(2, 'any', 4, 5\), got",
    ),
    (
        {"k": np.ones((2, 6, 2, 5))},
        ValueError,
        r"k must have shape .*=\(2, 'any', 4, 5\), got \(2, 6, 2, 5\)",
    ),
    (
        {"k": np.ones((2, 6, 1, 4))},
        ValueError,
        r"k must have shape .*=\(2, 'any', 1, 5\), got \(2, 6, 1, 4\)",
    ),
    (
        {"k": np.ones((1, 6, 4, 5))},
        ValueError,
        r"k must have shape .*=\(2, 'any', 4, 5\), got \(1, 6, 4, 5\)",
    ),
    (
        {"v": np.ones((2, 5, 4, 7))},
        ValueError,
        r"v must have shape .*=\(2, 6, 4, 'any'\), got \(2, 5, 4, 7\)",
    ),
    (
        {"v": np.ones((2, 6, 3, 7))},
        ValueError,
        r"v must have shape .*=\(2, 6, 4, 'any'\), got \(2, 6, 3, 7\)",
    ),
    (
        {"q": np.ones((2, 7, 4, 5))},
        ValueError,
        r"q must have at least one position and, if causal .*, at most as many as k, S=6, got T=7",
    ),
    (
        {"q": np.ones((2, 0, 4, 5))},
        ValueError,
        "q must have at least one position and, .*, at most as many as k, S=6, got T=0",
    ),
    (
        {"key_mask": np.ones((2, 3), bool)},
        ValueError,
        r"key_mask must have shape \(B, S\)=\(2, 6\), got \(2, 3\)",
    ),
    (
        {"key_mask": np.ones((1, 6), bool)},
        ValueError,
        r"key_mask must have shape \(B, S\)=\(2, 6\), got \(1, 6\)",
    ),
    (
        {"key_mask": np.full((2, 6), 2)},
        TypeError,
        "key_mask must be bool, got int64",
    ),  # 2 & True is 0
    (
        {"segments": np.ones((2, 3), int)},
        ValueError,
        r"segments must have shape \(B, S\)=\(2, 6\), got \(2, 3\)",
    ),
    ({"q": np.ones((2, 3, 4, 5), int)}, TypeError, "q must be float32 or wider"),
    ({"v": np.ones((2, 6, 4, 7), np.float16)}, TypeError, "v must be float32 or wider"),
    ({"k": np.ones((2, 6, 4, 5), np.float16)}, TypeError, "k must be float32 or wider"),
]


@np.errstate(all="ignore")
def check_range_of_validity(
    forward: Callable[..., tuple[Any, Any]], backward: Callable[..., tuple[Any, ...]]
) -> None:
    """Scores that overflow to +∞, or all to −∞, give NaN and no clean 0; one −∞ beside a finite
    score is the probability 0 that it has. Scores that underflow are 0, and weights equal."""

    def run(k: list[float], size: float = 1e25) -> tuple[np.ndarray, list[np.ndarray]]:
        q = np.full((1, 1, 1, 1), size, np.float32)
        keys = np.array(k, np.float32).reshape(1, -1, 1, 1)
        values = np.arange(1, keys.size + 1, dtype=np.float32).reshape(keys.shape)
        o, saved = forward(q, keys, values, scale=1.0)
        gradients = backward(np.ones_like(o), saved)
        return o.reshape(-1), [g.reshape(-1) for g in gradients]

    for overflow in ([-1e25, -2e25], [1e25, 0.0], [0.0, 1e25], [-1e25] * 3):
        o, gradients = run(overflow)
        assert np.isnan(o).all(), overflow
        assert all(np.isnan(g).all() for g in gradients), overflow
    o, (dq, dk, dv) = run([-1e25, 0.0])
    assert o.tolist() == [2]
    assert (dq.tolist(), dk.tolist(), dv.tolist()) == ([0], [0, 0], [0, 1])
    o, (_, _, dv) = run([1e-30, -1e-30], 1e-30)
    assert (o.tolist(), dv.tolist()) == ([1.5], [0.5, 0.5])


def check_more_queries_than_keys(forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
    """T > S without a causal mask, as a ring meets a block of keys: every query sees every key that
    is no padding. The same with hidden keys added until S = T, whose gradients are 0."""
    rng = np.random.default_rng(0)
    q, k, v, do = (rng.normal(size=(2, n, 3, 4)) for n in (5, 2, 2, 5))
    more = np.concatenate((k, rng.normal(size=(2, 3, 3, 4))), axis=1)
    seen = np.array([[True, True, False, False, False], [True, False, False, False, False]])
    values = np.concatenate((v, rng.normal(size=(2, 3, 3, 4))), axis=1)
    for key_mask in (None, seen[:, :2]):
        hidden = np.tile(seen[:1], (2, 1)) if key_mask is None else seen
        o, saved = forward(q, k, v, scale=0.5, causal=False, key_mask=key_mask)
        wanted, whole = forward(q, more, values, scale=0.5, causal=False, key_mask=hidden)
        (dq, dk, dv), (dq_whole, *whole_sums) = backward(do, saved), backward(do, whole)
        assert np.allclose(o, wanted, rtol=1e-14, atol=0)
        assert np.allclose(dq, dq_whole, rtol=1e-13, atol=1e-15)
        for x, y in zip((dk, dv), whole_sums, strict=True):
            assert np.allclose(x, y[:, :2], rtol=1e-13, atol=1e-15)
            assert not y[:, 2:].any()


def check_long_sums(forward: Callable[..., Any]) -> None:
    """In float32 a score of width 256 is not rounded 256 times on its way: of terms added one after
    another the error is 3.3 to 3.7 units of 2⁻²⁴ (root of the mean square of 64), of fours whose
    sums are added 1.8 to 1.9. A query that sees one key has its score as lse."""
    q, k = np.random.default_rng(0).random((2, 1, 1, 64, 256)).astype(np.float32)
    _, saved = forward(q, k, k[..., :1], scale=1.0)
    score = np.sum(np.float64(q) * k, axis=-1)[:, 0]
    error = np.asarray(saved.lse)[..., 0] / score - 1
    assert np.sqrt(np.mean(error**2)) <= 2.6 * 2.0**-24
