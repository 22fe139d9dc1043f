"""The interpreter of PTX: known answers of every family of instructions, and what it must refuse."""

from __future__ import annotations

import re
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ptx import InterpreterLaunch, PTXError, run
from ptx.arithmetic import APPROXIMATE, fma32, fma64, fma_half, from_half, to_half
from ptx.parse import DTYPES
from ptx.planted import BUGS, CASES, FLOATS, WRONG, Case

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
    return (
        f"{HEAD}{extra}\n.visible .entry k(\n{formal}\n)\n{{{REGISTERS}{loads}mov.u32 %r0, %tid.x;\n{body}\nret;\n}}\n"
    )


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
        lines.append(f"mad.lo.u64 %rd11, %rd10, {width[name]}, %rd{i + 1};")
        lines.append(f"ld.global.{'b' if width[name] > 1 else 'u'}{8 * width[name]} %{'abc'[i]}, [%rd11];")
    lines.append(instruction)
    lines.append(f"mad.lo.u64 %rd11, %rd10, {width[result]}, %rd{len(names) + 1};")
    lines.append(f"st.global.b{8 * width[result]} [%rd11], %d;")
    out = np.zeros(len(rows), DTYPES[result])
    run(kernel("\n".join(lines), len(names) + 1), "k", 1, len(rows), [*columns, out])
    return out


