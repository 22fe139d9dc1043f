"""Mixture of experts: the protocol, a plain loop, its invariances, and its errors."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from refimpl.grads import lazy
from refimpl.ops import (
    REFERENCE,
    Op,
    ffn_backward,
    ffn_forward,
    linear_backward,
    linear_forward,
    moe_backward,
    moe_forward,
)

import pretended_cupy
from support import property_test

EPS = np.finfo(np.float64).eps
B = 2
T = 4
D = 5
F = 3
E = 6
K = 3
S = 7
NAMES = [
    "x",
    "weights",
    "w_gate",
    "w_up",
    "w_down",
    "w_shared_gate",
    "w_shared_up",
    "w_shared_down",
]
Arguments = dict[str, Any]


def arguments(shared: bool = True) -> Arguments:
    """Every token has K different experts, never expert 2."""
    rng = np.random.default_rng(0)
    shapes = [(B, T, D), (B, T, K), (E, F, D), (E, F, D), (E, D, F), (S, D), (S, D), (D, S)]
    arrays = {name: rng.normal(size=shape) for name, shape in zip(NAMES, shapes, strict=True)}
    if not shared:
        arrays |= dict.fromkeys(NAMES[5:])
    used = np.array([0, 1, 3, 4, 5])
    return arrays | {"indices": used[np.argsort(rng.random((B, T, 5)), axis=-1)[..., :K]]}


def run(given: Arguments, dy: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    y, saved = moe_forward(**given)
    return y, dict(zip(NAMES, moe_backward(dy, saved), strict=True))


def cotangent() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(B, T, D))


def assert_close(got: np.ndarray, wanted: np.ndarray) -> None:
    """Sums of at most B·T·K = 24 terms behind sums of D and F: 100 eps of the largest entry."""
    np.testing.assert_allclose(got, wanted, rtol=0, atol=100 * EPS * np.abs(wanted).max())


def test_protocol() -> None:
    property_test("moe")


@pytest.mark.parametrize("shared", [True, False])
def test_equals_a_loop_over_tokens(shared: bool) -> None:
    """Token by token, slot by slot, without any sorting: output and all gradients."""
    given, dy = arguments(shared), cotangent()
    expected = np.zeros((B, T, D))
    sums = {name: None if given[name] is None else np.zeros_like(given[name]) for name in NAMES}
    for b, t in np.ndindex(B, T):
        x = given["x"][b, t]
        for k in range(K):
            expert = given["indices"][b, t, k]
            out, saved = ffn_forward(x, *(given[name][expert] for name in NAMES[2:5]))
            expected[b, t] += given["weights"][b, t, k] * out
            sums["weights"][b, t, k] = dy[b, t] @ out
            dx, *dw = ffn_backward(given["weights"][b, t, k] * dy[b, t], saved)
            sums["x"][b, t] += dx
            for name, part in zip(NAMES[2:5], dw, strict=True):
                sums[name][expert] += part
        if shared:
            out, saved = ffn_forward(x, *(given[name] for name in NAMES[5:]))
            expected[b, t] += out
            dx, *dw = ffn_backward(dy[b, t], saved)
            sums["x"][b, t] += dx
            for name, part in zip(NAMES[5:], dw, strict=True):
                sums[name] += part
    y, grads = run(given, dy)
    assert_close(y, expected)
    for name, total in sums.items():
        assert (total is None) == (grads[name] is None)
        if total is not None:
            assert_close(grads[name], total)


def test_numbering_of_experts_does_not_matter() -> None:
    """Matrices and indices renumbered alike: the same output, the gradients renumbered."""
    given = arguments()
    dy = cotangent()
    order = np.array([4, 2, 0, 5, 1, 3])  # new expert i is old order[i]
    y, grads = run(given, dy)
    renumbered = {name: given[name][order] for name in NAMES[2:5]} | {
        "indices": np.argsort(order)[given["indices"]]
    }
    same, moved = run(given | renumbered, dy)
    assert_close(same, y)
    for name in NAMES:
        assert_close(moved[name], grads[name][order] if name in NAMES[2:5] else grads[name])


def test_order_of_slots_does_not_matter() -> None:
    given = arguments()
    dy = cotangent()
    order = np.array([2, 0, 1])
    y, grads = run(given, dy)
    same, moved = run(
        given | {name: given[name][..., order] for name in ("weights", "indices")}, dy
    )
    assert_close(same, y)
    for name in NAMES:
        assert_close(moved[name], grads[name][..., order] if name == "weights" else grads[name])


def test_identities() -> None:
    """The routed part is linear in the weights, in all w_up and in all w_down: one number four
    times."""
    given, dy = arguments(), cotangent()
    y, grads = run(given, dy)
    shared, _ = ffn_forward(given["x"], *(given[name] for name in NAMES[5:]))
    terms = dy * (y - shared)
    for name in ("weights", "w_up", "w_down"):
        assert (
            abs(np.sum(grads[name] * given[name]) - terms.sum()) <= 100 * EPS * np.abs(dy * y).sum()
        )


@pytest.mark.parametrize("experts", [4, 64])
def test_copies_to_the_host_are_two(experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CuPy each is a wait for the device: the span of ``indices`` and the loads, however many
    experts there are, and nothing in the backward."""
    monkeypatch.setitem(sys.modules, "cupy", pretended_cupy.Pretended("cupy"))
    monkeypatch.setattr(pretended_cupy, "COPIES", copies := list[str]())
    rng = np.random.default_rng(0)
    shapes = [(9, D), (9, K), (experts, F, D), (experts, F, D), (experts, D, F)]
    shapes += [(S, D), (S, D), (D, S)]
    x, *rest = (pretended_cupy.there(rng.normal(size=shape)) for shape in shapes)
    indices = pretended_cupy.there(rng.integers(0, experts, (9, K)))
    y, saved = moe_forward(x, *rest, indices=indices)
    assert copies == ["tolist", "tolist"]
    moe_backward(y, saved)
    assert len(copies) == 2


