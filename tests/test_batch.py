"""The batch: what `forward` promises when targets, masks and positions are not given, and what an
MTP module meets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from refimpl.batch import Batch, Whole, count_true, make_batch
from refimpl.config import CONVENTIONS, Conventions, preset

CONFIG = preset("tiny")  # two MTP modules
LIKE = np.zeros(1)
TOKENS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def batch(**given: Any) -> Batch:
    return make_batch(LIKE, TOKENS, CONFIG, **given)


def test_nothing_given() -> None:
    """The target is the next token; the last position has none that counts."""
    made = batch()
    assert made.targets[:, :-1].tolist() == TOKENS[:, 1:].tolist()
    assert made.mask.tolist() == [[True] * 4 + [False]] * 2
    assert made.positions.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert made.takes_part is made.segments is None


def test_padding_and_documents() -> None:
    """A target counts if it is a real token of the same document; a given mask takes away."""
    key_mask = np.array([[True] * 5, [False, False, True, True, True]])
    segments = np.array([[0, 0, 1, 1, 1], [7] * 5])
    made = batch(key_mask=key_mask, segments=segments)
    assert made.mask.tolist() == [
        [True, False, True, True, False],
        [False, False, True, True, False],
    ]
    mask = made.mask & np.array([[False, True, True, False, True]] * 2)
    assert np.array_equal(batch(key_mask=key_mask, segments=segments, mask=mask).mask, mask)
    for row, position in ((0, 1), (0, 4), (1, 1)):
        mask = made.mask.copy()
        mask[row, position] = True
        with pytest.raises(ValueError, match=f"got True in row {row}, position {position}"):
            batch(key_mask=key_mask, segments=segments, mask=mask)


def test_left_padding_as_hugging_face_counts() -> None:
    """Under hf the first token behind padding is a target, and positions count from it."""
    key_mask = np.array([[True] * 5, [False, False, True, True, True]])
    hf = replace(CONFIG, conventions=CONVENTIONS["hf"])
    made = make_batch(np.empty(0), TOKENS, hf, key_mask=key_mask)
    assert made.mask.tolist() == [[True] * 4 + [False], [False, True, True, True, False]]
    assert made.positions.tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]
    mask = np.array([[True] * 4 + [False], [True] * 4 + [False]])
    with pytest.raises(ValueError, match="got True in row 1, position 0"):
        make_batch(np.empty(0), TOKENS, hf, key_mask=key_mask, mask=mask)


def test_no_more_tokens_than_the_indexer_chooses() -> None:
    make_batch(np.empty(0), TOKENS, replace(CONFIG, index_topk=5))
    with pytest.raises(ValueError, match="T at most index_topk=4"):
        make_batch(np.empty(0), TOKENS, replace(CONFIG, index_topk=4))


def test_given_targets() -> None:
    """Every position has one then; only a given mask takes away, or padding without one."""
    assert batch(targets=TOKENS).mask.all()
    mask = np.array([[True, False, True, False, True]] * 2)
    assert np.array_equal(batch(targets=TOKENS, mask=mask).mask, mask)
    key_mask = np.array([[True] * 5, [False] + [True] * 4])
    assert np.array_equal(batch(targets=TOKENS, key_mask=key_mask).mask, key_mask)


def test_positions() -> None:
    """One row for all, or a row each."""
    assert batch(positions=np.arange(5) + 11).positions.tolist() == [[11, 12, 13, 14, 15]] * 2
    rows = np.array([[0, 1, 0, 1, 2], [4, 5, 6, 7, 8]])
    assert np.array_equal(batch(positions=rows).positions, rows)


def test_as_a_module_meets_it() -> None:
    """Module k reads the token k later and predicts the one after that."""
    made = batch()
    for depth in (1, 2):
        met = made.at(depth)
        assert np.array_equal(met.tokens, TOKENS[:, depth:])
        assert np.array_equal(met.targets[:, :-1], TOKENS[:, depth + 1 :])
        assert met.mask.sum() == made.mask.sum() - 2 * depth
        assert np.array_equal(met.positions, made.positions[:, : 5 - depth])


def test_normalisers() -> None:
    """What the loss of module 1 is divided by under each convention, and of a part, whose main loss
    has another."""

    def normaliser(rule: Any, **given: Any) -> float | None:
        config = replace(CONFIG, conventions=Conventions(mtp_normaliser=rule))
        return make_batch(np.empty(0), TOKENS, config, **given).at(1).whole.targets

    assert normaliser("positions") == 10
    assert normaliser("main") == 8
    assert normaliser("valid") is None
    key_mask = np.array([[True] * 5, [False, False, True, True, True]])
    assert normaliser("positions", key_mask=key_mask) == 8
    whole = Whole(20.0, (17.0,), 4.0)
    assert batch().whole.targets is None
    assert batch(whole=whole).whole.targets == 20
    assert normaliser("positions", whole=whole) == 17
    assert count_true(np.zeros(3, dtype=bool)) is None  # a sum over none is 0 whatever divides it


def test_tokens_that_follow() -> None:
    """Two of five positions follow: the part's last target is the first of them, and a module reads
    as far into them as it is deep."""
    part = batch(follow=2)
    assert np.array_equal(part.tokens, TOKENS[:, :3])
    assert np.array_equal(part.targets, TOKENS[:, 1:4])
    assert part.mask.all()
    assert np.array_equal(part.at(1).tokens, TOKENS[:, 1:4])
    assert np.array_equal(part.at(2).targets[:, :-1], TOKENS[:, 3:])
    assert part.at(2).mask.tolist() == [[True, True, False]] * 2
    with pytest.raises(ValueError, match=r"follow must lie in 0…T−1=4, got 5"):
        batch(follow=5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"targets": TOKENS[:, 1:]}, r"targets must have shape \(B, T\)=\(2, 5\), got \(2, 4\)"),
        ({"segments": TOKENS[0]}, r"segments must have shape \(B, T\)"),
        ({"mask": TOKENS}, "mask must be"),
        ({"key_mask": np.ones((1, 5), dtype=bool)}, r"key_mask must have shape \(B, T\)"),
        ({"positions": np.arange(4)}, r"positions must have shape \(B, T\) or \(T,\)"),
    ],
    ids=["targets", "segments", "mask", "key_mask", "positions"],
)
def test_errors(given: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        batch(**given)


def test_tokens_must_reach_the_last_module() -> None:
    with pytest.raises(ValueError, match=r"with T > mtp_depth=2, got \(2, 2\)"):
        make_batch(LIKE, TOKENS[:, :2], CONFIG)
    make_batch(LIKE, TOKENS[:, :1], CONFIG, with_loss=False)
    make_batch(LIKE, TOKENS[:, :1], replace(CONFIG, mtp_depth=0))
    with pytest.raises(ValueError, match="tokens must"):
        make_batch(LIKE, TOKENS + 250, CONFIG)
