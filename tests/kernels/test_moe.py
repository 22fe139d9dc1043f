"""The kernels of the mixture of experts."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from refimpl.kernels import host
from refimpl.kernels.columns import COLUMNS
from refimpl.kernels.moe import combine, combine_backward, permute

from kernel_support import (
    DTYPES,
    HALF_UNIT,
    LUCK,
    TABLES,
    TYPES,
    WIDE,
    make_launch,
    rounded,
    to_device,
    to_host,
    without_a_device,
)
from kernel_support.planted import PLANTED, PLANTED_IN_NUMBA, assert_seen, plant, plant_in_numba


@pytest.mark.parametrize(("column", "storage"), TYPES)
def test_permute_and_combine(column: str, storage: str) -> None:
    """The stages of a mixture of experts alone, in every type: rows move unchanged, sums round
    once."""
    rng, launch = np.random.default_rng(1), make_launch(0, column)
    for tokens, top_k, d in ((1, 1, 1), (5, 2, 33), (4, 3, 40), (3, 9, 16)):
        x, weights = (
            rounded(rng.normal(size=(tokens, d)), storage),
            rng.uniform(0.2, 1.5, (tokens, top_k)),
        )
        weights = weights.astype(WIDE[storage])
        order = rng.permutation(tokens * top_k)
        where = host.place(to_device(order))
        rows = permute(launch, to_device(x), where, top_k)
        assert np.array_equal(to_host(rows), x[order // top_k])
        unit = float(ml_dtypes.finfo(DTYPES[storage]).eps)
        y = to_host(combine(launch, rows, where, to_device(weights)))
        exact = weights.astype(np.float64).sum(axis=1, keepdims=True) * x.astype(np.float64)
        sums = (top_k + 1) * np.finfo(weights.dtype).eps
        assert np.all(np.abs(y.astype(np.float64) - exact) <= (unit + sums) * np.abs(exact))


@pytest.mark.parametrize(("column", "storage"), TYPES)
def test_combine_backward(column: str, storage: str) -> None:
    """In every type, bfloat16 too: rows round once, weights by the rule of `compare`; with more
    choices than a block has warps."""
    rng = np.random.default_rng(2)
    launch = make_launch(0, column)
    wide = WIDE[storage]
    for tokens, top_k, d in ((1, 1, 1), (3, 2, 33), (2, 9, 40), (2, 3, 600)):
        dy, rows = (rounded(rng.normal(size=(n, d)), storage) for n in (tokens, tokens * top_k))
        where = rng.permutation(tokens * top_k)

        def exact_sum(a: Any, b: Any, where: Any = where, top_k: int = top_k) -> Any:
            return np.sum(np.repeat(a, top_k, axis=0) * b[where], axis=-1).reshape(-1, top_k)

        exact, plain = exact_sum(dy.astype(np.float64), rows.astype(np.float64)), 0.0
        for run in range(LUCK):
            moves = [bool(run) * HALF_UNIT * rng.uniform(-1, 1, x.shape) for x in (dy, rows)]
            low = [
                (x.astype(np.float64) * (1 + m)).astype(np.float32)
                for x, m in zip((dy, rows), moves, strict=True)
            ]
            plain = max(plain, float(np.max(np.abs(exact_sum(*low) - exact))))
        if storage == "float64":
            plain = 64 * float(np.finfo(np.float64).eps) * float(np.max(np.abs(exact)))
        weights = rng.uniform(0.2, 1.5, (tokens, top_k)).astype(wide)
        given = (to_device(x) for x in (dy, rows, where, weights))
        drows, found = map(to_host, combine_backward(launch, *given))
        scaled = weights.reshape(-1, 1).astype(np.float64) * np.repeat(dy, top_k, axis=0)
        eps = float(ml_dtypes.finfo(DTYPES[storage]).eps)
        assert np.all(np.abs(drows[where].astype(np.float64) - scaled) <= eps * np.abs(scaled))
        assert found.dtype == wide
        unit = float(np.finfo(wide).eps) * (np.abs(exact) + np.max(np.abs(exact)))
        assert np.all(np.abs(found - exact) <= 2 * plain + unit), (tokens, top_k, d)


@pytest.mark.parametrize("column", COLUMNS)
def test_arguments_that_a_kernel_would_misread(column: str) -> None:
    x = np.ones((2, 3))
    up = np.ones((4, 5, 3))
    down = np.ones((4, 3, 5))
    shared = {
        "w_shared_gate": np.ones((7, 3)),
        "w_shared_up": np.ones((7, 3)),
        "w_shared_down": np.ones((3, 7)),
    }
    for change, message in (
        (
            {"w_shared_up": np.ones((7, 2))},
            r"w_shared_up must have shape \(F, D\)=\(7, 3\), got \(7, 2\)",
        ),
        (
            {"w_shared_gate": np.ones((7, 2))},
            r"w_shared_gate must have shape \(F, D\)=\('any', 3\), got \(7, 2\)",
        ),
        (
            {"w_shared_down": np.ones((7, 3))},
            r"w_shared_down must have shape \(D, F\)=\(3, 7\), got \(7, 3\)",
        ),
        ({"w_shared_down": None}, "w_shared_gate, w_shared_up and w_shared_down must all be given"),
        (
            {"indices": np.zeros((2, 1), int)},
            r"weights must have shape \(…, K\)=\(2, 1\), got \(2, 2\)",
        ),
    ):
        given = {"indices": np.array([[0, 1], [0, 1]])} | shared | change
        with pytest.raises(ValueError, match=message):
            TABLES[column]["moe"].forward(x, np.ones((2, 2)), up, up, down, **given)


@without_a_device
@pytest.mark.parametrize("name", PLANTED["moe"])
def test_planted_mistakes_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant("moe", name, monkeypatch)
    assert_seen("moe")


@without_a_device
@pytest.mark.parametrize("name", PLANTED_IN_NUMBA["moe"])
def test_planted_mistakes_in_numba_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_in_numba("moe", name, monkeypatch)
    assert_seen("moe", column="numba_cuda")
