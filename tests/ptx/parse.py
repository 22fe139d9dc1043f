"""PTX text to instructions, one `Instruction` a statement.

The grammar is that of NVIDIA's "PTX ISA" (9.0), as far as our kernels use it; what it doesn't know raises.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
DTYPES = {f"{kind}{8 * size}": UNSIGNED[size] for size in UNSIGNED for kind in "bu"}
DTYPES |= {"s16": np.int16, "s32": np.int32, "s64": np.int64, "f32": np.float32, "f64": np.float64, "pred": np.bool_}


class PTXError(Exception):
    """What the program did wrong, or what the interpreter can't do; names kernel, line, instruction and thread."""


class Register(NamedTuple):
    name: str
    type: str  # "special" if not declared: %tid.x


class Immediate(NamedTuple):
    text: str

    @lru_cache(maxsize=4096)  # noqa: B019 - a tuple, and few of them
    def value(self, type: str) -> np.ndarray:
        """One element of the type's dtype; integers wrap, 0f and 0d are bit patterns."""
        dtype = np.dtype(DTYPES[type])
        if self.text[:2] in ("0f", "0d"):
            number = struct.unpack(f">{self.text[1]}", bytes.fromhex(self.text[2:]))[0]
            return np.array([number], f"f{dtype.itemsize}").view(dtype)
        if dtype.kind in "fb":
            return np.array([int(self.text, 0)], dtype)
        return np.array([int(self.text, 0) & (256**dtype.itemsize - 1)], f"u{dtype.itemsize}").view(dtype)


class Symbol(NamedTuple):
    name: str


class Address(NamedTuple):
    base: Register | Symbol
    offset: int


class Pair(NamedTuple):
    """a|b, what a shuffle writes."""

    first: Register
    second: Register


class Vector(tuple):
    """{…}"""


Operand = Register | Immediate | Symbol | Address | Pair | Vector


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple[Operand, ...]
    guard: tuple[Register, bool] | None  # (predicate, wanted value)
    line: int
    text: str


class Variable(NamedTuple):
    name: str
    align: int
    size: int  # bytes; 0 for dynamic shared memory


@dataclass
class Kernel:
    name: str
    parameters: list[Variable] = field(default_factory=list)
    shared: list[Variable] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    most_threads: int = 1024


@dataclass
class Module:
    shared: list[Variable] = field(default_factory=list)
    kernels: dict[str, Kernel] = field(default_factory=dict)


TOKEN = re.compile(r'"[^"]*"|[%$\w.]+(?:::\w+(?:\.\w+)*)*|\S')


