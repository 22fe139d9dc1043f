"""The linear maps of all experts in one launch, and the mixture of experts that is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.check.cases import Case
from refimpl.kernels.compile import STORAGE
from refimpl.kernels.grouped_linear import (
    FEW,
    TILINGS,
    grouped_forward,
    grouped_input,
    grouped_weight,
    make_groups,
    tiling_of,
)
from refimpl.kernels.launch import Launch
from refimpl.kernels.moe import moe
from refimpl.ops import Op
from refimpl.stored import DTYPES, compare

from kernel_support import (
    ON_DEVICE,
    TYPES,
    InterpreterLaunch,
    make_launch,
    to_device,
    to_host,
    without_a_device,
)
from kernel_support.launches import SMALL_TILINGS
from kernel_support.planted import PLANTED, plant
from ptx import PTXError
from support import FULL, HypothesisDraw


def grouped(launch: Launch, loads: Sequence[int], tilings: Any = TILINGS) -> Op[Any, Any]:
    """Two maps of the same x, whose outputs the loss adds up: what the kernels do for gate and
    up."""
    start = np.concatenate(([0], np.cumsum(loads))).astype(np.int64)

    def forward(x: Any, w: Any, more_w: Any) -> Any:
        x, w, more_w = map(to_device, (x, w, more_w))
        groups = make_groups(to_device(start), x.shape[0], str(x.dtype), tilings)
        y = tuple(to_host(grouped_forward(launch, x, each, groups)) for each in (w, more_w))
        return y, (x, w, more_w, groups)

    def backward(dy: Any, saved: Any) -> Any:
        x, w, more_w, groups = saved
        dy, more_dy = map(to_device, dy)
        dx = grouped_input(launch, dy, w, groups, (more_dy, more_w))
        dw = (grouped_weight(launch, each, x, groups) for each in (dy, more_dy))
        return tuple(map(to_host, (dx, *dw)))

    return Op(forward, backward)


def expert_by_expert(loads: Sequence[int]) -> Op[Any, Any]:
    """The same by a product for each expert."""
    stop = np.cumsum(loads)
    rows = [slice(b - n, b) for n, b in zip(loads, stop, strict=True)]

    def forward(x: Any, w: Any, more_w: Any) -> Any:
        y = (
            np.concatenate([x[r] @ m.T for r, m in zip(rows, each, strict=True)])
            for each in (w, more_w)
        )
        return tuple(y), (x, w, more_w)

    def backward(dy: Any, saved: Any) -> Any:
        x, *w = saved
        dx = [sum(d[r] @ m[e] for d, m in zip(dy, w, strict=True)) for e, r in enumerate(rows)]
        dw = (np.stack([d[r].T @ x[r] for r in rows]) for d in dy)
        return np.concatenate(dx), *dw

    return Op(forward, backward)


def example(rng: np.random.Generator, loads: Sequence[int], inputs: int, outputs: int) -> Case:
    shape = len(loads), outputs, inputs
    w, more_w = rng.normal(size=(2, *shape)) / np.sqrt(inputs)
    return Case([rng.normal(size=(sum(loads), inputs)), w, more_w])


def agrees(
    loads: Sequence[int],
    inputs: int,
    outputs: int,
    storage: str,
    *,
    column: str = "cuda",
    tilings: Any = SMALL_TILINGS,
    seed: int = 0,
) -> None:
    case = example(np.random.default_rng(seed), loads, inputs, outputs)
    pair = grouped(make_launch(column=column), loads, tilings)
    for i, x in enumerate(compare(pair, expert_by_expert(loads), case, storage, seed)):
        assert x.fault is None, f"result {i}: {x.fault}"
        assert x.ratio <= 1, f"result {i}: {x}"


LOADS = [
    [3],
    [0, 5, 0, 1],  # empty ones
    [0, 37, 0],  # one has all, several tiles
    [16, 16, 17, 15],  # whole tiles, one more, one less
    [1, 0, 2, 33, 1],
]


@pytest.mark.parametrize(("column", "storage"), TYPES)
def test_any_widths_and_loads(column: str, storage: str) -> None:
    """By the rule of all kernels; widths that are no multiples of 16 bytes among them."""

    @settings(max_examples=(20 if FULL else 3) if column == "cuda" else (6 if FULL else 1))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        draw = HypothesisDraw(data)
        loads = draw.choice(
            [*LOADS, [draw.integer(0, 20) for _ in range(draw.integer(1, 6))] + [1]]
        )
        inputs, outputs = (draw.choice([1, 7, 8, 16, 33, 40]) for _ in range(2))
        agrees(loads, inputs, outputs, storage, column=column, seed=draw.seed)

    run()


@pytest.mark.parametrize("storage", STORAGE if FULL or ON_DEVICE else ["bfloat16"])
@pytest.mark.parametrize("many", [False, True])
def test_tiles_of_a_device(many: bool, storage: str) -> None:
    """Those that a device gets, with more than one of them on every side."""
    tilings = {storage: 2 * (TILINGS[storage][many],)}
    loads = [0, 130, 20] if many else [0, 18, 3]
    agrees(loads, 136 if many else 40, 150, storage, tilings=tilings)


def test_which_tiles() -> None:
    """By an expert's rows on average; a block's shared memory fits every GPU, 99 KB, and two blocks
    of many rows in bfloat16 an SM of 163 KB."""
    for storage, (few, many) in TILINGS.items():
        assert tiling_of(storage, FEW) == few
        assert tiling_of(storage, FEW + 0.1) == many
        assert max(few.shared(storage), many.shared(storage)) <= 99 << 10
    assert TILINGS["bfloat16"][1].shared("bfloat16") == 4 * 256 * 40 * 2
    many = TILINGS["bfloat16"][1]
    groups = make_groups(np.array([0, 0, 130, 131]), 131, "bfloat16", {"bfloat16": 2 * (many,)})
    assert groups.first_tile.tolist() == [0, 0, 2, 3]
    assert groups.most_tiles == 1 + 3


def layer(experts: int) -> tuple[list[Any], dict[str, Any]]:
    rng = np.random.default_rng(0)
    d, f = 16, 8
    shapes = (experts, f, d), (experts, f, d), (experts, d, f)
    w = [rng.normal(size=s) / np.sqrt(s[-1]) for s in shapes]
    x, weights = rng.normal(size=(12, d)), rng.uniform(0.2, 1.5, (12, 2)).astype(np.float32)
    indices = np.stack((rng.integers(0, experts, 12), np.full(12, experts - 1)), axis=1)
    given = [a.astype(DTYPES["bfloat16"]) for a in (x, *w)]
    return [given[0], weights, *given[1:], None, None, None], {"indices": indices}


@without_a_device
def test_launches_do_not_grow_with_experts() -> None:
    """Forward and backward of a mixture of 4 and of 64 experts: the same kernels."""
    told = []
    for experts in (4, 64):
        inputs, given = layer(experts)
        launch = InterpreterLaunch()
        pair = moe(launch, SMALL_TILINGS)
        y, saved = pair.forward(*inputs, **given)
        pair.backward(y, saved)
        told.append([kernel for kernel, _ in launch.reports])
    assert told[0] == told[1]
    assert len(told[0]) == 6 + 8


class UsedLaunch(InterpreterLaunch):
    """In memory that a kernel shall write stand finite numbers, as on a device that used it
    before."""

    def empty(self, shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
        return np.full(shape, 7, dtype)


@without_a_device
def test_an_index_of_no_expert_is_nan() -> None:
    """Of its token alone, in the output and its gradients, whatever memory held before; the
    weights' gradients are those of the other choices."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 3, 4))
    weights = rng.uniform(size=(3, 2))
    w_gate, w_up, w_down = (rng.normal(size=shape) for shape in ((2, 3, 4), (2, 3, 4), (2, 4, 3)))
    pair = moe(UsedLaunch(), SMALL_TILINGS)
    for wrong in (-1, 2):
        indices = np.array([[0, 1], [1, wrong], [0, 1]])
        y, saved = pair.forward(x, weights, w_gate, w_up, w_down, None, None, None, indices=indices)
        dx, dweights, *dw = pair.backward(dy, saved)[:5]
        for of_tokens in (y, dx):
            assert np.isnan(of_tokens[1]).all()
            assert np.isfinite(of_tokens[[0, 2]]).all()
        assert np.isnan(dweights).tolist() == [[False, False], [False, True], [False, False]]
        assert all(np.isfinite(x).all() for x in dw)
    with pytest.raises(TypeError, match="indices must be integers, got float64"):
        pair.forward(x, weights, w_gate, w_up, w_down, None, None, None, indices=0.0 * indices)


def all_kinds_agree() -> None:
    for seed, loads in enumerate(LOADS[1:]):
        for widths in ((40, 24), (7, 33)):
            agrees(loads, *widths, "bfloat16", seed=seed)


def test_loads_of_all_kinds() -> None:
    all_kinds_agree()


@without_a_device
@pytest.mark.parametrize("name", list(PLANTED["grouped_linear"])[:: 1 if FULL else 3])
def test_planted_mistakes_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant("grouped_linear", name, monkeypatch)
    with pytest.raises((AssertionError, PTXError)):
        all_kinds_agree()
