"""The interpreter of PTX: known answers of the instructions that our kernels use, and what it must
refuse."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from ptx import PTXError, run
from ptx.arithmetic import fma, fma_down
from ptx.memory import Arena, Order
from ptx.parse import DTYPES
from ptx.planted import BUGS, CASES, WRONG, Case

HEAD = ".version 9.0\n.target sm_90\n.address_size 64\n"
INF, NAN = np.inf, np.nan
REGISTERS = """
    .reg .pred %p<20>;
    .reg .b16 %h<20>;
    .reg .b32 %r<40>;
    .reg .f32 %f<20>;
    .reg .f64 %fd<20>;
    .reg .b64 %rd<20>;
"""


def kernel(body: str, parameters: int = 1, extra: str = "") -> str:
    """A kernel `k` with pointers a, b, … in %rd1, %rd2, …, and the thread's number in %r0."""
    formal = ",\n".join(f".param .u64 k_{i}" for i in range(parameters))
    loads = "".join(f"ld.param.u64 %rd{i + 1}, [k_{i}];\n" for i in range(parameters))
    return f"{HEAD}{extra}\n.visible .entry k(\n{formal}\n)\n{{{REGISTERS}{loads}mov.u32 %r0, %tid.x;\n{body}\nret;\n}}\n"


def answers(instruction: str, types: str, rows: list, result: str) -> np.ndarray:
    """What `instruction` leaves in %d when %a, %b, … hold each row's values."""
    names = types.split()
    width = {name: np.dtype(DTYPES[name]).itemsize for name in [*names, result]}
    bits = {size: f".b{8 * size}" for size in (1, 2, 4, 8)}
    lines = [f".reg {bits[max(width[result], 2)]} %d;", "cvt.u64.u32 %rd10, %r0;"]
    columns: list[np.ndarray] = []
    for i, name in enumerate(names):
        column = [row[i] if isinstance(row, tuple) else row for row in rows]
        dtype = np.dtype(DTYPES[name])
        integer = all(isinstance(x, int) for x in column) and dtype.kind in "ui"
        raw = [x & (256**dtype.itemsize - 1) for x in column] if integer else column
        columns.append(np.array(raw, f"u{dtype.itemsize}") if integer else np.array(raw, dtype))
        lines.append(f".reg {bits[max(width[name], 2)]} %{'abc'[i]};")
        lines.append(f"mad.lo.s64 %rd11, %rd10, {width[name]}, %rd{i + 1};")
        lines.append(f"ld.global.u{8 * width[name]} %{'abc'[i]}, [%rd11];")
    lines.append(instruction)
    lines.append(f"mad.lo.s64 %rd11, %rd10, {width[result]}, %rd{len(names) + 1};")
    lines.append(f"st.global.u{8 * width[result]} [%rd11], %d;")
    out = np.zeros(len(rows), DTYPES[result])
    run(kernel("\n".join(lines), len(names) + 1), "k", 1, len(rows), [*columns, out])
    return out


