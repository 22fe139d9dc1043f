"""Flash attention: the protocol, agreement with attention, its own corners, and its errors."""

from __future__ import annotations

from functools import partial
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

from attention_contract import ERRORS, GOOD, check_more_queries_than_keys, check_range_of_validity
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


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [*ERRORS, ({"block": 0}, ValueError, "block must be at least 1, got 0")],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        flash_attention_forward(**(GOOD | change))


def test_range_of_validity() -> None:
    check_range_of_validity(partial(flash_attention_forward, block=2), flash_attention_backward)


@pytest.mark.parametrize("shape", [(1, 2, 1, 0), (1, 2, 0, 3), (0, 2, 1, 3)])
def test_nothing_to_attend(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="q must have at least 1 entry along each axis"):
        flash_attention_forward(*[np.ones(shape)] * 3, scale=1.0)


def test_a_ring_of_key_blocks_equals_the_whole() -> None:
    """Each block of keys gives o and lse on its own; their sum weighted by exp(lse − L), L the
    log-sum-exp over the blocks, is attention over all keys; the backward with this o and L gives
    each block's gradients."""
    rng = np.random.default_rng(1)
    q, k, v, do = (rng.normal(size=(2, n, 3, 4)) for n in (4, 7, 7, 4))
    o, saved = flash_attention_forward(q, k, v, scale=0.5, causal=False)
    dq, dk, dv = flash_attention_backward(do, saved)
    cuts = [slice(0, 1), slice(1, 6), slice(6, 7)]
    pieces = [
        flash_attention_forward(q, k[:, cut], v[:, cut], scale=0.5, causal=False) for cut in cuts
    ]
    logs = np.stack([piece.lse for _, piece in pieces])
    total = np.logaddexp.reduce(logs, axis=0)
    joined = sum(
        np.exp(log - total).transpose(0, 2, 1, 3) * y
        for log, (y, _) in zip(logs, pieces, strict=True)
    )
    assert np.allclose(joined, o, rtol=1e-13)
    dq_sum = np.zeros_like(dq)
    for cut, (_, piece) in zip(cuts, pieces, strict=True):
        part = flash_attention_backward(do, piece._replace(o=o, lse=total))
        dq_sum += part[0]
        assert np.allclose(part[1], dk[:, cut], rtol=1e-12)
        assert np.allclose(part[2], dv[:, cut], rtol=1e-12)
    assert np.allclose(dq_sum, dq, rtol=1e-12)


def test_more_queries_than_keys() -> None:
    check_more_queries_than_keys(
        partial(flash_attention_forward, block=2), flash_attention_backward
    )
