"""GRPO and its family: the protocol, the six regimes, the conventions on the edges, and its
errors."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest

from refimpl.ops import GRPO_PRESETS, group_advantages, grpo_backward, grpo_forward
from refimpl.ops.choices import Average, Empty
from refimpl.ops.grpo import loss_divisor

from support import property_test

MASK = np.array([[True, True, True], [True, True, False]])


def log_probs(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the policy, the old policy and the reference, [2, 3]."""
    rng = np.random.default_rng(seed)
    new = -rng.uniform(0.2, 2, (2, 3))
    return new, new - 0.1 * rng.normal(size=(2, 3)), new - 0.3 * rng.normal(size=(2, 3))


def run(log_prob: np.ndarray, **kwargs: Any) -> tuple[float, np.ndarray]:
    output, saved = grpo_forward(log_prob, **({"mask": MASK, "kl_weight": 0.0} | kwargs))
    return float(output.loss), grpo_backward((1.0,), saved)


def test_protocol() -> None:
    property_test("grpo")


@pytest.mark.parametrize(
    ("advantage", "rho", "value", "slope"),
    [
        (2.0, 1.0, 2.0, 2.0),  # up, inside: the plain ratio
        (2.0, 1.5, 2.4, 0.0),  # up, above: clipped at 1.2
        (2.0, 0.5, 1.0, 1.0),  # up, below: not clipped, so that a good token can come back
        (-2.0, 1.0, -2.0, -2.0),
        (-2.0, 1.5, -3.0, -3.0),  # down, above: not clipped
        (-2.0, 0.5, -1.6, 0.0),  # down, below: clipped at 0.8
        (2.0, 1.2, 2.4, 2.4),  # on a bound counts as within
        (-2.0, 0.8, -1.6, -1.6),
        (0.0, 1.5, 0.0, 0.0),  # no advantage, nothing
    ],
)
def test_regimes(advantage: float, rho: float, value: float, slope: float) -> None:
    """One token: the objective, and its derivative in ln π, for both signs of A in the three
    regions."""
    log_prob, old = np.array([[np.log(rho)]]), np.zeros((1, 1))
    bounds = {
        "clip": (1 - float(np.exp(np.log(0.8))), float(np.exp(np.log(1.2))) - 1)
    }  # bounds that ρ can hit
    loss, dlog_prob = run(
        log_prob,
        advantages=np.array([advantage]),
        mask=np.array([[True]]),
        old_log_prob=old,
        **bounds,
    )
    assert abs(-loss - value) <= 1e-15 * 4
    assert abs(-dlog_prob[0, 0] - slope) <= 1e-15 * 4


