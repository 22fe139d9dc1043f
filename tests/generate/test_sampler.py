"""The sampler: its law, the exact edge of the nucleus, what no number can be, and rows that are
what they are alone."""

from __future__ import annotations

import sys

import array_api_strict as strict
import numpy as np
import pytest

from refimpl.generate import Sampler

import pretended_cupy


def kept(top_p: float, p: list[float]) -> list[int]:
    """The tokens of the nucleus."""
    ids, mass = Sampler(1, top_p).nucleus(np.array([p]))
    count = np.count_nonzero(mass)
    assert not mass[0, count:].any()
    assert mass[0, :count].tolist() == [p[token] for token in ids[0, :count]]
    return ids[0, :count].tolist()


def test_nucleus() -> None:
    """Most probable first, equal ones by id; the sum of exactly top_p suffices."""
    equal, uneven = [0.25] * 4, [0.125, 0.625, 0.25]
    assert kept(0.5, equal) == [0, 1]
    assert kept(0.5 + 1e-9, equal) == [0, 1, 2]
    assert kept(1e-9, equal) == [0]
    assert kept(0.7, uneven) == [1, 2]
    assert kept(0.875, uneven) == [1, 2]
    assert kept(0.9, uneven) == [1, 2, 0]
    assert kept(0.9, [0.05] * 10) == list(range(10))  # the sums end below
    many = np.random.default_rng(0).integers(1, 4, 1000) / 2048  # ties far apart
    wanted = sorted(range(1000), key=lambda token: (-many[token], token))
    found = kept(0.9, many.tolist())
    assert found == wanted[: len(found)]
    ids, mass = Sampler(1, 0.5).nucleus(np.array([equal, [*uneven, 0]]))
    assert ids.tolist() == [[0, 1, 2, 3], [1, 2, 0, 3]]
    assert mass.tolist() == [[0.25, 0.25, 0, 0], [0.625, 0, 0, 0]]


