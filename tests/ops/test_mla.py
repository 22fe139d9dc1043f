"""Multi-head latent attention: the protocol, its cache, its identities, and its errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl.config import preset
from refimpl.ops import (
    mla_absorbed_forward,
    mla_backward,
    mla_forward,
    rms_norm_forward,
    rope_forward,
    rope_frequencies,
)

from mla_contract import check_range_of_validity
from support import property_test

EPS = np.finfo(np.float64).eps
B = 2
T = 6
D = 7
H = 3
N = 5
R = 4
V = 6
C = 8
A = 9  # all different, so that no transpose or swap fits
NAMES = ["x", "cache", "w_q_a", "w_q_a_norm", "w_q_b", "w_kv_a", "w_kv_a_norm", "w_kv_b", "w_o"]
Arguments = dict[str, Any]


def arguments(compressed: bool = True) -> Arguments:
    rng = np.random.default_rng(0)
    shapes = {
        "x": (B, T, D),
        "w_q_a": (A, D),
        "w_q_b": (H * (N + R), A if compressed else D),
        "w_kv_a": (C + R, D),
        "w_kv_b": (H * (N + V), C),
        "w_o": (D, H * V),
    }
    values: Arguments = {
        name: rng.normal(size=shape) / np.sqrt(shape[-1]) for name, shape in shapes.items()
    }
    values |= {
        "cache": None,
        "w_q_a_norm": rng.uniform(0.5, 1.5, A),
        "w_kv_a_norm": rng.uniform(0.5, 1.5, C),
    }
    if not compressed:
        values["w_q_a"] = values["w_q_a_norm"] = None
    rope = {"positions": np.arange(T) + 3, "inv_freq": rope_frequencies(R, 30.0), "factor": 1.25}
    return values | rope | {"heads": H, "scale": 0.7, "eps": 0.1}


def attend(
    given: Arguments, dy: np.ndarray, dcache: np.ndarray | None = None
) -> tuple[Any, dict[str, Any]]:
    output, saved = mla_forward(**given)
    return output, dict(zip(NAMES, mla_backward((dy, dcache), saved), strict=True))


def assert_close(got: np.ndarray, wanted: np.ndarray) -> None:
    """A chain of seven products with sums of at most H·V = 18 terms: 200 eps of the largest
    entry."""
    np.testing.assert_allclose(got, wanted, rtol=0, atol=200 * EPS * max(np.abs(wanted).max(), 1))


@pytest.mark.parametrize("forward", [mla_forward, mla_absorbed_forward])
def test_no_factor_is_one(forward: Any) -> None:
    one = forward(**arguments() | {"factor": 1.0})[0].y
    given = arguments()
    assert not np.allclose(forward(**given)[0].y, one)
    del given["factor"]
    assert np.array_equal(forward(**given)[0].y, one)


def test_protocol() -> None:
    property_test("mla")


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("steps", [[4, 2], [1, 5], [1, 1, 1, 1, 1, 1]])
def test_prefill_and_decode_equal_the_whole(compressed: bool, steps: list[int]) -> None:
    """Each piece reads the cache of those before; handing back the cache's gradient gives the
    whole's gradients."""
    given, rng = arguments(compressed), np.random.default_rng(1)
    dy, dcache = rng.normal(size=(B, T, D)), rng.normal(size=(B, T, C + R))
    whole, grads = attend(given, dy, dcache)
    cache = None
    pieces = []
    start = 0
    for n in steps:
        new = slice(start, start + n)
        step = given | {
            "x": given["x"][:, new],
            "cache": cache,
            "positions": given["positions"][new],
        }
        output, saved = mla_forward(**step)
        assert_close(output.y, whole.y[:, new])
        cache, start = output.cache, start + n
        pieces.append((new, saved))
    assert_close(cache, whole.cache)
    dx, sums = np.zeros_like(dy), dict.fromkeys(NAMES[2:], 0)
    for new, saved in reversed(pieces):
        dx[:, new], dcache, *dw = mla_backward((dy[:, new], dcache), saved)
        sums = {
            name: None if part is None else sums[name] + part
            for name, part in zip(sums, dw, strict=True)
        }
    assert dcache is None
    assert_close(dx, grads["x"])
    for name, total in sums.items():
        assert (total is None) == (grads[name] is None)
        if total is not None:
            assert_close(total, grads[name])


