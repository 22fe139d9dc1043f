"""Attention: the protocol, its identities, masks and extreme scores, and its errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl.ops import attention_backward, attention_forward

from attention_contract import ERRORS, GOOD, check_more_queries_than_keys, check_range_of_validity
from support import property_test

EPS = np.finfo(np.float64).eps
B = 2
T = 6
H = 3
X = 5
V = 4
Gradients = tuple[np.ndarray, np.ndarray, np.ndarray]


def inputs(k_heads: int = H, v_heads: int = H) -> tuple[np.ndarray, ...]:
    """q, k, v and a cotangent."""
    rng = np.random.default_rng(0)
    return tuple(
        rng.normal(size=(B, T, h, x)) for h, x in ((H, X), (k_heads, X), (v_heads, V), (H, V))
    )


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, do: np.ndarray, **kwargs: Any
) -> tuple[np.ndarray, Gradients]:
    o, saved = attention_forward(q, k, v, **({"scale": 0.4} | kwargs))
    return o, attention_backward(do, saved)


def assert_close(got: np.ndarray, wanted: np.ndarray) -> None:
    """Sums of at most T, X or V < 10 terms, a few behind one another: 50 eps of the largest
    entry."""
    np.testing.assert_allclose(got, wanted, rtol=0, atol=50 * EPS * max(np.abs(wanted).max(), 1))


def test_blind_queries_take_the_mean() -> None:
    """blind = "mean": a query that sees no key averages all values, hidden ones too; its backward
    is that of a softmax over equal scores. Queries that see a key are as before."""
    rng = np.random.default_rng(0)
    q, k, v, do = (rng.normal(size=(2, 4, 3, 5)) for _ in range(4))
    key_mask = np.array([[True] * 4, [False, False, True, True]])
    o, saved = attention_forward(q, k, v, scale=0.4, key_mask=key_mask, blind="mean")
    plain, zero = attention_forward(q, k, v, scale=0.4, key_mask=key_mask)
    np.testing.assert_allclose(o[1, :2], np.broadcast_to(v[1].mean(0), (2, 3, 5)), rtol=1e-14)
    assert np.array_equal(o[0], plain[0])
    assert np.array_equal(o[1, 2:], plain[1, 2:])
    assert not plain[1, :2].any()
    added = [
        x - y
        for x, y in zip(attention_backward(do, saved), attention_backward(do, zero), strict=True)
    ]
    dp = np.einsum("thv,shv->ths", do[1, :2], v[1])
    ds = (dp - dp.mean(-1, keepdims=True)) / 4
    dq = 0.4 * np.einsum("ths,shx->thx", ds, k[1])
    dk = 0.4 * np.einsum("ths,thx->shx", ds, q[1, :2])
    dv = np.broadcast_to(do[1, :2].sum(0) / 4, (4, 3, 5))
    for got, wanted in zip((added[0][1, :2], added[1][1], added[2][1]), (dq, dk, dv), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="blind must be one of zero, mean"):
        attention_forward(q, k, v, scale=0.4, blind="max")  # type: ignore[arg-type]


def test_protocol() -> None:
    property_test("attention")


@pytest.mark.parametrize("heads", [1, H])
@pytest.mark.parametrize("settings", [{}, {"causal": False}, {"blind": "mean"}, {"past": 2}])
@pytest.mark.parametrize("some", [1, 4])
def test_some_queries_at_a_time(
    monkeypatch: pytest.MonkeyPatch, some: int, settings: dict[str, Any], heads: int
) -> None:
    """All six, or one, or four and two: the same, with documents and padding."""
    q, k, v, do = inputs(heads, heads)
    past = settings.get("past", 0)
    kwargs: dict[str, Any] = {name: value for name, value in settings.items() if name != "past"}
    segments = np.array([[0, 0, 0, 1, 1, 1], [0] * T])
    key_mask = np.array([[True] * T, [False, False, True, True, False, True]])
    kwargs |= {"scale": 0.4, "segments": segments, "key_mask": key_mask}
    q, do = q[:, past:], do[:, past:]
    o, saved = attention_forward(q, k, v, **kwargs)
    wanted = o, saved.p, *attention_backward(do, saved)
    monkeypatch.setattr("refimpl.ops.attention.QUERIES", some)
    o, saved = attention_forward(q, k, v, **kwargs)
    for x, y in zip((o, saved.p, *attention_backward(do, saved)), wanted, strict=True):
        assert_close(x, y)


def test_no_score_behind_all_queries_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN there reaches nothing."""
    q, k, v, do = inputs()
    monkeypatch.setattr("refimpl.ops.attention.QUERIES", 2)
    _, gradients = attend(q, k, v, do)
    k[:, 2:] = v[:, 2:] = do[:, 2:] = np.nan
    o, found = attend(q, k, v, do)
    assert np.all(np.isfinite(o[:, :2]))
    assert np.array_equal(found[0][:, :2], gradients[0][:, :2])