def test_on_policy_is_the_plain_policy_gradient() -> None:
    """At ρ = 1 the gradient is A times that of the mean log-probability (DeepSeekMath eq. 21), clip
    or no clip."""
    new, _, reference = log_probs()
    a = np.array([1.5, -0.5])
    _, dlog_prob = run(new, advantages=a)
    np.testing.assert_allclose(
        dlog_prob, -a[:, None] * MASK / (2 * MASK.sum(axis=1, keepdims=True)), rtol=1e-15
    )
    r = np.exp(reference - new)
    _, with_kl = run(new, advantages=a, kl_weight=0.3, reference_log_prob=reference)
    wanted = -(a[:, None] + 0.3 * (r - 1)) * MASK / (2 * MASK.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(with_kl, wanted, rtol=0, atol=4e-16)
    _, explicit = run(new, advantages=a, old_log_prob=new)
    assert np.array_equal(explicit, dlog_prob)


def test_unbiased_kl_has_the_gradient_of_the_kl() -> None:
    """ρ·k3 with old = π has the gradient β ln(π/π_ref) of the true KL's estimate; k3 alone has β (1
    − r)."""
    new, _, reference = log_probs()
    options = {
        "advantages": np.zeros(2),
        "kl_weight": 1.0,
        "reference_log_prob": reference,
        "average": "constant",
    }
    _, unbiased = run(new, **options, length=1, kl="unbiased")
    np.testing.assert_allclose(unbiased, MASK * (new - reference) / 2, rtol=0, atol=4e-16)
    _, k3 = run(new, **options, length=1, kl="k3")
    np.testing.assert_allclose(k3, MASK * (1 - np.exp(reference - new)) / 2, rtol=0, atol=4e-16)


@pytest.mark.parametrize(
    ("u", "value", "slope"),
    [
        *((u, np.expm1(u) - u, np.expm1(u)) for u in (0.5, -0.5, 2.0, -9.0)),
        *((u, 9.0, 0.0) for u in (2.6, 3.0, -30.0)),
    ],
)
def test_kl_bounds(u: float, value: float, slope: float) -> None:
    """verl's clamps, here of |u| at 20 and of k3 at 9: the value stops there, and the gradient with
    it."""
    reference, options = (
        np.array([[u]]),
        {"advantages": np.zeros(1), "mask": np.array([[True]]), "kl_weight": 1.0},
    )
    loss, grad = run(
        np.zeros((1, 1)), reference_log_prob=reference, kl_bounds=(20.0, 9.0), **options
    )
    np.testing.assert_allclose([loss, -grad[0, 0]], [value, slope], rtol=1e-14)
    free, grad = run(np.zeros((1, 1)), reference_log_prob=reference, **options)
    assert free >= loss
    np.testing.assert_allclose(-grad[0, 0], np.expm1(u), rtol=1e-15)


def test_padding_never_leaks() -> None:
    """What stands at padding, NaN and infinities included, changes no bit."""
    new, old, reference = log_probs()
    options = {
        "advantages": np.array([1.0, -1.0]),
        "kl_weight": 0.3,
        "kl": "unbiased",
        "off_policy": 0.01,
    }
    for average in ("sequence", "token", "constant"):
        for ratio in ("token", "sequence", "sequence_mean"):
            given = options | {"average": average, "ratio": ratio, "length": 5}
            loss, grad = run(new, old_log_prob=old, reference_log_prob=reference, **given)
            dirty = [
                np.where(MASK, x, junk)
                for x, junk in ((new, np.nan), (old, np.inf), (reference, -np.inf))
            ]
            other, other_grad = run(
                dirty[0], old_log_prob=dirty[1], reference_log_prob=dirty[2], **given
            )
            assert other == loss
            assert np.array_equal(other_grad, grad)
            assert not np.any(grad[~MASK])


def test_nothing_to_learn_from_gives_zero() -> None:
    """An output, or a whole batch, without tokens gives 0 and a zero gradient; so do equal
    rewards."""
    new, old, _ = log_probs()
    for average in ("sequence", "token", "constant"):
        none = np.zeros_like(MASK)
        loss, grad = run(
            new, advantages=np.ones(2), old_log_prob=old, mask=none, average=average, length=3
        )
        assert loss == 0
        assert not np.any(grad)
    assert np.array_equal(group_advantages(np.array([[0.3, 0.3, 0.3]])), np.zeros(3))
    loss, grad = run(new, advantages=group_advantages(np.array([[1.0, 1.0]])), old_log_prob=old)
    assert loss == 0
    assert not np.any(grad)


def test_averages() -> None:
    """On-policy the three averages weigh the same tokens by 1/(N|o|), 1/Σ|o| and 1/(N·length)."""
    new, _, _ = log_probs()
    a = np.array([1.0, 1.0])
    sequence, token, constant = (
        -run(new, advantages=a, average=average, length=10)[1]
        for average in ("sequence", "token", "constant")
    )
    np.testing.assert_allclose(sequence, MASK / np.array([[6.0], [4.0]]), rtol=1e-15)
    np.testing.assert_allclose(token, MASK / 5.0, rtol=1e-15)
    np.testing.assert_allclose(constant, MASK / 20.0, rtol=1e-15)


def test_outputs_without_tokens_are_counted_or_left_out() -> None:
    """Of four outputs one has no token: N is 4 or 3. Left out, the loss is that of the other three
    alone; the mean over tokens does not know outputs; and a batch without a token gives 0."""
    rng = np.random.default_rng(3)
    new, mask = -rng.uniform(0.2, 2, (4, 3)), np.ones((4, 3), bool)
    mask[1] = False
    a = rng.normal(size=4)
    others = np.array([0, 2, 3])
    for how in ({"average": "sequence"}, {"average": "constant", "length": 5}):
        counted, left_out = (
            run(new, mask=mask, advantages=a, empty=empty, **how)
            for empty in ("counted", "left_out")
        )
        alone = run(new[others], mask=mask[others], advantages=a[others], **how)
        np.testing.assert_allclose(left_out[0], alone[0], rtol=1e-15)
        np.testing.assert_array_equal(left_out[1][others], alone[1])
        np.testing.assert_allclose(counted[0], 0.75 * left_out[0], rtol=1e-15)
        np.testing.assert_allclose(counted[1], 0.75 * left_out[1], rtol=1e-15)
        assert run(new, mask=mask & False, advantages=a, empty="left_out", **how)[0] == 0
    by_token = [
        run(new, mask=mask, advantages=a, average="token", empty=empty)[0]
        for empty in ("counted", "left_out")
    ]
    assert by_token[0] == by_token[1]


def test_ratio_levels() -> None:
    """A sequence's ratio is the product of its tokens', or its geometric mean; the gradient spreads
    over all."""
    new, old, _ = log_probs()
    a, z = np.array([1.0, 1.0]), np.where(MASK, new - old, 0).sum(axis=1)
    sizes = MASK.sum(axis=1)
    for ratio, logs in (("sequence", z), ("sequence_mean", z / sizes)):
        loss, grad = run(new, advantages=a, old_log_prob=old, ratio=ratio, clip=(1.0, 9.0))
        rho = np.exp(logs)
        assert abs(-loss - rho.mean()) <= 1e-15
        per_token = rho / 2 / (sizes if ratio == "sequence_mean" else 1)
        np.testing.assert_allclose(-grad, per_token[:, None] * MASK, rtol=1e-14)


def test_off_policy_mask() -> None:
    """An output with A < 0 that drifted further than δ loses its ratio term, not its KL; one with A
    > 0 never does."""
    new, _, reference = log_probs()
    old = new + 0.5  # mean ln(π_old/π) = 0.5
    options = {"old_log_prob": old, "off_policy": 0.4, "advantages": np.array([-1.0, 1.0])}
    output, _ = grpo_forward(new, mask=MASK, kl_weight=0.0, **options)
    assert output.kept.tolist() == [False, True]
    _, grad = run(new, **options)
    assert not np.any(grad[0])
    assert np.any(grad[1])
    _, with_kl = run(new, **options, kl_weight=0.1, reference_log_prob=reference)
    assert np.all(with_kl[0][MASK[0]] != 0)
    assert grpo_forward(new, mask=MASK, kl_weight=0.0, **(options | {"off_policy": 0.6}))[
        0
    ].kept.all()


def test_a_drift_of_just_the_threshold_is_kept() -> None:
    new, *_ = log_probs()
    options = {"old_log_prob": new, "off_policy": 0.0, "advantages": np.array([-1.0, 1.0])}
    output, _ = grpo_forward(new, mask=MASK, kl_weight=0.0, **options)
    assert output.kept.all()


def test_dual_clip() -> None:
    """verl's third bound: where A < 0 and ρ exceeds c, the objective stays at c A."""
    one = np.array([[True]])
    options = {"advantages": np.array([-2.0]), "old_log_prob": np.array([[0.0]]), "mask": one}
    loss, grad = run(np.array([[np.log(5.0)]]), **options, dual_clip=3.0)
    assert abs(loss - 6.0) <= 1e-14
    assert grad[0, 0] == 0
    loss, grad = run(np.array([[np.log(5.0)]]), **options)
    assert abs(loss - 10.0) <= 1e-14
    assert abs(grad[0, 0] - 10.0) <= 1e-14


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({}, np.std([1, 2, 6], ddof=1)),
        ({"ddof": 0}, np.std([1, 2, 6])),
        ({"scale": False}, 1.0),
        ({"epsilon": 0.5}, np.std([1, 2, 6], ddof=1) + 0.5),
    ],
)
def test_group_advantages(options: dict[str, Any], scale: float) -> None:
    """Each row is centred on its own mean and divided as asked."""
    a = group_advantages(np.array([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]]), **options)
    np.testing.assert_allclose(a, [-2 / scale, -1 / scale, 3 / scale, 0, 0, 0], rtol=1e-15)