def test_empty_cache() -> None:
    """A cache of no tokens is none, but gets a gradient: of no tokens."""
    given, dy = arguments(), np.random.default_rng(1).normal(size=(B, T, D))
    (y, cache), grads = attend(given, dy)
    (same_y, same_cache), same = attend(given | {"cache": np.zeros((B, 0, C + R))}, dy)
    np.testing.assert_array_equal(same_y, y)
    np.testing.assert_array_equal(same_cache, cache)
    assert grads.pop("cache") is None
    assert same.pop("cache").shape == (B, 0, C + R)
    for name in grads:
        np.testing.assert_array_equal(same[name], grads[name])


def test_cache_holds_normed_latents_and_rotated_keys() -> None:
    given = arguments()
    output, _ = mla_forward(**given)
    kv = given["x"] @ given["w_kv_a"].T
    latent, _ = rms_norm_forward(kv[..., :C], given["w_kv_a_norm"], eps=given["eps"])
    k_pe, _ = rope_forward(
        kv[:, :, None, C:],
        positions=given["positions"],
        inv_freq=given["inv_freq"],
        factor=given["factor"],
    )
    np.testing.assert_array_equal(output.cache, np.concatenate((latent, k_pe[:, :, 0]), axis=-1))


@pytest.mark.parametrize("heads", [1, 4])
def test_cache_of_v3_is_576_numbers_a_token(heads: int) -> None:
    """However many heads."""
    config = preset("v3")
    n = config.nope
    r = config.rope
    v = config.value
    c = config.kv_latent
    shapes = {
        "w_q_b": (heads * (n + r), 2),
        "w_kv_a": (c + r, 2),
        "w_kv_a_norm": (c,),
        "w_kv_b": (heads * (n + v), c),
    }
    weights = {name: np.ones(shape) for name, shape in shapes.items()} | {
        "w_o": np.ones((2, heads * v))
    }
    output, _ = mla_forward(
        np.ones((1, 3, 2)),
        None,
        None,
        None,
        **weights,
        heads=heads,
        scale=1.0,
        eps=1e-6,
        positions=np.arange(3),
        inv_freq=rope_frequencies(r, config.theta, config.yarn),
    )
    assert output.cache.shape == (1, 3, 576)


def test_compression_that_does_nothing() -> None:
    """The identity for w_q_a, and tokens that its norm leaves as they are: as without
    compression."""
    given = arguments(compressed=False)
    x = given["x"] * np.sqrt((1 - given["eps"]) / np.mean(given["x"] ** 2, axis=-1, keepdims=True))
    compression = {"x": x, "w_q_a": np.eye(D), "w_q_a_norm": np.ones(D)}
    dy = np.random.default_rng(1).normal(size=(B, T, D))
    (y, cache), grads = attend(given | {"x": x}, dy)
    (same_y, same_cache), same = attend(given | compression, dy)
    assert_close(same_y, y)
    np.testing.assert_array_equal(same_cache, cache)
    for name in NAMES[4:]:
        assert_close(same[name], grads[name])
    assert grads["w_q_a"] is grads["w_q_a_norm"] is None


