"""Absorbed MLA: the protocol, equality with the naive form, what it reads, and its errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.check.cases import CASES
from refimpl.ops import (
    LEAVES,
    Op,
    attention_backward,
    attention_forward,
    mla_absorbed_backward,
    mla_absorbed_forward,
    mla_backward,
    mla_forward,
)

from mla_contract import check_range_of_validity
from support import HypothesisDraw, property_test

B = 2
T = 4
D = 7
H = 3
N = 5
R = 4
V = 6
C = 8


def test_protocol() -> None:
    property_test("mla_absorbed")


def assert_same(got: np.ndarray | None, wanted: np.ndarray | None) -> None:
    """Within 1e-12 of the largest entry: the two forms add the same products in another order."""
    assert (got is None) == (wanted is None)
    if got is not None and wanted is not None:
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())


@given(st.data())
def test_equals_mla(data: st.DataObject) -> None:
    """Both outputs and all nine gradients, with and without cache, compression, padding, documents
    and dcache."""
    draw = HypothesisDraw(data)
    case = CASES["mla"](draw)
    (y, cache), saved = mla_absorbed_forward(*case.inputs, **case.kwargs)
    (naive_y, naive_cache), naive_saved = mla_forward(*case.inputs, **case.kwargs)
    assert_same(y, naive_y)
    np.testing.assert_array_equal(cache, naive_cache)
    dy = draw.rng.normal(size=y.shape), draw.choice([None, draw.rng.normal(size=cache.shape)])
    for got, wanted in zip(
        mla_absorbed_backward(dy, saved), mla_backward(dy, naive_saved), strict=True
    ):
        assert_same(got, wanted)


def arguments(past: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {
        "x": (B, T, D),
        "cache": (B, past, C + R),
        "w_q_b": (H * (N + R), D),
        "w_kv_a": (C + R, D),
        "w_kv_a_norm": (C,),
        "w_kv_b": (H * (N + V), C),
        "w_o": (D, H * V),
    }
    arrays = {name: rng.normal(size=shape) for name, shape in shapes.items()} | {
        "w_q_a": None,
        "w_q_a_norm": None,
    }
    if not past:
        arrays["cache"] = None
    rope = {"positions": np.arange(T) + past, "inv_freq": np.ones(R // 2)}
    return arrays | rope | {"heads": H, "scale": 0.7, "eps": 0.1}


def test_attends_to_the_cache_itself() -> None:
    """One shared key, the cache row, and one shared value, its first C numbers: nothing is expanded
    to heads."""
    read: list[np.ndarray] = []

    def spy(q: np.ndarray, k: np.ndarray, v: np.ndarray, **kwargs: Any) -> tuple[np.ndarray, Any]:
        read.extend((q, k, v))
        return attention_forward(q, k, v, **kwargs)

    output, _ = mla_absorbed_forward(
        **arguments(past=5), ops=LEAVES | {"attention": Op(spy, attention_backward)}
    )
    assert read[0].shape == (B, T, H, C + R)
    np.testing.assert_array_equal(read[1], output.cache[:, :, None])
    np.testing.assert_array_equal(read[2], output.cache[:, :, None, :C])


def test_decoding_equals_the_whole() -> None:
    """Prefill in the naive form, decode in the absorbed one, as servers do."""
    whole = arguments()
    cache = None
    for t in range(T):
        step = whole | {"x": whole["x"][:, t : t + 1], "cache": cache, "positions": np.array([t])}
        (y, cache), _ = (mla_absorbed_forward if t >= 2 else mla_forward)(**step)
        assert_same(y, mla_forward(**whole)[0].y[:, t : t + 1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"heads": 2},
            ValueError,
            r"w_q_b must have shape \(H·\(N\+R\), A\) .* got \(27, 7\) and \(12, 7\)",
        ),
        ({"w_kv_a_norm": np.ones(C + R)}, ValueError, "with H=3, C=12, all at least 1"),
        (
            {"w_kv_b": np.ones((H * N, C))},
            ValueError,
            r"w_kv_b must have shape .*=\(33, 8\), got \(15, 8\)",
        ),
        (
            {"w_o": np.ones((D, H * V + 1))},
            ValueError,
            r"w_o must have shape \(D, H·V\)=\(7, 18\), got \(7, 19\)",
        ),
        (
            {"cache": np.ones((B, 2, C))},
            ValueError,
            r"cache must have shape \(B, S−T, C\+R\)=\(2, 'any', 12\)",
        ),
        (
            {"key_mask": np.ones((B, T + 1), bool)},
            ValueError,
            r"key_mask must have shape .*=\(2, 4\), got \(2, 5\)",
        ),
        (
            {"w_kv_b": np.ones((H * (N + V), C), np.float16)},
            TypeError,
            "w_kv_b must be float32 or wider",
        ),
        ({"x": np.ones((B, T, D), int)}, TypeError, "x must be float32 or wider"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mla_absorbed_forward(**(arguments() | change))


def test_range_of_validity() -> None:
    check_range_of_validity(mla_absorbed_forward, mla_absorbed_backward, arguments())