def test_overflow_of_what_does_not_count() -> None:
    """A ratio beyond float32 at A = 0, in a dropped output, or at another's padding gives 0, not
    NaN."""
    new = np.array([[-1.0, -1.0, 0.0], [-1.0, -1.0, -1.0]], dtype=np.float32)
    old = new - np.array([[60.0], [0.0]], dtype=np.float32)
    mask = np.array([[True, True, False], [True, True, True]])
    for advantage, options in ((0.0, {}), (-1.0, {"kept": np.array([False, True])})):
        a = np.array([advantage, 1.0], dtype=np.float32)
        with np.errstate(over="ignore"):
            loss, grad = run(
                new, advantages=a, mask=mask, old_log_prob=old, ratio="sequence", **options
            )
        assert loss == -0.5
        assert np.isfinite(grad).all()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_nan_within_an_output_stays_visible(advantage: float) -> None:
    """A broken log-probability is neither clipped away nor dropped: the loss is NaN."""
    new, old, _ = log_probs()
    new[0, 1] = np.nan
    for ratio in ("token", "sequence"):
        loss, grad = run(
            new,
            advantages=np.array([advantage, 1.0]),
            old_log_prob=old,
            ratio=ratio,
            off_policy=0.1,
        )
        assert np.isnan(loss)
        assert np.isnan(grad[0, 1])


