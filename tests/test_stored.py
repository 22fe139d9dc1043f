"""bfloat16 in memory: the rule for its errors, and ops and models through the column `cuda` on a
pretended CuPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from refimpl import ops, verify
from refimpl.array import namespace, sum_along
from refimpl.check.cases import CASES, Case, RandomDraw, model_case
from refimpl.config import preset
from refimpl.errors import CouldNotRun
from refimpl.kernels.columns import COMPOSITES, CUDA
from refimpl.model import backward, forward
from refimpl.ops import IMPLEMENTATIONS, REFERENCE, Op, Ops
from refimpl.parameters import HEAD, init_parameters, is_buffer
from refimpl.stored import (
    ACTIVATIONS,
    DTYPES,
    RUNS,
    RUNS_OF_SEVERAL,
    compare,
    results,
    rounded,
    stored_table,
)
from refimpl.text import load_text
from refimpl.verify import Settings, Step, placed, run, select

from kernel_support.on_cupy import use_cuda
from pretended_cupy import there
from support import FULL

BFLOAT16 = np.dtype(DTYPES["bfloat16"])
SETTINGS = Settings(load_text(None), backend="cupy", implementation="cuda", dtype="bfloat16")
TINY = preset("tiny")
FLASH = REFERENCE | {"attention": IMPLEMENTATIONS["flash"].attention}


@pytest.fixture
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Ops:
    """The column on a pretended CuPy, which commands find; with its kernels of attention where
    these are tested."""
    return use_cuda(monkeypatch, attention="planted" not in request.node.name)


def in_bfloat16() -> dict[str, np.ndarray]:
    params = init_parameters(TINY, std=0.15)
    return {n: x if is_buffer(n) else x.astype(BFLOAT16) for n, x in params.items()}


TOKENS = np.random.default_rng(0).integers(0, TINY.vocabulary, (2, 7))


# What the reference makes of it


def test_the_reference_refuses_bfloat16() -> None:
    """In one line that says what to do, from the first op that computes; composites, which move and
    add, hand it on."""
    x = np.ones((2, 3), BFLOAT16)
    told = r"must be float32 or wider \(cast 16-bit and integer arrays up\), got bfloat16$"
    with pytest.raises(TypeError, match=f"^x {told}"):
        namespace(x=x)
    assert namespace(moved=True, x=x) is np
    with pytest.raises(TypeError, match=r"^x must be float32 or wider .*, got float16$"):
        namespace(moved=True, x=x.astype(np.float16))
    with pytest.raises(TypeError, match=f"^w {told}"):
        forward(in_bfloat16(), TOKENS, TINY)
    table = stored_table() | {"attention": REFERENCE.attention}
    with pytest.raises(TypeError, match=f"^q {told}"):
        forward(in_bfloat16(), TOKENS, TINY, ops=table)


def test_sum_along_rounds_once() -> None:
    """256 numbers of 1 and 0.0039: one after the other, bfloat16 would stay at 256."""
    x = np.where(np.arange(512)[None, :] < 256, 1.0, 2.0**-8).astype(BFLOAT16)
    assert sum_along(x, axis=1).dtype == BFLOAT16
    assert float(sum_along(x, axis=1)[0]) == float(np.float32(257).astype(BFLOAT16))
    assert float(np.cumsum(x, axis=1, dtype=BFLOAT16)[0, -1]) == 256
    wide = np.random.default_rng(0).normal(size=(3, 50, 2)).astype(np.float32)
    np.testing.assert_array_equal(sum_along(wide, axis=1), np.sum(wide, axis=1))


def test_the_model_in_memory() -> None:
    """Activations bfloat16, gradients of parameters float32; each number of the activations'
    rounding is to the nearest, or with a seed by chance; loss and gradients near float64's."""
    params = in_bfloat16()
    exact, exact_saved = forward(
        {name: x.astype(np.float64) for name, x in params.items()}, TOKENS, TINY
    )
    wanted, seen = backward(exact_saved), set()
    for seed in (None, 1, 2):
        table = stored_table(seed)
        output, saved = forward(params, TOKENS, TINY, ops=table, routes=exact.routes)
        found = backward(saved)
        assert output.hidden.dtype == BFLOAT16
        assert saved.blocks[0].attention.cache.dtype == BFLOAT16
        assert output.loss is not None
        assert output.loss.dtype == np.float32
        assert abs(output.loss - exact.loss) < 0.02
        seen.add(output.hidden.tobytes())
        for name, g in found.items():
            assert g.dtype == np.float32, name
            assert np.max(np.abs(g - wanted[name])) < 0.2 * np.max(np.abs(wanted[name])), name
    assert len(seen) == 3


def test_parameters_that_take_no_part() -> None:
    """Their zeros have the type of the other gradients, which an optimizer wants."""
    output, saved = forward(in_bfloat16(), TOKENS, TINY, ops=stored_table(), with_loss=False)
    found = backward(saved, dhidden=np.ones_like(output.hidden))
    assert found[HEAD].dtype == np.float32
    assert not found[HEAD].any()


