"""The kernels of cross-entropy."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from refimpl import ops
from refimpl.check.cases import Case, RandomDraw
from refimpl.kernels.columns import COLUMNS
from refimpl.kernels.compile import STORAGE
from refimpl.kernels.cross_entropy import cross_entropy_in_place, softmax_gradient
from refimpl.ops import Op

from kernel_support import (
    QUICK_TYPES,
    SHAPES,
    TABLE,
    TABLES,
    TYPES,
    compare,
    make_launch,
    rounded,
    to_device,
    to_host,
    without_a_device,
)
from kernel_support.planted import PLANTED, PLANTED_IN_NUMBA, assert_seen, plant, plant_in_numba


@pytest.mark.parametrize(("column", "storage"), TYPES)
def test_cross_entropy_in_place(column: str, storage: str) -> None:
    """Loss and gradient have the bits of the op's, in the memory of the logits, also where a thread
    has several batches of chunks, and of rows that don't count."""
    rng = np.random.default_rng(0)
    in_place = cross_entropy_in_place(make_launch(0, column))
    pair = COLUMNS[column](make_launch())["cross_entropy"]
    wide = {"float64": 4106, "float32": 17000, "bfloat16": 40000}[storage]
    for width in (1, 37, 40, wide):
        logits = to_device(rounded(rng.normal(size=(3, width)), storage))
        targets = to_device(np.array([0, width - 1, 7 % width]))
        given = {"targets": targets, "mask": to_device(np.array([1.0, 0.5, 0.0]))}
        wanted, saved = pair.forward(logits, **given)
        fresh = pair.backward(0.7, saved)
        loss, gradient = in_place(logits, **given, dloss=0.7)
        assert to_host(loss).tobytes() == to_host(wanted).tobytes()
        for x in (logits, gradient):  # one memory: the gradient itself may be a view of it
            assert to_host(x).tobytes() == to_host(fresh).tobytes()


@pytest.mark.parametrize(("column", "storage"), TYPES)
def test_gradient_over_the_logits(column: str, storage: str) -> None:
    """As the head writes it: the same bits as in an array of its own."""
    launch = make_launch(0, column)
    logits = to_device(rounded(np.random.default_rng(0).normal(size=(3, 40)), storage))
    pair = COLUMNS[column](make_launch())["cross_entropy"]
    _, saved = pair.forward(logits, targets=to_device(np.array([0, 39, 7])))
    fresh = to_host(pair.backward(0.7, saved))
    assert softmax_gradient(launch, saved.logits, *saved, 0.7) is saved.logits
    assert to_host(logits).tobytes() == fresh.tobytes()


@pytest.mark.parametrize("storage", STORAGE)
def test_in_place_by_the_rule(storage: str) -> None:
    """The gradient's error, and that of the loss with it, on the op's own shapes."""

    def forward(logits: Any, **given: Any) -> tuple[Any, Any]:
        return TABLE["cross_entropy"].forward(logits, **given)[0], (logits, given)

    def backward(dloss: Any, saved: Any) -> Any:
        logits = to_device(saved[0].copy())
        given = {k: to_device(x) if isinstance(x, np.ndarray) else x for k, x in saved[1].items()}
        _, gradient = cross_entropy_in_place(make_launch())(logits, **given, dloss=dloss)
        return to_host(gradient)

    for seed in range(6):
        case = SHAPES["cross_entropy"](RandomDraw(seed))
        compare("cross_entropy", Op(forward, backward), case, storage, seed)


@pytest.mark.parametrize(("column", "storage"), QUICK_TYPES)
def test_cross_entropy_extremes(column: str, storage: str) -> None:
    """Logits of ±1e4 and −∞, rows with NaN, +∞ or −∞ alone, each of them masked too: finite and NaN
    where the reference is, and 0 in masked rows."""
    rng = np.random.default_rng(0)
    inf = np.inf
    nan = np.nan
    for width in (5, 40, 4100):
        logits = rng.normal(size=(16, width))
        logits[0, :3] = (1e4, -1e4, 0)
        logits[1, 1:] = -inf
        logits[2, -1] = -inf
        logits[3] = -1e4
        for row, strange in enumerate(
            ((nan, 1), (inf, 0), (inf, inf), (-inf, nan), (nan, inf), (1e4, nan)), 4
        ):
            logits[[row, row + 6], -2:] = strange
        logits[15] = -inf
        logits = rounded(logits, storage)
        wide, targets = logits.astype(np.float64), np.where(np.arange(16) % 2, 0, width - 1)
        for mask in (np.arange(16) < 4, np.arange(16) < 10, np.arange(16) % 3 == 0):
            kwargs: dict[str, Any] = {"targets": np.where(mask, targets, -100), "mask": mask}
            with np.errstate(invalid="ignore"):
                wanted, reference = ops.cross_entropy_forward(wide, **kwargs)
                wanted_gradient = ops.cross_entropy_backward(0.7, reference)
                loss, saved = TABLES[column]["cross_entropy"].forward(logits, **kwargs)
                gradient = TABLES[column]["cross_entropy"].backward(0.7, saved)
            assert not gradient[~mask].astype(np.float64).any()
            np.testing.assert_allclose(loss, wanted, rtol=1e-6)
            np.testing.assert_allclose(
                gradient.astype(np.float64), wanted_gradient, atol=1e-7, rtol=2.0**-8
            )


@pytest.mark.parametrize(("column", "storage"), QUICK_TYPES)
def test_cross_entropy_where_rows_end(column: str, storage: str) -> None:
    """Rows that fill all blocks of the backward, and rows that end in the last of the chunks that a
    thread has on their way, in every type; logits of −20, beside which a 0 read past the end would
    be the largest. Then more rows than the block that adds up the loss has threads."""
    rng, pair = np.random.default_rng(0), TABLES[column]["cross_entropy"]
    for rows, width in ((2, 4096), (2, 15999), (300, 3)):
        targets = rng.integers(0, width, rows)
        compare(
            "cross_entropy",
            pair,
            Case((rng.normal(-20, size=(rows, width)),), {"targets": targets}),
            storage,
            0,
        )


@pytest.mark.parametrize("column", COLUMNS)
def test_what_is_no_number_stays_visible(column: str) -> None:
    """As in the reference: a row with a logit of +∞."""
    logits, targets = np.array([[0.0, np.inf, 1.0]]), np.array([0])
    pair = TABLES[column]["cross_entropy"]
    with np.errstate(invalid="ignore"):
        _, saved = pair.forward(logits, targets=targets)
        assert np.isnan(pair.backward(1.0, saved)).all()


@without_a_device
@pytest.mark.parametrize("name", PLANTED["cross_entropy"])
def test_planted_mistakes_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant("cross_entropy", name, monkeypatch)
    tests = test_cross_entropy_in_place, test_gradient_over_the_logits
    assert_seen("cross_entropy", *(partial(test, "cuda", "float64") for test in tests))


@without_a_device
@pytest.mark.parametrize("name", PLANTED_IN_NUMBA["cross_entropy"])
def test_planted_mistakes_in_numba_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_in_numba("cross_entropy", name, monkeypatch)
    assert_seen("cross_entropy", column="numba_cuda")