@pytest.mark.parametrize("past", [0, 2])
def test_query_of_zeros_averages_what_it_sees(past: int) -> None:
    """Equal scores: the mean of the values, up to the query's own position S − T + t."""
    _, k, v, _ = inputs()
    o, _ = attention_forward(np.zeros((B, T - past, H, X)), k, v, scale=0.4)
    means = np.cumsum(v, axis=1) / np.arange(1, T + 1)[:, None, None]
    assert_close(o, means[:, past:])
    everywhere, _ = attention_forward(np.zeros((B, T - past, H, X)), k, v, scale=0.4, causal=False)
    assert_close(everywhere, np.broadcast_to(v.mean(axis=1, keepdims=True), everywhere.shape))


def test_rows_of_p() -> None:
    """They sum to 1; hidden keys have exactly 0 and exactly no gradient."""
    q, k, v, do = inputs()
    key_mask = np.ones((B, T), bool)
    key_mask[:, 2] = key_mask[1, 4] = False
    _, saved = attention_forward(q, k, v, scale=0.4, key_mask=key_mask)
    np.testing.assert_allclose(saved.p.sum(axis=-1), 1, rtol=T * EPS)
    assert np.all(saved.p[:, :, np.triu_indices(T, 1)[0], np.triu_indices(T, 1)[1]] == 0)
    _, dk, dv = attention_backward(do, saved)
    for d in (dk, dv):
        assert np.all(d[~key_mask] == 0)
        assert np.all(np.any(d[key_mask] != 0, axis=-1))


def test_one_vector_added_to_all_keys_changes_nothing() -> None:
    """It raises all scores of a row alike; hence the keys' gradients sum to 0 in each head."""
    q, k, v, do = inputs()
    o, grads = attend(q, k, v, do)
    moved_o, moved = attend(q, k + np.random.default_rng(1).normal(size=(B, 1, H, X)), v, do)
    assert_close(moved_o, o)
    assert_close(moved[1], grads[1])
    assert_close(grads[1].sum(axis=1), np.zeros((B, H, X)))


def test_single_visible_key() -> None:
    """The first query of a causal sequence copies the first value, whatever it asks: its gradient
    is exactly 0."""
    q, k, v, do = inputs()
    o, (dq, _, _) = attend(q, k, v, do)
    np.testing.assert_array_equal(o[:, 0], v[:, 0])
    np.testing.assert_array_equal(dq[:, 0], np.zeros((B, H, X)))
    assert np.all(np.any(dq[:, 1:] != 0, axis=-1))


@pytest.mark.parametrize("visible", [0, 2])
def test_query_that_sees_nothing(visible: int) -> None:
    """Left padding: the first queries give exactly 0 and get exactly 0; so does everything if all
    is padding."""
    q, k, v, do = inputs()
    key_mask = np.zeros((B, T), bool)
    key_mask[:, T - visible :] = True
    o, (dq, dk, dv) = attend(q, k, v, do, key_mask=key_mask)
    for x in (o, dq, dk, dv):
        assert np.all(x[:, : T - visible] == 0)
    assert np.all(np.any(o[:, T - visible :] != 0, axis=-1))


@pytest.mark.parametrize("steps", [[6], [4, 2], [1, 1, 1, 1, 1, 1]])
def test_decoding_equals_the_whole(steps: list[int]) -> None:
    """T < S: the last rows of the whole; the keys' gradients of all pieces add up to the
    whole's."""
    q, k, v, do = inputs(k_heads=1)
    o, (dq, dk, dv) = attend(q, k, v, do)
    sums, start = [np.zeros_like(dk), np.zeros_like(dv)], 0
    for n in steps:
        stop = start + n
        piece, grads = attend(q[:, start:stop], k[:, :stop], v[:, :stop], do[:, start:stop])
        assert_close(piece, o[:, start:stop])
        assert_close(grads[0], dq[:, start:stop])
        for total, part in zip(sums, grads[1:], strict=True):
            total[:, :stop] += part
        start = stop
    assert_close(sums[0], dk)
    assert_close(sums[1], dv)


