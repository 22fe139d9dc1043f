"""Rotary embedding and YaRN: the protocol, the identities, V3's numbers, and the errors."""

from __future__ import annotations

from typing import Any

import array_api_strict as strict
import numpy as np
import pytest

from refimpl.check.rules import has_longdouble
from refimpl.config import preset
from refimpl.ops import (
    Yarn,
    rope_backward,
    rope_forward,
    rope_frequencies,
    yarn_mscale,
    yarn_softmax_factor,
)

from support import property_test

EPS = np.finfo(np.float64).eps
LAYOUTS = pytest.mark.parametrize("layout", ["interleaved", "halves"])


def heads(seed: int = 0, r: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, 5, 3, r))


def rope(
    x: np.ndarray, positions: Any, layout: str = "interleaved", factor: float = 1.0
) -> tuple[np.ndarray, Any]:
    frequencies = rope_frequencies(x.shape[-1], 100.0)
    return rope_forward(
        x, positions=np.asarray(positions), inv_freq=frequencies, layout=layout, factor=factor
    )


def test_protocol() -> None:
    property_test("rope")


def test_a_ramp_that_ends_before_it_begins() -> None:
    """As DeepSeek's code and Hugging Face's: within a context of one position, no pair is slowed
    down."""
    np.testing.assert_array_equal(
        rope_frequencies(8, 100.0, Yarn(4.0, 1)), rope_frequencies(8, 100.0)
    )
    ramp_of_one = rope_frequencies(8, 100.0, Yarn(4.0, 16, 32.0, 4.0))  # from pair 0 to pair 0
    np.testing.assert_array_equal(ramp_of_one[1:], rope_frequencies(8, 100.0)[1:] / 4)


@pytest.mark.parametrize(
    ("layout", "y"), [("interleaved", [-2, 1, -3, -4]), ("halves", [-3, -2, 1, -4])]
)
def test_quarter_and_half_turn(layout: str, y: list[float]) -> None:
    """Position 1 turns the first pair by 90°, from the first axis towards the second, and the
    second pair by 180°."""
    x = np.arange(1.0, 5).reshape(1, 1, 1, 4)
    turned, _ = rope_forward(
        x, positions=np.ones(1, int), inv_freq=np.array([np.pi / 2, np.pi]), layout=layout
    )
    np.testing.assert_allclose(turned[0, 0, 0], y, rtol=4 * EPS)


@LAYOUTS
def test_backward_is_the_inverse_rotation(layout: str) -> None:
    """Twice the factor and no turn is left; and turning forward by negative positions is the same
    to the bit."""
    x, positions = heads(), np.array([0, 7, 3, 100, 5])
    y, saved = rope(x, positions, layout, factor=1.25)
    back = rope_backward(y, saved)
    np.testing.assert_allclose(
        back, 1.25**2 * x, rtol=0, atol=8 * EPS * np.abs(x).max()
    )  # six roundings each
    np.testing.assert_array_equal(back, rope(y, -positions, layout, factor=1.25)[0])


@LAYOUTS
def test_norm_of_each_pair(layout: str) -> None:
    x = heads()
    y, _ = rope(x, np.arange(5), layout, factor=0.8)
    pairs = (2, 5, 3, 4, 2) if layout == "interleaved" else (2, 5, 3, 2, 4)
    norms = [
        np.sum(a.reshape(pairs) ** 2, axis=-1 if layout == "interleaved" else -2) for a in (x, y)
    ]
    np.testing.assert_allclose(norms[1], 0.8**2 * norms[0], rtol=16 * EPS)


@LAYOUTS
def test_scores_depend_on_relative_position_alone(layout: str) -> None:
    q = heads()
    k = heads(1)
    positions = np.array([0, 2, 3, 7, 11])

    def scores(shift: int) -> np.ndarray:
        turned = (rope(x, positions + shift, layout)[0] for x in (q, k))
        return np.einsum("bthx,bshx->bhts", *turned)

    size = np.abs(scores(0)).max()
    # an angle of 1000 is off by 1000 eps
    np.testing.assert_allclose(scores(1000), scores(0), rtol=0, atol=1000 * EPS * size)
    swapped = np.einsum(
        "bthx,bshx->bhts", rope(q, -positions, layout)[0], rope(k, -positions, layout)[0]
    )
    assert np.abs(swapped - scores(0)).max() > 0.1 * size  # but the direction counts