@pytest.mark.parametrize("op", ACTIVATIONS)
def test_types_are_those_of_kernels(op: str, cuda: Ops) -> None:
    """Each output and gradient is stored in the type in which the kernel's is."""
    case = CASES[op](RandomDraw(3))
    inputs = [rounded(x, "bfloat16") for x in case.inputs]
    kwargs = rounded(case.kwargs, "float32")
    y = REFERENCE[op].forward(*case.inputs, **case.kwargs)[0]
    cotangents = [np.ones(m.shape) for m in (y[:2] if isinstance(y, tuple) else (y,))]
    both = [
        [x.dtype for x in results(pair, inputs, kwargs, cotangents)]
        for pair in (stored_table()[op], on_device(op, cuda))
    ]
    assert both[0] == both[1]
    assert np.dtype(np.float32) in both[0] or op in ("swiglu", "rope", "attention")


def on_device(op: str, table: Ops) -> Op[Any, Any]:
    """From and to NumPy's arrays."""
    pair = placed(table[op], there)
    if op not in (*COMPOSITES, "moe") or op == "linear":
        return pair
    inner = table[op]
    return placed(Op(lambda *x, **k: inner.forward(*x, ops=table, **k), inner.backward), there)


# The rule


def test_the_rule() -> None:
    """An op that rounds what it gives to the nearest holds; a unit and a half too much does not,
    nor NaN, nor another shape. What is made of several has 16 runs and four times their error."""
    op = stored_table()["swiglu"]
    case = CASES["swiglu"](RandomDraw(0))

    def told(change: Callable[[Any], Any], **given: Any) -> Any:
        def changed(*args: Any) -> Any:
            y, saved = op.forward(*args)
            return change(y), saved

        pair = Op(changed, op.backward)
        return compare(pair, REFERENCE.swiglu, case, "bfloat16", 0, **given)[0]

    right = told(lambda y: y)
    assert right.fault is None
    assert 0.2 < right.ratio <= 0.51
    assert told(lambda y: (y * (1 + 3 * 2.0**-8)).astype(y.dtype)).ratio > 1
    assert told(lambda y: y * np.where(y == y.reshape(-1)[0], np.nan, 1).astype(y.dtype)).fault
    assert told(lambda y: y[:1]).fault == f"shape {right.got[:1].shape}, wanted {right.got.shape}"
    ran = list[int]()

    def again(run: int) -> Op[Any, Any]:
        ran.append(run)
        return stored_table(run)["swiglu"]

    assert told(lambda y: y, runs=again).allowed.min() >= 4 * right.reference
    assert ran == list(range(RUNS_OF_SEVERAL))
    assert RUNS_OF_SEVERAL > RUNS


def verified(op: str, seed: int = 0) -> Any:
    report = run(Step(op, seed), SETTINGS)
    return {row.tensor: row for row in report.tensors}, report


@pytest.mark.parametrize("seed", range(3 if FULL else 1))
@pytest.mark.parametrize("op", ["model", *(["model_variant", "model_grpo"] if FULL else [])])
def test_models(op: str, seed: int, cuda: Ops) -> None:
    """Loss, hidden states, logits and every gradient, by the rule, through all the kernels."""
    rows, report = verified(op, seed)
    assert report.ok, str(report)
    assert len(rows) > 40
    assert max(row.noise for row in rows.values()) > 0.15  # 0.19 or more in test-full


@pytest.mark.parametrize("op", [x for x in select([], "bfloat16") if x not in verify.MODELS])
def test_ops(op: str, cuda: Ops) -> None:
    for seed in range(3 if FULL else 1):
        _, report = verified(op, seed)
        assert report.ok, str(report)


@pytest.mark.parametrize("storage", ["bfloat16", "float32", "float64"] if FULL else ["bfloat16"])
def test_a_layer_as_wide_as_v3(storage: str, cuda: Ops) -> None:
    """A model of one layer with two of V3's heads, through all the kernels: what it gives and every
    gradient, by the rule."""
    wide = preset("v3")
    heads = {"heads": 2, "nope": wide.nope, "rope": wide.rope, "value": wide.value}
    config = replace(TINY, layers=1, dense_layers=0, mtp_depth=0, **heads)
    length = 40 if FULL else 12

    def layer(table: Ops) -> tuple[Case, Op[Any, Any]]:
        draw = RandomDraw(0)
        case, _, pair = model_case(draw, config=config, table=table, length=length, masked=True)
        return case, pair

    case, tested = layer(cuda)
    told = compare(
        placed(tested, there),
        layer(REFERENCE)[1],
        case,
        storage,
        0,
        runs=lambda number: layer(stored_table(number) if storage == "bfloat16" else FLASH)[1],
    )
    assert len(told) == 3 + len(case.inputs)
    for name, x in zip([*"123", *range(len(case.inputs))], told, strict=True):
        assert x.fault is None
        assert x.ratio <= 1, f"{name}: {x}"