def test_left_padding_equals_no_padding() -> None:
    """Row 1 begins two positions later: its tokens come out as if they stood alone, whatever the
    padding holds."""
    given = arguments()
    key_mask, dy = np.ones((B, T), bool), np.random.default_rng(1).normal(size=(B, T, D))
    key_mask[1, :2] = False
    (y, _), grads = attend(given | {"key_mask": key_mask}, dy * key_mask[..., None])
    alone = given | {"x": given["x"][1:, 2:], "positions": np.arange(T - 2)}
    (alone_y, _), alone_grads = attend(alone, dy[1:, 2:])
    assert_close(y[1:, 2:], alone_y)
    assert_close(grads["x"][1:, 2:], alone_grads["x"])
    assert np.all(y[1, :2] == 0)
    assert np.all(grads["x"][1, :2] == 0)


def test_packed_documents_equal_separate_runs() -> None:
    given = arguments()
    packed = given | {
        "positions": np.array([0, 1, 0, 1, 2, 3]),
        "segments": np.array([[0, 0, 1, 1, 1, 1]] * B),
    }
    dy = np.random.default_rng(1).normal(size=(B, T, D))
    (y, _), grads = attend(packed, dy)
    for own in (slice(0, 2), slice(2, 6)):
        alone = given | {"x": given["x"][:, own], "positions": np.arange(own.stop - own.start)}
        (alone_y, _), alone_grads = attend(alone, dy[:, own])
        assert_close(y[:, own], alone_y)
        assert_close(grads["x"][:, own], alone_grads["x"])


def test_moving_all_positions_changes_the_cache_and_not_the_output() -> None:
    given = arguments()
    (y, cache), _ = mla_forward(**given)
    (moved_y, moved_cache), _ = mla_forward(**(given | {"positions": given["positions"] + 10}))
    assert_close(moved_y, y)
    np.testing.assert_array_equal(moved_cache[..., :C], cache[..., :C])
    assert np.abs(moved_cache[..., C:] - cache[..., C:]).max() > 0.1


def test_scaling_what_goes_into_a_norm_changes_nothing() -> None:
    """At eps = 0, so ⟨w_q_a, dw_q_a⟩ = 0, and the same for the latent's rows of w_kv_a, but not for
    the key's."""
    given = arguments() | {"eps": 0.0}
    _, grads = attend(given, np.random.default_rng(1).normal(size=(B, T, D)))
    products = [given[name] * grads[name] for name in ("w_q_a", "w_kv_a")]
    for product in (products[0], products[1][:C]):
        assert abs(product.sum()) <= 200 * EPS * np.abs(product).sum()
    assert abs(products[1][C:].sum()) > 0.01 * np.abs(products[1][C:]).sum()


def test_what_x_goes_through() -> None:
    """x enters by w_q_a x and w_kv_a x alone, so ⟨dx, x⟩ = ⟨dw_q_a, w_q_a⟩ + ⟨dw_kv_a, w_kv_a⟩."""
    given, rng = arguments(), np.random.default_rng(1)
    _, grads = attend(given, rng.normal(size=(B, T, D)), rng.normal(size=(B, T, C + R)))
    x, w_q_a, w_kv_a = (given[name] * grads[name] for name in ("x", "w_q_a", "w_kv_a"))
    assert abs(x.sum() - w_q_a.sum() - w_kv_a.sum()) <= 200 * EPS * np.abs(x).sum()
    assert min(abs(w_q_a.sum()), abs(w_kv_a.sum())) > 1e-3 * abs(x.sum())


def test_every_head_twice() -> None:
    """With half of w_o each: the same output, and the same gradients of what the heads share, the
    rotated key's too."""
    given, dy = arguments(), np.random.default_rng(1).normal(size=(B, T, D))
    twice = {name: np.concatenate((given[name], given[name])) for name in ("w_q_b", "w_kv_b")}
    twice |= {"w_o": np.concatenate((given["w_o"], given["w_o"]), axis=1) / 2, "heads": 2 * H}
    ((y, _), grads), ((same_y, _), same) = attend(given, dy), attend(given | twice, dy)
    assert_close(same_y, y)
    for name in ("x", "w_q_a", "w_q_a_norm", "w_kv_a", "w_kv_a_norm"):
        assert_close(same[name], grads[name])
    for name in ("w_q_b", "w_kv_b"):
        assert_close(same[name], np.concatenate((grads[name], grads[name])) / 2)