class Parser:
    def __init__(self, text: str) -> None:
        text = re.sub(r"//[^\n]*|/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text.replace("\0", ""), flags=re.DOTALL)
        self.lines = text.splitlines()
        self.tokens = [(m[0], i) for i, line in enumerate(self.lines, 1) for m in TOKEN.finditer(line)]
        self.tokens.append(("", len(self.lines)))
        self.at = 0
        self.module = Module()
        self.scopes: list[dict[str, str]] = []  # types of registers; of a family by its name and "<"

    def peek(self) -> str:
        return self.tokens[self.at][0]

    def error(self, what: str) -> PTXError:
        line = self.tokens[self.at][1]
        return PTXError(f"line {line}: {what}: {self.lines[line - 1].strip()}")

    def take(self, expected: str = "") -> str:
        token = self.peek()
        if not token or (expected and token != expected):
            raise self.error(f"{expected or 'more'} expected, got {token!r}")
        self.at += 1
        return token

    def accept(self, token: str) -> bool:
        found = self.peek() == token
        self.at += found
        return found

    def skip(self, end: str) -> None:
        while self.take() != end:
            pass

    def parse(self) -> Module:
        while self.peek():
            token = self.take()
            if token in (".version", ".target", ".address_size"):
                line = self.tokens[self.at][1]
                while self.tokens[self.at][1] == line and self.peek():
                    self.at += 1
            elif token == ".entry":
                self.kernel()
            elif token == ".shared":
                self.module.shared.append(self.variable())
                self.take(";")
            elif token == ".global":
                self.skip(";")  # constants that the compiler has put in their places; what uses one raises
            elif token not in (".visible", ".extern", ".common"):
                raise self.error(f"can't read {token!r} at the top of a module")
        return self.module

    def variable(self) -> Variable:
        """`.align n .type name[size]` or `.type .ptr .align n name`, whose alignment is of what it points to."""
        align, pointer, width = 0, False, 0
        while self.peek().startswith("."):
            token = self.take()[1:]
            if token == "align":
                align = max(align, 0 if pointer else int(self.peek()))
                self.take()
            elif token == "ptr":
                pointer = True
            else:
                width = np.dtype(DTYPES[token]).itemsize
        name, count = self.take(), 1
        if self.accept("["):
            count = 0 if self.peek() == "]" else int(self.take())
            self.take("]")
        return Variable(name, align or width, count * width)

    def kernel(self) -> None:
        kernel = Kernel(self.take())
        self.take("(")
        while not self.accept(")"):
            self.take(".param")
            kernel.parameters.append(self.variable())
            self.accept(",")
        if self.accept(".maxntid"):
            kernel.most_threads = int(self.take())
            while self.accept(","):
                kernel.most_threads *= int(self.take())
        if self.accept(".minnctapersm"):  # what ptxas should leave room for
            self.take()
        self.take("{")
        self.scopes.append({})
        while self.scopes:
            self.statement(kernel)
        self.module.kernels[kernel.name] = kernel

    def statement(self, kernel: Kernel) -> None:
        if self.accept("{"):
            self.scopes.append({})
        elif self.accept("}"):
            self.scopes.pop()
        elif self.accept(".reg"):
            self.registers()
        elif self.accept(".pragma"):
            self.skip(";")
        elif self.accept(".shared"):
            kernel.shared.append(self.variable())
            self.take(";")
        elif self.tokens[self.at + 1][0] == ":":
            kernel.labels[self.take()] = len(kernel.instructions)
            self.take(":")
        else:
            self.instruction(kernel)

    def registers(self) -> None:
        type, name = self.take()[1:], self.take()
        if self.accept("<"):
            self.take()
            self.take(">")
            name += "<"
        if type not in DTYPES or self.type_of(name):
            raise self.error(f"a register of type .{type}, or of a name that is taken, isn't supported")
        self.scopes[-1][name] = type
        self.take(";")

    def type_of(self, name: str) -> str:
        """The type of a register in scope, or nothing."""
        names = (name, re.sub(r"\d+$", "<", name))
        return next((scope[n] for scope in self.scopes for n in names if n in scope), "")

    def instruction(self, kernel: Kernel) -> None:
        guard, line = None, self.tokens[self.at][1]
        if self.accept("@"):
            wanted = not self.accept("!")
            guard = (self.operand(), wanted)
        opcode, operands = self.take(), []
        while not self.accept(";"):
            operands.append(self.operand())
            if self.peek() != ";":
                self.take(",")
        text = " ".join(" ".join(self.lines[line - 1 : self.tokens[self.at - 1][1]]).split())
        kernel.instructions.append(Instruction(opcode, tuple(operands), guard, line, text))

    def operand(self) -> Operand:
        if self.accept("{"):
            parts = [self.operand()]
            while self.accept(","):
                parts.append(self.operand())
            self.take("}")
            return Vector(parts)
        if self.accept("["):
            base, offset = self.operand(), 0
            if self.accept("+"):
                offset = int(("-" if self.accept("-") else "") + self.take())
            self.take("]")
            return Address(base, offset)
        token = self.take()
        if token == "-" or token[0].isdigit():
            return Immediate(token + self.take() if token == "-" else token)
        if token[0] != "%":
            return Symbol(token)
        register = Register(token, self.type_of(token) or "special")
        return Pair(register, self.operand()) if self.accept("|") else register


@lru_cache(maxsize=64)
def parse(text: str) -> Module:
    """All shared variables and kernels of a PTX text."""
    return Parser(text).parse()
