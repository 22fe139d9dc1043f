"""Every op of `refimpl.kernels.columns`, executed (under our interpreter of PTX, or on the GPU by
``make gpu``) against the float64 reference and finite differences."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.check import check
from refimpl.check.cases import CASES, RandomDraw, pair_of
from refimpl.check.rules import Pair
from refimpl.config import preset
from refimpl.kernels.columns import COLUMNS, CUDA, NUMBA_CUDA
from refimpl.model import backward, forward
from refimpl.ops import REFERENCE, Op
from refimpl.parameters import init_parameters
from refimpl.verify import KERNELS, placed

from kernel_support import (
    ALL,
    EXECUTED,
    ON_DEVICE,
    PRETENDED,
    SHAPES,
    TABLES,
    TYPES,
    V3,
    InterpreterLaunch,
    compare,
    make_launch,
    make_table,
    ops_of,
    results,
    rounded,
    strided,
)
from support import FULL, HypothesisDraw

EXAMPLES = {"cuda": 40 if FULL else 6, "numba_cuda": 12 if FULL else 3}  # of each op and type
DIFFERENCES = {"cuda": 20 if FULL else 2, "numba_cuda": 5 if FULL else 1}  # of each op
if PRETENDED:
    EXAMPLES = DIFFERENCES = {"cuda": 1, "numba_cuda": 1}
MANY = ("attention", "moe", "log_prob")  # execute much
OPS = [("cuda", op) for op in CUDA] + [("numba_cuda", op) for op in NUMBA_CUDA]
LOW = [
    (column, op, storage)
    for column, storage in TYPES
    for c, op in OPS
    if c == column and storage != "float64"
]
# a mixture of experts rounds between its stages, each of which is tested alone
LOW = [case for case in LOW if case[1:] != ("moe", "bfloat16")]
# attention in bfloat16 and float64 executes all of its source
LOW = [case for case in LOW if FULL or ON_DEVICE or case != ("cuda", "attention", "float32")]
OTHER = [(column, op, "float64") for column, op in OPS if FULL or column != "numba_cuda"] + LOW
OTHER = [case for case in OTHER if FULL or case[:2] != ("numba_cuda", "attention")]
AS_WIDE_AS_V3 = [
    (column, op, storage) for column, storage in TYPES for c, op in OPS if c == column and op in V3
]
# one type of each column, and where registers hold the row, all
AS_WIDE_AS_V3 = [
    case
    for case in AS_WIDE_AS_V3
    if ALL
    or case[::2] in (("cuda", "bfloat16"), ("numba_cuda", "float32"))
    or case[:2] == ("cuda", "rms_norm")
]


# of numba_cuda the slowest on the GPU and in test-full
DIFFERED = [x for x in OPS if FULL or ON_DEVICE or x[0] != "numba_cuda" or x[1] not in MANY]


@pytest.mark.parametrize(("column", "op"), DIFFERED)
def test_finite_differences(column: str, op: str) -> None:
    """The float64 kernels themselves, by `refimpl.check`: contract (arrays read-only and strided,
    two calls alike, float32 near float64) and differences to 1e-8; those of attention, which
    executes much, on one tile by its own test, and here in test-full."""
    rules = ("contract",) if op == "attention" and not FULL else ("contract", "differences")
    more = (
        ops_of(op, column) if column == "cuda" or FULL else {}
    )  # else experts are the reference's
    count = DIFFERENCES[column]
    for seed in range(-(-count // 4) if op in MANY else count):
        case = CASES[op](RandomDraw(seed))
        if "block" in case.kwargs:
            case.kwargs["block"] = (256, 4096)
        report = check(
            *TABLES[column][op],
            case.inputs,
            case.kwargs | more,
            op=op,
            replay=case.replay,
            seed=seed,
            names=[str(i) for i in range(len(case.inputs))],
            rules=rules,
        )
        assert report.ok, f"{case.kwargs}\n{report}"


@pytest.mark.parametrize(("column", "op"), OPS)
def test_float64_against_the_reference(column: str, op: str) -> None:
    _against_the_reference(column, op, "float64")


@pytest.mark.parametrize(("column", "op", "storage"), LOW)
def test_error_is_that_of_the_reference(column: str, op: str, storage: str) -> None:
    _against_the_reference(column, op, storage)


def _against_the_reference(column: str, op: str, storage: str) -> None:
    few = op == "attention" and not FULL and not PRETENDED

    @settings(max_examples=EXAMPLES[column] // (2 if few else 1))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        draw = HypothesisDraw(data)
        compare(op, TABLES[column][op], SHAPES[op](draw), storage, draw.seed, ops_of(op, column))

    run()


@pytest.mark.parametrize(("column", "op", "storage"), AS_WIDE_AS_V3)
def test_widths_of_v3(column: str, op: str, storage: str) -> None:
    """Rows of 7,168, 18,432 and 129,280 elements, 256 experts."""
    compare(op, TABLES[column][op], V3[op](RandomDraw(0)), storage, 0)


@pytest.mark.skipif(ON_DEVICE, reason="on the GPU its own target is executed")
@pytest.mark.parametrize(("column", "op", "storage"), OTHER)
def test_other_targets(column: str, op: str, storage: str) -> None:
    """The same rule for the code of sm_100."""
    for target in EXECUTED[1:]:
        pair = make_table(make_launch(target=target), column)[op]
        for seed in range(10 if FULL else 1):
            compare(
                op, pair, SHAPES[op](RandomDraw(seed)), storage, seed, ops_of(op, column, target)
            )


@pytest.mark.parametrize("storage", ["float64", "float32"])
@pytest.mark.parametrize(("column", "op"), OPS)
def test_same_bits(column: str, op: str, storage: str) -> None:
    """Twice the same call, and in float64 warps that run in other orders too (in float32 the seed
    draws the errors of the interpreter's approximate functions as well): not one bit differs."""
    case = SHAPES[op](RandomDraw(3))
    kwargs, inputs = (
        rounded(case.kwargs, storage) | ops_of(op, column),
        [rounded(x, storage) for x in case.inputs],
    )
    outputs = Pair(*pair_of(op), rounded(case.kwargs, storage)).outputs(inputs)  # for their shapes
    cotangents = [np.cos(np.arange(y.size) + 1).reshape(y.shape) for y in outputs]
    found = [
        results(make_table(make_launch(seed), column)[op], inputs, kwargs, cotangents)
        for seed in ((0, 1, 2) if storage == "float64" else (0, 0))
    ]
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            assert a.tobytes() == b.tobytes()


@pytest.mark.skipif(not ON_DEVICE, reason="arrays with gaps are part of test_finite_differences")
@pytest.mark.parametrize(
    ("column", "op", "storage"), [*((column, op, "float64") for column, op in OPS), *LOW]
)
def test_strided_arrays(column: str, op: str, storage: str) -> None:
    """Arrays with gaps on the GPU, inputs, cotangents and all others: the same rule."""
    for seed in range(1 if PRETENDED else 3):
        pair = placed(COLUMNS[column](make_launch())[op], strided)
        compare(op, pair, SHAPES[op](RandomDraw(seed)), storage, seed, ops_of(op, column))


@pytest.mark.parametrize("column", COLUMNS)
def test_whole_model(column: str) -> None:
    """Loss and every gradient of the tiny model with all kernels in their places, as with the
    reference."""
    if ON_DEVICE:
        pytest.skip(f"refimpl verify --backend cupy --implementation {column}")
    if column == "numba_cuda" and not FULL:
        pytest.skip("its host side is that of cuda, and each of its ops is tested alone")
    config = preset("tiny")
    params = {name: p.astype(np.float64) for name, p in init_parameters(config, std=0.15).items()}
    tokens = np.frombuffer(b"by hand and checked", dtype=np.uint8)[None, :9].astype(np.int64)
    wanted, wanted_saved = forward(params, tokens, config, ops=REFERENCE)
    found, saved = forward(params, tokens, config, ops=TABLES[column])
    assert abs(float(found.loss) - float(wanted.loss)) <= 1e-13 * float(wanted.loss)
    grads = backward(saved)
    for name, g in backward(wanted_saved).items():
        assert np.max(np.abs(grads[name] - g)) <= 1e-12 * np.max(np.abs(g), initial=1e-3), name


def test_signatures_are_the_ops() -> None:
    """Every op of the column takes the arguments of the reference, under the same names and with
    the same defaults."""

    def parameters(function: Any) -> list[tuple[str, Any, Any]]:
        return [
            (p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()
        ]

    for name, make in CUDA.items():
        pair: Op = make(InterpreterLaunch())
        assert parameters(pair.forward) == parameters(REFERENCE[name].forward), name
        assert parameters(pair.backward) == parameters(REFERENCE[name].backward), name
    for make in COLUMNS.values():
        assert set(make(InterpreterLaunch())) == set(REFERENCE)
    assert set(COLUMNS) == set(KERNELS)