def test_expert_without_tokens_gets_exactly_nothing() -> None:
    _, grads = run(arguments(), cotangent())
    for name in NAMES[2:5]:
        assert np.all(grads[name][2] == 0)
        assert all(np.any(grads[name][expert] != 0) for expert in (0, 1, 3, 4, 5))


@pytest.mark.parametrize("experts", [1, E])
def test_all_tokens_to_one_expert(experts: int) -> None:
    """One slot, the last expert (the only one or one of many), weight 1: the dense network."""
    given, dy = arguments(shared=False), cotangent()
    last = {name: given[name][:experts] for name in NAMES[2:5]}
    last |= {"weights": np.ones((B, T, 1)), "indices": np.full((B, T, 1), experts - 1)}
    y, grads = run(given | last, dy)
    dense, saved = ffn_forward(given["x"], *(last[name][-1] for name in NAMES[2:5]))
    dx, *dw = ffn_backward(dy, saved)
    assert_close(y, dense)
    assert_close(grads["x"], dx)
    for name, wanted in zip(NAMES[2:5], dw, strict=True):
        assert_close(grads[name][-1], wanted)
        assert np.all(grads[name][:-1] == 0)


def test_one_expert_in_two_slots() -> None:
    """Its weights add up."""
    given, dy = arguments(), cotangent()
    expert = given["indices"][..., :1]
    twice = {
        "weights": given["weights"][..., :2],
        "indices": np.concatenate((expert, expert), axis=-1),
    }
    once = {"weights": twice["weights"].sum(axis=-1, keepdims=True), "indices": expert}
    (y, grads), (same, wanted) = run(given | twice, dy), run(given | once, dy)
    assert_close(y, same)
    for name in NAMES:
        assert_close(
            grads[name], np.repeat(wanted[name], 2, axis=-1) if name == "weights" else wanted[name]
        )


@pytest.mark.parametrize("forward", [moe_forward, lazy.moe_forward])
def test_the_table_reaches_every_expert(forward: Any) -> None:
    """The 5 experts that have tokens and the shared one, each three products."""
    products = []

    def linear(x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, Any]:
        products.append(w.shape)
        return linear_forward(x, w)

    table = REFERENCE | {"linear": Op(linear, linear_backward)}
    forward(*(arguments()[name] for name in NAMES), indices=arguments()["indices"], ops=table)
    assert len(products) == 6 * 3
    assert products[-3:] == [(S, D), (S, D), (D, S)]