def added_in_bfloat16(x: Any, axis: int) -> Any:
    """A sum over heads, rounded each time."""
    found = 0 * x[:, :, 0]
    for head in range(x.shape[axis]):
        found = found + x[:, :, head]
    return found


def many_heads() -> Case:
    """MLA with 512 heads, nearly the same, so that the shared key's gradients do not cancel: beyond
    256 of them, one is less than half a unit of the sum."""
    rng = np.random.default_rng(0)
    h, width = 512, 4  # N = V = 1, R = 2, C = 3
    shapes = [(h * 3, width), (5, width), (3,), (h * 2, 3), (width, h)]
    w = [rng.normal(size=s) / s[-1] ** 0.5 for s in shapes]
    w[0] = np.tile(w[0][:3], (h, 1)) + 0.05 * w[0]
    w[3] = np.tile(w[3][:2], (h, 1)) + 0.05 * w[3]
    w[4] = np.tile(w[4][:, :1], (1, h)) + 0.05 * w[4]
    inputs = (rng.normal(size=(1, 3, width)), None, None, None, *w)
    given = {"heads": h, "scale": 0.4, "eps": 0.1, "positions": np.arange(3)}
    return Case(inputs, given | {"inv_freq": np.array([0.1])})


def mla_with(table: Ops) -> Op[Any, Any]:
    def of(*inputs: Any, **kwargs: Any) -> Any:
        y, saved = REFERENCE.mla.forward(*inputs, **kwargs, ops=table)
        return y.y, saved

    return Op(of, lambda dy, saved: REFERENCE.mla.backward((dy, None), saved))


def test_planted_a_sum_over_heads_in_bfloat16(cuda: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are further off than the rule allows; summed in float32 they hold."""

    def worst() -> float:
        pair = placed(mla_with(cuda), there)
        told = compare(
            pair,
            mla_with(REFERENCE),
            many_heads(),
            "bfloat16",
            0,
            mean=1,
            runs=lambda number: mla_with(tables[number]),
        )
        assert len(told) == 7
        return max(x.ratio for x in told)

    tables = [stored_table(number) for number in range(RUNS_OF_SEVERAL)]
    assert worst() <= 1
    here = ops.mla.sum_along  # type: ignore[attr-defined]
    monkeypatch.setattr(
        "refimpl.ops.mla.sum_along",
        lambda x, axis: (here if type(x) is np.ndarray else added_in_bfloat16)(x, axis),
    )
    assert worst() > 1


def test_planted_weights_of_the_loss_in_bfloat16(
    cuda: Ops, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1/7 rounded to bfloat16: loss and gradients are off by it."""
    _, report = verified("head_cross_entropy")
    assert report.ok, str(report)
    real = ops.head_cross_entropy.token_weights  # type: ignore[attr-defined]

    def narrow(like: Any, *given: Any) -> Any:
        targets, weight = real(like, *given)
        if type(like) is not np.ndarray:
            weight = weight.astype(BFLOAT16).astype(like.dtype)
        return targets, weight

    monkeypatch.setattr("refimpl.ops.head_cross_entropy.token_weights", narrow)
    rows, report = verified("head_cross_entropy")
    assert rows["output 0"].verdict == "FAIL"


def test_planted_a_cast_that_is_forgotten(cuda: Ops) -> None:
    """A float32 activation is refused by the next kernel, in one line."""
    gate = cuda.swiglu

    def forward_in_float32(*args: Any, **kwargs: Any) -> Any:
        y, saved = gate.forward(*args, **kwargs)
        return y.astype(np.float32), saved

    table = cuda | {"swiglu": Op(forward_in_float32, gate.backward)}
    params = {name: there(x) for name, x in in_bfloat16().items()}
    with pytest.raises(TypeError, match=r"^w must be cupy float32 like x, got cupy bfloat16$"):
        forward(params, there(TOKENS), TINY, ops=table)


# The command's settings


def test_what_bfloat16_reaches() -> None:
    reached = select([], "bfloat16")
    assert {*reached} == {*CUDA, *COMPOSITES, *verify.MODELS}
    with pytest.raises(
        CouldNotRun, match=r"^unknown op balance_loss in bfloat16; there are linear"
    ):
        select(["balance_loss"], "bfloat16")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"implementation": "reference"}, "^dtype bfloat16 needs the implementation cuda"),
        ({"convention": "hf"}, "^convention hf cannot be combined with bfloat16"),
        ({"digits": 50}, "^digits cannot be combined with bfloat16$"),
    ],
)
def test_settings(given: dict[str, Any], message: str) -> None:
    settings = {name: getattr(SETTINGS, name) for name in SETTINGS.__dataclass_fields__} | given
    with pytest.raises(CouldNotRun, match=message):
        Settings(**settings).validate()