B31, ONES = 1 << 31, 0xFFFFFFFF
TABLE: list[tuple[str, str, list, str, list]] = [
    ("add.s32 %d, %a, %b;", "s32 s32", [(1, 2), (2**31 - 1, 1)], "s32", [3, -(2**31)]),
    ("add.sat.s32 %d, %a, %b;", "s32 s32", [(2**31 - 1, 1), (-(2**31), -1)], "s32", [2**31 - 1, -(2**31)]),
    ("sub.u64 %d, %a, %b;", "u64 u64", [(0, 1), (5, 3)], "u64", [2**64 - 1, 2]),
    ("mul.lo.s32 %d, %a, %b;", "s32 s32", [(-3, 5), (1 << 20, 1 << 20)], "s32", [-15, 0]),
    ("mul.hi.s32 %d, %a, %b;", "s32 s32", [(-3, 5), (1 << 20, 1 << 20)], "s32", [-1, 256]),
    ("mul.hi.u32 %d, %a, %b;", "u32 u32", [(ONES, ONES)], "u32", [ONES - 1]),
    ("mul.hi.u64 %d, %a, %b;", "u64 u64", [(2**64 - 1, 2**64 - 1), (2**63, 6)], "u64", [2**64 - 2, 3]),
    ("mul.hi.s64 %d, %a, %b;", "s64 s64", [(-1, 1), (-(2**63), -(2**63))], "s64", [-1, 2**62]),
    ("mul.wide.s32 %d, %a, %b;", "s32 s32", [(-(2**31), 2), (-3, -4)], "s64", [-(2**32), 12]),
    ("mul.wide.u32 %d, %a, %b;", "u32 u32", [(ONES, ONES)], "u64", [ONES * ONES]),
    ("mul.wide.u16 %d, %a, %b;", "u16 u16", [(0xFFFF, 0xFFFF)], "u32", [0xFFFF * 0xFFFF]),
    ("mad.lo.s32 %d, %a, %b, %c;", "s32 s32 s32", [(3, -4, 5)], "s32", [-7]),
    ("mad.wide.s32 %d, %a, %b, %c;", "s32 s32 s64", [(-(2**31), 4, 1)], "s64", [1 - 2**33]),
    ("div.s32 %d, %a, %b;", "s32 s32", [(7, 2), (-7, 2), (7, -2), (-7, -2), (5, 0)], "s32", [3, -3, -3, 3, -1]),
    ("rem.s32 %d, %a, %b;", "s32 s32", [(7, 2), (-7, 2), (7, -2), (-7, -2)], "s32", [1, -1, 1, -1]),
    ("div.u64 %d, %a, %b;", "u64 u64", [(2**64 - 1, 10), (3, 4)], "u64", [(2**64 - 1) // 10, 0]),
    ("rem.u64 %d, %a, %b;", "u64 u64", [(2**64 - 1, 10)], "u64", [5]),
    ("min.s32 %d, %a, %b;", "s32 s32", [(-1, 1)], "s32", [-1]),
    ("min.u32 %d, %a, %b;", "u32 u32", [(-1, 1)], "u32", [1]),
    ("abs.s32 %d, %a;", "s32", [-5, 5], "s32", [5, 5]),
    ("add.cc.u32 %d, %a, %b; addc.u32 %d, 5, 0;", "u32 u32", [(ONES, 1), (1, 1)], "u32", [6, 5]),
    ("sub.cc.u32 %d, %a, %b; subc.u32 %d, 5, 0;", "u32 u32", [(0, 1), (1, 1)], "u32", [4, 5]),
    (
        "mad.lo.cc.u32 %d, %a, %b, 9; madc.hi.u32 %d, %a, %b, 0;",
        "u32 u32",
        [(ONES, ONES), (0, 0)],
        "u32",
        [ONES - 1, 0],
    ),
    ("mad.lo.cc.u32 %d, %a, %b, -1; addc.u32 %d, 0, 0;", "u32 u32", [(ONES, ONES), (0, 0)], "u32", [1, 0]),
    ("neg.s32 %d, %a;", "s32", [-5, 5], "s32", [5, -5]),
    ("shl.b32 %d, %a, %b;", "b32 u32", [(1, 31), (1, 32), (1, 33), (3, ONES)], "b32", [B31, 0, 0, 0]),
    ("shr.u32 %d, %a, %b;", "u32 u32", [(B31, 31), (B31, 32), (B31, 100)], "u32", [1, 0, 0]),
    ("shr.s32 %d, %a, %b;", "s32 u32", [(-8, 1), (-8, 32), (8, 77)], "s32", [-4, -1, 0]),
    ("shl.b64 %d, %a, %b;", "b64 u32", [(1, 63), (1, 64)], "b64", [1 << 63, 0]),
    ("shr.s64 %d, %a, %b;", "s64 u32", [(-8, 1), (-8, 64)], "s64", [-4, -1]),
    ("shr.u16 %d, %a, %b;", "u16 u32", [(0x8000, 15), (0x8000, 16)], "u16", [1, 0]),
    ("shf.l.wrap.b32 %d, %a, %b, %c;", "b32 b32 u32", [(B31, 1, 1), (7, 9, 32)], "b32", [3, 9]),
    ("shf.l.clamp.b32 %d, %a, %b, %c;", "b32 b32 u32", [(7, 9, 32), (7, 9, 50)], "b32", [7, 7]),
    ("shf.r.wrap.b32 %d, %a, %b, %c;", "b32 b32 u32", [(2, 1, 1), (2, 1, 33)], "b32", [B31 + 1, B31 + 1]),
    ("shf.r.clamp.b32 %d, %a, %b, %c;", "b32 b32 u32", [(2, 1, 40)], "b32", [1]),
    ("and.b32 %d, %a, %b;", "b32 b32", [(12, 10)], "b32", [8]),
    ("xor.b64 %d, %a, %b;", "b64 b64", [(12, -1)], "b64", [2**64 - 13]),
    ("not.b32 %d, %a;", "b32", [0], "b32", [ONES]),
    ("cnot.b32 %d, %a;", "b32", [0, 7], "b32", [1, 0]),
    ("lop3.b32 %d, %a, %b, %c, 0xE8;", "b32 b32 b32", [(0b1100, 0b1010, 0b1001)], "b32", [0b1000]),
    ("lop3.b32 %d, %a, %b, %c, 0x96;", "b32 b32 b32", [(0b1100, 0b1010, 0b1001)], "b32", [0b1111]),
    ("bfe.u32 %d, %a, %b, %c;", "u32 u32 u32", [(0xABCD, 4, 8), (ONES, 28, 9), (9, 0, 0)], "u32", [0xBC, 15, 0]),
    ("bfe.s32 %d, %a, %b, %c;", "s32 u32 u32", [(0xF0, 4, 4), (0x70, 4, 4), (B31, 28, 9)], "s32", [-1, 7, -8]),
    ("bfe.u64 %d, %a, %b, %c;", "u64 u32 u32", [(2**63, 60, 4), (-1, 0, 64)], "u64", [8, 2**64 - 1]),
    ("bfi.b32 %d, %a, 0, %b, %c;", "b32 u32 u32", [(0xFF, 4, 4), (1, 31, 8), (1, 32, 1)], "b32", [0xF0, B31, 0]),
    ("prmt.b32 %d, %a, %b, 0x5410;", "b32 b32", [(0x33221100, 0x77665544)], "b32", [0x55441100]),
    ("prmt.b32 %d, %a, 0, 0xBBBB;", "b32", [0x80000000, 0x7F000000], "b32", [ONES, 0]),
    ("popc.b32 %d, %a;", "b32", [0, ONES, 0x101], "u32", [0, 32, 2]),
    ("popc.b64 %d, %a;", "b64", [-1], "u32", [64]),
    ("clz.b32 %d, %a;", "b32", [0, 1, B31], "u32", [32, 31, 0]),
    ("clz.b64 %d, %a;", "b64", [0, 1, 2**40], "u32", [64, 63, 23]),
    ("brev.b32 %d, %a;", "b32", [1, 0x0F], "b32", [B31, 0xF0000000]),
    ("bfind.u32 %d, %a;", "u32", [0, 1, B31], "u32", [ONES, 0, 31]),
    ("bfind.shiftamt.u32 %d, %a;", "u32", [1, B31], "u32", [31, 0]),
    ("bfind.s32 %d, %a;", "s32", [-1, -2, 5], "u32", [ONES, 0, 2]),
    ("min.f32 %d, %a, %b;", "f32 f32", [(NAN, 1), (2, NAN), (0.0, -0.0), (1, 2)], "f32", [1, 2, -0.0, 1]),
    ("max.f32 %d, %a, %b;", "f32 f32", [(NAN, 1), (NAN, NAN), (-0.0, 0.0)], "f32", [1, NAN, 0.0]),
    ("max.NaN.f32 %d, %a, %b;", "f32 f32", [(NAN, 1), (1, 2)], "f32", [NAN, 2]),
    ("add.ftz.f32 %d, %a, %b;", "f32 f32", [(1e-40, 1e-40), (-1e-40, 0)], "f32", [0, 0]),
    ("mul.f32 %d, %a, %b;", "f32 f32", [(1e-20, 1e-20), (1e30, 1e30)], "f32", [np.float32(1e-20) ** 2, INF]),
    ("mul.ftz.f32 %d, %a, %b;", "f32 f32", [(1e-20, -1e-20)], "f32", [-0.0]),
    ("add.sat.f32 %d, %a, %b;", "f32 f32", [(0.7, 0.7), (-1, 0), (NAN, 1)], "f32", [1, 0, 0]),
    ("add.rz.f32 %d, %a, %b;", "f32 f32", [(1, 2**-25), (1, -(2**-30))], "f32", [1, 1 - 2**-24]),
    ("add.rp.f32 %d, %a, %b;", "f32 f32", [(1, 2**-25), (1, 2**-60)], "f32", [1 + 2**-23, 1 + 2**-23]),
    ("fma.rn.f32 %d, %a, %b, %c;", "f32 f32 f32", [(1 + 2**-23, 1 - 2**-23, -1)], "f32", [-(2.0**-46)]),
    ("fma.rn.f64 %d, %a, %b, %c;", "f64 f64 f64", [(1 + 2**-52, 1 - 2**-52, -1)], "f64", [-(2.0**-104)]),
    (
        "fma.rn.f64 %d, %a, %b, %c;",
        "f64 f64 f64",
        [(1 + 2**-52, (1 + 2**-52) * 2.0**-960, -(1 + 2**-51) * 2.0**-960)],
        "f64",
        [2.0**-1064],
    ),
    ("div.rn.f32 %d, %a, %b;", "f32 f32", [(1, 3), (-1, 0), (0, 0)], "f32", [np.float32(1) / 3, -INF, NAN]),
    ("sqrt.rn.f32 %d, %a;", "f32", [2, -1, -0.0], "f32", [np.sqrt(np.float32(2)), NAN, -0.0]),
    ("rcp.rn.f64 %d, %a;", "f64", [3, 0], "f64", [1 / 3, INF]),
    ("copysign.f32 %d, %a, %b;", "f32 f32", [(-1, 3), (2, -3)], "f32", [-3, 3]),
    ("abs.f32 %d, %a;", "f32", [-0.0, -2], "f32", [0, 2]),
    ("neg.f64 %d, %a;", "f64", [1, -0.0], "f64", [-1, 0.0]),
    ("cvt.rni.s32.f32 %d, %a;", "f32", [0.5, 1.5, 2.5, -1.5, NAN, 3e9], "s32", [0, 2, 2, -2, 0, 2**31 - 1]),
    ("cvt.rzi.s32.f32 %d, %a;", "f32", [1.9, -1.9, -INF], "s32", [1, -1, -(2**31)]),
    ("cvt.rmi.s32.f64 %d, %a;", "f64", [1.9, -1.1, NAN], "s32", [1, -2, -(2**31)]),
    ("cvt.rpi.u32.f32 %d, %a;", "f32", [1.1, -5], "u32", [2, 0]),
    ("cvt.rzi.u64.f64 %d, %a;", "f64", [1e19, -1, 1e30], "u64", [10**19, 0, 2**64 - 1]),
    ("cvt.rzi.s64.f32 %d, %a;", "f32", [-INF, 2.0**40, NAN], "s64", [-(2**63), 2**40, -(2**63)]),
    ("cvt.rni.f32.f32 %d, %a;", "f32", [0.5, 1.5, -0.2], "f32", [0, 2, -0.0]),
    ("cvt.rzi.f32.f32 %d, %a;", "f32", [1.7, -1.7], "f32", [1, -1]),
    ("cvt.rn.f32.s32 %d, %a;", "s32", [16777217, -1], "f32", [16777216, -1]),
    ("cvt.rz.f32.s32 %d, %a;", "s32", [2**31 - 1], "f32", [2**31 - 128]),
    ("cvt.rn.f32.u64 %d, %a;", "u64", [2**64 - 1, 2**40 + 2**16 + 1], "f32", [2.0**64, 2**40 + 2**17]),
    ("cvt.rn.f32.f64 %d, %a;", "f64", [1 + 2**-24, 1 + 2**-24 + 2**-52, 1e300], "f32", [1, 1 + 2**-23, INF]),
    ("cvt.rz.f32.f64 %d, %a;", "f64", [1 + 2**-23 - 2**-52, -1e300], "f32", [1, -np.finfo(np.float32).max]),
    ("cvt.rp.f32.f64 %d, %a;", "f64", [1 + 2**-50, -1e300], "f32", [1 + 2**-23, -np.finfo(np.float32).max]),
    ("cvt.rn.ftz.f32.f64 %d, %a;", "f64", [-1e-40, 1.5], "f32", [-0.0, 1.5]),
    ("cvt.rni.ftz.s32.f32 %d, %a;", "f32", [2.5], "s32", [2]),
    ("cvt.rpi.ftz.f32.f32 %d, %a;", "f32", [1e-40, 0.1], "f32", [0, 1]),
    ("cvt.sat.f32.f32 %d, %a;", "f32", [-1, 0.25, 2, NAN], "f32", [0, 0.25, 1, 0]),
    ("cvt.f64.f32 %d, %a;", "f32", [0.1], "f64", [float(np.float32(0.1))]),
    ("cvt.s32.s8 %d, %a;", "b32", [0x80, 0x17F], "s32", [-128, 127]),
    ("cvt.u32.u16 %d, %a;", "u16", [0xFFFF], "u32", [0xFFFF]),
    ("cvt.s64.s32 %d, %a;", "s32", [-1], "s64", [-1]),
    ("cvt.u64.u32 %d, %a;", "u32", [-1], "u64", [ONES]),
    ("cvt.sat.u8.s32 %d, %a;", "s32", [-5, 300, 7], "u32", [0, 255, 7]),
    ("cvt.sat.s16.s32 %d, %a;", "s32", [-(2**20), 2**20], "s32", [-(2**15), 2**15 - 1]),
    ("cvt.rn.bf16.f32 %d, %a;", "f32", [1, 1 + 2**-8, 1 + 3 * 2**-8, NAN], "b16", [0x3F80, 0x3F80, 0x3F82, 0x7FFF]),
    ("cvt.rz.bf16.f32 %d, %a;", "f32", [1 + 2**-7 - 2**-20], "b16", [0x3F80]),
    ("cvt.rn.f16.f32 %d, %a;", "f32", [1, 1e6, 2**-25], "b16", [0x3C00, 0x7C00, 0]),
    ("cvt.f32.bf16 %d, %a;", "b16", [0x3F80, 0xC000], "f32", [1, -2]),
    ("cvt.f32.f16 %d, %a;", "b16", [0x3C00, 1], "f32", [1, 2.0**-24]),
    ("cvt.rn.bf16x2.f32 %d, %a, %b;", "f32 f32", [(1, -2)], "b32", [0x3F80C000]),
    ("add.bf16x2 %d, %a, %b;", "b32 b32", [(0x3F80C000, 0x3F803F80)], "b32", [0x4000BF80]),
    ("fma.rn.bf16 %d, %a, %b, %c;", "b16 b16 b16", [(0x3F80, 0x4000, 0x3F80)], "b16", [0x4040]),
    ("fma.rn.bf16 %d, %a, %b, %c;", "b16 b16 b16", [(0x3F88, 0x3F88, 0x2B80)], "b16", [0x3F91]),
    ("add.f16 %d, %a, %b;", "b16 b16", [(0x3C00, 0x3C00), (0x3C00, 0xBC00)], "b16", [0x4000, 0]),
    ("sub.bf16 %d, %a, %b;", "b16 b16", [(0x3F80, 0x4000)], "b16", [0xBF80]),
    ("max.bf16x2 %d, %a, %b;", "b32 b32", [(0x3F80C000, 0x40003F80)], "b32", [0x40003F80]),
    ("neg.bf16x2 %d, %a;", "b32", [0x3F80C000], "b32", [0xBF804000]),
    ("abs.f16 %d, %a;", "b16", [0xC000], "b16", [0x4000]),
    ("mul.f16 %d, %a, %b;", "b16 b16", [(0x3C00, 0x4000)], "b16", [0x4000]),
    ("mov.b64 %d, {%a, %b};", "b32 b32", [(1, 2)], "b64", [2 << 32 | 1]),
    ("mov.b32 {_, %d}, %a;", "b32", [0x12345678], "b16", [0x1234]),
    ("ex2.approx.f32 %d, %a;", "f32", [0, -INF, INF], "f32", [1, 0, INF]),
    ("rcp.approx.ftz.f32 %d, %a;", "f32", [1e-40, INF, -0.0], "f32", [INF, 0, -INF]),
]
PREDICATES: list[tuple[str, str, list, list]] = [
    ("eq.s32", "s32 s32", [(1, 1), (1, 2)], [1, 0]),
    ("lt.s32", "s32 s32", [(-1, 1), (1, -1)], [1, 0]),
    ("lt.u32", "u32 u32", [(-1, 1), (1, -1)], [0, 1]),
    ("hs.u32", "u32 u32", [(-1, 1), (1, 1)], [1, 1]),
    ("eq.f32", "f32 f32", [(NAN, NAN), (0.0, -0.0)], [0, 1]),
    ("ne.f32", "f32 f32", [(NAN, 1), (1, 2), (1, 1), (2, 1)], [0, 1, 0, 1]),
    ("neu.f32", "f32 f32", [(NAN, 1), (1, 1)], [1, 0]),
    ("equ.f32", "f32 f32", [(NAN, 1), (1, 2)], [1, 0]),
    ("gt.f64", "f64 f64", [(2, 1), (NAN, 1)], [1, 0]),
    ("gtu.f64", "f64 f64", [(1, 2), (NAN, 1)], [0, 1]),
    ("leu.f32", "f32 f32", [(1, 2), (2, 1), (1, NAN)], [1, 0, 1]),
    ("num.f32", "f32 f32", [(1, 2), (1, NAN)], [1, 0]),
    ("nan.f32", "f32 f32", [(1, 2), (1, NAN)], [0, 1]),
    ("gt.bf16", "b16 b16", [(0x4000, 0x3F80), (0xC000, 0x3F80)], [1, 0]),
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
    both = f"setp.{compare} %p1|%p2, %a, %b;\nselp.u32 %d, 1, 0, %p1;\n@%p2 add.u32 %d, %d, 2;"
    assert answers(both, types, inputs, "u32").tolist() == [1 if e else 2 for e in expected]
    joined = (
        f"setp.eq.u32 %p3, %r0, 0;\nsetp.{compare.replace('.', '.and.')} %p1, %a, %b, !%p3;\nselp.u32 %d, 1, 0, %p1;"
    )
    assert answers(joined, types, inputs, "u32").tolist() == [0, *expected[1:]]


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
    if below == 0 or mode == "rm" or (mode == "rz" and value > 0):
        return low
    if mode != "rn":
        return high
    bits = low.view(f"u{low.itemsize}")
    return low if below < above or (below == above and bits & 1 == 0) else high


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fused_multiply_add_rounds_once(dtype: type, mode: str) -> None:
    """Against rational arithmetic: random, cancelling, ties and almost ties, subnormal results."""
    rng = np.random.default_rng(3)
    digits = np.finfo(dtype).nmant
    small = 2.0 ** (np.finfo(dtype).minexp - 1)
    a, b, c = (rng.standard_normal(400).astype(dtype) for _ in range(3))
    c[:100] = -(a * b)[:100]
    a[100:200], b[100:200] = 1 + rng.integers(0, 8, 100) * 2.0**-digits, 1 + 2.0**-digits
    c[100:200] = rng.choice([2.0 ** (-digits - 1), -(2.0 ** (-digits - 1)), 2.0 ** (digits + 1)], 100)
    c[200:300] = 1
    a[200:300], b[200:300] = 2.0 ** (-digits - 1), 1 + rng.choice([0, 2.0**-digits, -(2.0**-digits)], 100)
    a[300:], b[300:], c[300:] = a[300:] * small, b[300:], c[300:] * small
    got = (fma32 if dtype is np.float32 else fma64)(a, b, c, mode)
    for x, y, z, g in zip(*(v.tolist() for v in (a, b, c)), got, strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        assert g == exact_round(exact, dtype, mode), (x, y, z)


def test_fma_beyond_the_range() -> None:
    """Products that overflow or vanish, infinities, NaN and signed zeros."""
    big, a = 1e300, np.array([1e200, 1e200, INF, 0.0, -0.0, 5e-324, NAN])
    with np.errstate(all="ignore"):
        got = fma64(
            a, np.array([1e200, 1e108, 2, INF, 1, 0.5, 1]), np.array([-big, -np.finfo(float).max, -1, 1, -0.0, 0, 1])
        )
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(got, [INF, 1e308 - np.finfo(float).max, INF, NAN, -0.0, 0, NAN])
    assert np.signbit(got[4])


def test_halves_round_once() -> None:
    """bf16 and f16 products with an addend, against rational arithmetic through float32's grid."""
    rng = np.random.default_rng(4)
    for type, digits in (("bf16", 7), ("f16", 10)):
        a, b, c = (to_half(rng.standard_normal(300).astype(np.float32), type) for _ in range(3))
        c[:100] = to_half(rng.choice([2.0**-digits, 2.0 ** (-digits - 9)], 100), type)
        got = from_half(fma_half(a, b, c, type), type)
        for x, y, z, g in zip(*(from_half(v, type).tolist() for v in (a, b, c)), got.tolist(), strict=True):
            exact = Fraction(x) * Fraction(y) + Fraction(z)
            unit = Fraction(2) ** (np.frexp(float(exact))[1] - 1 - digits)
            unit = max(unit, Fraction(2) ** -24) if type == "f16" else unit
            assert Fraction(g) == round(exact / unit) * unit  # Fraction rounds ties to even


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximations_err_within_their_bound(name: str) -> None:
    """Not exact, not beyond the bound, the same for the same bits, and different for another seed."""
    x = np.random.default_rng(5).uniform(0.01, 3, 512).astype(np.float32)
    function, relative, absolute = APPROXIMATE[name]
    body = f"""mul.wide.u32 %rd9, %r0, 4; add.u64 %rd8, %rd9, %rd1; ld.global.f32 %f1, [%rd8];
    {name}.approx.f32 %f2, %f1; add.u64 %rd8, %rd9, %rd2; st.global.f32 [%rd8], %f2;"""
    results = []
    for seed in (0, 0, 1):
        out = np.zeros_like(x)
        run(kernel(body, 2), "k", 1, 512, [x, out], seed=seed)
        results.append(out)
    exact = function(x.astype(np.float64))
    limit = np.maximum(
        relative * np.abs(exact), absolute if name != "lg2" else np.where((x > 0.5) & (x < 2), absolute, 0)
    )
    error = np.abs(results[0] - exact)
    assert (error <= limit).all()
    assert error.max() > 0.5 * limit.min()
    np.testing.assert_array_equal(results[0], results[1])
    assert (results[0] != results[2]).any()


def threads(body: str, count: int = 32, grid: int = 1, **options: Any) -> np.ndarray:
    """Each thread's %r1 (u32) after the body; %r2 is the block's number."""
    tail = f"mad.lo.u32 %r30, %r2, {count}, %r0;\nmul.wide.u32 %rd9, %r30, 4;\nadd.u64 %rd9, %rd9, %rd1;\n"
    out = np.zeros(count * grid, np.uint32)
    extra = options.pop("extra", "")
    text = kernel(f"mov.u32 %r2, %ctaid.x;\n{body}\n{tail}st.global.u32 [%rd9], %r1;", extra=extra)
    run(text, "k", grid, count, [out], **options)
    return out


def test_divergent_loop_and_reconvergence() -> None:
    """Each thread loops as often as its number; both ways of a branch run; a predicated instruction skips lanes."""
    body = """
    mov.u32 %r1, 0; mov.u32 %r3, %r0;
$LOOP: setp.eq.u32 %p1, %r3, 0;
    @%p1 bra $DONE;
    add.u32 %r1, %r1, %r3; sub.u32 %r3, %r3, 1;
    bra.uni $LOOP;
$DONE: and.b32 %r4, %r0, 1; setp.ne.u32 %p2, %r4, 0;
    @%p2 bra $ODD;
    add.u32 %r1, %r1, 1000; bra $JOIN;
$ODD: add.u32 %r1, %r1, 2000;
$JOIN: @!%p2 add.u32 %r1, %r1, 10000;"""
    n = np.arange(70)
    np.testing.assert_array_equal(threads(body, 70), n * (n + 1) // 2 + np.where(n % 2, 2000, 11000))


def test_early_exit_and_special_registers() -> None:
    body = (
        "setp.ge.u32 %p1, %r0, 5; @%p1 ret; mov.u32 %r3, %laneid; mov.u32 %r4, %ntid.x; mad.lo.u32 %r1, %r3, 100, %r4;"
    )
    assert threads(body, 40).tolist() == [40, 140, 240, 340, 440] + [0] * 35
    body = "mov.u32 %r1, %lanemask_lt;\nmov.u32 %r3, %warpid;\nadd.u32 %r1, %r1, %r3;"
    assert threads(body, 64)[33] == 1 + 1
    for name, expected in {"eq": 4, "lt": 3, "le": 7, "gt": ONES - 7, "ge": ONES - 3}.items():
        assert threads(f"mov.u32 %r1, %lanemask_{name};")[2] == expected


def test_blocks_and_seeds() -> None:
    """Many blocks in chunks; the report counts each thread's instructions; a seed repeats."""
    np.testing.assert_array_equal(
        threads("add.u32 %r1, %r2, %r0;", 64, 700), (np.arange(700)[:, None] + np.arange(64)).ravel()
    )
    out = np.zeros(64, np.uint32)
    text = kernel("mul.wide.u32 %rd9, %r0, 4;\nadd.u64 %rd9, %rd9, %rd1;\nst.global.u32 [%rd9], %r0;\nbar.sync 0;")
    report = run(text, "k", 1, 64, [out])
    assert (report.instructions, report.barriers, report.longest_warp) == (64 * 7, 1, 7)
    assert report.written["global"] == 256
    assert report.histogram["st.global.u32"] == 64


SHUFFLES = {
    "bfly.b32 %r1|%p1, %r0, 1, 31": lambda i: i ^ 1,
    "up.b32 %r1|%p1, %r0, 3, 0": lambda i: np.where(i >= 3, i - 3, i),
    "down.b32 %r1|%p1, %r0, 3, 31": lambda i: np.where(i + 3 < 32, i + 3, i),
    "idx.b32 %r1|%p1, %r0, 7, 31": lambda i: np.full(32, 7),
    "down.b32 %r1|%p1, %r0, 2, 0x181f": lambda i: np.where(i % 8 + 2 < 8, i + 2, i),  # segments of 8
    "up.b32 %r1|%p1, %r0, 2, 0x1800": lambda i: np.where(i % 8 >= 2, i - 2, i),
    "idx.b32 %r1|%p1, %r0, 1, 0x1c1f": lambda i: i // 4 * 4 + 1,  # segments of 4
    "bfly.b32 %r1|%p1, %r0, 4, 0x1c03": lambda i: np.where(i ^ 4 <= (i & 28 | 3), i ^ 4, i),
}


@pytest.mark.parametrize("form", SHUFFLES)
def test_shuffles(form: str) -> None:
    np.testing.assert_array_equal(threads(f"shfl.sync.{form}, -1;"), SHUFFLES[form](np.arange(32)))


def test_votes_matches_and_reductions() -> None:
    odd = "and.b32 %r3, %r0, 1;\nsetp.eq.u32 %p1, %r3, 1;\n"
    assert set(threads(odd + "vote.sync.ballot.b32 %r1, %p1, -1;")) == {0xAAAAAAAA}
    assert set(threads(odd + "vote.sync.any.pred %p2, %p1, -1;\nselp.u32 %r1, 1, 0, %p2;")) == {1}
    assert set(threads(odd + "vote.sync.all.pred %p2, !%p1, -1;\nselp.u32 %r1, 1, 0, %p2;")) == {0}
    assert threads("and.b32 %r3, %r0, 3;\nmatch.any.sync.b32 %r1, %r3, -1;")[:4].tolist() == [
        0x11111111 << i for i in range(4)
    ]
    assert set(threads("redux.sync.add.u32 %r1, %r0, -1;")) == {496}
    assert set(threads("sub.s32 %r3, %r0, 16;\nredux.sync.min.s32 %r1, %r3, -1;")) == {2**32 - 16}
    assert threads(odd + "activemask.b32 %r1;\n@%p1 activemask.b32 %r1;")[:2].tolist() == [ONES, 0xAAAAAAAA]
    halves = "shr.u32 %r4, %r0, 4;\nsetp.eq.u32 %p1, %r4, 0;\nselp.b32 %r5, 0xFFFF, 0xFFFF0000, %p1;\n"
    assert threads(halves + "redux.sync.max.u32 %r1, %r0, %r5;").tolist() == [15] * 16 + [31] * 16


def test_lanes_wait_for_their_mates() -> None:
    """A shuffle after divergent code waits until all have come; an exited lane may be in a ballot's mask."""
    late = "setp.lt.u32 %p1, %r0, 7;\n@%p1 bra $A;\nbra $B;\n$C: shfl.sync.bfly.b32 %r1, %r3, 1, 31, -1;\nbra $END;\n"
    late += "$A: mov.u32 %r3, 5;\nbra $C;\n$B: mov.u32 %r3, 6;\nbra $C;\n$END:"
    assert threads(late).tolist() == [5] * 6 + [6, 5] + [6] * 24
    early = "setp.ge.u32 %p1, %r0, 9;\n@%p1 ret;\nsetp.ge.u32 %p2, %r0, 0;\nvote.sync.ballot.b32 %r1, %p2, -1;"
    assert threads(early)[0] == 0x1FF


def test_barriers() -> None:
    """bar.red, named barriers with counts, and warps that left before the barrier."""
    body = "setp.lt.u32 %p1, %r0, 40;\nbar.red.popc.u32 %r1, 0, %p1;"
    assert set(threads(body, 64, 3)) == {40}
    body = "setp.lt.u32 %p1, %r0, 40;\nbar.red.and.pred %p2, 0, %p1;\nbar.red.or.pred %p3, 1, %p1;\n"
    assert set(threads(body + "selp.u32 %r3, 4, 0, %p2;\nselp.u32 %r1, 1, %r3, %p3;", 64)) == {1}
    body = "setp.eq.u32 %p1, %r0, 99; bar.red.or.pred %p3, 1, %p1; selp.u32 %r1, 1, 0, %p3;"
    assert set(threads(body, 64)) == {0}
    body = "setp.ge.u32 %p1, %r0, 32; @%p1 bra $WAIT; bar.arrive 2, 64; ret; $WAIT: bar.sync 2, 64; mov.u32 %r1, 9;"
    assert threads(body, 64)[32:].tolist() == [9] * 32
    body = "setp.ge.u32 %p1, %r0, 64;\n@%p1 ret;\nbarrier.sync 3, 64;\nbar.sync 0;\nmov.u32 %r1, 9;"
    assert threads(body, 128).tolist() == [9] * 64 + [0] * 64


def test_shared_memory_and_generic_addresses() -> None:
    """Static and dynamic shared memory, a 32-bit address, local memory, and generic access to each of them."""
    body = """
    .shared .align 4 .b8 buffer[256];
    .local .align 4 .b8 stack[16];
    mov.u32 %r3, buffer; shl.b32 %r4, %r0, 2; add.u32 %r5, %r3, %r4;
    st.shared.u32 [%r5], %r0;
    mov.u64 %rd3, dynamic; mul.wide.u32 %rd4, %r0, 4; add.u64 %rd3, %rd3, %rd4;
    st.shared.u32 [%rd3], 100;
    bar.sync 0;
    xor.b32 %r6, %r4, 252; add.u32 %r6, %r6, %r3; cvt.u64.u32 %rd5, %r6; cvta.shared.u64 %rd5, %rd5;
    ld.u32 %r1, [%rd5];
    mov.u64 %rd6, stack; cvta.local.u64 %rd6, %rd6; st.u32 [%rd6+4], %r1; ld.local.u32 %r7, [stack+4];
    ld.shared.u32 %r8, [%rd3]; add.u32 %r1, %r7, %r8;"""
    extra = ".extern .shared .align 16 .b8 dynamic[];"
    np.testing.assert_array_equal(threads(body, 64, 2, shared=256, extra=extra), np.tile(163 - np.arange(64), 2))
    found = "selp.u32 %r1, 1, 0, %p1; @%p2 add.u32 %r1, %r1, 2;"
    spaces = "isspacep.shared %p1, %rd5; isspacep.global %p2, %rd1;"
    window = ".shared .align 4 .b8 s[4]; mov.u64 %rd5, s; cvta.shared.u64 %rd5, %rd5;"
    assert set(threads(f"{window} {spaces} {found}")) == {3}
    with pytest.raises(PTXError, match=r"out of bounds: shared byte 128 of dynamic shared memory, which has 128 bytes"):
        threads(body, 64, shared=128, extra=extra)


def test_calls_constants_and_scopes() -> None:
    """A function with parameters and a result, called in divergent code; a constant table; registers of a scope."""
    extra = """
    .const .align 4 .u32 table[3] = {7, 8, 9};
    .func (.param .b32 result) twice(.param .b32 x) {
        .reg .b32 %r<3>;
        ld.param.u32 %r1, [x]; add.u32 %r2, %r1, %r1; st.param.b32 [result], %r2; ret;
    }"""
    body = """
    mov.u32 %r1, 5; setp.lt.u32 %p1, %r0, 3; @%p1 bra $SKIP;
    { .reg .b32 %r1; .param .b32 a; .param .b32 b;
      mov.u32 %r1, 3; st.param.b32 [a], %r0; call.uni (b), twice, (a); ld.param.b32 %r3, [b]; }
    add.u32 %r1, %r1, %r3;
$SKIP: ld.const.u32 %r4, [table+8]; add.u32 %r1, %r1, %r4;"""
    n = np.arange(32)
    np.testing.assert_array_equal(threads(body, extra=extra), np.where(n < 3, 14, 14 + 2 * n))


@pytest.mark.parametrize(
    ("operation", "expected", "old"),
    [("add.u32 %r3, [%rd1], 2;", 64, set(range(0, 64, 2))), ("max.u32 %r3, [%rd1], %r0;", 31, None),
     ("inc.u32 %r3, [%rd1], 9;", 2, set(range(10))), ("exch.b32 %r3, [%rd1], %r0;", None, None),
     ("cas.b32 %r3, [%rd1], 0, 77;", 77, {0, 77}), ("or.b32 %r3, [%rd1], %r0;", 31, None)],
)  # fmt: skip
def test_atomics(operation: str, expected: int | None, old: set | None) -> None:
    target, seen = np.zeros(1, np.uint32), np.zeros(32, np.uint32)
    tail = "mul.wide.u32 %rd9, %r0, 4;\nadd.u64 %rd9, %rd9, %rd2;\nst.global.u32 [%rd9], %r3;"
    run(kernel(f"atom.global.{operation}\n{tail}", 2), "k", 1, 32, [target, seen])
    assert expected is None or target[0] == expected
    assert old is None or set(seen.tolist()) == old


def test_vector_stores_race_in_any_element() -> None:
    """All blocks write {0, the block's number} to one place: the first element agrees, the second doesn't."""
    text = kernel("mov.u32 %r2, %ctaid.x; st.global.v2.u32 [%rd1], {0, %r2};")
    with pytest.raises(PTXError, match="race"):
        run(text, "k", 700, 1024, [np.zeros(2, np.uint32)])


def test_floating_atomics_flush_in_global_memory_alone() -> None:
    out = np.zeros(2, np.float32)
    body = """.shared .align 4 .b8 sum[4]; setp.ne.u32 %p1, %r0, 0; @%p1 ret; st.shared.f32 [sum], 0f00000000;
    mov.b32 %f1, 5; red.global.add.f32 [%rd1], %f1; red.shared.add.f32 [sum], %f1;
    ld.shared.f32 %f2, [sum]; st.global.f32 [%rd1+4], %f2;"""
    run(kernel(body), "k", 1, 32, [out])
    assert out.view(np.uint32).tolist() == [0, 5]


def test_floating_atomics_add_in_a_random_order() -> None:
    total = []
    for seed in range(4):
        target = np.zeros(1, np.float32)
        text = kernel("cvt.rn.f32.u32 %f1, %r0;\nmul.f32 %f1, %f1, 0f3DCCCCCD;\nred.global.add.f32 [%rd1], %f1;")
        run(text, "k", 2, 128, [target], seed=seed)
        total.append(float(target[0]))
    assert len(set(total)) > 1
    assert np.allclose(total, 2 * 0.1 * 127 * 64, rtol=1e-5)


COPY = """
    .shared .align 16 .b8 buffer[512];
    mov.u32 %r3, buffer; shl.b32 %r4, %r0, 4; add.u32 %r3, %r3, %r4; mul.wide.u32 %rd3, %r0, 16;
    add.u64 %rd4, %rd3, %rd1;
    cp.async.{how} [%r3], [%rd4], 16{count};
    cp.async.commit_group;
    {wait}
    ld.shared.v4.u32 {{%r5, %r6, %r7, %r8}}, [%r3];
    add.u64 %rd5, %rd3, %rd2;
    st.global.v4.u32 [%rd5], {{%r5, %r6, %r7, %r8}};"""


def test_asynchronous_copies() -> None:
    """Bytes land at the wait; a source size fills with zeros; without the wait they may not be read."""
    x = np.arange(128, dtype=np.uint32)
    for how, count, wait in (
        ("cg.shared.global", "", "wait_group 0"),
        ("ca.shared.global.L2::128B", ", 8", "wait_all"),
    ):
        y = np.zeros_like(x)
        run(kernel(COPY.format(how=how, count=count, wait=f"cp.async.{wait};"), 2), "k", 1, 32, [x, y])
        np.testing.assert_array_equal(y, np.where(np.arange(128) % 4 < (2 if count else 4), x, 0))
    for wait in ("", "cp.async.wait_group 1;"):
        with pytest.raises(PTXError, match=r"ld\.shared.*in flight by cp\.async"):
            run(kernel(COPY.format(how="cg.shared.global", count="", wait=wait), 2), "k", 1, 32, [x, x.copy()])


REFUSED = {
    "add.f99 %r1, %r1, %r1;": "the type .f99 is not supported",
    "add.s32.odd %r1, %r1, %r1;": "the type .odd",
    "add.odd.s32 %r1, %r1, %r1;": "the modifier .odd",
    "wgmma.fence.sync.aligned;": "the instruction wgmma",
    "ex2.approx.f64 %fd1, %fd1;": "ex2 of .f64",
    "mov.u32 %r1, %smid;": "special register %smid",
    "call.uni printf, ();": "a call of printf",
    "add.s64 %rd1, %r1, %r1;": "reading .b32 %r1 as .s64",
    "trap;": "trap",
    "cp.async.cg.shared.global [%r1], [%rd1], 4;": "a copy of 4 bytes",
    "st.global.v2.u32 [%rd1+-8], {0, %r0};": "out of bounds",
    "$A: bra $A;": "endless loop",
    "setp.gt.u32 %p1, %r0, 3; $A: @%p1 bra $A; bra $B; $C: @!%p1 bra $C; $B: bra $C;": "endless loop",
    "mov.u32 %r1, -16; shfl.sync.up.b32 %r2, %r0, 1, 0, %r1;": "not in its member mask",
    "and.b32 %r1, %r0, 1; sub.u32 %r1, -1, %r1; vote.sync.any.pred %p2, %p1, %r1;": "another mask",
    "ld.global.u32 %r1, [%rd1+4];": "out of bounds: global byte 4 of argument 0 uint32.1., which has 4 bytes",
    "ld.global.u32 %r1, [%rd1+-4];": "out of bounds: global byte -4",
    "ld.global.u16 %h1, [%rd1+1];": "misaligned",
    "ld.global.u64 %rd2, [%rd1+0];": "out of bounds",
    "ld.global.u32 %r1, [64];": "near no variable",
    "st.global.u32 [%rd1], %r0;": "by the same instruction",
    "setp.gt.u32 %p1, %r0, 3; @%p1 bar.sync 1; st.global.u32 [%rd1], 1;": "thread .4, 0, 0.: barrier in divergent code",
    "bar.sync 16;": "numbered from 0 to 15",
    ".shared .align 4 .b8 s[64]; st.shared.v2.u32 [s], {%r0, %r0};": "misaligned",
    "bar.sync 0, 64;": "deadlock: 32 threads of 64 are at barrier 0",
    "shfl.sync.idx.b32 %r1, %r0, 9, 31, 0xFF;": "not in its member mask",
    "setp.gt.u32 %p1, %r0, 3; @%p1 redux.sync.or.b32 %r1, %r0, -1; @!%p1 bar.warp.sync -1;": "lanes missing",
}


@pytest.mark.parametrize("body", REFUSED)
def test_what_is_refused(body: str) -> None:
    """Each error names the kernel, the line and the instruction's text."""
    with pytest.raises(PTXError, match=REFUSED[body]) as caught:
        run(kernel(body), "k", 1, 32, [np.zeros(1, np.uint32)], limit=1000)
    assert "k, line" in str(caught.value)


def test_wrong_arguments() -> None:
    text, x = kernel(""), np.zeros((4, 4), np.float32)
    for arguments, message in [
        ([], "arguments must be 1 for k, got 0"), ([np.float32(1)], "argument 0 must have 8 bytes"),
        ([np.broadcast_to(x, (2, 4, 4))], "argument 0 must be C-contiguous"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            run(text, "k", 1, 32, arguments)
    with pytest.raises(ValueError, match="must not overlap"):
        run(kernel("", 2), "k", 1, 32, [x[:2], x[1:]])
    with pytest.raises(ValueError, match="kernel must be one of"):
        run(text, "q", 1, 32, [x])
    with pytest.raises(ValueError, match="block must have"):
        run(text, "k", 1, 2048, [x])


# Kernels compiled from CUDA C and from Python; the planted mistakes are in ptx/planted.py


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
    log = bytes(bytearray(size + 1))  # NVRTC writes into it: b" " * 1 would be the object that all share
    nvrtc.nvrtcGetProgramLog(program, log)
    assert int(status) == 0, log.decode()
    _, size = nvrtc.nvrtcGetPTXSize(program)
    text = bytes(bytearray(size + 1))
    nvrtc.nvrtcGetPTX(program, text)
    nvrtc.nvrtcDestroyProgram(program)
    return text[:size].decode()


LIBRARY = {
    "exp": np.exp, "log": np.log, "log1p": np.log1p, "expm1": np.expm1, "exp2": np.exp2, "log2": np.log2,
    "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "cbrt": np.cbrt, "sin": np.sin, "cos": np.cos,
    "tanh": np.tanh, "atan": np.arctan, "rint": np.rint, "floor": np.floor, "trunc": np.trunc,
}  # fmt: skip


@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
@pytest.mark.parametrize("name", ["float", "double"])
def test_the_mathematical_library(name: str, target: str) -> None:
    """CUDA's functions, which lean on fma, bits and rounding modes, give NumPy's values to a few units, far out too."""
    suffix, dtype = ("f", np.float32) if name == "float" else ("", np.float64)
    calls = "".join(f"    y[{i} * n + t] = {f}{suffix}(v);\n" for i, f in enumerate(LIBRARY))
    divide = f"    y[{len(LIBRARY)} * n + t] = v / x[(t + 1) % n] + fmod{suffix}(v, x[(t + 7) % n]);\n"
    source = f"""extern "C" __global__ void k(const {name}* x, {name}* y, int n) {{
    const int t = blockIdx.x * 64 + threadIdx.x; const {name} v = x[t];\n{calls}{divide}}}"""
    x = np.random.default_rng(8).uniform(-4, 6, 256)
    x = np.abs(np.r_[np.exp(x[:192]), np.exp(4 * x[192:])]).astype(dtype)
    y = np.zeros((len(LIBRARY) + 1, 256), dtype)
    run(compiled(source, target), "k", 4, 64, [x, y, np.int32(256)])
    with np.errstate(over="ignore"):
        wanted = [f(x.astype(np.float64)) for f in LIBRARY.values()]
        wanted.append(x / np.roll(x, -1).astype(np.float64) + np.fmod(x, np.roll(x, -7)))
        for f, got, want in zip([*LIBRARY, "/"], y, np.array(wanted).astype(dtype), strict=True):
            np.testing.assert_allclose(got, want, rtol=4 * np.finfo(dtype).eps, err_msg=f)


def result(case: Case, ptx: str, fresh: bool = True, **options: Any) -> np.ndarray:
    dtype = case.x.dtype
    y = np.zeros(case.size, dtype) if "atomicAdd(y" in case.source else np.full(case.size, -1).astype(dtype)
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
    for target in ("sm_80", "sm_90"):
        ptx = compiled(case.source, target)
        for seed in range(3):
            np.testing.assert_allclose(result(case, ptx, seed=seed), case.wanted(case.x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("bug", BUGS)
def test_planted_mistakes_are_caught(bug: str) -> None:
    name, right, wrong, message = BUGS[bug]
    case = CASES[name]
    assert case.source.count(right) >= 1
    before, _, after = case.source.rpartition(right) if bug == "write not awaited" else case.source.partition(right)
    ptx = compiled(before + wrong + after)
    if message is WRONG:
        assert not np.allclose(result(case, ptx), case.wanted(case.x), rtol=1e-3, atol=1e-3)
        return
    with pytest.raises(PTXError, match=message) as caught:
        result(case, ptx, fresh="__ldg" not in wrong)
    assert re.search(r"k, line \d+: `.*;`: block \(\d, 0, 0\), thread \(\d+, 0, 0\): ", str(caught.value))


@pytest.mark.parametrize("bug", ["read while others write", "write not awaited", "stage overwritten early"])
def test_a_missing_barrier_shows_in_results(bug: str) -> None:
    """Even without looking for races: warps go at unequal speed, in an order that the seed draws."""
    name, right, wrong, _ = BUGS[bug]
    before, _, after = CASES[name].source.rpartition(right)
    ptx, wanted = compiled(before + wrong + after), CASES[name].wanted(CASES[name].x)
    seen = []
    for seed in range(6):
        try:
            seen.append(np.allclose(result(CASES[name], ptx, seed=seed, races=False), wanted, atol=1e-4))
        except PTXError:  # the bytes are there, but in flight
            seen.append(False)
    assert not all(seen)


def test_launch_for_the_host_side() -> None:
    """`InterpreterLaunch` runs modules, keeps reports, and lets no kernel read what `empty` gave it."""
    launch = InterpreterLaunch(seed=1)
    module = SimpleNamespace(ptx=compiled(CASES["warp"].source))
    y = launch.empty((128,), np.float32)
    assert np.isnan(y).all()
    launch(module, "k", (1,), (128,), [FLOATS[:128].copy(), y, np.int32(128)])
    np.testing.assert_array_equal(y, CASES["warp"].wanted(FLOATS[:128]))
    assert launch.reports[0][0] == "k"
    launch(module, "k", (1,), (128,), [y, launch.empty((128,), np.float32), np.int32(128)])
    with pytest.raises(PTXError, match="never written"):
        launch(module, "k", (1,), (128,), [launch.empty((128,), np.float32), y, np.int32(128)])


def test_numba_kernels() -> None:
    """numba's calling convention: an array is its address with sizes and strides."""
    numba = pytest.importorskip("numba", reason="numba and numba-cuda come with the extra kernels")
    pytest.importorskip("numba_cuda", reason="numba-cuda comes with the extra kernels")
    from numba import cuda

    def scale(x: Any, y: Any, n: Any) -> None:
        part = cuda.shared.array(64, numba.float32)
        i = cuda.grid(1)
        part[cuda.threadIdx.x] = x[i, 1] if i < n else 0.0
        cuda.syncthreads()
        if i < n:
            y[i] = part[cuda.threadIdx.x] * 3 + part[cuda.threadIdx.x ^ 1]

    signature = (numba.float32[:, ::1], numba.float32[::1], numba.int64)
    ptx, _ = cuda.compile(scale, signature, cc=(9, 0), output="ptx", abi="numba", device=False)
    x, y = FLOATS[:200].reshape(100, 2).copy(), np.zeros(100, np.float32)
    run(ptx, re.search(r"\.entry (\w+)", ptx)[1], 2, 64, [x, y, np.int64(100)], uninitialised=[y])
    np.testing.assert_allclose(y, x[:, 1] * 3 + x[np.arange(100) ^ 1, 1], rtol=1e-5, atol=1e-6)