ERRORS: list[tuple[Arguments, type[Exception], str]] = [
    ({"indices": np.ones((B, T, 0), int)}, ValueError, "^indices must have a last axis of at"),
    (
        {"weights": np.ones((B, T, K + 1))},
        ValueError,
        r"weights must have shape \(…, K\)=\(2, 4, 3\), got \(2, 4, 4\)",
    ),
    (
        {"weights": np.ones((T, B, K))},
        ValueError,
        r"weights must have shape .*=\(2, 4, 3\), got \(4, 2, 3\)",
    ),
    (
        {"w_down": np.ones((E, F, D))},
        ValueError,
        r"w_down must have shape \(E, D, F\)=\(6, 5, 3\), got \(6, 3, 5\)",
    ),
    (
        {"w_gate": np.ones((E + 1, F, D))},
        ValueError,
        r"w_up must have shape .*=\(7, 3, 5\), got \(6, 3, 5\)",
    ),
    (
        {"w_up": np.ones((E, F, D + 1))},
        ValueError,
        r"w_up must have shape .*=\(6, 3, 5\), got \(6, 3, 6\)",
    ),
    (
        {"w_gate": np.ones((E, F, D + 1))},
        ValueError,
        r"^w_gate must have shape \(E, F, D\)=.*5\), got \(6, 3, 6\)",
    ),
    (
        {"w_shared_up": np.ones((S + 1, D))},
        ValueError,
        r"^w_shared_up must have shape \(F, D\)=\(7, 5\), got \(8, 5\)",
    ),
    ({"w_up": np.ones((E, F + 1, D))}, ValueError, r"w_up must have shape .*, got \(6, 4, 5\)"),
    (
        {"w_shared_down": np.ones((S, D))},
        ValueError,
        r"w_shared_down must have shape \(D, F\)=\(5, 7\), got \(7, 5\)",
    ),
    ({"indices": np.full((B, T, K), -1)}, ValueError, "indices must lie in 0…5, got -1…-1"),
    ({"indices": np.full((B, T, K), E)}, ValueError, "indices must lie in 0…5, got 6…6"),
    (
        {
            "x": np.ones((0, 4, D)),
            "weights": np.ones((0, 4, K)),
            "indices": np.ones((0, 4, K), int),
        },
        ValueError,
        r"x and indices must have at least one row and one choice, got \(0, 4, 5\)",
    ),
    ({"x": np.ones((B, T, D), int)}, TypeError, "x must be float32 or wider"),
    ({"w_gate": np.ones((E, F, D), np.float16)}, TypeError, "w_gate must be float32 or wider"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors(change: Arguments, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        moe_forward(**(arguments() | change))


@pytest.mark.parametrize(
    "change",
    [
        {"indices": np.zeros((1, 1, K), int)},  # the first token's outputs for all tokens
        {"indices": arguments()["indices"].transpose(1, 0, 2)},  # other tokens' routes
        {"w_up": np.ones((E + 1, F, D))},
        {"w_shared_gate": None},
    ],
)
def test_wrong_in_silence(change: Arguments) -> None:
    with pytest.raises(ValueError, match="must"):
        moe_forward(**(arguments() | change))


@np.errstate(all="ignore")
def test_range_of_validity() -> None:
    """A token whose experts overflow is not finite, nor the gradient of its weights, and no other
    token with it. Below, outputs underflow to 0, wrong by less than float32's smallest number."""
    given = {n: v if n == "indices" else v.astype(np.float32) for n, v in arguments().items()}
    x = given["x"].copy()
    x[0, 1] *= np.float32(1e25)
    y, gradients = run(given | {"x": x}, cotangent().astype(np.float32))
    bad = ~np.isfinite(y).all(axis=-1)
    assert bad[0, 1]
    assert bad.sum() == 1
    assert (~np.isfinite(gradients["weights"]).all(axis=-1) == bad).all()  # products with outputs
    y, _ = run(given | {"x": np.float32(1e-30) * given["x"]}, cotangent().astype(np.float32))
    assert np.abs(y).max() < np.finfo(np.float32).tiny