def test_interleaved_is_permuted_halves() -> None:
    """halves(x with pairs moved apart) = interleaved(x) with pairs moved apart: the same
    arithmetic, the same bits."""
    x = heads()
    dy = heads(1)
    apart = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    (y, saved), (moved, moved_saved) = (
        rope(x, np.arange(5)),
        rope(x[..., apart], np.arange(5), "halves"),
    )
    np.testing.assert_array_equal(moved, y[..., apart])
    np.testing.assert_array_equal(
        rope_backward(dy[..., apart], moved_saved), rope_backward(dy, saved)[..., apart]
    )


@LAYOUTS
def test_position_zero_only_multiplies(layout: str) -> None:
    x = heads()
    np.testing.assert_array_equal(rope(x, np.zeros(5, int), layout, factor=1.25)[0], 1.25 * x)


def test_positions_by_row() -> None:
    """[B, T] positions hold for their own row."""
    x, positions = heads(), np.array([[0, 1, 2, 3, 4], [9, 9, 0, 1, 30]])
    y, _ = rope(x, positions)
    for b in range(2):
        np.testing.assert_array_equal(y[b], rope(x, positions[b])[0][b])


def test_far_positions_in_float32() -> None:
    """Angles are computed in float64 whatever x is: in float32 an angle of 100000 would be off by
    0.004."""
    x, positions = heads().astype(np.float32), 100_000 + np.arange(5)
    y, _ = rope(x, positions)
    assert y.dtype == np.float32
    wide = rope(x.astype(np.float64), positions)[0]
    np.testing.assert_allclose(y, wide, rtol=0, atol=4 * np.finfo(np.float32).eps * np.abs(x).max())


def test_frequencies() -> None:
    np.testing.assert_allclose(rope_frequencies(4, 10000.0), [1, 0.01], rtol=4 * EPS)
    np.testing.assert_array_equal(
        rope_frequencies(8, 30.0, Yarn(factor=1.0)), rope_frequencies(8, 30.0)
    )


def test_yarn_of_v3() -> None:
    """Pairs up to 10 keep their frequency, pairs from 23 on are 40 times slower, a linear ramp lies
    between."""
    plain, slowed = rope_frequencies(64, 1e4), rope_frequencies(64, 1e4, Yarn())
    np.testing.assert_array_equal(slowed[:11], plain[:11])
    np.testing.assert_allclose(slowed[23:], plain[23:] / 40, rtol=EPS)
    ramp = np.arange(11, 23) - 10
    np.testing.assert_allclose(
        slowed[11:23] / plain[11:23], 1 - ramp / 13 * (1 - 1 / 40), rtol=8 * EPS
    )


def test_yarn_of_tiny_contexts_is_finite() -> None:
    """Low and high coincide: a step in place of the ramp, and no division by zero."""
    frequencies = rope_frequencies(4, 100.0, Yarn(4.0, 1, 1.0, 1.0))
    np.testing.assert_allclose(frequencies, [1, 0.1 / 4], rtol=4 * EPS)


def test_yarn_softmax_factor() -> None:
    config = preset("v3")
    assert yarn_softmax_factor(None) == yarn_mscale(1.0, 1.0) == yarn_mscale(0.5, 1.0) == 1
    assert yarn_mscale(40.0, 0.0) == 1
    assert yarn_softmax_factor(Yarn(mscale_all_dim=0.707)) == pytest.approx(1.58963, abs=5e-6)
    assert (config.nope + config.rope) ** -0.5 * yarn_softmax_factor(config.yarn) == pytest.approx(
        0.135234, abs=5e-7
    )


