"""PTX text to instructions, one `Instruction` a statement.

The grammar is that of NVIDIA's "PTX ISA" (9.0), as far as our kernels use it; what it doesn't know
raises.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
DTYPES = {f"{kind}{8 * size}": UNSIGNED[size] for size in UNSIGNED for kind in "bu"}
DTYPES |= {
    "s16": np.int16,
    "s32": np.int32,
    "s64": np.int64,
    "f32": np.float32,
    "f64": np.float64,
    "pred": np.bool_,
}


class PTXError(Exception):
    """What the program did wrong, or what the interpreter can't do; names kernel, line, instruction
    and thread."""


class Register(NamedTuple):
    name: str
    type: str  # "special" if not declared: %tid.x


class Immediate(NamedTuple):
    text: str

    def value(self, type: str) -> np.ndarray:
        """One element of the type's dtype; integers wrap, 0f and 0d are bit patterns."""
        dtype = np.dtype(DTYPES[type])
        if self.text[:2] in ("0f", "0d"):
            return np.array([int(self.text[2:], 16)], f"u{len(self.text) // 2 - 1}").view(dtype)
        if dtype.kind in "fb":
            return np.array([int(self.text, 0)], dtype)
        return np.array([int(self.text, 0) & (256**dtype.itemsize - 1)], f"u{dtype.itemsize}").view(
            dtype
        )


class Symbol(NamedTuple):
    name: str


class Address(NamedTuple):
    base: Register | Symbol
    offset: int


class Vector(tuple):
    """{a, b}, and a|b, what a shuffle writes."""


Operand = Register | Immediate | Symbol | Address | Vector


class Instruction(NamedTuple):
    opcode: str
    operands: tuple[Operand, ...]
    guard: tuple[Register, bool] | None  # (predicate, wanted value)
    line: int
    text: str


class Variable(NamedTuple):
    name: str
    align: int
    size: int  # bytes; 0 for dynamic shared memory


@dataclass(eq=False)
class Kernel:
    name: str
    parameters: list[Variable]
    most_threads: int
    shared: list[Variable]
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    bound: bool = False  # whether a machine has known each of its instructions


IGNORED = re.compile(
    r"(?ms)//[^\n]*|/\*.*?\*/|^[ \t]*\.(?:version|target|address_size|pragma)\b[^\n]*"
)
LINKAGE = r"\s*(?:\.(?:visible|extern|common)\s+)?"
CONSTANT = re.compile(
    LINKAGE + r"\.global\s[^;]*;"
)  # the compiler has put it in its places; what uses it raises
ENTRY = re.compile(LINKAGE + r"\.entry\s+([$\w]+)\s*\(([^)]*)\)\s*(?:\.maxntid([\s\d,]+))?[^{;]*\{")
WORD = re.compile(r"\s*\S+")
SHARED = re.compile(LINKAGE + r"\.shared\s([^;]*);")
STATEMENT = re.compile(r"\s*(?:([{}])|([$\w]+)\s*:(?!:)|([^;]+);)")
VARIABLE = re.compile(
    r"\s*(?:\.param\s+)?(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr[\s.\w]*\s)?([$\w]+)(?:\[(\d*)\])?\s*"
)
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+([%$\w]+)(<\d+>)?")
INSTRUCTION = re.compile(r"(?:@(!?)(%?[$\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^\s,][^,]*")


class Parser:
    def __init__(self, text: str) -> None:
        self.text = IGNORED.sub(lambda m: "\n" * m[0].count("\n"), text.replace("\0", ""))
        self.at, self.line = 0, 1
        self.counted = 0  # characters, in whose lines `line` is
        # types of registers; of a family by its name and "<"
        self.scopes: list[dict[str, str]] = []

    def accept(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """The next piece of the text if it is of this form; `line` is where its first word
        stands."""
        found = pattern.match(self.text, self.at)
        if found:
            word = found.end() - len(found[0].lstrip())
            self.line += self.text.count("\n", self.counted, word)
            self.at, self.counted = found.end(), word
        return found

    def parse(self) -> dict[str, Kernel]:
        shared: list[Variable] = []  # of all kernels that follow
        kernels = {}
        while self.text[self.at :].strip():
            if found := self.accept(SHARED):
                shared.append(self.variable(found[1]))
            elif found := self.accept(ENTRY):
                parameters = [self.variable(text) for text in found[2].split(",") if text.strip()]
                most_threads = int(np.prod([int(n) for n in (found[3] or "1024").split(",")]))
                kernel = kernels[found[1]] = Kernel(found[1], parameters, most_threads, [*shared])
                self.scopes.append({})
                while self.scopes:
                    self.statement(kernel)
            elif not self.accept(CONSTANT):
                word = self.accept(WORD)
                raise PTXError(
                    f"line {self.line}: can't read {word[0].strip()!r} at the top of a module"
                )
        return kernels

    def variable(self, text: str) -> Variable:
        """`.align n .type name[size]`, or `.type .ptr .align n name`, whose alignment is of what it
        points to."""
        found = VARIABLE.fullmatch(text)
        if not found or found[2] not in DTYPES:
            raise PTXError(f"line {self.line}: can't read the variable {text.strip()!r}")
        width = np.dtype(DTYPES[found[2]]).itemsize
        return Variable(
            found[3],
            int(found[1] or width),
            width * (1 if found[4] is None else int(found[4] or 0)),
        )

    def statement(self, kernel: Kernel) -> None:
        found = self.accept(STATEMENT)
        if not found:
            raise PTXError(f"line {self.line}: the body of {kernel.name} has no end")
        brace, label, text = found.groups()
        if brace == "{":
            self.scopes.append({})
        elif brace:
            self.scopes.pop()
        elif label:
            kernel.labels[label] = len(kernel.instructions)
        elif text.startswith(".reg"):
            self.registers(text)
        elif text.startswith(".shared"):
            kernel.shared.append(self.variable(text.removeprefix(".shared")))
        elif found := INSTRUCTION.fullmatch(text):
            guard = (self.operand(found[2]), not found[1]) if found[2] else None
            operands = tuple(self.operand(operand) for operand in OPERAND.findall(found[4]))
            text = f"{' '.join(text.split())};"
            kernel.instructions.append(Instruction(found[3], operands, guard, self.line, text))
        else:
            raise PTXError(f"line {self.line}: can't read {text!r}")

    def registers(self, text: str) -> None:
        found = REGISTERS.fullmatch(text)
        name = found[2] + ("<" if found[3] else "") if found else ""
        if not found or found[1] not in DTYPES or self.type_of(name):
            raise PTXError(
                f"line {self.line}: {text}: such a type, or a name that is taken, isn't supported"
            )
        self.scopes[-1][name] = found[1]

    def type_of(self, name: str) -> str:
        """The type of a register in scope, or nothing."""
        family = name.rstrip("0123456789") + "<"
        return next(filter(None, (s.get(name) or s.get(family) for s in self.scopes)), "")

    def operand(self, text: str) -> Operand:
        text = text.strip()
        if text[0] == "{":
            return Vector(self.operand(part) for part in text[1:-1].split(","))
        if text[0] == "[":
            base, _, offset = text[1:-1].partition("+")
            return Address(self.operand(base), int(offset or 0))
        if "|" in text:
            return Vector(self.operand(part) for part in text.split("|"))
        if type := self.type_of(text):
            return Register(text, type)
        if text[0] == "%":
            return Register(text, "special")
        return Immediate(text) if text[0] in "-0123456789" else Symbol(text)


@lru_cache(maxsize=256)
def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a PTX text by their names."""
    return Parser(text).parse()
