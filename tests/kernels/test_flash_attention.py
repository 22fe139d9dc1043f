"""Attention's kernels: what the op promises, V3's widths in the tiles of a device, and mistakes."""

from __future__ import annotations

import inspect
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from refimpl.check import check
from refimpl.check.cases import Case, RandomDraw
from refimpl.kernels.flash_attention import SIZES, attention, flash_attention, tiles
from refimpl.ops import REFERENCE, flash_attention_backward, flash_attention_forward
from refimpl.ops.attention import visible

from attention_contract import (
    ERRORS,
    GOOD,
    check_long_sums,
    check_more_queries_than_keys,
    check_range_of_validity,
)
from kernel_support import (
    ALL,
    ON_DEVICE,
    SHAPES,
    TABLE,
    InterpreterLaunch,
    compare,
    without_a_device,
)
from kernel_support.launches import SMALL
from kernel_support.planted import PLANTED, assert_seen, plant
from support import FULL

OP = TABLE["attention"]
SEEN_QUICKLY = (
    "wait for the keys missing",
    "lane address of a tile's row",
    ".trans missing",
    "numerator not rescaled",
    "diagonal hidden",
    "dropped tail: keys past the end seen",
)


@pytest.mark.parametrize(("wrong", "error", "message"), ERRORS)
def test_errors(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    """Those of the op; of types, the kernels' own."""
    if error is TypeError and "must be float32 or wider" in message:
        message = message.split(" must")[0] + " must be"
    with pytest.raises(error, match=message):
        OP.forward(**GOOD | wrong)


def test_signature_is_that_of_flash_attention() -> None:
    """It is put in its place by name."""
    pair = flash_attention(InterpreterLaunch(), SMALL)
    for mine, other in zip(pair, (flash_attention_forward, flash_attention_backward), strict=True):
        mine, other = (inspect.signature(function).parameters for function in (mine, other))
        assert [*mine] == [*other]
        assert [p.default for p in mine.values()] == [p.default for p in other.values()]
    q = np.ones((1, 1, 1, 300))
    with pytest.raises(ValueError, match="q must be at most 256 wide, got 300"):
        pair.forward(q, q, q[..., :8], scale=1.0)
    with pytest.raises(ValueError, match="v must be at most 256 wide, got 300"):
        pair.forward(q[..., :8], q[..., :8], q, scale=1.0)
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        pair.forward(q[..., :8], q[..., :8], q[..., :8], scale=1.0, block=0)


def test_what_is_left_to_the_reference() -> None:
    """Heads wider than 256, and the mean of all values for a query that sees nothing."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 3, 2, 300)) for _ in range(3))
    hidden = {"key_mask": np.zeros((1, 3), bool), "blind": "mean"}
    for more, width in (({}, 300), (hidden, 8)):
        given = [x[..., :width] for x in (q, k, v)]
        o, saved = OP.forward(*given, scale=0.1, **more)
        wanted, wanted_saved = REFERENCE["attention"].forward(*given, scale=0.1, **more)
        found = o, *OP.backward(o, saved)
        wanted = wanted, *REFERENCE["attention"].backward(o, wanted_saved)
        for a, b in zip(found, wanted, strict=True):  # a device adds in another order
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_range_of_validity() -> None:
    check_range_of_validity(*OP)


@pytest.mark.skipif(not ALL, reason="in test-full: 18 s to compile and interpret")
def test_long_sums() -> None:
    check_long_sums(OP.forward)


def test_more_queries_than_keys() -> None:
    check_more_queries_than_keys(*OP)


def test_one_tile_against_finite_differences() -> None:
    """Float64, all masks at once, in a single tile: to 1e-8, by `refimpl.check`."""
    rng = np.random.default_rng(1)
    inputs = [rng.normal(size=(1, n, heads, 3)) for n, heads in ((4, 2), (6, 1), (6, 2))]
    key_mask = np.array([[True, True, False, True, True, True]])
    kwargs = {"scale": 0.6, "key_mask": key_mask, "segments": np.array([[0, 0, 0, 0, 1, 1]])}
    report = check(
        *OP, inputs, kwargs, op="attention", names=["q", "k", "v"], rules=("differences",)
    )
    assert report.ok, report


def _v3(seed: int, t: int, s: int) -> Case:
    rng = np.random.default_rng(seed)
    shapes = (1, t, 1, 192), (1, s, 1, 192), (1, s, 1, 128)
    return Case([rng.normal(size=shape) for shape in shapes], {"scale": 192**-0.5})


@pytest.mark.parametrize("storage", ["bfloat16", "float32", "float64"])
def test_widths_of_v3(storage: str) -> None:
    """192 and 128, in the tiles that a device is given: several tiles of queries and keys."""
    if storage != "bfloat16" and not ALL:
        pytest.skip("in test-full: seconds under the interpreter")
    sizes = (70, 100) if storage == "bfloat16" else (40, 50)
    pair = OP if ON_DEVICE else attention(InterpreterLaunch())
    compare("attention", pair, _v3(0, *sizes), storage, 0)


@pytest.mark.skipif(not FULL, reason="in test-full")
@pytest.mark.parametrize("storage", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("widths", [(256, 256), (128, 128), (40, 200), (7, 250)])
def test_other_widths(widths: tuple[int, int], storage: str) -> None:
    """Up to 256, in the tiles of a device."""
    x, v = widths
    rng = np.random.default_rng(2)
    inputs = [rng.normal(size=(1, n, 1, w)) for n, w in ((20, x), (35, x), (35, v))]
    case = Case(inputs, {"scale": x**-0.5})
    compare("attention", attention(InterpreterLaunch()), case, storage, 0)


@without_a_device
def test_same_bits_in_bfloat16() -> None:
    """Twice the same call. The interpreter draws the errors of 2^x by the seed, so another order of
    the warps is tested in float64, in test_columns."""
    case = _v3(3, 40, 40)
    q, k, v = (x[..., :16].astype(ml_dtypes.bfloat16) for x in case.inputs)
    found = set()
    for _ in range(2):
        pair = attention(InterpreterLaunch(1), SMALL)
        o, saved = pair.forward(q, k, v, scale=0.25)
        found.add(b"".join(x.tobytes() for x in (o, *pair.backward(o, saved))))
    assert len(found) == 1


@without_a_device
@pytest.mark.skipif(not FULL, reason="in test-full: 20 s under the interpreter")
def test_half_of_a_causal_mask_is_not_executed() -> None:
    """At 8 tiles of keys at most 0.6 of the instructions that all pairs take, at V3's widths; 9 of
    16 tiles of the forward have a visible pair."""
    length = 8 * SIZES.forward[0][1]
    q, k, v = (x.astype(ml_dtypes.bfloat16) for x in _v3(0, length, length).inputs)
    counts = []
    for causal in (True, False):
        launch = InterpreterLaunch()
        pair = attention(launch)
        o, saved = pair.forward(q, k, v, scale=0.25, causal=causal)
        pair.backward(o, saved)
        counts.append({kernel: report.instructions for kernel, report in launch.reports})
    shares = {kernel: counts[0][kernel] / counts[1][kernel] for kernel in counts[0]}
    assert shares.pop("flash_attention_row_sum") == 1
    assert all(share <= 0.6 for share in shares.values()), shares


def test_tiles() -> None:
    """Shared memory of every GPU, 99 KB; V3's in bfloat16 as in kernels/README.md."""
    for storage in ("bfloat16", "float32", "float64"):
        for widths in ((1, 1), (192, 128), (128, 128), (256, 256), (256, 1), (1, 256)):
            found = tiles(storage, *widths)
            assert max(found.forward_shared, found.backward_shared) <= 99 << 10
            assert found.key_width % 16 == found.value_width % 16 == 0
    v3 = tiles("bfloat16", 192, 128)
    assert (v3.forward, v3.backward) == ((4, 64), (4, 32))
    assert (v3.forward_shared, v3.backward_shared) == (68608, 64512)


def _blind_rows() -> None:
    """A row that sees nothing is 0, and lse with it."""
    q = np.ones((1, 3, 1, 4), ml_dtypes.bfloat16)
    o, saved = OP.forward(q, q, q, scale=1.0, key_mask=np.array([[False, True, True]]))
    assert not o[0, 0].any()
    assert saved.lse[0, 0, 0] == 0


@without_a_device
@pytest.mark.parametrize("name", PLANTED["attention"] if FULL else SEEN_QUICKLY)
def test_planted_mistakes_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant("attention", name, monkeypatch)
    assert_seen("attention", _blind_rows, test_range_of_validity, storage="bfloat16")


def test_shapes_meet_everything() -> None:
    """Shapes of the suite meet every feature."""
    drawn = [SHAPES["attention"](RandomDraw(seed)) for seed in range(60)]
    shapes = [[x.shape for x in case.inputs] for case in drawn]
    assert any(q[1] > k[1] for q, k, _ in shapes)
    assert any(q[1] < k[1] for q, k, _ in shapes)
    assert {(k[2] == 1, v[2] == 1) for q, k, v in shapes if q[2] > 1} >= {
        (False, False),
        (True, True),
        (True, False),
        (False, True),
    }
    for name in ("key_mask", "segments"):
        assert {case.kwargs[name] is None for case in drawn} == {True, False}


def test_some_query_sees_two_keys() -> None:
    """In each draw: elsewhere the reference's gradients of q and k are 0, and no kernel's are."""
    for seed in range(400):
        case = SHAPES["attention"](RandomDraw(seed))
        (b, t, *_), s = case.inputs[0].shape, case.inputs[1].shape[1]
        given = {name: case.kwargs[name] for name in ("causal", "key_mask", "segments")}
        seen = visible((0, t), (0, s), np.empty((b, t)), np.empty((b, s)), **given)
        assert seen.sum(axis=-1).max() >= 2, seed
