"""Instructions that touch one thread's registers alone: arithmetic, logic, comparison, conversion, moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from . import arithmetic as fp
from .parse import DTYPES, Operand, Vector

if TYPE_CHECKING:
    from .machine import Lanes, Machine

Array = np.ndarray
Step = Callable[["Lanes"], object]
Function = Callable[..., Array]


def quotient(a: Array, b: Array) -> Array:
    """Of integers, towards zero; −1 where b is 0."""
    return np.where(b == 0, np.array(-1).astype(b.dtype), (a - np.fmod(a, b)) // b)


def remainder(a: Array, b: Array) -> Array:
    return np.where(b == 0, a, np.fmod(a, b))


def shift_left(a: Array, n: Array) -> Array:
    """a << n of unsigned integers, zero where n is at least the width."""
    bits = 8 * a.dtype.itemsize
    return np.where(n < bits, a << np.minimum(n, bits - 1).astype(a.dtype), a.dtype.type(0))


def shift_right(a: Array, n: Array) -> Array:
    """As `shift_left`; signed integers keep their sign."""
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(n, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(n < bits, shifted, a.dtype.type(0))


def insert(a: Array, b: Array, position: Array, length: Array) -> Array:
    """b with its `length` bits from `position` replaced by the lowest of a."""
    ones = ~shift_left(np.full(np.shape(length), -1, "i8").astype(b.dtype), length & 0xFF)
    mask = shift_left(ones, position & 0xFF)
    return (b & ~mask) | (shift_left(a, position & 0xFF) & mask)


SIGNED, UNSIGNED, FLOATS = ("s32", "s64"), ("u32", "u64"), ("f32", "f64")
INTEGERS, BITS = (*SIGNED, *UNSIGNED), ("b16", "b32", "b64", "pred")
COMPARED = (*INTEGERS, *FLOATS, "s16", "b32", "b64")
# the opcode but for its type: (types that it may have, function); operands and result are of that type
SAME_TYPE: dict[str, tuple[tuple[str, ...], Function]] = {
    "add": ((*INTEGERS, *FLOATS), np.add), "add.rn": (("f64",), np.add), "sub": ((*SIGNED, *FLOATS), np.subtract),
    "mul": (FLOATS, np.multiply), "mul.lo": (SIGNED, np.multiply), "mad.lo": (SIGNED, lambda a, b, c: a * b + c),
    "fma.rn": (FLOATS, lambda a, b, c: (fp.fma32 if a.dtype == np.float32 else fp.fma64)(a, b, c)),
    "fma.rm": (("f32",), lambda a, b, c: fp.fma32(a, b, c, down=True)),
    "div.rn": (FLOATS, np.divide), "div": (INTEGERS, quotient), "rem": (INTEGERS, remainder),
    "rcp.rn": (FLOATS, lambda a: a.dtype.type(1) / a), "sqrt.rn": (FLOATS, np.sqrt),
    "min": (SIGNED, np.minimum), "max": (INTEGERS, np.maximum),
    "abs": (FLOATS, np.abs), "neg": ((*SIGNED, *FLOATS), np.negative),
    "and": (BITS, np.bitwise_and), "or": (BITS, np.bitwise_or), "xor": (BITS, np.bitwise_xor), "not": (BITS, np.invert),
}  # fmt: skip
# the whole opcode: (types of the operands, of the result, function)
OTHERS: dict[str, tuple[list[str], str, Function]] = {
    "max.f32": (["f32"] * 2, "f32", fp.maximum), "max.f64": (["f64"] * 2, "f64", fp.maximum),
    "bfi.b64": (["b64", "b64", "u32", "u32"], "b64", insert),
    "cvta.to.global.u64": (["u64"], "u64", lambda a: a),  # generic addresses of global memory are themselves
    "cvt.rn.bf16.f32": (["f32"], "b16", fp.to_bf16),
    "cvt.rn.f32.s32": (["s32"], "f32", lambda a: a.astype(np.float32)),
    "cvt.rn.f64.s32": (["s32"], "f64", lambda a: a.astype(np.float64)),
    "cvt.rni.f32.f32": (["f32"], "f32", np.rint),
    "cvt.sat.f32.f32": (["f32"], "f32", fp.saturate),
}  # fmt: skip
for type in ("b32", "b64"):
    OTHERS[f"shl.{type}"] = [type, "u32"], type, shift_left
for type in INTEGERS:
    OTHERS[f"shr.{type}"] = [type, "u32"], type, shift_right
for type in (*INTEGERS, *FLOATS, "b32", "b64", "u16"):
    OTHERS[f"selp.{type}"] = [type, type, "pred"], type, lambda a, b, p: np.where(p, a, b)
for type in (*INTEGERS, *FLOATS, *BITS):
    OTHERS[f"mov.{type}"] = [type], type, lambda a: a
for type in ("s32", "u32"):
    wide = f"{type[0]}64"
    OTHERS[f"mul.wide.{type}"] = [type] * 2, wide, lambda a, b, to=DTYPES[wide]: a.astype(to) * b.astype(to)
for conversion in ("s64.s32", "u64.u32", "u32.u64", "u16.u32", "u32.u16"):
    target, source = conversion.split(".")
    OTHERS[f"cvt.{conversion}"] = [source], target, lambda a, to=DTYPES[target]: a.astype(to)

COMPARE: dict[str, Function] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
ORDER: dict[str, Function] = {
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)), "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "ne": lambda a, b: (a < b) | (a > b),
    "neu": np.not_equal, "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
}  # fmt: skip
for type in COMPARED:
    for name, function in {**COMPARE, **(ORDER if type in FLOATS else {})}.items():
        OTHERS[f"setp.{name}.{type}"] = [type] * 2, "pred", function


def bind(m: Machine, opcode: str, operands: tuple[Operand, ...]) -> Step:
    """destination = function(sources)."""
    if opcode.startswith("mov.b") and any(isinstance(operand, Vector) for operand in operands):
        return move_vector(m, opcode.removeprefix("mov."), *operands)
    form, _, type = opcode.rpartition(".")
    if opcode in OTHERS:
        types, result, function = OTHERS[opcode]
    elif form in SAME_TYPE and type in SAME_TYPE[form][0]:
        function = SAME_TYPE[form][1]
        types, result = [type] * (len(operands) - 1), type
    elif opcode == "ex2.approx.f32":
        types, result, function = ["f32"], "f32", lambda a: fp.exponential(a, m.seed)
    elif opcode == "ex2.approx.ftz.f32":
        types, result, function = ["f32"], "f32", lambda a: fp.flush(fp.exponential(fp.flush(a), m.seed))
    elif opcode == "rcp.approx.ftz.f64":
        types, result, function = ["f64"], "f64", lambda a: fp.reciprocal(a, m.seed)
    else:
        raise m.unsupported(f"the instruction {opcode}")
    write = m.writer(operands[0], result)
    read = [m.reader(operand, type) for operand, type in zip(operands[1:], types, strict=True)]
    return lambda lanes: write(lanes, function(*[r(lanes) for r in read]))


def move_vector(m: Machine, type: str, target: Operand, source: Operand) -> Step:
    """Pack or unpack two halves, the lowest bits first."""
    bits = 4 * DTYPES[type]().itemsize
    half, shift = f"u{bits}", DTYPES[type](bits)
    if isinstance(target, Vector):
        read, (write_low, write_high) = m.reader(source, type), [m.writer(part, half) for part in target]

        def unpack(lanes: Lanes) -> None:
            value = read(lanes).copy()
            write_low(lanes, value.astype(DTYPES[half]))
            write_high(lanes, (value >> shift).astype(DTYPES[half]))

        return unpack
    write, (low, high) = m.writer(target, type), [m.reader(part, half) for part in source]
    return lambda lanes: write(lanes, low(lanes).astype(DTYPES[type]) | high(lanes).astype(DTYPES[type]) << shift)
