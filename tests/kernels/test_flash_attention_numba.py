"""Flash attention in Numba CUDA: more warps and more blocks of keys than the shapes of all kernels
have, what it keeps, its errors and its range of validity, planted mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refimpl.check.cases import Case, RandomDraw
from refimpl.kernels.flash_attention import flash_attention
from refimpl.ops import flash_attention_backward, flash_attention_forward

from attention_contract import (
    ERRORS,
    GOOD,
    check_long_sums,
    check_more_queries_than_keys,
    check_range_of_validity,
)
from kernel_support import (
    DTYPES,
    ON_DEVICE,
    SHAPES,
    TABLES,
    compare,
    make_launch,
    to_device,
    to_host,
    without_a_device,
)
from kernel_support.planted import PLANTED_IN_NUMBA, assert_seen, plant_in_numba
from support import FULL

ATTENTION = TABLES["numba_cuda"]["attention"]


def _case(b: int, t: int, s: int, h: tuple[int, int, int], x: int, v: int, **given: Any) -> Case:
    rng, (heads, key_heads, value_heads) = np.random.default_rng(0), h
    shapes = (b, t, heads, x), (b, s, key_heads, x), (b, s, value_heads, v)
    return Case([rng.normal(size=shape) for shape in shapes], {"scale": x**-0.5} | given)


def _two_warps(storage: str = "float64") -> None:
    """A block of two warps, which meets the keys and the queries in two parts."""
    compare("attention", ATTENTION, _case(1, 66, 67, (2, 1, 2), 33, 7), storage, 0)


def _before_the_first() -> None:
    """More queries than keys, so that the first stand before all keys, and padding."""
    key_mask = np.array([[True, False, True]])
    case = _case(1, 5, 3, (2, 2, 1), 3, 2, causal=False, key_mask=key_mask)
    compare("attention", ATTENTION, case, "float64", 0)


def _range_of_validity() -> None:
    check_range_of_validity(*ATTENTION)


@pytest.mark.parametrize("storage", ["float64", "float32"] if FULL or ON_DEVICE else ["float32"])
def test_two_warps(storage: str) -> None:
    _two_warps(storage)


def test_one_key_takes_nearly_all() -> None:
    """There dq and dk are what rounding leaves of dp − Σ p dp, more than in the reference, whose
    Σ p dp rounds as dp does: the rule compares with flash attention in float32."""
    compare("attention", ATTENTION, SHAPES["attention"](RandomDraw(126)), "float32", 126)


@pytest.mark.parametrize(("x", "v"), [(192, 128), (5, 256)])
def test_wide(x: int, v: int) -> None:
    """V3's widths, and the widest: a thread has each column."""
    compare("attention", ATTENTION, _case(1, 3, 4, (2, 2, 2), x, v), "float32", 0)


def test_long_sums() -> None:
    check_long_sums(ATTENTION.forward)


def test_range_of_validity() -> None:
    _range_of_validity()


def test_more_queries_than_keys() -> None:
    _before_the_first()
    check_more_queries_than_keys(*ATTENTION)


def test_what_it_keeps() -> None:
    """Nothing quadratic; lse as the reference has it, 0 for a query that sees nothing, and so are
    its output and gradients. Blocks are the kernel's own."""
    pair = flash_attention(make_launch(column="numba_cuda"))
    case = _case(2, 35, 40, (2, 1, 2), 4, 3)
    key_mask = np.ones((2, 40), bool)
    key_mask[1, :10] = False  # queries 0 to 4 stand at 5 to 9
    q, k, v = case.inputs
    given = {"scale": 0.5, "key_mask": key_mask}
    wanted, reference = flash_attention_forward(q, k, v, **given)
    do = np.ones_like(wanted)
    gradients = flash_attention_backward(do, reference)
    there = given | {"key_mask": to_device(key_mask)}
    o, saved = pair.forward(*(to_device(x) for x in (q, k, v)), **there, block=3)
    assert max(x.size for x in saved if hasattr(x, "size")) <= max(x.size for x in (q, k, v, o))
    found = to_host(o), to_host(saved.lse), *map(to_host, pair.backward(to_device(do), saved))
    right = wanted, reference.lse[..., 0], *gradients
    for x, y in zip(found, right, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-13, atol=1e-13)
    for x in (found[0][1, :5], found[1][1, :, :5], found[2][1, :5], found[3][1, :10]):
        assert not x.any()


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """Those of attention; a number type that no kernel has is named with all that one has."""
    (name,) = change
    if error is TypeError and name != "key_mask":
        message = f"{name} must be float64, float32 or bfloat16, got|{name} must be numpy float64"
    with pytest.raises(error, match=message):
        ATTENTION.forward(**(GOOD | change))


def test_errors_of_its_own() -> None:
    pair = flash_attention(make_launch(column="numba_cuda"))
    ones = np.ones((1, 2, 1, 257))
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        pair.forward(**GOOD, block=0)
    with pytest.raises(ValueError, match="v must be at most 256 wide, got 257"):
        pair.forward(ones[..., :3], ones[..., :3], ones, scale=1.0)
    low = ones[..., :3].astype(DTYPES["bfloat16"])
    with pytest.raises(TypeError, match="take float64 and float32 arrays, got bfloat16"):
        ATTENTION.forward(low, low, low, scale=1.0)


MORE: dict[str, Callable[[], None]] = {  # what the shapes of all kernels do not show
    "weights read before all are written": _two_warps,
    "gradients read before all are written": _two_warps,
    "gradients written while others are read": _two_warps,
    "overflow gives a clean number": _range_of_validity,
    "segments of a position before the first": _before_the_first,
}


@without_a_device
@pytest.mark.parametrize("name", list(PLANTED_IN_NUMBA["attention"])[:: 1 if FULL else 6])
def test_planted_mistakes_in_numba_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_in_numba("attention", name, monkeypatch)
    if name in MORE:
        assert_seen("attention", MORE[name], column="numba_cuda")
    else:
        assert_seen("attention", column="numba_cuda")
