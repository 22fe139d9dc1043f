"""Instructions that touch one thread's registers alone: arithmetic, logic, comparison, conversion,
moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from . import arithmetic as fp
from .parse import DTYPES, Operand, Register, Symbol, Vector

if TYPE_CHECKING:
    from .machine import Lanes, Machine

Array = np.ndarray
Step = Callable[["Lanes"], object]


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


def multiply_wide(a: Array, b: Array) -> Array:
    wide = f"{a.dtype.kind}{2 * a.dtype.itemsize}"
    return a.astype(wide) * b.astype(wide)


def multiply_high(a: Array, b: Array) -> Array:
    """The upper half of the product, of twice the width."""
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        return (multiply_wide(a, b) >> bits).astype(a.dtype)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)  # NumPy has no 128 bits: halves of 32
    (al, ah), (bl, bh) = ((x & low, x >> half) for x in (a.view("u8"), b.view("u8")))
    middle = ah * bl + (al * bl >> half)
    other = al * bh + (middle & low)
    high = (ah * bh + (middle >> half) + (other >> half)).view(a.dtype)
    if a.dtype.kind == "i":  # read as unsigned, a negative number is 2^64 too large
        high = high - np.where(a < 0, b, 0) - np.where(b < 0, a, 0)
    return high


# An opcode, whole or but for its last type t: (types of the operands and of the result, function).
# w: twice t's width.
FORMS: dict[str, tuple[str, Callable[..., Array]]] = {
    "add": ("t t → t", np.add),
    "add.rn": ("t t → t", np.add),
    "sub": ("t t → t", np.subtract),
    "mul": ("t t → t", np.multiply),
    "mul.lo": ("t t → t", np.multiply),
    "mul.hi": ("t t → t", multiply_high),
    "mul.wide": ("t t → w", multiply_wide),
    "mad.lo": ("t t t → t", lambda a, b, c: a * b + c),
    "fma.rn": ("t t t → t", fp.fma),
    "fma.rm.f32": ("t t t → t", fp.fma_down),
    "div.rn": ("t t → t", np.divide),
    "div": ("t t → t", quotient),
    "rem": ("t t → t", remainder),
    "rcp.rn": ("t → t", lambda a: a.dtype.type(1) / a),
    "sqrt.rn": ("t → t", np.sqrt),
    "min": ("t t → t", fp.minimum),
    "max": ("t t → t", fp.maximum),
    "abs": ("t → t", np.abs),
    "copysign": ("t t → t", lambda a, b: np.copysign(b, a)),  # the sign of a, the value of b
    "neg": ("t → t", np.negative),
    "not": ("t → t", np.invert),
    "and": ("t t → t", np.bitwise_and),
    "or": ("t t → t", np.bitwise_or),
    "xor": ("t t → t", np.bitwise_xor),
    "shl": ("t u32 → t", shift_left),
    "shr": ("t u32 → t", shift_right),
    "bfi": ("t t u32 u32 → t", insert),
    "mov": ("t → t", lambda a: a),
    "selp": ("t t pred → t", lambda a, b, p: np.where(p, a, b)),
    "cvta.to.global": ("t → t", lambda a: a),  # generic addresses of global memory are themselves
    "cvt.rni.f32.f32": ("t → t", np.rint),
    "cvt.sat.f32.f32": ("t → t", fp.saturate),
    "cvt.rn.bf16.f32": ("t → b16", fp.to_bf16),
    "cvt.rn.bf16x2.f32": (
        "t t → b32",
        lambda a, b: fp.to_bf16(a) * np.uint32(65536) | fp.to_bf16(b),
    ),
    "setp.eq": ("t t → pred", np.equal),
    "setp.ne": ("t t → pred", lambda a, b: (a < b) | (a > b)),
    "setp.lt": ("t t → pred", np.less),
    "setp.le": ("t t → pred", np.less_equal),
    "setp.gt": ("t t → pred", np.greater),
    "setp.ge": ("t t → pred", np.greater_equal),
    "setp.neu": ("t t → pred", np.not_equal),
    "setp.nan": ("t t → pred", lambda a, b: (a != a) | (b != b)),
    "setp.equ": ("t t → pred", lambda a, b: ~((a < b) | (a > b))),
    "setp.ltu": ("t t → pred", lambda a, b: ~(a >= b)),
    "setp.leu": ("t t → pred", lambda a, b: ~(a > b)),
    "setp.gtu": ("t t → pred", lambda a, b: ~(a <= b)),
    "setp.geu": ("t t → pred", lambda a, b: ~(a < b)),
    "setp.num": ("t t → pred", lambda a, b: (a == a) & (b == b)),
}
for to in ("u16", "u32", "s32", "u64", "s64", "f32", "f64"):
    FORMS[f"cvt.rn.{to}" if to[0] == "f" else f"cvt.{to}"] = (
        f"t → {to}",
        lambda a, to=DTYPES[to]: a.astype(to),
    )
APPROXIMATE: dict[str, Callable[[Array, int], Array]] = {
    "ex2.approx.f32": fp.exponential,
    "rcp.approx.ftz.f64": fp.reciprocal,
    "rcp.approx.ftz.f32": lambda a, seed: fp.flush(fp.inverse(fp.flush(a), seed)),
    "ex2.approx.ftz.f32": lambda a, seed: fp.flush(fp.exponential(fp.flush(a), seed)),
}


DROPPED = Symbol("_")


def bind(m: Machine, opcode: str, operands: tuple[Operand, ...]) -> Step:
    """destination = function(sources)."""
    form, _, type = opcode.rpartition(".")
    if form == "mov" and any(isinstance(operand, Vector) for operand in operands):
        return move_halves(m, type, *operands)
    if opcode in APPROXIMATE:
        approximate = APPROXIMATE[opcode]
        types, function = "t → t", lambda a: approximate(a, m.seed)
    elif type in DTYPES and (opcode in FORMS or form in FORMS):
        types, function = FORMS.get(opcode) or FORMS[form]
    else:
        raise m.unsupported(f"the instruction {opcode}")
    named = {"t": type, "w": f"{type[0]}{2 * int(type[1:])}" if type != "pred" else ""}
    *sources, _, result = [named.get(name, name) for name in types.split()]
    write = m.writer(operands[0], result)
    read = [
        converted(m, operand, source) if opcode.startswith("cvt.") else m.reader(operand, source)
        for operand, source in zip(operands[1:], sources, strict=True)
    ]
    return lambda lanes: write(lanes, function(*[r(lanes) for r in read]))


def width(type: str) -> int:
    """Bytes; 0 of a special register, whose type is its own."""
    return np.dtype(DTYPES[type]).itemsize if type in DTYPES else 0


def converted(m: Machine, operand: Operand, type: str) -> Callable[[Lanes], Array]:
    """As `Machine.reader`; the register of what is converted may be wider, and its lowest bits
    count."""
    if isinstance(operand, Register) and width(operand.type) > width(type):
        wide = m.view(operand, f"u{8 * width(operand.type)}")
        return lambda lanes: wide[lanes].astype(f"u{width(type)}").view(DTYPES[type])
    return m.reader(operand, type)


def move_halves(m: Machine, type: str, target: Operand, source: Operand) -> Step:
    """Pack two registers into one of twice their size, or unpack one; the lowest bits first, and
    `_` for those that are dropped."""
    half = f"b{int(type[1:]) // 2}"
    whole, parts = (target, source) if isinstance(source, Vector) else (source, target)
    low, high = m.view(whole, type).view(DTYPES[half]).reshape(-1, 2).T
    if parts is source:
        pairs = [
            (place.__setitem__, m.reader(part, half))
            for place, part in zip((low, high), parts, strict=True)
        ]
    else:
        pairs = [
            (m.writer(part, half), place.__getitem__)
            for place, part in zip((low, high), parts, strict=True)
            if part != DROPPED
        ]

    def step(lanes: Lanes) -> None:
        for write, read in pairs:
            write(lanes, read(lanes))

    return step