B31, ONES = 1 << 31, 0xFFFFFFFF
TABLE: list[tuple[str, str, list, str, list]] = [
    ("add.s32 %d, %a, %b;", "s32 s32", [(1, 2), (2**31 - 1, 1)], "s32", [3, -(2**31)]),
    ("mul.lo.s32 %d, %a, %b;", "s32 s32", [(-3, 5), (1 << 20, 1 << 20)], "s32", [-15, 0]),
    ("mul.wide.s32 %d, %a, %b;", "s32 s32", [(-(2**31), 2), (-3, -4)], "s64", [-(2**32), 12]),
    ("mul.wide.u32 %d, %a, %b;", "u32 u32", [(ONES, ONES)], "u64", [ONES * ONES]),
    ("mad.lo.s32 %d, %a, %b, %c;", "s32 s32 s32", [(3, -4, 5)], "s32", [-7]),
    (
        "div.s32 %d, %a, %b;",
        "s32 s32",
        [(7, 2), (-7, 2), (7, -2), (-7, -2), (5, 0)],
        "s32",
        [3, -3, -3, 3, -1],
    ),
    ("div.u64 %d, %a, %b;", "u64 u64", [(2**64 - 1, 10), (3, 4)], "u64", [(2**64 - 1) // 10, 0]),
    ("neg.s32 %d, %a;", "s32", [-5, 5], "s32", [5, -5]),
    (
        "shl.b32 %d, %a, %b;",
        "b32 u32",
        [(1, 31), (1, 32), (1, 33), (3, ONES)],
        "b32",
        [B31, 0, 0, 0],
    ),
    ("shr.u32 %d, %a, %b;", "u32 u32", [(B31, 31), (B31, 32), (B31, 100)], "u32", [1, 0, 0]),
    ("shr.s32 %d, %a, %b;", "s32 u32", [(-8, 1), (-8, 32), (8, 77)], "s32", [-4, -1, 0]),
    ("shl.b64 %d, %a, %b;", "b64 u32", [(1, 63), (1, 64)], "b64", [1 << 63, 0]),
    ("shr.s64 %d, %a, %b;", "s64 u32", [(-8, 1), (-8, 64)], "s64", [-4, -1]),
    ("and.b32 %d, %a, %b;", "b32 b32", [(12, 10)], "b32", [8]),
    ("xor.b64 %d, %a, %b;", "b64 b64", [(12, -1)], "b64", [2**64 - 13]),
    ("not.b32 %d, %a;", "b32", [0], "b32", [ONES]),
    ("max.f32 %d, %a, %b;", "f32 f32", [(NAN, 1), (NAN, NAN), (-0.0, 0.0)], "f32", [1, NAN, 0.0]),
    (
        "mul.f32 %d, %a, %b;",
        "f32 f32",
        [(1e-20, 1e-20), (1e30, 1e30)],
        "f32",
        [np.float32(1e-20) ** 2, INF],
    ),
    (
        "fma.rn.f32 %d, %a, %b, %c;",
        "f32 f32 f32",
        [(1 + 2**-23, 1 - 2**-23, -1)],
        "f32",
        [-(2.0**-46)],
    ),
    (
        "fma.rn.f64 %d, %a, %b, %c;",
        "f64 f64 f64",
        [(1 + 2**-52, 1 - 2**-52, -1)],
        "f64",
        [-(2.0**-104)],
    ),
    (
        "fma.rn.f64 %d, %a, %b, %c;",
        "f64 f64 f64",
        [(1 + 2**-52, (1 + 2**-52) * 2.0**-960, -(1 + 2**-51) * 2.0**-960)],
        "f64",
        [2.0**-1064],
    ),
    (
        "div.rn.f32 %d, %a, %b;",
        "f32 f32",
        [(1, 3), (-1, 0), (0, 0)],
        "f32",
        [np.float32(1) / 3, -INF, NAN],
    ),
    ("sqrt.rn.f32 %d, %a;", "f32", [2, -1, -0.0], "f32", [np.sqrt(np.float32(2)), NAN, -0.0]),
    ("rcp.rn.f64 %d, %a;", "f64", [3, 0], "f64", [1 / 3, INF]),
    ("abs.f32 %d, %a;", "f32", [-0.0, -2], "f32", [0, 2]),
    ("neg.f64 %d, %a;", "f64", [1, -0.0], "f64", [-1, 0.0]),
    ("cvt.rni.f32.f32 %d, %a;", "f32", [0.5, 1.5, -0.2], "f32", [0, 2, -0.0]),
    ("cvt.rn.f32.s32 %d, %a;", "s32", [16777217, -1], "f32", [16777216, -1]),
    ("cvt.sat.f32.f32 %d, %a;", "f32", [-1, 0.25, 2, NAN], "f32", [0, 0.25, 1, 0]),
    ("cvt.u32.u16 %d, %a;", "u16", [0xFFFF], "u32", [0xFFFF]),
    ("cvt.s64.s32 %d, %a;", "s32", [-1], "s64", [-1]),
    ("cvt.u64.u32 %d, %a;", "u32", [-1], "u64", [ONES]),
    (
        "cvt.rn.bf16.f32 %d, %a;",
        "f32",
        [1, 1 + 2**-8, 1 + 3 * 2**-8, NAN],
        "b16",
        [0x3F80, 0x3F80, 0x3F82, 0x7FFF],
    ),
    ("mov.b64 %d, {%a, %b};", "b32 b32", [(1, 2)], "b64", [2 << 32 | 1]),
    ("mov.b32 {%h1, %d}, %a;", "b32", [0x12345678], "b16", [0x1234]),
    ("mov.b32 %d, {%a, %b};", "b16 b16", [(0x5678, 0x1234)], "b32", [0x12345678]),
    ("rem.s64 %d, %a, %b;", "s64 s64", [(7, 2), (-7, 2), (7, -2), (-7, -2)], "s64", [1, -1, 1, -1]),
    ("rem.u32 %d, %a, %b;", "u32 u32", [(ONES, 10)], "u32", [5]),
    ("div.u32 %d, %a, %b;", "u32 u32", [(ONES, 10), (3, 4)], "u32", [ONES // 10, 0]),
    ("min.s64 %d, %a, %b;", "s64 s64", [(-1, 1)], "s64", [-1]),
    ("max.u32 %d, %a, %b;", "u32 u32", [(-1, 1)], "u32", [ONES]),
    (
        "bfi.b64 %d, %a, 0, %b, %c;",
        "b64 u32 u32",
        [(0xFF, 4, 4), (1, 63, 8), (1, 64, 1)],
        "b64",
        [0xF0, 1 << 63, 0],
    ),
    ("cvt.u32.u64 %d, %a;", "u64", [2**40 + 5], "u32", [5]),
    ("cvt.u16.u32 %d, %a;", "u32", [0x12345], "u16", [0x2345]),
    ("fma.rm.f32 %d, %a, %b, %c;", "f32 f32 f32", [(1, 1, -(2.0**-60))], "f32", [1 - 2**-24]),
    ("not.b64 %d, %a;", "b64", [0], "b64", [2**64 - 1]),
    ("ex2.approx.ftz.f32 %d, %a;", "f32", [1e-40, -140], "f32", [1, 0]),
    ("ex2.approx.f32 %d, %a;", "f32", [0, -INF, INF], "f32", [1, 0, INF]),
]
PREDICATES: list[tuple[str, str, list, list]] = [
    ("eq.s32", "s32 s32", [(1, 1), (1, 2)], [1, 0]),
    ("lt.s32", "s32 s32", [(-1, 1), (1, -1)], [1, 0]),
    ("lt.u32", "u32 u32", [(-1, 1), (1, -1)], [0, 1]),
    ("eq.f32", "f32 f32", [(NAN, NAN), (0.0, -0.0)], [0, 1]),
    ("ne.f32", "f32 f32", [(NAN, 1), (1, 2), (1, 1), (2, 1)], [0, 1, 0, 1]),
    ("neu.f32", "f32 f32", [(NAN, 1), (1, 1)], [1, 0]),
    ("gt.f64", "f64 f64", [(2, 1), (NAN, 1)], [1, 0]),
    ("leu.f32", "f32 f32", [(1, 2), (2, 1), (1, NAN)], [1, 0, 1]),
    ("num.f32", "f32 f32", [(1, 2), (1, NAN)], [1, 0]),
    ("nan.f32", "f32 f32", [(1, 2), (1, NAN)], [0, 1]),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0].split()[0])
def test_known_answers(row: tuple[str, str, list, str, list]) -> None:
    instruction, types, inputs, result, expected = row
    got = answers(instruction, types, inputs, result)
    wanted = np.array(expected, got.dtype)
    np.testing.assert_array_equal(got, wanted)
    if got.dtype.kind == "f":
        np.testing.assert_array_equal(np.signbit(got[got == 0]), np.signbit(wanted[wanted == 0]))


@pytest.mark.parametrize("row", PREDICATES, ids=lambda row: row[0])
def test_comparisons(row: tuple[str, str, list, list]) -> None:
    compare, types, inputs, expected = row
    got = answers(f"setp.{compare} %p1, %a, %b;\nselp.u32 %d, 1, 0, %p1;", types, inputs, "u32")
    assert got.tolist() == expected


def exact_round(value: Fraction, dtype: type, mode: str) -> float:
    """The number of dtype that `mode` chooses, by neighbours."""
    with np.errstate(all="ignore"):
        low = dtype(float(value))
        while Fraction(float(low)) > value:
            low = np.nextafter(low, dtype(-INF))
        high = np.nextafter(low, dtype(INF))
        while Fraction(float(high)) <= value:
            low, high = high, np.nextafter(high, dtype(INF))
    below, above = value - Fraction(float(low)), Fraction(float(high)) - value
    if below == 0 or mode == "rm":
        return low
    bits = low.view(f"u{low.itemsize}")
    return low if below < above or (below == above and bits & 1 == 0) else high


@pytest.mark.parametrize(
    ("dtype", "mode"), [(np.float32, "rn"), (np.float32, "rm"), (np.float64, "rn")]
)
def test_fused_multiply_add_rounds_once(dtype: type, mode: str) -> None:
    """Against rational arithmetic: random, cancelling, ties and almost ties, subnormal results."""
    rng = np.random.default_rng(3)
    digits = np.finfo(dtype).nmant
    small = 2.0 ** (np.finfo(dtype).minexp - 1)
    a, b, c = (rng.standard_normal(400).astype(dtype) for _ in range(3))
    c[:100] = -(a * b)[:100]
    a[100:200], b[100:200] = 1 + rng.integers(0, 8, 100) * 2.0**-digits, 1 + 2.0**-digits
    c[100:200] = rng.choice(
        [2.0 ** (-digits - 1), -(2.0 ** (-digits - 1)), 2.0 ** (digits + 1)], 100
    )
    c[200:300] = 1
    a[200:300], b[200:300] = (
        2.0 ** (-digits - 1),
        1 + rng.choice([0, 2.0**-digits, -(2.0**-digits)], 100),
    )
    a[300:], b[300:], c[300:] = a[300:] * small, b[300:], c[300:] * small
    got = (fma_down if mode == "rm" else fma)(a, b, c)
    for x, y, z, g in zip(*(v.tolist() for v in (a, b, c)), got, strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        assert g == exact_round(exact, dtype, mode), (x, y, z)


def test_fma_beyond_the_range() -> None:
    """Products that overflow or vanish, infinities, NaN and signed zeros."""
    big, a = 1e300, np.array([1e200, 1e200, INF, 0.0, -0.0, 5e-324, NAN])
    with np.errstate(all="ignore"):
        got = fma(
            a,
            np.array([1e200, 1e108, 2, INF, 1, 0.5, 1]),
            np.array([-big, -np.finfo(float).max, -1, 1, -0.0, 0, 1]),
        )
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(
            got, [INF, 1e308 - np.finfo(float).max, INF, NAN, -0.0, 0, NAN]
        )
    assert np.signbit(got[4])


@pytest.mark.parametrize(
    ("opcode", "function", "bound"),
    [("ex2.approx.f32", np.exp2, 2**-22), ("rcp.approx.ftz.f64", np.reciprocal, 2**-19)],
)
def test_approximations_err_within_their_bound(opcode: str, function: Any, bound: float) -> None:
    """Not exact, not beyond the bound, the same for the same bits, and different for another
    seed."""
    type = opcode.split(".")[-1]
    x = np.random.default_rng(5).uniform(0.01, 3, 512).astype(DTYPES[type])
    f, size = ("fd", 8) if type == "f64" else ("f", 4)
    body = f"""mul.wide.u32 %rd9, %r0, {size}; add.s64 %rd8, %rd9, %rd1; ld.global.{type} %{f}1, [%rd8];
    {opcode} %{f}2, %{f}1; add.s64 %rd8, %rd9, %rd2; st.global.{type} [%rd8], %{f}2;"""
    results = []
    for seed in (0, 0, 1):
        out = np.zeros_like(x)
        run(kernel(body, 2), "k", 1, 512, [x, out], seed=seed)
        results.append(out)
    exact = function(x.astype(np.float64))
    error = np.abs(results[0] - exact) / exact
    assert 0.25 * bound < error.max() <= bound
    np.testing.assert_array_equal(results[0], results[1])
    assert (results[0] != results[2]).any()


def threads(body: str, count: int = 32, grid: int = 1, **options: Any) -> np.ndarray:
    """Each thread's %r1 (u32) after the body; %r2 is the block's number."""
    tail = f"mad.lo.s32 %r30, %r2, {count}, %r0;\nmul.wide.u32 %rd9, %r30, 4;\nadd.s64 %rd9, %rd9, %rd1;\n"
    out = np.zeros(count * grid, np.uint32)
    extra = options.pop("extra", "")
    text = kernel(f"mov.u32 %r2, %ctaid.x;\n{body}\n{tail}st.global.u32 [%rd9], %r1;", extra=extra)
    run(text, "k", grid, count, [out], **options)
    return out


def test_divergent_loop_and_reconvergence() -> None:
    """Each thread loops as often as its number; both ways of a branch run."""
    body = """
    mov.u32 %r1, 0; mov.u32 %r3, %r0;
$LOOP: setp.eq.u32 %p1, %r3, 0;
    @%p1 bra $DONE;
    add.s32 %r1, %r1, %r3; sub.s32 %r3, %r3, 1;
    bra.uni $LOOP;
$DONE: and.b32 %r4, %r0, 1; setp.ne.u32 %p2, %r4, 0;
    @%p2 bra $ODD;
    add.s32 %r1, %r1, 1000; bra $JOIN;
$ODD: add.s32 %r1, %r1, 2000;
$JOIN: @%p2 bra $END;
    add.s32 %r1, %r1, 10000;
$END:"""
    n = np.arange(70)
    np.testing.assert_array_equal(
        threads(body, 70), n * (n + 1) // 2 + np.where(n % 2, 2000, 11000)
    )


def test_early_exit_and_special_registers() -> None:
    body = "setp.lt.u32 %p1, %r0, 5; @%p1 bra $A; ret; $A: mov.u32 %r4, %ntid.x; mad.lo.s32 %r1, %r0, 100, %r4;"
    assert threads(body, 40).tolist() == [40, 140, 240, 340, 440] + [0] * 35


def test_blocks_and_seeds() -> None:
    """Many blocks in chunks; the report counts each thread's instructions; a seed repeats."""
    np.testing.assert_array_equal(
        threads("add.s32 %r1, %r2, %r0;", 64, 700),
        (np.arange(700)[:, None] + np.arange(64)).ravel(),
    )
    out = np.zeros(64, np.uint32)
    text = kernel(
        "mul.wide.u32 %rd9, %r0, 4;\nadd.s64 %rd9, %rd9, %rd1;\nst.global.u32 [%rd9], %r0;\nbar.sync 0;"
    )
    report = run(text, "k", 1, 64, [out])
    assert (report.instructions, report.barriers) == (64 * 7, 1)
    assert report.written["global"] == 256
    assert report.histogram["st.global.u32"] == 64


SHUFFLES = {
    "bfly.b32 %r1|%p1, %r0, 1, 31": lambda i: i ^ 1,
    "up.b32 %r1|%p1, %r0, 3, 0": lambda i: np.where(i >= 3, i - 3, i),
    "idx.b32 %r1|%p1, %r0, 7, 31": lambda i: np.full(32, 7),
    "up.b32 %r1|%p1, %r0, 2, 0x1800": lambda i: np.where(i % 8 >= 2, i - 2, i),
    "idx.b32 %r1|%p1, %r0, 1, 0x1c1f": lambda i: i // 4 * 4 + 1,  # segments of 4
    "bfly.b32 %r1|%p1, %r0, 4, 0x1c03": lambda i: np.where(i ^ 4 <= (i & 28 | 3), i ^ 4, i),
}


@pytest.mark.parametrize("form", SHUFFLES)
def test_shuffles(form: str) -> None:
    np.testing.assert_array_equal(threads(f"shfl.sync.{form}, -1;"), SHUFFLES[form](np.arange(32)))


def test_reductions_of_a_warp() -> None:
    np.testing.assert_array_equal(
        threads("redux.sync.max.u32 %r1, %r0, -1;", 64), [31] * 32 + [63] * 32
    )
    body = "sub.s32 %r3, %r0, 40;\nredux.sync.min.s32 %r1, %r3, -1;\nadd.s32 %r1, %r1, 40;"
    np.testing.assert_array_equal(threads(body, 64), [0] * 32 + [32] * 32)
    leave = (
        "setp.{} %p1, %r0, 19;\n@%p1 bra $A;\nredux.sync.{} %r1, %r0, -1;\nbra $B;\n$A: ret;\n$B:"
    )
    assert (
        threads(leave.format("gt.u32", "max.u32")).tolist() == [19] * 20 + [0] * 12
    )  # lanes that exited don't count
    assert threads(leave.format("lt.u32", "min.s32")).tolist() == [0] * 19 + [19] * 13
    assert threads("redux.sync.max.u32 %r1, %r0, -1;", 20).tolist() == [19] * 20


def test_lanes_wait_for_their_mates() -> None:
    """A shuffle after divergent code waits until all have come."""
    late = "setp.lt.u32 %p1, %r0, 7;\n@%p1 bra $A;\nbra $B;\n$C: shfl.sync.bfly.b32 %r1|%p2, %r3, 1, 31, -1;\nbra $END;\n"
    late += "$A: mov.u32 %r3, 5;\nbra $C;\n$B: mov.u32 %r3, 6;\nbra $C;\n$END:"
    assert threads(late).tolist() == [5] * 6 + [6, 5] + [6] * 24


def test_lanes_do_not_wait_for_mates_that_exit_later() -> None:
    body = "setp.lt.u32 %p1, %r0, 9;\n@%p1 bra $A;\nbar.warp.sync -1;\nmov.u32 %r1, 9;\nbra $B;\n$A: ret;\n$B:"
    assert threads(body).tolist() == [0] * 9 + [9] * 23


def test_warps_that_left_before_the_barrier() -> None:
    body = "setp.lt.u32 %p1, %r0, 64;\n@%p1 bra $A;\nret;\n$A: bar.sync 0;\nmov.u32 %r1, 9;"
    assert threads(body, 128).tolist() == [9] * 64 + [0] * 64


def test_shared_memory() -> None:
    """Static and dynamic, by addresses of 32 and of 64 bits."""
    body = """
    .shared .align 4 .b8 buffer[256];
    mov.u32 %r3, buffer; shl.b32 %r4, %r0, 2; add.s32 %r5, %r3, %r4;
    st.shared.u32 [%r5], %r0;
    mov.u64 %rd3, dynamic; mul.wide.u32 %rd4, %r0, 4; add.s64 %rd3, %rd3, %rd4;
    st.shared.u32 [%rd3], 100;
    bar.sync 0;
    xor.b32 %r6, %r4, 252; add.s32 %r6, %r6, %r3; ld.shared.u32 %r7, [%r6];
    ld.shared.u32 %r8, [%rd3]; add.s32 %r1, %r7, %r8;"""
    extra = ".extern .shared .align 16 .b8 dynamic[];"
    np.testing.assert_array_equal(
        threads(body, 64, 2, shared=256, extra=extra), np.tile(163 - np.arange(64), 2)
    )
    with pytest.raises(
        PTXError,
        match=r"out of bounds: shared byte 128 of dynamic shared memory, which has 128 bytes",
    ):
        threads(body, 64, shared=128, extra=extra)


def test_atomics() -> None:
    """Each thread sees another number; threads come in a random order; f32 flushes in global memory
    alone."""
    target, seen = np.zeros(1, np.uint32), np.zeros(32, np.uint32)
    tail = "mul.wide.u32 %rd9, %r0, 4;\nadd.s64 %rd9, %rd9, %rd2;\nst.global.u32 [%rd9], %r3;"
    run(kernel(f"atom.global.add.u32 %r3, [%rd1], 2;\n{tail}", 2), "k", 1, 32, [target, seen])
    assert target[0] == 64
    assert seen.tolist() != sorted(seen.tolist()) == [*range(0, 64, 2)]
    out = np.zeros(2, np.float32)
    body = """.shared .align 4 .b8 sum[4]; setp.eq.u32 %p1, %r0, 0; @%p1 bra $A; ret; $A:
    mov.u64 %rd2, sum; st.shared.f32 [%rd2], 0f00000000; mov.b32 %f1, 5;
    atom.global.add.f32 %f3, [%rd1], %f1; atom.shared.add.f32 %f3, [%rd2], %f1;
    ld.shared.f32 %f2, [%rd2]; st.global.f32 [%rd1+4], %f2;"""
    run(kernel(body), "k", 1, 32, [out])
    assert out.view(np.uint32).tolist() == [0, 5]


def test_vector_stores_race_in_any_element() -> None:
    """All blocks write {0, the block's number} to one place: the first element agrees, the second
    doesn't."""
    text = kernel("mov.u32 %r2, %ctaid.x; mov.u32 %r3, 0; st.global.v2.u32 [%rd1], {%r3, %r2};")
    with pytest.raises(PTXError, match="race"):
        run(text, "k", 700, 1024, [np.zeros(2, np.uint32)])


def test_races_are_those_of_the_definition() -> None:
    """Random reads, writes and barriers at one place, by several lanes at once: the four reads and
    the write that are remembered find a race exactly where one with all earlier accesses finds
    it."""

    class Race(Exception):
        pass

    def fail(wrong: np.ndarray, message: Any) -> None:
        raise Race

    rng, warps, found = np.random.default_rng(11), 2, 0
    for _ in range(1500):
        order, span = Order(2, warps), rng.choice([64, 128])  # of one block or of two
        arena = Arena("global", 0, 4, order, True, fail)
        position = arena.add("x", 4)
        arena.allocate(1)
        arena.valid.fill(True)
        past: list[tuple[int, int, bool]] = []  # thread, time, whether it wrote
        for _ in range(16):
            order.now += 1
            kind = rng.choice(["read"] * 6 + ["write", "warp", "warp", "warp", "block"])
            if kind == "warp":
                order.warp_time[rng.integers(0, 2 * warps)] = order.now
            elif kind == "block":
                order.block_time[rng.integers(0, 2)] = order.now
            else:
                threads = rng.choice(
                    span, 1 if kind == "write" else rng.integers(1, 4), replace=False
                )
                threads = np.unique(
                    threads // 30 * 30 + threads % 2
                )  # few lanes, so that they meet again
                race = any(
                    other != thread
                    and (wrote or kind == "write")
                    and not (other // 64 == thread // 64 and time < order.block_time[thread // 64])
                    and not (other // 32 == thread // 32 and time < order.warp_time[thread // 32])
                    for other, time, wrote in past
                    for thread in threads
                )
                verify = arena.check_read if kind == "read" else arena.check_write
                arguments = [
                    np.full(len(threads), position),
                    4,
                    threads,
                    *([False] if kind == "read" else []),
                ]
                if race:
                    found += 1
                    with pytest.raises(Race):
                        verify(*arguments)
                    break
                verify(*arguments)
                past += [(int(thread), order.now, kind == "write") for thread in threads]
    assert 300 < found < 1400


COPY = """
    .shared .align 16 .b8 buffer[512];
    mov.u32 %r3, buffer; shl.b32 %r4, %r0, 4; add.s32 %r3, %r3, %r4; mul.wide.u32 %rd3, %r0, 16;
    add.s64 %rd4, %rd3, %rd1;
    cp.async.cg.shared.global [%r3], [%rd4], 16;
    cp.async.commit_group;
    {wait}
    ld.shared.v4.u32 {{%r5, %r6, %r7, %r8}}, [%r3];
    add.s64 %rd5, %rd3, %rd2;
    st.global.v4.u32 [%rd5], {{%r5, %r6, %r7, %r8}};"""


def test_asynchronous_copies() -> None:
    """Bytes land at the wait; without it they may not be read."""
    x = np.arange(128, dtype=np.uint32)
    y = np.zeros_like(x)
    run(kernel(COPY.format(wait="cp.async.wait_group 0;"), 2), "k", 1, 32, [x, y])
    np.testing.assert_array_equal(y, x)
    for wait in ("", "cp.async.wait_group 1;"):
        with pytest.raises(PTXError, match=r"ld\.shared.*in flight by cp\.async"):
            run(kernel(COPY.format(wait=wait), 2), "k", 1, 32, [x, x.copy()])


REFUSED = {
    "add.f99 %r1, %r1, %r1;": "the instruction add.f99 is not supported",
    "add.odd.s32 %r1, %r1, %r1;": "the instruction add.odd.s32",
    "add.s64 %rd1, %r1, %r1;": ".b32 %r1 as .s64",
    "wgmma.fence.sync.aligned;": "the instruction wgmma",
    "fma.rz.f32 %f1, %f1, %f1, %f1;": "the instruction fma.rz.f32",
    "ex2.approx.f64 %fd1, %fd1;": "the instruction ex2.approx.f64",
    "mov.u32 %r1, %smid;": "special register %smid",
    "mov.u64 %rd1, nowhere;": "the name nowhere",
    "setp.gt.u32 %p1, %r0, 3; @%p1 mov.u32 %r1, 5;": "a guard",
    "bra $NOWHERE;": "this form of bra",
    "ld.volatile.global.u32 %r1, [%rd1];": "the instruction ld.volatile",
    "atom.global.max.u32 %r1, [%rd1], 5;": "the instruction atom.global.max",
    "cp.async.cg.shared.global [%r1], [%rd1], 4;": "this form of cp.async",
    "shfl.sync.down.b32 %r1|%p1, %r0, 1, 31, -1;": "the instruction shfl.sync.down",
    "shfl.sync.idx.b32 %r1|%p1, %r0, 9, 31, 0xFF;": "member mask 0xff",
    "redux.sync.add.u32 %r1, %r0, -1;": "the instruction redux.sync.add.u32",
    "bar.sync 1;": "this form of bar.sync",
    "bar.sync 0, 64;": "this form of bar.sync",
    "$A: bra $A;": "endless loop",
    "setp.gt.u32 %p1, %r0, 3; $A: @%p1 bra $A; bra $B; $C: @!%p1 bra $C; $B: bra $C;": "endless loop",
    "st.global.v2.u32 [%rd1+-8], {%r0, %r0};": "out of bounds",
    "ld.global.u32 %r1, [%rd1+4];": "out of bounds: global byte 4 of argument 0 uint32.1., which has 4 bytes",
    "ld.global.u32 %r1, [%rd1+-4];": "out of bounds: global byte -4",
    "ld.global.u16 %h1, [%rd1+1];": "misaligned",
    "ld.global.u64 %rd2, [%rd1];": "out of bounds",
    "ld.global.u32 %r1, [%r31];": "near no variable",
    "st.global.u32 [%rd1], %r0;": "by the same instruction",
    "setp.le.u32 %p1, %r0, 3; @%p1 bra $A; bar.sync 0; $A: mov.u32 %r1, 1;": "thread .4, 0, 0.: barrier in",
    ".shared .align 4 .b8 s[64]; mov.u64 %rd2, s; st.shared.v2.u32 [%rd2], {%r0, %r0};": "misaligned",
    "setp.gt.u32 %p1, %r0, 3; @%p1 bra $A; bar.warp.sync -1; bra $A; $A: bar.warp.sync -1;": "lanes missing",
}


@pytest.mark.parametrize("body", REFUSED)
def test_what_is_refused(body: str) -> None:
    """Each error names the kernel, the line and the instruction's text."""
    with pytest.raises(PTXError, match=REFUSED[body]) as caught:
        run(kernel(body), "k", 1, 32, [np.zeros(1, np.uint32)], limit=1000)
    assert "k, line" in str(caught.value)


UNREADABLE = {
    ".local .align 4 .b8 stack[16];": "line 17: can't read '.local .align 4 .b8 stack",
    ".shared .align 4 .v4 s[4];": "can't read the variable '.align 4 .v4 s",
    ".reg .b128 %q;": r"\.reg \.b128 %q: such a type",
    "{ .reg .b32 %r1; }": "or a name that is taken",
}


@pytest.mark.parametrize("body", UNREADABLE)
def test_what_cannot_be_read(body: str) -> None:
    with pytest.raises(PTXError, match=UNREADABLE[body]):
        run(kernel(body), "k", 1, 32, [np.zeros(1, np.uint32)])


def test_functions_are_not_read() -> None:
    with pytest.raises(PTXError, match=r"can't read '\.func' at the top of a module"):
        run(kernel("", extra=".func f() { ret; }"), "k", 1, 32, [np.zeros(1, np.uint32)])


def test_read_only_memory() -> None:
    x = np.zeros(1, np.uint32)
    with pytest.raises(PTXError, match=r"ld\.global\.nc of memory that this kernel writes"):
        run(kernel("st.global.u32 [%rd1], 5; ld.global.nc.f32 %f1, [%rd1];"), "k", 1, 1, [x])
    x.flags.writeable = False
    with pytest.raises(PTXError, match="write to read-only memory: global byte 0 of argument 0"):
        run(kernel("st.global.u32 [%rd1], 5;"), "k", 1, 1, [x])


def test_wrong_arguments() -> None:
    text, x = kernel(""), np.zeros((4, 4), np.float32)
    for arguments, message in [
        ([], "arguments must be 1 for k, got 0"),
        ([np.float32(1)], "argument 0 must have 8 bytes"),
        ([np.broadcast_to(x, (2, 4, 4))], "argument 0 must be C-contiguous"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(text, "k", 1, 32, arguments)
    with pytest.raises(ValueError, match="must not overlap"):
        run(kernel("", 2), "k", 1, 32, [x[:2], x[1:]])
    with pytest.raises(ValueError, match="kernel must be one of"):
        run(text, "q", 1, 32, [x])
    with pytest.raises(ValueError, match="block must have"):
        run(text, "k", 1, 2048, [x])
    with pytest.raises(ValueError, match="grid 1 to"):
        run(text, "k", (1, 1 << 16), 32, [x])
    with pytest.raises(ValueError, match=r"shared memory must be at most 49152 bytes .* got 49153"):
        run(kernel(".shared .align 4 .b8 s[1024];"), "k", 1, 32, [x], shared=(47 << 10) + 1)


# Kernels compiled from CUDA C; the planted mistakes are in ptx/planted.py


def compiled(source: str, target: str = "sm_90") -> str:
    """CUDA C to PTX by NVRTC."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:  # the bindings, or the library behind them
        pytest.skip(f"NVRTC comes with the extra kernels ({str(error).splitlines()[0]})")
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"planted.cu", 0, [], [])
    options = [f"--gpu-architecture={target}".replace("sm_", "compute_").encode(), b"--std=c++17"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytes(
        bytearray(size + 1)
    )  # NVRTC writes into it: b" " * 1 would be the object that all share
    nvrtc.nvrtcGetProgramLog(program, log)
    assert int(status) == 0, log.decode()
    _, size = nvrtc.nvrtcGetPTXSize(program)
    text = bytes(bytearray(size + 1))
    nvrtc.nvrtcGetPTX(program, text)
    nvrtc.nvrtcDestroyProgram(program)
    return text[:size].decode()


def result(case: Case, ptx: str, fresh: bool = True, **options: Any) -> np.ndarray:
    dtype = case.x.dtype
    y = (
        np.zeros(case.size, dtype)
        if "atomicAdd(y" in case.source
        else np.full(case.size, -1).astype(dtype)
    )
    unwritten = [y] if fresh and "atomicAdd(y" not in case.source else []
    run(
        ptx,
        "k",
        case.grid,
        case.block,
        [case.x, y, np.int32(len(case.x))],
        uninitialised=unwritten,
        limit=20_000,
        **options,
    )
    return y


@pytest.mark.parametrize("name", CASES)
def test_right_kernels_are_clean(name: str) -> None:
    case = CASES[name]
    for target in ("sm_80", "sm_90", "sm_100"):
        ptx = compiled(case.source, target)
        for seed in range(3):
            np.testing.assert_allclose(
                result(case, ptx, seed=seed), case.wanted(case.x), rtol=2e-5, atol=2e-5
            )


@pytest.mark.parametrize("bug", BUGS)
def test_planted_mistakes_are_caught(bug: str) -> None:
    name, right, wrong, message = BUGS[bug]
    case = CASES[name]
    assert case.source.count(right) >= 1
    before, _, after = (
        case.source.rpartition(right)
        if bug == "write not awaited"
        else case.source.partition(right)
    )
    ptx = compiled(before + wrong + after)
    if message is WRONG:
        assert not np.allclose(result(case, ptx), case.wanted(case.x), rtol=1e-3, atol=1e-3)
        return
    with pytest.raises(PTXError, match=message) as caught:
        result(case, ptx, fresh="__ldg" not in wrong)
    assert re.search(
        r"k, line \d+: `.*;`: block \(\d, 0, 0\), thread \(\d+, 0, 0\): ", str(caught.value)
    )


@pytest.mark.parametrize(
    "bug", ["read while others write", "write not awaited", "stage overwritten early"]
)
def test_a_missing_barrier_shows_in_results(bug: str) -> None:
    """Even without looking for races: warps go at unequal speed, in an order that the seed
    draws."""
    name, right, wrong, _ = BUGS[bug]
    before, _, after = CASES[name].source.rpartition(right)
    ptx, wanted = compiled(before + wrong + after), CASES[name].wanted(CASES[name].x)
    seen = []
    for seed in range(6):
        try:
            seen.append(
                np.allclose(result(CASES[name], ptx, seed=seed, races=False), wanted, atol=1e-4)
            )
        except PTXError:  # the bytes are there, but in flight
            seen.append(False)
    assert not all(seen)