def test_scale_and_rope_factor() -> None:
    """A factor κ of the rotation multiplies the rotated part of q·k by κ²: scale is common to both
    parts."""
    given = arguments()
    rotated = np.zeros((H, N + R, 1))
    rotated[:, N:] = 1
    w = given["w_q_b"].reshape(H, N + R, A)
    scaled = (w * np.where(rotated, given["factor"] ** 2, 1) * given["scale"]).reshape(-1, A)
    same, _ = mla_forward(**(given | {"w_q_b": scaled, "factor": 1.0, "scale": 1.0}))
    assert_close(same.y, mla_forward(**given)[0].y)


ERRORS: list[tuple[Arguments, type[Exception], str]] = [
    (
        {"heads": 2},
        ValueError,
        r"w_q_b must have shape \(H·\(N\+R\), A\) .* got \(27, 9\) and \(12, 7\)",
    ),
    ({"w_q_b": np.ones((H * R, A))}, ValueError, "with H=3, C=8, all at least 1"),
    ({"w_kv_a_norm": np.ones(C + R)}, ValueError, "with H=3, C=12, all at least 1"),
    (
        {"w_q_a": np.ones((A, D + 1))},
        ValueError,
        r"w_q_a must have shape \(A, D\)=\('any', 7\), got \(9, 8\)",
    ),
    (
        {"w_q_a_norm": np.ones(A + 1)},
        ValueError,
        r"w_q_a_norm must have shape \(A,\)=\(9,\), got \(10,\)",
    ),
    (
        {"w_q_a": None, "w_q_a_norm": None},
        ValueError,
        r"w_q_b must have shape .*=\('any', 7\), got \(27, 9\)",
    ),
    (
        {"w_kv_b": np.ones((H * (N + V), C + 1))},
        ValueError,
        r"w_kv_b must have shape .*=\(33, 8\), got \(33, 9\)",
    ),
    (
        {"w_kv_b": np.ones((H * N, C))},
        ValueError,
        r"w_kv_b must have shape \(H·\(N\+V\), C\)=\(33, 8\), got",
    ),
    (
        {"w_o": np.ones((D, H * V + 1))},
        ValueError,
        r"w_o must have shape \(D, H·V\)=\(7, 18\), got \(7, 19\)",
    ),
    (
        {"cache": np.ones((B, 2, C))},
        ValueError,
        r"cache must have shape \(B, S−T, C\+R\)=\(2, 'any', 12\), got",
    ),
    (
        {"cache": np.ones((1, 2, C + R))},
        ValueError,
        r"cache must have shape .*=\(2, 'any', 12\), got \(1, 2, 12\)",
    ),
    ({"cache": np.ones((B, 2, C + R), int)}, TypeError, "cache must be float32 or wider"),
    (
        {"cache": np.ones((B, 2, C + R)), "key_mask": np.ones((B, T), bool)},
        ValueError,
        r"key_mask must .*=\(2, 8\)",
    ),
    (
        {"segments": np.ones((B, T + 1), int)},
        ValueError,
        r"segments must have shape \(B, S\)=\(2, 6\), got \(2, 7\)",
    ),
    ({"positions": np.arange(T + 1)}, ValueError, "positions must have shape"),
    ({"inv_freq": np.ones(R)}, ValueError, "x must have shape"),
    ({"layout": "half"}, ValueError, "layout must be one of interleaved, halves"),
    ({"x": np.ones((B, T, D), int)}, TypeError, "x must be float32 or wider"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors(change: Arguments, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mla_forward(**(arguments() | change))


def test_half_a_compression() -> None:
    with pytest.raises(ValueError, match="w_q_a"):
        mla_forward(**(arguments(compressed=False) | {"w_q_a_norm": np.ones(A)}))


def test_range_of_validity() -> None:
    check_range_of_validity(mla_forward, mla_backward, arguments())
