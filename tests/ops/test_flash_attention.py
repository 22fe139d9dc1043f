"""Flash attention: the protocol, agreement with attention, its own corners, and its errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.check.cases import CASES
from refimpl.ops import (
    attention_backward,
    attention_forward,
    flash_attention_backward,
    flash_attention_forward,
)

from support import HypothesisDraw, property_test

BLOCKS = [1, 2, 3, 5, 128]


def test_protocol() -> None:
    property_test("flash_attention")


def assert_same(
    arrays: tuple[np.ndarray, ...], block: int, dtype: Any, tolerance: float, **kwargs: Any
) -> None:
    """Output and gradients are those of attention in float64, within ``tolerance`` of their largest
    entry.

    In dq and dk the terms p (dp − Σ p dp) cancel where one key takes all: there the terms' size
    counts.
    """
    *qkv, do = (x.astype(dtype) for x in arrays)
    truth, truth_saved = attention_forward(*(x.astype(np.float64) for x in qkv), **kwargs)
    o, saved = flash_attention_forward(*qkv, block=block, **kwargs)
    found = (o, *flash_attention_backward(do, saved))
    wanted = (truth, *attention_backward(do.astype(np.float64), truth_saved))
    q, k, v = qkv
    terms = kwargs["scale"] * np.abs(do).max() * np.abs(v).max()
    sizes = (0.0, terms * np.abs(k).max(), terms * np.abs(q).max(), 0.0)
    for name, x, y, size in zip(("o", "dq", "dk", "dv"), found, wanted, sizes, strict=True):
        assert x.dtype == dtype
        error = np.abs(x - y).max()
        assert error <= tolerance * max(np.abs(y).max(), size), (
            f"{name} is off by {error}, block {block}"
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-14), (np.float32, 5e-6)])
@given(st.data())
def test_equals_attention(dtype: Any, tolerance: float, data: st.DataObject) -> None:
    """All masks, head counts and lengths, all blocks: one block, many, and a short last one."""
    draw = HypothesisDraw(data)
    case = CASES["attention"](draw)
    q, k, v = (x for x in case.inputs if x is not None)
    do = draw.rng.normal(size=(*q.shape[:3], v.shape[3]))
    for block in BLOCKS:
        assert_same((q, k, v, do), block, dtype, tolerance, **case.kwargs)


def arrays(t: int = 7, s: int = 7) -> tuple[np.ndarray, ...]:
    """q, k, v and a cotangent, two heads of widths 4 and 3."""
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(2, n, 2, x)) for n, x in ((t, 4), (s, 4), (s, 3), (t, 3)))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_that_rise_or_fall(block: int, sign: int) -> None:
    """Rising along the keys, each block rebases the sums before it; falling, none does."""
    q, k, v, do = arrays(s=9)
    k = np.sort(k, axis=1)[:, ::sign]
    assert_same((np.abs(q), 5 * k, v, do), block, np.float64, 1e-13, scale=0.5, causal=False)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("block", BLOCKS)
def test_huge_scores(block: int, dtype: Any) -> None:
    """Scores of ±1e4: every query takes the best key's value exactly, wherever its block (warnings
    are errors)."""
    q, k, v, do = (x.astype(dtype) for x in arrays(6, 6))
    q[:] = 1
    k[:] = 1e4 * np.array([1, -1, 0, 2, 0, -2], dtype=dtype)[:, None, None]
    o, saved = flash_attention_forward(q, k, v, scale=0.25, block=block)
    dq, _, dv = flash_attention_backward(do, saved)
    np.testing.assert_array_equal(o, v[:, [0, 0, 0, 3, 3, 3]])
    # p is exactly 0 or 1, so ds is the rounding of do · v − δ, two sums of 3 terms: 9 eps; times
    # scale · k
    ds = 9 * np.finfo(dtype).eps * np.abs(do).max() * np.abs(v).max()
    np.testing.assert_allclose(dq, 0, atol=ds * 0.25 * 2e4)
    np.testing.assert_array_equal(dv[:, [1, 2, 4, 5]], np.zeros((2, 4, 2, 3)))


@pytest.mark.parametrize("block", BLOCKS)
def test_whole_blocks_hidden(block: int) -> None:
    """Left padding, padding in the middle and documents hide whole blocks: no NaN, exact zeros for
    blind queries."""
    q, k, v, do = arrays()
    key_mask = np.array([[0, 0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 1]], bool)
    segments = np.array([[0, 0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1, 2]])
    assert_same(
        (q, k, v, do), block, np.float64, 1e-13, scale=0.5, key_mask=key_mask, segments=segments
    )
    o, saved = flash_attention_forward(
        q, k, v, scale=0.5, block=block, key_mask=key_mask, segments=segments
    )
    dq, dk, dv = flash_attention_backward(do, saved)
    blind = np.array([[1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 0]], bool)
    for x, hidden in ((o, blind), (dq, blind), (dk, ~key_mask), (dv, ~key_mask)):
        assert np.all(x[hidden] == 0)


@pytest.mark.parametrize("block", BLOCKS)
def test_log_sum_exp(block: int) -> None:
    """What is saved is log Σ exp(scores) of each row, whatever the block."""
    q, k, v, _ = arrays(t=5)
    _, saved = flash_attention_forward(q, k, v, scale=0.5, causal=False, block=block)
    scores = 0.5 * np.einsum("bthx,bshx->bhts", q, k)
    np.testing.assert_allclose(
        saved.lse[..., 0], np.log(np.exp(scores).sum(axis=-1)), rtol=1e-14, atol=1e-14
    )


def test_saves_nothing_quadratic() -> None:
    length = 200
    q = np.ones((1, length, 1, 2))
    _, saved = flash_attention_forward(q, q, q, scale=0.5)
    assert max(x.size for x in saved if isinstance(x, np.ndarray)) <= 2 * length


GOOD: dict[str, Any] = {
    "q": np.ones((2, 3, 4, 5)),
    "k": np.ones((2, 6, 4, 5)),
    "v": np.ones((2, 6, 4, 7)),
    "scale": 1.0,
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block": 0}, ValueError, "block must be at least 1, got 0"),
        (
            {"q": np.ones((2, 3, 5))},
            ValueError,
            r"q must have shape \(B, T, H, X\), got \(2, 3, 5\)",
        ),
        (
            {"k": np.ones((2, 6, 2, 5))},
            ValueError,
            r"k must have shape .*=\(2, 'any', 4, 5\), got \(2, 6, 2, 5\)",
        ),
        (
            {"v": np.ones((2, 5, 4, 7))},
            ValueError,
            r"v must have shape .*=\(2, 6, 4, 'any'\), got \(2, 5, 4, 7\)",
        ),
        (
            {"q": np.ones((2, 7, 4, 5))},
            ValueError,
            "q must have at least one position and at most as many as k, S=6, got T=7",
        ),
        (
            {"key_mask": np.ones((2, 3), bool)},
            ValueError,
            r"key_mask must have shape \(B, S\)=\(2, 6\), got \(2, 3\)",
        ),
        ({"key_mask": np.full((2, 6), 2)}, TypeError, "key_mask must be bool, got int64"),
        (
            {"segments": np.ones((2, 3), int)},
            ValueError,
            r"segments must have shape \(B, S\)=\(2, 6\), got \(2, 3\)",
        ),
        ({"k": np.ones((2, 6, 4, 5), np.float16)}, TypeError, "k must be float32 or wider"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        flash_attention_forward(**(GOOD | change))


@np.errstate(all="ignore")
def test_range_of_validity() -> None:
    """Scores that overflow to +∞, or all to −∞, give NaN and no clean 0; one −∞ beside a finite
    score is the probability 0 that it has. Scores that underflow are 0, and weights equal."""

    def run(k: list[float], size: float = 1e25) -> tuple[np.ndarray, list[np.ndarray]]:
        q = np.full((1, 1, 1, 1), size, np.float32)
        keys = np.array(k, np.float32).reshape(1, -1, 1, 1)
        values = np.arange(1, keys.size + 1, dtype=np.float32).reshape(keys.shape)
        o, saved = flash_attention_forward(q, keys, values, scale=1.0, block=2)
        gradients = flash_attention_backward(np.ones_like(o), saved)
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


@pytest.mark.parametrize("shape", [(1, 2, 1, 0), (1, 2, 0, 3), (0, 2, 1, 3)])
def test_nothing_to_attend(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="q must have at least 1 entry along each axis"):
        flash_attention_forward(*[np.ones(shape)] * 3, scale=1.0)