@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_equal_separate_runs(causal: bool) -> None:
    """Also where two documents with one number lie apart in different rows."""
    arrays, cuts = inputs(), [[0, 2, 6], [0, 5, 6]]
    segments = np.array([[4, 4, 7, 7, 7, 7], [7, 7, 7, 7, 7, 4]])
    o, grads = attend(*arrays, segments=segments, causal=causal)
    for b in range(B):
        for start, stop in zip(cuts[b], cuts[b][1:], strict=False):
            alone, own = attend(*(x[b : b + 1, start:stop] for x in arrays), causal=causal)
            for got, wanted in zip((o, *grads), (alone, *own), strict=True):
                assert_close(got[b : b + 1, start:stop], wanted)


@pytest.mark.parametrize("real", [slice(0, 4), slice(2, 6)])
def test_padding_equals_cutting(real: slice) -> None:
    """On either side, as long as nothing comes back from the padded queries."""
    q, k, v, do = inputs()
    key_mask = np.zeros((B, T), bool)
    key_mask[:, real] = True
    o, grads = attend(q, k, v, do * key_mask[:, :, None, None], key_mask=key_mask)
    cut_o, cut_grads = attend(*(x[:, real] for x in (q, k, v, do)))
    assert_close(o[:, real], cut_o)
    for got, wanted in zip(grads, cut_grads, strict=True):
        assert_close(got[:, real], wanted)


def test_shared_head_equals_repeated_heads() -> None:
    """One key and value head for all: as if repeated; its gradient is the sum over the heads."""
    q, k, v, do = inputs(1, 1)
    o, (dq, dk, dv) = attend(q, k, v, do)
    repeated, grads = attend(q, np.repeat(k, H, axis=2), np.repeat(v, H, axis=2), do)
    assert_close(o, repeated)
    assert_close(dq, grads[0])
    assert_close(dk, grads[1].sum(axis=2, keepdims=True))
    assert_close(dv, grads[2].sum(axis=2, keepdims=True))


def test_scale_is_a_factor_of_the_query() -> None:
    """A power of two, which multiplies without rounding: the same bits."""
    q, k, v, do = inputs()
    o, (dq, dk, dv) = attend(q, k, v, do, scale=0.25)
    scaled, grads = attend(0.25 * q, k, v, do, scale=1.0)
    for got, wanted in zip(
        (scaled, 0.25 * grads[0], grads[1], grads[2]), (o, dq, dk, dv), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)


def test_order_of_keys_does_not_matter_without_a_mask() -> None:
    q, k, v, do = inputs()
    order = np.array([3, 0, 5, 1, 4, 2])
    o, grads = attend(q, k, v, do, causal=False)
    moved_o, moved = attend(q, k[:, order], v[:, order], do, causal=False)
    assert_close(moved_o, o)
    assert_close(moved[0], grads[0])
    assert_close(moved[1], grads[1][:, order])
    assert_close(moved[2], grads[2][:, order])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_huge_scores(dtype: type) -> None:
    """Scores of ±1e4: every query takes the best key's value, and the gradients are finite
    (warnings are errors)."""
    q, k, v, do = (x.astype(dtype) for x in inputs())
    q[:] = 1
    k[:] = 1e4 * np.array([1, -1, 0, 2, 0, -2], dtype=dtype)[:, None, None]
    o, grads = attend(q, k, v, do, scale=0.2)
    np.testing.assert_array_equal(o, v[:, [0, 0, 0, 3, 3, 3]])
    np.testing.assert_array_equal(grads[0], np.zeros_like(q))
    np.testing.assert_array_equal(grads[2][:, [1, 2, 4, 5]], np.zeros((B, 4, H, V)))


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention_forward(**(GOOD | change))


def test_range_of_validity() -> None:
    check_range_of_validity(attention_forward, attention_backward)


@pytest.mark.parametrize("shape", [(1, 2, 1, 0), (1, 2, 0, 3), (0, 2, 1, 3)])
def test_nothing_to_attend(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="q must have at least 1 entry along each axis"):
        attention_forward(*[np.ones(shape)] * 3, scale=1.0)


def test_more_queries_than_keys() -> None:
    check_more_queries_than_keys(attention_forward, attention_backward)