GOOD: dict[str, Any] = {
    "x": np.ones((2, 3, 1, 4)),
    "positions": np.arange(3),
    "inv_freq": np.ones(2),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"x": np.ones((2, 3, 4))},
            ValueError,
            r"x must have shape \(B, T, H, R\) with .*=4, got \(2, 3, 4\)",
        ),
        ({"inv_freq": np.ones(4)}, ValueError, r"R=2·len\(inv_freq\)=8, got \(2, 3, 1, 4\)"),
        (
            {"positions": np.arange(2)},
            ValueError,
            r"positions must have shape \(T,\) or \(B, T\) of x \(2, 3\), got",
        ),
        ({"positions": np.zeros((3, 2))}, ValueError, r"positions must have shape .* got \(3, 2\)"),
        ({"positions": np.zeros((1, 3))}, ValueError, r"positions must have shape .* got \(1, 3\)"),
        ({"layout": "half"}, ValueError, "layout must be one of interleaved, halves, got 'half'"),
        ({"x": np.ones((2, 3, 1, 4), int)}, TypeError, "x must be float32 or wider"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = GOOD | change
    with pytest.raises(error, match=message):
        rope_forward(arguments.pop("x"), **arguments)


@pytest.mark.parametrize("width", [0, 3, -2])
def test_frequencies_of_no_or_odd_width(width: int) -> None:
    with pytest.raises(ValueError, match=f"width must be even and positive, got {width}"):
        rope_frequencies(width, 1e4)


@np.errstate(all="ignore")
def test_range_of_validity() -> None:
    """A pair may grow by √2, so the last octave overflows to ∞; the smallest numbers turn with an
    error of one of them. An angle errs by a unit of itself: 1e-16 of the number of radians."""
    settings: dict[str, Any] = {"positions": np.array([1]), "inv_freq": np.array([np.pi / 4])}

    def turned(size: float) -> np.ndarray:
        return rope_forward(np.full((1, 1, 1, 2), size, np.float32), **settings)[0].reshape(-1)

    assert np.isinf(turned(3e38)[1])
    np.testing.assert_allclose(turned(2e38), [0, 2e38 * 2**0.5], rtol=1e-6, atol=2e31)
    np.testing.assert_allclose(turned(1e-44), [0, 1.4e-44], atol=3e-45)
    settings["inv_freq"] = np.array([np.inf])
    assert np.isnan(turned(1.0)).all()
    if has_longdouble():
        far = {"positions": np.array([10**12]), "inv_freq": np.array([0.1])}
        x = np.ones((1, 1, 1, 2))
        error = rope_forward(x, **far)[0] - rope_forward(x.astype(np.longdouble), **far)[0]
        assert 0 < np.abs(error).max() < 2 * 1e11 * np.finfo(float).eps


@pytest.mark.parametrize("theta", [0.0, -1.0, np.inf, np.nan])
def test_theta_that_cannot_be_right(theta: float) -> None:
    with pytest.raises(ValueError, match=f"theta must be a finite number above 0.* got {theta}"):
        rope_frequencies(4, theta)


def test_theta_1_with_yarn() -> None:
    assert rope_frequencies(4, 1.0).tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"theta must be .* and not 1 with YaRN, got 1.0"):
        rope_frequencies(4, 1.0, Yarn())


@pytest.mark.parametrize("name", ["factor", "beta_fast", "beta_slow", "original"])
@pytest.mark.parametrize("value", [0.0, -1.0, 5e-324, np.inf, np.nan])
def test_yarn_that_cannot_be_right(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"yarn\.{name} must be a finite number above 0, got"):
        rope_frequencies(4, 1e4, Yarn()._replace(**{name: value}))


@pytest.mark.parametrize("name", ["mscale", "mscale_all_dim"])
@pytest.mark.parametrize("value", [1e299, 1e20, -1e299, -10 / np.log(40), np.inf, np.nan])
def test_mscale_that_cannot_be_right(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"yarn\.{name} must make .* fit float32, got"):
        rope_frequencies(4, 1e4, Yarn()._replace(**{name: value}))


def test_no_positions() -> None:
    with pytest.raises(ValueError, match=r"x must have at least 1 entry along each axis of \(B, T"):
        rope_forward(np.ones((1, 0, 1, 4)), positions=np.arange(0), inv_freq=np.ones(2))


@pytest.mark.skipif(not has_longdouble(), reason="longdouble is no wider than float64 here")
def test_angles_are_as_wide_as_longdouble() -> None:
    """cos and sin at a far position, against those of the angle in longdouble."""
    position, frequency = 163_000, np.array([0.7])
    x = np.array([[[[1, 0]]]], dtype=np.longdouble)
    y, _ = rope_forward(x, positions=np.array([position]), inv_freq=frequency)
    angle = np.longdouble(position) * np.longdouble(frequency[0])
    wanted = np.array([np.cos(angle), np.sin(angle)])
    assert np.max(np.abs(y.reshape(-1) - wanted)) <= 4 * np.finfo(np.longdouble).eps
    in_float64 = np.array([np.cos(position * frequency[0]), np.sin(position * frequency[0])])
    assert np.max(np.abs(in_float64 - wanted)) > 1e-13


def test_numpy_frequencies_beside_another_library() -> None:
    """`rope_frequencies` makes NumPy's; the op takes them into the library of ``x``."""
    x, frequencies = heads(), rope_frequencies(8, 100.0)
    given = {"inv_freq": frequencies}
    y, saved = rope_forward(strict.asarray(x), positions=strict.arange(5), **given)
    wanted, _ = rope_forward(x, positions=np.arange(5), **given)
    np.testing.assert_array_equal(np.asarray(y), wanted)
    dx = rope_backward(strict.asarray(x), saved)
    assert "array_api_strict" in type(dx).__module__
