"""PTX text to instructions: scopes and register families are resolved, one `Instruction` a statement.

The grammar is that of NVIDIA's "PTX ISA" (9.0), as far as NVRTC and numba-cuda use it; what it doesn't know raises.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
DTYPES = {f"{kind}{8 * size}": UNSIGNED[size] for size in UNSIGNED for kind in "bu"}
DTYPES |= {"s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64, "pred": np.bool_}
DTYPES |= {"f16": np.uint16, "bf16": np.uint16, "f16x2": np.uint32, "bf16x2": np.uint32}  # kept as bits
DTYPES |= {"f32": np.float32, "f64": np.float64}
SPACES = ("global", "shared", "local", "const", "param")


class PTXError(Exception):
    """What the program did wrong, or what the interpreter can't do; names kernel, line, instruction and thread."""


class Register(NamedTuple):
    name: str
    type: str


class Immediate(NamedTuple):
    text: str

    @lru_cache(maxsize=4096)  # noqa: B019 - a tuple, and few of them
    def value(self, type: str) -> np.ndarray:
        """One element of the type's dtype; integers wrap, 0f and 0d are bit patterns."""
        dtype = np.dtype(DTYPES[type])
        if self.text[:2] in ("0f", "0F"):
            number = struct.unpack(">f", bytes.fromhex(self.text[2:]))[0]
        elif self.text[:2] in ("0d", "0D"):
            number = struct.unpack(">d", bytes.fromhex(self.text[2:]))[0]
        elif re.fullmatch(r"-?\d+\.\d*([eE]-?\d+)?", self.text):
            number = float(self.text)
        else:
            number = int(self.text.rstrip("U"), 0)
        if dtype.kind in "fb":
            return np.array([number], dtype)
        if isinstance(number, float):
            return np.array([number], f"f{dtype.itemsize}").view(dtype)
        return np.array([number & (256**dtype.itemsize - 1)], f"u{dtype.itemsize}").view(dtype)


class Symbol(NamedTuple):
    name: str
    offset: int = 0


class Address(NamedTuple):
    base: Register | Immediate | Symbol
    offset: int


class Pair(NamedTuple):
    first: Operand
    second: Operand


class Not(NamedTuple):
    predicate: Register


class Vector(tuple):
    """{…} or (…)."""


Operand = Register | Immediate | Symbol | Address | Pair | Not | Vector | None


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple[Operand, ...]
    guard: tuple[Register, bool] | None  # (predicate, wanted value)
    line: int
    text: str
    scope: tuple[int, ...]


class Variable(NamedTuple):
    name: str
    space: str
    align: int
    size: int | None  # None for an extern array
    data: bytes


@dataclass
class Function:
    name: str
    entry: bool
    returns: list[Variable] = field(default_factory=list)
    parameters: list[Variable] = field(default_factory=list)
    variables: dict[str, Variable] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[tuple[int, str], int] = field(default_factory=dict)
    limits: dict[str, tuple[int, ...]] = field(default_factory=dict)  # .maxntid and .reqntid

    def target(self, instruction: Instruction) -> int | None:
        """The index of the label that a branch names, seen from its scope."""
        name = instruction.operands[0].name
        return next((self.labels[s, name] for s in reversed(instruction.scope) if (s, name) in self.labels), None)


@dataclass
class Module:
    variables: dict[str, Variable]
    functions: dict[str, Function]


TOKEN = re.compile(r'"[^"]*"|[%$\w.]+(?:::\w+(?:\.\w+)*)*|\S')


