"""Arithmetic, logic, comparison, conversion and moves: instructions that touch one thread's registers alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from . import arithmetic as fp
from .parse import DTYPES, UNSIGNED, Pair, Vector

if TYPE_CHECKING:
    from .machine import Lanes, Machine

Array = np.ndarray
Step = Callable[["Lanes"], object]
FACTORIES: dict[str, Callable] = {}
DIRECTIONS = ("rn", "rz", "rm", "rp")


class Modifiers:
    """The parts of an opcode after its name; what no one takes is an error."""

    def __init__(self, machine: Machine, opcode: str) -> None:
        self.machine, (self.name, *self.left) = machine, opcode.split(".")

    def type(self) -> str:
        """Take the last part, a type."""
        if not self.left or self.left[-1] not in DTYPES:
            raise self.machine.unsupported(f"the type .{self.left[-1] if self.left else ''}")
        return self.left.pop()

    def flag(self, name: str) -> bool:
        found = name in self.left
        if found:
            self.left.remove(name)
        return found

    def one_of(self, *names: str, default: str | None = None) -> str:
        """Take the first of these that is there."""
        found = next((part for part in self.left if part in names), default)
        if found is None:
            raise self.machine.unsupported(f"{self.name} without one of {names}")
        if found in self.left:
            self.left.remove(found)
        return found

    def drop(self, *names: str) -> list[str]:
        self.left = [part for part in self.left if part not in names]
        return self.left


def factory(*names: str) -> Callable:
    def enter(function: Callable) -> Callable:
        FACTORIES.update(dict.fromkeys(names, function))
        return function

    return enter


def elementwise(m: Machine, operands: tuple, types: list[str], result: str, function: Callable) -> Step:
    """destination = function(sources)."""
    if len(operands) != len(types) + 1:
        raise m.unsupported(f"{len(operands)} operands")
    write = m.writer(operands[0], result)
    read = [m.reader(operand, type) for operand, type in zip(operands[1:], types, strict=True)]
    if len(read) == 1:
        return lambda lanes: write(lanes, function(read[0](lanes)))
    if len(read) == 2:
        return lambda lanes: write(lanes, function(read[0](lanes), read[1](lanes)))
    return lambda lanes: write(lanes, function(*[r(lanes) for r in read]))


def halves(type: str, function: Callable) -> Callable:
    """Apply a function of f16 or bf16 bits to each half of packed pairs."""
    if not type.endswith("x2"):
        return function

    def both(*values: Array) -> Array:
        values = np.broadcast_arrays(*values)
        return function(*[np.ascontiguousarray(v).view(np.uint16) for v in values]).view(np.uint32)

    return both


def finished(function: Callable, type: str, ftz: bool, sat: bool) -> Callable:
    """.ftz on inputs and output, .sat on the output."""
    if ftz and type == "f32":
        inner = function
        function = lambda *x: fp.flush(inner(*[fp.flush(v) for v in x]))  # noqa: E731
    return (lambda *x: fp.saturate(function(*x))) if sat else function


def is_half(type: str) -> bool:
    return "f16" in type


@factory("add", "sub", "mul", "fma", "mad")
def arithmetic(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    type, name = mods.type(), mods.name
    if "f" not in type:
        return integers(m, operands, mods, type)
    mode, ftz, sat = mods.one_of(*DIRECTIONS, default="rn"), mods.flag("ftz"), mods.flag("sat")
    if is_half(type):
        half = type.removesuffix("x2")
        one, minus_zero = np.uint16(0x3C00 if half == "f16" else 0x3F80), np.uint16(0x8000)
        fused = {
            "add": lambda a, b: fp.fma_half(a, one, b, half),
            "sub": lambda a, b: fp.fma_half(a, one, b ^ minus_zero, half),
            "mul": lambda a, b: fp.fma_half(a, b, minus_zero, half),
        }.get(name, lambda a, b, c: fp.fma_half(a, b, c, half))
        if mode != "rn" or ftz or sat:
            raise m.unsupported("a modifier of half arithmetic")
        return elementwise(m, operands, [type] * (len(operands) - 1), type, halves(type, fused))
    fma = fp.fma32 if type == "f32" else fp.fma64
    dtype = DTYPES[type]
    if name in ("fma", "mad"):
        function = lambda a, b, c: fma(a, b, c, mode)  # noqa: E731
    elif mode == "rn":
        function = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name]
    else:
        function = {
            "add": lambda a, b: fma(a, np.ones(1, dtype), b, mode),
            "sub": lambda a, b: fma(-b, np.ones(1, dtype), a, mode),
            "mul": lambda a, b: fma(a, b, -np.zeros(1, dtype), mode),
        }[name]
    return elementwise(m, operands, [type] * (len(operands) - 1), type, finished(function, type, ftz, sat))


def high_product(a: Array, b: Array) -> Array:
    """The upper half of the product of two integer arrays."""
    size = a.dtype.itemsize
    if size < 8:
        wide = np.dtype(f"{a.dtype.kind}{2 * size}")
        return (a.astype(wide) * b.astype(wide) >> wide.type(8 * size)).astype(a.dtype)
    x, y, low, shift = a.view(np.uint64), b.view(np.uint64), np.uint64(0xFFFFFFFF), np.uint64(32)
    middle = (x >> shift) * (y & low) + ((x & low) * (y & low) >> shift)
    other = (x & low) * (y >> shift) + (middle & low)
    product = (x >> shift) * (y >> shift) + (middle >> shift) + (other >> shift)
    if a.dtype.kind == "i":
        product = product - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return product.view(a.dtype)


@factory("addc", "subc", "madc")
def carrying(m: Machine, operands: tuple, mods: Modifiers, type: str = "") -> Step:
    """32-bit add, sub and mad with a carry in (…c) or out (.cc), which is each thread's own."""
    type = type or mods.type()
    if type not in ("u32", "s32"):
        raise m.unsupported(f"a carry of .{type}")
    takes, gives, part = mods.name.endswith("c"), mods.flag("cc"), mods.one_of("lo", "hi", default="")
    read, write = [m.reader(operand, "u32") for operand in operands[1:]], m.writer(operands[0], "u32")
    if part and type == "s32" and part == "hi":
        raise m.unsupported("a signed upper half with carry")

    def step(lanes: Lanes) -> None:
        a, b, *c = (r(lanes).astype(np.int64) for r in read)
        carry = m.carry[lanes] if takes else np.int64(0)
        if part:
            product = a.view(np.uint64) * b.view(np.uint64)
            half = product >> np.uint64(32) if part == "hi" else product & np.uint64(0xFFFFFFFF)
            total = half.view(np.int64) + c[0] + carry
        else:
            total = a - b - carry if mods.name.startswith("sub") else a + b + carry
        write(lanes, total.astype(np.uint32))
        if gives:
            m.carry[lanes] = total >> 32 & 1

    return step


