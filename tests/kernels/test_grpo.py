"""The kernels of GRPO."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from refimpl.check.cases import Case, pair_of
from refimpl.kernels.compile import STORAGE

from kernel_support import TABLE, compare, without_a_device
from kernel_support.planted import PLANTED, assert_seen, plant


@pytest.mark.parametrize("storage", STORAGE)
def test_grpo_of_many_outputs(storage: str) -> None:
    """More outputs than the block that adds up the loss has threads."""
    rng, shape = np.random.default_rng(0), (300, 2)
    kwargs = {"advantages": rng.normal(size=300), "mask": rng.random(shape) < 0.8}
    kwargs |= {name: -rng.random(shape) for name in ("old_log_prob", "reference_log_prob")}
    compare("grpo", TABLE["grpo"], Case((-rng.random(shape),), kwargs), storage, 0)


@pytest.mark.parametrize("average", ["sequence", "token", "constant"])
@pytest.mark.parametrize("empty", ["counted", "left_out"])
@pytest.mark.parametrize("normaliser", [None, 7.5])
def test_grpo_with_an_empty_output(average: str, empty: str, normaliser: float | None) -> None:
    """Counted among the outputs that the loss is averaged over, or not; and a part of a batch,
    which is divided by the whole batch's count."""
    rng, shape = np.random.default_rng(0), (4, 3)
    mask = np.ones(shape, bool)
    mask[1], mask[2, 1:] = False, False
    kwargs = {"advantages": rng.normal(size=4), "mask": mask, "average": average, "empty": empty}
    kwargs |= {name: -rng.random(shape) for name in ("old_log_prob", "reference_log_prob")}
    kwargs |= {"length": 5, "normaliser": normaliser}
    compare("grpo", TABLE["grpo"], Case((-rng.random(shape),), kwargs), "float64", 0)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_grpo_of_what_is_no_number(dtype: type) -> None:
    """NaN and infinities of advantages and log-probabilities, at tokens and at padding, in outputs
    without tokens too: NaN, infinities and numbers are where they are in the reference, at all
    levels of ratio and KL."""
    rng, (inf, nan) = np.random.default_rng(0), (np.inf, np.nan)
    strange = [
        (a, b) for a in (nan, inf, -inf, 0.0, 1.0, -1.0) for b in (0.0, nan, inf, -inf, 40.0)
    ]
    n, t = len(strange), 5
    for case, options in enumerate(
        (
            {},
            {"ratio": "sequence", "kl_level": "sequence", "average": "token"},
            {"ratio": "sequence_mean", "kl": "k1"},
            {
                "kl": "unbiased",
                "dual_clip": 3.0,
                "off_policy": 0.1,
                "kl_bounds": (20.0, 10.0),
                "average": "token",
            },
            {"kl_weight": 0.0, "average": "constant", "length": 9},
            {"kl": "k2", "kl_level": "sequence"},
        )
    ):
        given = {
            name: -1 + 0.3 * rng.normal(size=(n, t))
            for name in ("log_prob", "old_log_prob", "reference_log_prob")
        }
        mask = rng.random((n, t)) < 0.6
        mask[:, 0] = True
        mask[::7] = False
        mask[1::3, 2] = case % 2 == 0  # at 2 stands what is strange
        for i, x in enumerate(given.values()):
            x[i::3, 2] += [b for _, b in strange][i::3]
        advantages = np.array([a for a, _ in strange])
        for rows in (slice(None), ~mask[:, 2] & np.isfinite(advantages), [0], [14], [16]):
            here = {
                name: x[rows].astype(dtype)
                for name, x in (given | {"advantages": advantages}).items()
            } | options
            here["mask"] = mask[rows]
            with np.errstate(all="ignore"):
                _compare_grpo(
                    here,
                    *((1e-12, 1e-14) if dtype is np.float64 else (1e-4, 1e-6)),
                    str((options, rows)),
                )


def _compare_grpo(given: dict[str, Any], rtol: float, atol: float, at: str) -> None:
    """The reference's loss, gradient and choices, those of padding left out."""
    wanted, saved = pair_of("grpo").forward(**given)
    found, kept = TABLE["grpo"].forward(**given)
    gradient, exact = TABLE["grpo"].backward((0.7,), kept), pair_of("grpo").backward((0.7,), saved)
    np.testing.assert_allclose(found.loss, wanted.loss, rtol, atol, err_msg=at)
    np.testing.assert_allclose(gradient, exact, rtol, atol, err_msg=at)
    assert np.array_equal(found.kept, wanted.kept), at
    assert np.array_equal(found.unclipped[given["mask"]], wanted.unclipped[given["mask"]]), at