class Parser:
    def __init__(self, text: str) -> None:
        text = re.sub(r"//[^\n]*|/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text.replace("\0", ""), flags=re.DOTALL)
        self.lines = text.splitlines()
        self.tokens = [(m[0], i) for i, line in enumerate(self.lines, 1) for m in TOKEN.finditer(line)]
        self.tokens.append(("", len(self.lines)))
        self.at = 0
        self.module = Module({}, {})
        self.function: Function | None = None
        self.scopes: list[tuple[int, dict[str, Register | Symbol]]] = [(0, {})]
        self.made = 0

    def peek(self) -> str:
        return self.tokens[self.at][0]

    def take(self, expected: str = "") -> str:
        token, line = self.tokens[self.at]
        if not token or (expected and token != expected):
            raise PTXError(f"line {line}: {expected or 'more'} expected, got {token!r}: {self.lines[line - 1].strip()}")
        self.at += 1
        return token

    def accept(self, token: str) -> bool:
        found = self.peek() == token
        self.at += found
        return found

    def parse(self) -> Module:
        while self.peek():
            token = self.peek()
            if token in (".version", ".target", ".address_size", ".file"):
                line = self.tokens[self.at][1]
                while self.peek() and self.tokens[self.at][1] == line:
                    self.at += 1
            elif token in (".visible", ".extern", ".weak", ".common"):
                self.at += 1
            elif token in (".entry", ".func"):
                self.parse_function()
            elif token[1:] in SPACES:
                for variable in self.declaration():
                    self.module.variables[variable.name] = variable
                    self.scopes[0][1][variable.name] = Symbol(variable.name)
            else:
                raise PTXError(f"line {self.tokens[self.at][1]}: can't read {token!r} at the top of a module")
        return self.module

    def declaration(self, end: str = ";") -> Iterator[Variable]:
        """`.space .align n .type name[size] = {…}, …` up to `end`; the names are as written."""
        space, align, pointer = self.take()[1:], 0, False
        while self.peek().startswith("."):
            token = self.take()[1:]
            pointer |= token == "ptr"  # the alignment that follows is of what it points to
            if token == "align":
                align = align if pointer else int(self.peek())
                self.take()
            elif token in DTYPES:
                type = token
            elif token != "ptr" and token not in SPACES:
                raise PTXError(f"line {self.tokens[self.at][1]}: can't read .{token} in a declaration")
        while True:
            name, count, width = self.take(), 1, np.dtype(DTYPES[type]).itemsize
            while self.accept("["):
                if self.accept("]"):
                    count = 0
                else:
                    count *= int(self.take(), 0)
                    self.take("]")
            data = b"".join(Immediate(x).value(type).tobytes() for x in self.initial()) if self.accept("=") else b""
            yield Variable(name, space, align or width, count * width or None, data)
            if end != ";" or not self.accept(","):
                break
        if end == ";":
            self.take(";")

    def initial(self) -> list[str]:
        values = [self.take() for _ in iter(lambda: self.peek() == ";", True)]
        if any(re.match(r"[A-Za-z_$%]", value) for value in values):
            raise PTXError(f"line {self.tokens[self.at][1]}: an initial value that is an address isn't supported")
        text = "".join(values).replace("{", "").replace("}", "")
        return [value for value in text.split(",") if value]

    def parse_function(self) -> None:
        function = Function("", self.take() == ".entry")
        self.open()
        if self.accept("("):
            function.returns = self.formal(function)
        function.name = self.take()
        if self.accept("("):
            function.parameters = self.formal(function)
        while self.peek() not in ("{", ";"):
            name, numbers = self.take(), []
            while re.fullmatch(r"\d+|,", self.peek()):
                numbers.append(self.take())
            function.limits[name] = tuple(int(n) for n in numbers if n != ",")
        if self.accept(";"):
            self.scopes.pop()
            return
        self.take("{")
        self.module.functions[function.name] = self.function = function
        depth = len(self.scopes)
        while len(self.scopes) >= depth:
            self.statement(function)

    def open(self) -> None:
        self.made += 1
        self.scopes.append((self.made, {}))

    def formal(self, function: Function) -> list[Variable]:
        found: list[Variable] = []
        while not self.accept(")"):
            found += [self.declare(function, variable) for variable in self.declaration(end=")")]
            self.accept(",")
        return found

    def declare(self, function: Function, variable: Variable) -> Variable:
        """Enter a function's variable under a name of its own."""
        scope, names = self.scopes[-1]
        unique = variable._replace(name=f"{variable.name}@{scope}")
        names[variable.name] = Symbol(unique.name)
        function.variables[unique.name] = unique
        return unique

    def statement(self, function: Function) -> None:
        token, line = self.tokens[self.at]
        if self.accept("{"):
            self.open()
        elif self.accept("}"):
            self.scopes.pop()
        elif self.accept(";"):
            pass
        elif token == ".reg":
            self.registers()
        elif token in (".pragma", ".loc"):
            while self.tokens[self.at][1] == line:
                self.at += 1
        elif token[1:] in SPACES and token[0] == ".":
            for variable in self.declaration():
                self.declare(function, variable)
        elif self.tokens[self.at + 1][0] == ":":
            function.labels[self.scopes[-1][0], self.take()] = len(function.instructions)
            self.take(":")
        else:
            self.instruction(function)

    def registers(self) -> None:
        scope, names = self.scopes[-1]
        self.take(".reg")
        type = self.take()[1:]
        if type not in DTYPES:
            raise PTXError(f"line {self.tokens[self.at][1]}: registers of type .{type} aren't supported")
        while True:
            name = self.take()
            if self.accept("<"):
                self.take()
                self.take(">")
                names[name + "<"] = Register(str(scope), type)
            else:
                names[name] = Register(f"{name}@{scope}", type)
            if not self.accept(","):
                break
        self.take(";")

    def instruction(self, function: Function) -> None:
        start, guard = self.at, None
        line = self.tokens[start][1]
        if self.accept("@"):
            wanted = not self.accept("!")
            guard = (self.name(self.take()), wanted)
        opcode, operands = self.take(), []
        while not self.accept(";"):
            operands.append(self.operand())
            if self.peek() != ";":
                self.take(",")
        scope = tuple(s for s, _ in self.scopes)
        last = self.tokens[self.at - 1][1]
        text = " ".join(" ".join(self.lines[line - 1 : last]).split())
        function.instructions.append(Instruction(opcode, tuple(operands), guard, line, text, scope))

    def operand(self) -> Operand:
        if self.accept("{") or self.accept("("):
            parts = []
            while not (self.accept("}") or self.accept(")")):
                parts.append(self.operand())
                self.accept(",")
            return Vector(parts)
        if self.accept("["):
            base = self.operand()
            self.take("]")
            return Address(base, 0) if not isinstance(base, Address) else base
        if self.accept("!"):
            return Not(self.name(self.take()))
        token = self.take()
        if token == "-":
            return Immediate("-" + self.take())
        value = None if token == "_" else self.name(token)
        if self.accept("|"):
            return Pair(value, self.operand())
        if self.accept("+"):
            sign = "-" if self.accept("-") else ""
            offset = int(sign + self.take(), 0)
            return Symbol(value.name, value.offset + offset) if isinstance(value, Symbol) else Address(value, offset)
        return value

    def name(self, token: str) -> Register | Symbol | Immediate:
        if token[0].isdigit():
            return Immediate(token)
        family = re.sub(r"\d+$", "", token)
        for _, names in reversed(self.scopes):
            if token in names:
                return names[token]
            if family + "<" in names:
                scope, type = names[family + "<"]
                return Register(f"{token}@{scope}", type)
        return Register(token, "b64" if token.endswith("64") else "b32") if token[0] == "%" else Symbol(token)


@lru_cache(maxsize=64)
def parse(text: str) -> Module:
    """All variables and functions of a PTX text."""
    return Parser(text).parse()