def integers(m: Machine, operands: tuple, mods: Modifiers, type: str) -> Step:
    name, result, dtype = mods.name, type, DTYPES[type]
    if "cc" in mods.left:
        return carrying(m, operands, mods, type)
    if name in ("add", "sub"):
        function = np.add if name == "add" else np.subtract
        if mods.flag("sat"):
            plain = function
            function = lambda a, b: np.clip(plain(a.astype("i8"), b.astype("i8")), -(2**31), 2**31 - 1).astype(dtype)  # noqa: E731
        return elementwise(m, operands, [type] * 2, type, function)
    part = mods.one_of("lo", "hi", "wide")
    product: Callable = {"lo": np.multiply, "hi": high_product}.get(part)
    if part == "wide":
        result = f"{type[0]}{2 * int(type[1:])}"
        wide = DTYPES[result]
        product = lambda a, b: a.astype(wide) * b.astype(wide)  # noqa: E731
    if name == "mul":
        return elementwise(m, operands, [type] * 2, result, product)
    return elementwise(m, operands, [type, type, result], result, lambda a, b, c: product(a, b) + c)


@factory("div", "rem")
def divide(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    type = mods.type()
    if "f" in type:
        mode, ftz = mods.one_of("rn", "approx", "full"), mods.flag("ftz")
        function: Callable = np.divide if mode == "rn" else lambda a, b: fp.quotient(a, b, m.seed)
        return elementwise(m, operands, [type] * 2, type, finished(function, type, ftz, False))
    ones = np.array([-1]).astype(DTYPES[type])

    def function(a: Array, b: Array) -> Array:
        remainder = np.fmod(a, b)
        by_zero = a if mods.name == "rem" else ones
        return np.where(b == 0, by_zero, remainder if mods.name == "rem" else (a - remainder) // b)

    return elementwise(m, operands, [type] * 2, type, function)


@factory("min", "max")
def minimum(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    type, nan, ftz, largest = mods.type(), mods.flag("NaN"), mods.flag("ftz"), mods.name == "max"
    function = lambda a, b: fp.extreme(a, b, largest, nan)  # noqa: E731
    if is_half(type):
        half = type.removesuffix("x2")
        wide = function
        function = halves(type, lambda a, b: fp.to_half(wide(fp.from_half(a, half), fp.from_half(b, half)), half))
    return elementwise(m, operands, [type] * 2, type, finished(function, type, ftz, False))


@factory("abs", "neg")
def sign(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    type, ftz = mods.type(), mods.flag("ftz")
    function: Callable = np.abs if mods.name == "abs" else np.negative
    if is_half(type):
        top = np.uint32(0x80008000).astype(DTYPES[type])
        function = (lambda a: a & ~top) if mods.name == "abs" else (lambda a: a ^ top)
    return elementwise(m, operands, [type], type, finished(function, type, ftz, False))


@factory("copysign")
def copysign(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    type = mods.type()
    return elementwise(m, operands, [type] * 2, type, lambda a, b: np.copysign(b, a))


@factory("rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def special(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    type, ftz, name = mods.type(), mods.flag("ftz"), mods.name
    mode = mods.one_of("rn", "approx")
    if mode == "rn":
        function: Callable = {"rcp": lambda x: DTYPES[type](1) / x, "sqrt": np.sqrt}[name]
    elif type == "f32" or (type == "f64" and (name == "rsqrt" or (name == "rcp" and ftz))):
        function = lambda x: fp.approximate(name, x, m.seed, ftz)  # noqa: E731
    else:
        raise m.unsupported(f"{name} of .{type}")
    return elementwise(m, operands, [type], type, finished(function, type, ftz, False))


@factory("and", "or", "xor", "not", "cnot")
def logic(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    type = mods.type()
    names = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
    function = names.get(mods.name, lambda a: (a == 0).astype(a.dtype))
    return elementwise(m, operands, [type] * (len(operands) - 1), type, function)


def shift_left(a: Array, n: Array) -> Array:
    """a << n of unsigned integers, zero where n is at least the width."""
    bits = 8 * a.dtype.itemsize
    return np.where(n < bits, a << np.minimum(n, bits - 1).astype(a.dtype), a.dtype.type(0))


def shift_right(a: Array, n: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    if a.dtype.kind == "i":
        return a >> np.minimum(n, bits - 1).astype(a.dtype)
    return np.where(n < bits, a >> np.minimum(n, bits - 1).astype(a.dtype), a.dtype.type(0))


def low_bits(n: Array, dtype: np.dtype) -> Array:
    """n ones."""
    return ~shift_left(np.full(np.shape(n), -1, "i8").astype(dtype), n)


@factory("shl", "shr")
def shift(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    type = mods.type()
    return elementwise(m, operands, [type, "u32"], type, shift_left if mods.name == "shl" else shift_right)


@factory("shf")
def funnel(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    type, left, clamp = mods.type(), mods.one_of("l", "r") == "l", mods.one_of("wrap", "clamp") == "clamp"

    def function(low: Array, high: Array, n: Array) -> Array:
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        n = (np.minimum(n, 32) if clamp else n & 31).astype(np.uint64)
        return (both << n >> np.uint64(32) if left else both >> n).astype(np.uint32)

    return elementwise(m, operands, [type, type, "u32"], type, function)


@factory("bfe")
def extract(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    type = mods.type()
    dtype = np.dtype(DTYPES[type])
    unsigned, bits = UNSIGNED[dtype.itemsize], 8 * dtype.itemsize

    def function(a: Array, position: Array, length: Array) -> Array:
        position, length = (position & 0xFF).astype(np.int64), (length & 0xFF).astype(np.int64)
        raw = a.view(unsigned)
        field = shift_right(raw, position) & low_bits(length, unsigned)
        if dtype.kind == "i":
            negative = shift_right(raw, np.minimum(position + length - 1, bits - 1)) & unsigned(1) != 0
            kept = low_bits(np.clip(bits - position, 0, length), unsigned)
            field = np.where((length > 0) & negative, field | ~kept, field)
        return field.astype(unsigned).view(dtype)

    return elementwise(m, operands, [type, "u32", "u32"], type, function)


@factory("bfi")
def insert(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    type = mods.type()

    def function(a: Array, b: Array, position: Array, length: Array) -> Array:
        mask = shift_left(low_bits(length & 0xFF, b.dtype), position & 0xFF)
        return (b & ~mask) | (shift_left(a, position & 0xFF) & mask)

    return elementwise(m, operands, [type, type, "u32", "u32"], type, function)


@factory("prmt")
def permute(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    type = mods.type()

    def function(a: Array, b: Array, selectors: Array) -> Array:
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        result = np.uint32(0)
        for place in range(4):
            selector = selectors >> np.uint32(4 * place) & np.uint32(15)
            byte = (both >> (selector & np.uint32(7)).astype(np.uint64) * np.uint64(8) & np.uint64(255)).astype(
                np.uint32
            )
            byte = np.where(selector & 8 != 0, np.where(byte & 128 != 0, 255, 0), byte).astype(np.uint32)
            result = result | byte << np.uint32(8 * place)
        return result

    return elementwise(m, operands, [type] * 3, type, function)


@factory("lop3")
def lookup(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    type = mods.type()
    table = int(operands[4].value("u32")[0])

    def function(a: Array, b: Array, c: Array) -> Array:
        result = np.uint32(0)
        for row in (i for i in range(8) if table >> i & 1):
            result = result | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
        return result

    return elementwise(m, operands[:4], [type] * 3, type, function)


def leading_zeros(a: Array) -> Array:
    if a.dtype.itemsize == 8:
        high, low = (a >> np.uint64(32)).astype(np.uint32), a.astype(np.uint32)
        return np.where(high != 0, leading_zeros(high), 32 + leading_zeros(low)).astype(np.uint32)
    return (32 - np.frexp(a.astype(np.float64))[1]).astype(np.uint32)


def reverse_bits(a: Array) -> Array:
    octets = np.ascontiguousarray(a).view(np.uint8).reshape(len(a), -1)
    return np.packbits(np.unpackbits(octets, axis=1)[:, ::-1], axis=1)[:, : octets.shape[1]].copy().view(a.dtype)[:, 0]


@factory("popc", "clz", "brev", "bfind")
def count_bits(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    type, amount = mods.type(), mods.flag("shiftamt")
    if mods.name == "brev":
        return elementwise(m, operands, [type], type, reverse_bits)
    bits = 8 * np.dtype(DTYPES[type]).itemsize

    def find(a: Array) -> Array:
        a = np.where(a < 0, ~a, a).view(UNSIGNED[bits // 8])
        zeros = leading_zeros(a)
        return np.where(a == 0, np.uint32(0xFFFFFFFF), zeros if amount else np.uint32(bits - 1) - zeros)

    function = {"popc": lambda a: np.bitwise_count(a).astype(np.uint32), "clz": leading_zeros, "bfind": find}[mods.name]
    return elementwise(m, operands, [type], "u32", function)


COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
COMPARE |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}


def comparison(name: str, type: str) -> Callable[[Array, Array], Array]:
    """Ordered, unordered (…u), num and nan comparisons."""
    if is_half(type):
        inner = comparison(name, "f32")
        return lambda a, b: inner(fp.from_half(a, type), fp.from_half(b, type))
    if type[0] != "f":
        return COMPARE[name]
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if name == "ne":
        return lambda a, b: (a < b) | (a > b)
    if name.endswith("u"):
        plain = COMPARE[name[:-1]]
        return lambda a, b: plain(a, b) | np.isnan(a) | np.isnan(b)
    return COMPARE[name]


COMPARISONS = (*COMPARE, "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
JOIN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@factory("setp", "set")
def set_predicate(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    type = mods.type()
    result = mods.type() if mods.name == "set" else "pred"
    compare, join, ftz = comparison(mods.one_of(*COMPARISONS), type), mods.one_of(*JOIN, default=""), mods.flag("ftz")
    if ftz and type == "f32":
        inner = compare
        compare = lambda a, b: inner(fp.flush(a), fp.flush(b))  # noqa: E731
    first, second = operands[0] if isinstance(operands[0], Pair) else (operands[0], None)
    write, write_second = m.writer(first, result), m.writer(second, "pred")
    read = [m.reader(operand, type) for operand in operands[1:3]]
    extra = m.reader(operands[3], "pred") if join else None
    true = {"pred": True, "f32": np.float32(1), "u32": np.uint32(0xFFFFFFFF), "s32": np.int32(-1)}.get(result)
    if true is None:
        raise m.unsupported(f"set to .{result}")

    def step(lanes: Lanes) -> None:
        value = compare(read[0](lanes), read[1](lanes))
        opposite = ~value
        if extra:
            value, opposite = JOIN[join](value, extra(lanes)), JOIN[join](opposite, extra(lanes))
        write(lanes, value if result == "pred" else np.where(value, true, type_zero))
        write_second(lanes, opposite)

    type_zero = DTYPES[result](0)
    return step


@factory("selp")
def select(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    type = mods.type()
    return elementwise(m, operands, [type, type, "pred"], type, lambda a, b, p: np.where(p, a, b))


@factory("testp")
def test_property(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    type = mods.type()
    tests = {"finite": np.isfinite, "infinite": np.isinf, "notanumber": np.isnan, "number": lambda x: ~np.isnan(x)}
    return elementwise(m, operands, [type], "pred", tests[mods.one_of(*tests)])


@factory("mov")
def move(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    """Between registers, of addresses and special registers; packs and unpacks vectors, lowest bits first."""
    type = mods.type()
    target, source = operands
    if not isinstance(target, Vector) and not isinstance(source, Vector):
        return elementwise(m, operands, [type], type, lambda a: a)
    parts = target if isinstance(target, Vector) else source
    width = 8 * np.dtype(DTYPES[type]).itemsize
    part, whole = f"u{width // len(parts)}", f"u{width}"
    if isinstance(target, Vector):
        read = m.reader(source, whole)
        writers = [m.writer(register, part) for register in target]

        def unpack(lanes: Lanes) -> None:
            value = read(lanes).copy()
            for i, write in enumerate(writers):
                write(lanes, (value >> value.dtype.type(i * width // len(parts))).astype(DTYPES[part]))

        return unpack
    readers, write, dtype = [m.reader(register, part) for register in source], m.writer(target, whole), DTYPES[whole]
    shifts = [dtype(i * width // len(parts)) for i in range(len(parts))]
    return lambda lanes: write(
        lanes, sum((r(lanes).astype(dtype) << n for r, n in zip(readers, shifts, strict=True)), dtype(0))
    )


@factory("cvt")
def convert(m: Machine, operands: tuple, mods: Modifiers) -> Step:
    source, target = mods.type(), mods.type()
    mode = mods.one_of(*DIRECTIONS, *fp.ROUND, default="")
    ftz, sat = mods.flag("ftz"), mods.flag("sat")
    if target.endswith("x2"):
        half = target.removesuffix("x2")
        if source != "f32" or mode not in ("rn", "rz") or ftz or sat:
            raise m.unsupported("this conversion")
        pair = lambda a, b: fp.to_half(a, half, mode).astype(np.uint32) << np.uint32(16) | fp.to_half(b, half, mode)  # noqa: E731
        return elementwise(m, operands, [source] * 2, target, pair)
    function = conversion(m, target, source, mode, sat)
    if ftz and source == "f32":
        before = function
        function = lambda x: before(fp.flush(x))  # noqa: E731
    if sat and "f" in target:
        exact = function
        function = lambda x: fp.saturate(exact(x))  # noqa: E731
    if ftz and target == "f32":
        unflushed = function
        function = lambda x: fp.flush(unflushed(x))  # noqa: E731
    return elementwise(m, operands, [source], target, function)


def conversion(m: Machine, target: str, source: str, mode: str, sat: bool) -> Callable[[Array], Array]:
    dtype = DTYPES[target]
    if is_half(source):
        inner = conversion(m, target, "f32", mode, sat) if target != "f32" else lambda x: x
        return lambda x: inner(fp.from_half(x, source))
    if "f" in source and "f" not in target:
        wide = source == "f64" or target in ("s64", "u64")
        return lambda x: fp.to_integer(x, dtype, mode, wide)
    if "f" not in source and "f" not in target:
        limits = np.iinfo(dtype)
        low, high = max(limits.min, np.iinfo(DTYPES[source]).min), min(limits.max, np.iinfo(DTYPES[source]).max)
        return (lambda x: np.clip(x, low, high).astype(dtype)) if sat else (lambda x: x.astype(dtype))
    if "f" not in source:
        if mode != "rn" and not (target == "f32" and "64" not in source):
            raise m.unsupported(f"rounding .{mode} from .{source}")
        if is_half(target):
            return lambda x: fp.to_half(x.astype(np.float64), target)
        return lambda x: x.astype(dtype) if mode == "rn" else fp.narrow(x.astype(np.float64), mode)
    if mode in fp.ROUND:
        if source != target:
            raise m.unsupported(f"rounding .{mode} with a change of type")
        return fp.ROUND[mode]
    if is_half(target):
        return lambda x: fp.to_half(x, target, mode)
    return lambda x: fp.narrow(x, mode or "rn") if (source, target) == ("f64", "f32") else x.astype(dtype)