def test_grpo_on_both_sides_of_every_bound() -> None:
    """Every advantage with ratios in and out of the clip and KL in and out of its bounds, by
    choices made and by replayed ones that contradict them: values and choices are the
    reference's."""
    a, z, u = (
        x.ravel()
        for x in np.meshgrid([-1, -0.5, 0, 0.5, 1], [-2, -0.1, 0.1, 2], [-25, -3, 0.1, 3, 25])
    )
    rng, n = np.random.default_rng(0), len(a)
    log_prob = np.stack([z, np.full(n, 0.1)], axis=1) - 30
    given = {
        "log_prob": log_prob,
        "old_log_prob": np.full((n, 2), -30.0),
        "advantages": a,
        "reference_log_prob": log_prob + np.stack([u, np.zeros(n)], axis=1),
        "mask": np.ones((n, 2), bool),
    }
    kl = [
        (kl, bounds)
        for kl in ("k1", "k2", "k3", "unbiased")
        for bounds in ((20.0, 10.0), (2.0, 1000.0))
    ]
    choices: list[dict[str, Any]] = [
        {},
        {"unclipped": rng.random((n, 2)) < 0.5},
        {"kept": rng.random(n) < 0.5},
    ]
    of_outputs = {"ratio": "sequence", "kl_level": "sequence", "kl_weight": 1.0}
    levels = ({}, of_outputs, {"off_policy": 0.5}, {"dual_clip": 3.0})
    for i, (setting, (estimator, bounds)) in enumerate(product(levels, kl)):
        here = given | {"kl": estimator, "kl_bounds": bounds} | setting | choices[i % 3]
        _compare_grpo(here, 1e-13, 1e-15, str((setting, estimator, bounds, list(choices[i % 3]))))


def test_grpo_multiplies_no_infinity_with_zero() -> None:
    """An output that is dropped, whose ratio overflows, and one without advantage, whose clip has
    no upper end."""
    one = {"old_log_prob": np.full((1, 1), -900.0), "mask": np.ones((1, 1), bool), "kl_weight": 0.0}
    for options in (
        {"advantages": np.array([-1.0]), "kept": np.array([False])},
        {"advantages": np.array([0.0]), "clip": (0.2, np.inf)},
    ):
        for pair in (TABLE["grpo"], pair_of("grpo")):
            with np.errstate(over="ignore"):
                output, saved = pair.forward(np.full((1, 1), -1.0), **one, **options)
                assert (output.loss, pair.backward((1.0,), saved)) == (0, 0)


def test_arguments_that_a_kernel_would_misread() -> None:
    kwargs = {"advantages": np.ones(2), "mask": np.ones((2, 3), bool), "kl_weight": 0.0}
    for pair in (TABLE["grpo"], pair_of("grpo")):
        for choice in (
            {"unclipped": np.ones((2, 1), bool)},
            {"unclipped": np.ones((2, 3), np.int64)},
        ):
            with pytest.raises((TypeError, ValueError), match="unclipped must "):
                pair.forward(-np.ones((2, 3)), **kwargs, **choice)
        with pytest.raises((TypeError, ValueError), match="kept must "):
            pair.forward(-np.ones((2, 3)), **kwargs, kept=np.array([0, 1]))


def test_what_is_no_number_stays_visible() -> None:
    """As in the reference: NaN and −∞ of a policy without an old one."""
    kwargs = {"advantages": np.ones(1), "mask": np.ones((1, 3), bool), "kl_weight": 0.0}
    for strange in (np.nan, -np.inf):
        log_prob = np.array([[-1.0, strange, -2.0]])
        with np.errstate(invalid="ignore"):
            (wanted, saved), (got, kept) = (
                pair.forward(log_prob, **kwargs) for pair in (pair_of("grpo"), TABLE["grpo"])
            )
            np.testing.assert_array_equal(got.loss, wanted.loss)
            np.testing.assert_allclose(
                TABLE["grpo"].backward((1.0,), kept), pair_of("grpo").backward((1.0,), saved)
            )


@without_a_device
@pytest.mark.parametrize("name", PLANTED["grpo"])
def test_planted_mistakes_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant("grpo", name, monkeypatch)
    assert_seen("grpo")