LAWS = {
    "plain": (1.0, 1.0, [0.1, 0.6, 0.3]),
    "nucleus": (1.0, 0.7, [0, 2 / 3, 1 / 3]),
    "colder": (0.5, 1.0, [1 / 46, 36 / 46, 9 / 46]),
    "colder nucleus": (0.5, 0.9, [0, 0.8, 0.2]),
}


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("name", LAWS)
def test_law_of_the_sampler(name: str, rows: int) -> None:
    """Frequencies of thousands of draws, within five standard deviations."""
    temperature, top_p, wanted = LAWS[name]
    sampler, n = Sampler(temperature, top_p, seed=5, rows=rows), 5_000 if rows == 1 else 20_000
    z = np.tile(np.log([0.1, 0.6, 0.3]), (rows, 1))
    drawn = np.concatenate([sampler.choose(z).tokens for _ in range(n // rows)])
    counts, p = np.bincount(drawn, minlength=3), np.array(wanted)
    assert np.all(np.abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p)))


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_batch_is_its_rows(temperature: float, top_p: float) -> None:
    """Row b draws from ``seed + b``, one number per call, whatever rows have left; over more calls
    than numbers are drawn ahead."""
    z = np.random.default_rng(1).normal(size=(150, 5, 30)).astype(np.float32)
    sampler = Sampler(temperature, top_p, seed=3, rows=5)
    alone = [Sampler(temperature, top_p, seed=3 + row) for row in range(5)]
    for call, batch in enumerate(z):
        rows = np.array([row for row in range(5) if call < 40 * (row + 1)])
        found = sampler.choose(batch[rows], rows, log_probs=True)
        for place, row in enumerate(rows):
            one = alone[row].choose(batch[row : row + 1], log_probs=True)
            assert one.tokens == found.tokens[place]
            assert one.log_probs is not None
            assert found.log_probs is not None
            assert one.log_probs[0] == found.log_probs[place]


def test_one_number_picks_in_the_order_of_ids() -> None:
    """With top_p = 1: the token whose part of 0 … 1 the number falls into."""
    u = np.random.default_rng(9).random(200)
    sampler = Sampler(1.0, seed=9)
    p = np.array([0.2, 0.5, 0.0, 0.3])
    with np.errstate(divide="ignore"):
        z = np.log(p)[None]
    drawn = [int(sampler.choose(z).tokens[0]) for _ in range(200)]
    assert drawn == np.searchsorted(np.cumsum(p), u, side="right").tolist()


def test_edges_of_a_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number on the edge of two tokens is the later one's; none of probability 0 is drawn, not
    even where a library's running sum, added in another order, rises there by rounding."""
    sampler, p = Sampler(1.0), np.array([[0.0, 0.25, 0.0, 0.25, 0.5, 0.0]])
    numbers = [0.0, 0.25 - 2**-54, 0.25, 0.5, 1 - 2**-53]
    sampler.uniform = np.array([numbers])
    assert [int(sampler.draw(p)[0, 0]) for _ in numbers] == [1, 1, 3, 4, 4]
    up = np.array([[0, 0, 2**-54, 0, 0, 0]])
    monkeypatch.setattr("refimpl.generate.sampler.running_sum", lambda p: np.cumsum(p, 1) + up)
    sampler.drawn = 2
    assert int(sampler.draw(p)[0, 0]) == 3


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_log_probs(temperature: float) -> None:
    """Of the whole softmax, whatever top_p; at temperature 0 that of temperature 1."""
    z = 3 * np.random.default_rng(2).normal(size=(6, 40))
    found = Sampler(temperature, 0.5, rows=6).choose(z, log_probs=True)
    scaled = z / (temperature or 1.0)
    wanted = scaled - np.log(np.sum(np.exp(scaled), axis=1, keepdims=True))
    np.testing.assert_allclose(found.log_probs, wanted[np.arange(6), found.tokens], rtol=1e-13)
    assert Sampler(temperature, rows=6).choose(z).log_probs is None


def test_equal_logits_take_the_lowest() -> None:
    assert Sampler().choose(np.array([[1.0, 3.0, 2.0, 3.0], [2, 2, 2, 2]])).tokens.tolist() == [
        1,
        0,
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_is_no_token(temperature: float) -> None:
    for bad in ([0.0, np.nan], [np.inf, np.nan], [np.nan, -np.inf]):
        with pytest.raises(ValueError, match="logits must be numbers, got NaN"):
            Sampler(temperature, rows=2).choose(np.array([[0.0, 1.0], bad]))


def test_infinite_logits() -> None:
    """+∞ is that token, or one of several alike; −∞ is none; all −∞ is an error."""
    inf = np.inf
    z = np.array([[0.0, inf, -inf, 5.0], [-inf, -inf, -1e30, -inf]])
    for temperature in (0.0, 1e-300, 1.0):
        for top_p in (1.0, 0.3):
            found = Sampler(temperature, top_p, rows=2).choose(z, log_probs=True)
            assert found.tokens.tolist() == [1, 2]
            assert found.log_probs is not None
            assert found.log_probs.tolist() == [0, 0]
        with pytest.raises(ValueError, match="logits must not all be −∞"):
            Sampler(temperature, rows=2).choose(np.array([[0.0] * 3, [-inf] * 3]))
    sampler, n = Sampler(0.7), 20_000
    several = np.array([[inf, 3.0, inf, -inf]])
    counts = np.bincount([sampler.choose(several).tokens[0] for _ in range(n)], minlength=4)
    assert counts[[1, 3]].tolist() == [0, 0]
    assert np.all(np.abs(counts[[0, 2]] - n / 2) <= 5 * np.sqrt(n / 4))


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_other_libraries(temperature: float, top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens; from CuPy, only tokens and log-probabilities are copied to the host."""
    monkeypatch.setitem(sys.modules, "cupy", pretended_cupy.Pretended("cupy"))
    z = np.random.default_rng(1).normal(size=(4, 5, 30)).astype(np.float32)
    here, there, device = (Sampler(temperature, top_p, seed=3, rows=5) for _ in range(3))
    for batch in z:
        wanted = here.choose(batch, log_probs=True)
        pretended_cupy.COPIES.clear()
        found = device.choose(pretended_cupy.there(batch), log_probs=True)
        assert pretended_cupy.COPIES == ["get", "get"]
        for other in (found, there.choose(strict.asarray(batch), log_probs=True)):
            assert other.tokens.tolist() == wanted.tokens.tolist()
            np.testing.assert_allclose(other.log_probs, wanted.log_probs, rtol=1e-13)
