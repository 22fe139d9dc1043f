"""Known answers of the instructions that touch one thread's registers alone."""

from __future__ import annotations

import numpy as np
import pytest

from ptx import run
from ptx.parse import DTYPES
from ptx.written import INF, NAN, kernel


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
# of 64 bits, around the places where a sum of 32-bit halves carries
PLACES = (0, 1, 3, 2**32 - 1, 2**32, 2**32 + 1, 2**63 - 1, 2**63, 0x123456789ABCDEF0, 2**64 - 1)
FACTORS = [(a, b) for a in PLACES for b in PLACES]

TABLE: list[tuple[str, str, list, str, list]] = [
    ("add.s32 %d, %a, %b;", "s32 s32", [(1, 2), (2**31 - 1, 1)], "s32", [3, -(2**31)]),
    ("mul.lo.s32 %d, %a, %b;", "s32 s32", [(-3, 5), (1 << 20, 1 << 20)], "s32", [-15, 0]),
    ("mul.wide.s32 %d, %a, %b;", "s32 s32", [(-(2**31), 2), (-3, -4)], "s64", [-(2**32), 12]),
    ("mul.wide.u32 %d, %a, %b;", "u32 u32", [(ONES, ONES)], "u64", [ONES * ONES]),
    (
        "mul.hi.u32 %d, %a, %b;",
        "u32 u32",
        [(ONES, ONES), (B31, 2), (3, 5)],
        "u32",
        [ONES - 1, 1, 0],
    ),
    (
        "mul.hi.s32 %d, %a, %b;",
        "s32 s32",
        [(-1, 1), (-(2**31), -(2**31)), (2**31 - 1, 4), (-3, 5)],
        "s32",
        [-1, 2**30, 1, -1],
    ),
    ("mul.hi.u16 %d, %a, %b;", "u16 u16", [(0xFFFF, 0xFFFF), (0x100, 0x100)], "u16", [0xFFFE, 1]),
    ("mul.hi.s16 %d, %a, %b;", "s16 s16", [(-1, 1), (0x100, 0x100)], "s16", [-1, 1]),
    ("mul.hi.u64 %d, %a, %b;", "u64 u64", FACTORS, "u64", [a * b >> 64 for a, b in FACTORS]),
    (
        "mul.hi.s64 %d, %a, %b;",
        "s64 s64",
        [(a - 2**63, b - 2**63) for a, b in FACTORS],
        "s64",
        [(a - 2**63) * (b - 2**63) >> 64 for a, b in FACTORS],
    ),
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
    (
        "copysign.f32 %d, %a, %b;",
        "f32 f32",
        [(-1, 2), (1, -2), (-0.0, 0), (0, -INF), (-INF, 3), (-1, NAN)],
        "f32",
        [-2, 2, -0.0, INF, -3, NAN],
    ),
    ("copysign.f64 %d, %a, %b;", "f64 f64", [(-0.0, 1e300), (5, -1)], "f64", [-1e300, 1]),
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
    (  # the first is the upper half; to nearest even; what overflows
        "cvt.rn.bf16x2.f32 %d, %a, %b;",
        "f32 f32",
        [
            (1, -2),
            (1 + 2**-8, 1 + 3 * 2**-8),
            (1 + 2**-8 + 2**-23, 1 + 3 * 2**-8 - 2**-22),
            (NAN, -INF),
            (-0.0, NAN),
            (float.fromhex("0x1.ffp127"), float.fromhex("0x1.fefffep127")),
            (2.0**-133, 2.0**-134),
        ],
        "b32",
        [0x3F80_C000, 0x3F80_3F82, 0x3F81_3F81, 0x7FFF_FF80, 0x8000_7FFF, 0x7F80_7F7F, 0x0001_0000],
    ),
    # the lowest bits of a wider register
    ("cvt.u32.u16 %d, %a;", "b32", [0x1234_FEDC], "u32", [0xFEDC]),
    ("cvt.s32.s16 %d, %a;", "b32", [0x1234_8000, 0x8000_1234], "s32", [-(2**15), 0x1234]),
    ("cvt.s64.s32 %d, %a;", "b64", [0x1_8000_0000, 7 << 32], "s64", [-(2**31), 0]),
    ("cvt.u16.u8 %d, %a;", "b32", [0x1234_56FF], "u16", [0xFF]),
    ("cvt.rn.f32.s16 %d, %a;", "b32", [0x0001_FFFF], "f32", [-1]),
    ("cvt.rn.f64.u32 %d, %a;", "b64", [0x5_0000_0003], "f64", [3]),
    ("mov.b64 %d, {%a, %b};", "b32 b32", [(1, 2)], "b64", [2 << 32 | 1]),
    ("mov.b32 {%h1, %d}, %a;", "b32", [0x12345678], "b16", [0x1234]),
    ("mov.b64 {_, %d}, %a;", "b64", [1 << 40], "b32", [256]),
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
    ("rcp.approx.ftz.f32 %d, %a;", "f32", [1e-40, -0.0, -INF, 1.5e38], "f32", [INF, -INF, -0.0, 0]),
    ("ex2.approx.f32 %d, %a;", "f32", [0, -INF, INF], "f32", [1, 0, INF]),
]

PREDICATES: list[tuple[str, str, list, list]] = [
    ("eq.s32", "s32 s32", [(1, 1), (1, 2)], [1, 0]),
    ("lt.s32", "s32 s32", [(-1, 1), (1, -1)], [1, 0]),
    ("lt.u32", "u32 u32", [(-1, 1), (1, -1)], [0, 1]),
    ("eq.f32", "f32 f32", [(NAN, NAN), (0.0, -0.0)], [0, 1]),
    ("ne.f32", "f32 f32", [(NAN, 1), (1, 2), (1, 1), (2, 1)], [0, 1, 0, 1]),
    ("neu.f32", "f32 f32", [(NAN, 1), (1, 1)], [1, 0]),
    ("equ.f64", "f64 f64", [(NAN, 1), (0.0, -0.0), (1, 2), (2, 1)], [1, 1, 0, 0]),
    ("eq.b64", "b64 b64", [(2**63, 2**63), (2**63, 0)], [1, 0]),
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
