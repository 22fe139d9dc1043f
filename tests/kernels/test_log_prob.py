"""Log-probabilities by the kernels of cross-entropy and dense products."""

from __future__ import annotations

import sys
from math import prod
from typing import Any

import numpy as np
import pytest

from refimpl import stored
from refimpl.check.cases import Case, pair_of
from refimpl.kernels import host
from refimpl.kernels.columns import COLUMNS
from refimpl.kernels.compile import STORAGE
from refimpl.kernels.log_prob import log_prob
from refimpl.ops import REFERENCE
from refimpl.verify import placed

from kernel_support import ALL, TABLE, TABLES, compare, make_launch, rounded, to_device, to_host


@pytest.mark.parametrize("column", COLUMNS)
def test_log_prob_of_masked_rows(column: str) -> None:
    """A masked row without numbers has log-probability 0, and no part in any gradient, as in the
    reference."""
    rng = np.random.default_rng(0)
    h = rng.normal(size=(4, 3))
    w = rng.normal(size=(6, 3))
    dy = rng.normal(size=4)
    h[1] = np.nan
    kwargs = {"targets": np.array([1, -100, 5, 2]), "mask": np.array([True, False, True, True])}
    (wanted, saved), (found, kept) = (
        pair.forward(h, w, **kwargs) for pair in (pair_of("log_prob"), TABLES[column]["log_prob"])
    )
    np.testing.assert_allclose(found, wanted)
    for got, gradient in zip(
        TABLES[column]["log_prob"].backward(dy, kept),
        pair_of("log_prob").backward(dy, saved),
        strict=True,
    ):
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, gradient)


@pytest.mark.parametrize("storage", STORAGE)
def test_log_prob_of_masked_rows_in_every_type(storage: str) -> None:
    """They are left out by their bits, whatever the type."""
    rng = np.random.default_rng(0)
    h, w = rng.normal(size=(3, 2)), rng.normal(size=(5, 2))
    kwargs = {"targets": np.array([1, -100, 4]), "mask": np.array([1.0, 0.0, 0.5])}
    pair, found = TABLE["log_prob"], []
    for anything in (0.5, np.nan, np.inf):
        h[1] = anything
        y, saved = pair.forward(rounded(h, storage), rounded(w, storage), **kwargs)
        found.append([y, *pair.backward(np.ones_like(y), saved)])
    for other in found[1:]:
        assert all(a.tobytes() == b.tobytes() for a, b in zip(found[0], other, strict=True))
    assert all(np.isfinite(x.astype(np.float64)).all() for x in found[0])


def test_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 with two or three, dh and dw hold the rule beside the plain reference; with one
    beside that which rounds the logits' gradient, as `compare` has it, and not beside this. One
    takes 4 products of tokens × width × vocabulary, three take 8."""
    made, real = list[tuple[int, ...]](), host.matmul

    def counted(a: Any, b: Any, out: Any, *, add: bool = False) -> None:
        made.append((*a.shape, b.shape[1]))
        real(a, b, out, add=add)

    for module in (host, sys.modules["refimpl.kernels.log_prob"]):
        monkeypatch.setattr(module, "matmul", counted)
    h, w = (12, 33), (100, 33)
    rng = np.random.default_rng(0)
    case = Case((rng.normal(size=h), rng.normal(size=w)), {"targets": rng.integers(0, 100, 12)})
    seen = {}
    for terms, products in ((1, 4), (2, 6), (3, 8)):
        made.clear()
        pair = placed(log_prob(make_launch(), terms=terms), to_device)
        told = stored.compare(pair, REFERENCE["log_prob"], case, "bfloat16", terms)
        assert sum(map(prod, made)) == products * prod((*h, w[0]))
        assert all(x.fault is None for x in told)
        seen[terms] = [x.ratio for x in told]
    assert max(seen[2] + seen[3]) <= 1
    assert seen[1][0] <= 1 < min(seen[1][1:])
    with pytest.raises(ValueError, match="terms must be 1, 2 or 3, got 4"):
        log_prob(make_launch(), terms=4)


@pytest.mark.parametrize("storage", STORAGE if ALL else ("float64", "bfloat16"))
def test_log_prob_in_blocks(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where products are exact, any block gives the very log-probabilities of the whole; gradients
    within the rule."""
    module, rng = sys.modules["refimpl.kernels.log_prob"], np.random.default_rng(1)
    h, w = (rng.integers(-3, 4, shape) / 4 for shape in ((7, 12), (100, 12)))
    targets = rng.integers(0, 100, 7)
    given = to_device(rounded(h, storage)), to_device(rounded(w, storage))
    found = []
    for least, block in (
        (module.BLOCK, (1, 1)),
        ((1, 1), (1, 100)),
        ((1, 1), (3, 40)),
        ((2, 70), (1, 1)),
        ((1, 1), (7, 9)),
    ):
        monkeypatch.setattr(module, "BLOCK", least)
        case = Case((h, w), {"targets": targets, "block": block, "temperature": 0.7})
        compare("log_prob", TABLE["log_prob"], case, storage, 0)
        y, saved = COLUMNS["cuda"](make_launch())["log_prob"].forward(
            *given, targets=to_device(targets), block=block
        )
        assert saved.block == (max(least[0], block[0]), max(least[1], block[1]))
        found.append(to_host(y).tobytes())
    assert len(set(found)) == 1
    assert module._rows((4096, 16384), 129280) == 512
    assert module._rows((256, 4096), 129280) == 8