def test_k3_keeps_its_digits() -> None:
    """Near ln π = ln π_ref, k3 is u²/2 and never negative, though e^u − u − 1 cancels."""
    u = 1e-7 * np.array([[1.0, -2.0, 3.0]], dtype=np.float64)
    options = {
        "advantages": np.zeros(1),
        "mask": np.ones((1, 3), bool),
        "average": "token",
        "kl_weight": 1.0,
    }
    loss, grad = run(-u, reference_log_prob=np.zeros((1, 3)), **options)
    assert loss > 0
    np.testing.assert_allclose(grad, -u / 3, rtol=1e-6)


def test_equal_rewards_give_exactly_zero() -> None:
    """0.1 · 3 / 3 is not 0.1 in binary; the advantage is 0 all the same."""
    for scale in (True, False):
        assert not np.any(group_advantages(np.full((2, 3), 0.1), scale=scale))


def test_a_group_of_one() -> None:
    assert group_advantages(np.array([[3.0]])).tolist() == [0.0]
    assert group_advantages(np.array([[3.0]]), alone=1.0).tolist() == [3.0]


@pytest.mark.parametrize("name", GRPO_PRESETS)
def test_presets_run(name: str) -> None:
    new, old, reference = log_probs()
    old = new + 1e-3 * (old - new)  # GSPO clips at 3e-4
    options = {
        "advantages": np.array([1.0, -1.0]),
        "reference_log_prob": reference,
        "length": 8,
    } | GRPO_PRESETS[name]
    output, saved = grpo_forward(new, mask=MASK, old_log_prob=old, **options)
    assert np.isfinite(output.loss)
    assert np.any(grpo_backward((1.0,), saved))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mask": MASK.astype(float)}, TypeError, "mask must be bool, got float64"),
        ({"mask": MASK[:1]}, ValueError, r"mask must have shape \(N, T\)=\(2, 3\), got \(1, 3\)"),
        (
            {"advantages": np.ones(3)},
            ValueError,
            r"advantages must have shape \(N,\)=\(2,\), got \(3,\)",
        ),
        ({"advantages": np.ones((2, 1))}, ValueError, "advantages must have shape"),
        (
            {"old_log_prob": np.ones((1, 3))},
            ValueError,
            r"old_log_prob must have shape \(N, T\)=\(2, 3\)",
        ),
        (
            {"reference_log_prob": None, "kl_weight": 0.1},
            ValueError,
            "reference_log_prob must be given unless",
        ),
        ({"clip": (-0.1, 0.2)}, ValueError, "clip must be two numbers of at least 0"),
        ({"dual_clip": 1.0}, ValueError, "dual_clip above 1 or None, got"),
        (
            {"average": "mean"},
            ValueError,
            "average must be one of sequence, token, constant, got 'mean'",
        ),
        (
            {"average": "constant"},
            ValueError,
            "length must be positive and finite for average='constant', got None",
        ),
        (
            {"ratio": "word"},
            ValueError,
            "ratio must be one of token, sequence, sequence_mean, got 'word'",
        ),
        ({"empty": "no"}, ValueError, "empty must be one of counted, left_out, got 'no'"),
        ({"kl": "k4"}, ValueError, "kl must be one of k1, k2, k3, unbiased, got 'k4'"),
        ({"kl_level": "group"}, ValueError, "kl_level must be one of token, sequence, got 'group'"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    new, old, reference = log_probs()
    options = {
        "mask": MASK,
        "advantages": np.ones(2),
        "old_log_prob": old,
        "reference_log_prob": reference,
    }
    with pytest.raises(error, match=message):
        grpo_forward(new, **(options | change))


@np.errstate(all="ignore")
def test_range_of_validity() -> None:
    """ρ = e^1000 is ∞: a gain is clipped and right, a loss is ∞ and seen; e^−1000 is 0, and right.
    Rewards whose squares overflow have NaN for advantages, and no clean 0."""
    mask = np.ones((1, 1), bool)
    one = np.ones((1, 1), np.float32)

    def of(log_ratio: float, a: float) -> tuple[float, float]:
        given = {"advantages": np.array([a], np.float32), "mask": mask}
        loss, gradient = run(log_ratio * one, old_log_prob=0 * one, **given)
        return loss, float(gradient[0, 0])

    assert of(1000, 1.0) == (pytest.approx(-1.2), 0)
    assert of(1000, -1.0) == (np.inf, np.inf)
    assert of(-1000, 1.0) == (0, 0)
    assert of(-1000, -1.0) == (pytest.approx(0.8), 0)
    big = np.array([[1e25, -1e25], [1.0, -1.0]], np.float32)
    a = group_advantages(big)
    assert np.isnan(a[:2]).all()
    np.testing.assert_allclose(a[2:], [0.5**0.5, -(0.5**0.5)], rtol=1e-6)
    tiny = group_advantages(np.float32(1e-30) * big[1:], epsilon=1e-4)
    np.testing.assert_allclose(tiny, [1e-26, -1e-26], rtol=1e-6)
    assert np.isinf(group_advantages(np.float32(1e-30) * big[1:])).all()  # its squares are 0


def test_an_output_without_tokens_does_not_count() -> None:
    """Whatever its advantage and its places hold, NaN included."""
    new, old, _ = log_probs()
    mask = np.array([[True, True, True], [False, False, False]])
    right = run(new, advantages=np.array([0.5, 1.0]), mask=mask, old_log_prob=old)
    new[1] = old[1] = np.nan
    loss, gradient = run(new, advantages=np.array([0.5, np.nan]), mask=mask, old_log_prob=old)
    assert loss == right[0]
    np.testing.assert_array_equal(gradient, right[1])


def test_rewards_that_are_equal_but_for_rounding() -> None:
    """They get 0 like equal ones; a spread of more than 8 units is one."""
    rounded = np.array([[0.1 + 0.2, 0.3, 0.3, 0.3], [-(0.1 + 0.2), -0.3, -0.3, -0.3]])
    assert not group_advantages(rounded).any()
    assert not group_advantages(rounded, scale=False).any()
    eps = np.finfo(np.float64).eps
    assert not group_advantages(np.array([[1.0, 1 + 7 * eps]])).any()
    assert group_advantages(np.array([[1.0, 1 + 16 * eps]])).all()
    assert not group_advantages(np.array([[0.1, 0.10000005]], np.float32)).any()
    assert group_advantages(np.array([[0.1, 0.10000005]])).all()
    assert not group_advantages(np.zeros((1, 3))).any()


@pytest.mark.parametrize("reward", [np.nan, np.inf])
@pytest.mark.parametrize("size", [1, 2])
def test_rewards_that_are_no_numbers_name_their_group(reward: float, size: int) -> None:
    rewards = np.ones((3, size))
    rewards[1, 0] = reward
    with pytest.raises(ValueError, match=rf"rewards must be finite, got \[{reward}.* in group 1$"):
        group_advantages(rewards)


@pytest.mark.parametrize("shape", [(2, 0), (0, 2)])
def test_empty_groups(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"rewards must have at least 1 entry along each axis of"):
        group_advantages(np.ones(shape))
    with pytest.raises(ValueError, match=r"log_prob must have at least 1 entry along each axis"):
        run(np.ones(shape), advantages=np.ones(shape[0]), mask=np.ones(shape, bool))


def test_backward_takes_the_scalar() -> None:
    new, old, _ = log_probs()
    given: Any = {"advantages": np.array([1.0, -1.0]), "mask": MASK, "kl_weight": 0.0}
    _, saved = grpo_forward(new, old_log_prob=old, **given)
    wanted = grpo_backward((2.0,), saved)
    for dloss in (2.0, np.float64(2), np.array(2.0), (2.0, None, None)):
        np.testing.assert_array_equal(grpo_backward(dloss, saved), wanted)
    assert wanted.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"off_policy": np.nan}, "off_policy must be a number or None, got nan"),
        ({"kl_weight": np.nan}, "kl_weight must be finite, got nan"),
        ({"kl_bounds": (0.0, 1.0)}, r"kl_bounds must be two numbers above 0 or None, got \(0.0, 1"),
        ({"kl_bounds": (1.0, 0.0)}, "kl_bounds must be two numbers above 0 or None"),
        ({"kl_weight": np.inf}, "kl_weight must be finite, got inf"),
        ({"average": "constant", "length": np.inf}, "length must be positive and finite"),
    ],
)
def test_settings_that_cannot_be_right(change: dict[str, Any], message: str) -> None:
    new, _, reference = log_probs()
    with pytest.raises(ValueError, match=message):
        run(new, advantages=np.ones(2), reference_log_prob=reference, **change)


@pytest.mark.parametrize("epsilon", [np.nan, np.inf, -1.0])
def test_epsilon_that_cannot_be_right(epsilon: float) -> None:
    with pytest.raises(ValueError, match="epsilon a finite number of at least 0"):
        group_advantages(np.array([[0.0, 1.0]]), epsilon=epsilon)


def test_loss_divisor() -> None:
    """One place for reference and kernels: outputs times lengths, tokens, or outputs times the
    longest; empty outputs counted or not, and never 0."""
    mask = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]], bool)
    count = np.array([[3.0], [1.0], [1.0]])
    cases: tuple[tuple[Empty, int], ...] = (("counted", 3), ("left_out", 2))
    for empty, n in cases:
        by_length = loss_divisor(mask, count, "sequence", None, empty)
        assert np.array_equal(by_length, n * count)
        assert loss_divisor(mask, 1, "sequence", None, empty) == n
        assert loss_divisor(mask, count, "token", None, empty) == 4.0
        assert loss_divisor(mask, count, "constant", 7, empty) == n * 7.0
    nothing = np.zeros((2, 3), bool)
    for average in get_args(Average):
        assert loss_divisor(nothing, 1, average, 1, "left_out") == 1
