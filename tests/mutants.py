"""The mutants of our source, drawn from its syntax trees by a seed; tests/mutate.py runs them.

A mutant is one small edit of a file: a comparison moved, a sign turned, a number one higher or
lower, a condition negated, a keyword left out, a statement dropped. Docstrings, annotations and the
texts of errors stay as they are.
"""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = Path(__file__).parents[1] / "refimpl"
SEED = 12
SAMPLE = 600
FILES = ("ops/*.py", "grads/*.py", "checkpoint/*.py", "generate/*.py")
MODULES = ("model", "optimizer", "parameters", "batch")

OPPOSITE = (
    (ast.Lt, ast.LtE),
    (ast.Gt, ast.GtE),
    (ast.Eq, ast.NotEq),
    (ast.Is, ast.IsNot),
    (ast.In, ast.NotIn),
)
COMPARED = {a: b for one, other in OPPOSITE for a, b in ((one, other), (other, one))}
COMPUTED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
NAMES = {
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "floor": "ceil",
    "ceil": "floor",
    "maximum": "minimum",
    "zeros_like": "ones_like",
}


class Mutant(NamedTuple):
    """One edit of a file of refimpl/."""

    file: str
    start: int  # of the bytes that `text` replaces
    stop: int
    text: str
    line: int
    code: str  # the line as it was, with «» around what is edited
    edit: str  # what became of it

    def source(self) -> bytes:
        """The file with the edit."""
        before = (PACKAGE / self.file).read_bytes()
        return before[: self.start] + self.text.encode() + before[self.stop :]

    def told(self) -> str:
        return f"refimpl/{self.file}:{self.line}: {self.code}: {self.edit}"

    def key(self) -> tuple[str, str, str]:
        """What names it when lines have moved."""
        return self.file, self.code, self.edit


def edits(node: ast.AST) -> Iterator[ast.AST | str]:
    """What may stand in the place of a node: other nodes, or text."""
    match node:
        case ast.Compare(ops=[*ops]):
            for i, op in enumerate(ops):
                changed = copy.deepcopy(node)
                changed.ops[i] = COMPARED[type(op)]()
                yield changed
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in COMPUTED:
            changed = copy.deepcopy(node)
            changed.op = COMPUTED[type(op)]()
            yield changed
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield from (ast.Constant(node.value + step) for step in (1, -1))
        case ast.Constant(value=str(text)) if text and " " not in text:  # no message
            yield ast.Constant(f"{text}x")
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert()):
            yield node.operand
        case ast.BoolOp(op=op):
            yield ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), node.values)
        case ast.Name(id=name) if name in NAMES:
            yield ast.Name(NAMES[name])
        case ast.Attribute(attr=name) if name in NAMES:
            yield ast.Attribute(node.value, NAMES[name])
        case ast.Call(keywords=[*keywords]):
            for i, keyword in enumerate(keywords):
                if keyword.arg not in (None, "strict"):  # zip's: a guard against ourselves
                    yield ast.Call(node.func, node.args, keywords[:i] + keywords[i + 1 :])
        case ast.Break():
            yield "continue"
        case ast.Continue():
            yield "break"
        case ast.Return(value=ast.AST() as value) if not is_constant(value, None):
            yield "return None"
    match node:  # beside the above
        case ast.Expr(value=ast.Call() | ast.Yield()) | ast.AugAssign() | ast.Raise():
            yield "pass"
        case ast.Assign(targets=[ast.Subscript() | ast.Attribute()]):
            yield "pass"
        case ast.Assign(targets=[ast.Name(id=name)]) if name in names(node.value):
            yield "pass"


def is_constant(node: ast.AST | None, *values: Any) -> bool:
    return isinstance(node, ast.Constant) and any(node.value is value for value in values)


def names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def visited(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """The nodes that may change, and ``condition`` or ``bound`` for those that are one. Left out:
    docstrings, annotations, imports, the names of ``__all__``, the texts of errors."""
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or field in ("annotation", "returns", "ctx"):
                continue
            if isinstance(child, ast.Import | ast.ImportFrom | ast.JoinedStr):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue
            if isinstance(child, ast.Assign) and ast.unparse(child.targets[0]) == "__all__":
                continue
            role = ""
            if field in ("test", "ifs"):
                role = "condition"
            elif isinstance(node, ast.Slice):
                role = "bound"
            yield child, role
            if not isinstance(child, ast.Raise):
                yield from visited(child)


def mutants(file: str) -> list[Mutant]:
    """Every mutant of refimpl/``file``, in the order of the source."""
    source = (PACKAGE / file).read_text()
    lines = source.encode().splitlines(keepends=True)
    begins = [0]
    for line in lines:
        begins.append(begins[-1] + len(line))
    found = {}
    for node, role in visited(ast.parse(source)):
        changes = list(edits(node)) if hasattr(node, "lineno") else []
        if role == "condition" and not isinstance(node, ast.Compare | ast.UnaryOp):
            changes.append(ast.UnaryOp(ast.Not(), node))
        if role == "bound" and not isinstance(node, ast.Constant | ast.UnaryOp):
            changes.append(ast.BinOp(node, ast.Add(), ast.Constant(1)))
        for change in changes:
            start = begins[node.lineno - 1] + node.col_offset
            stop = begins[node.end_lineno - 1] + node.end_col_offset
            text = change if isinstance(change, str) else ast.unparse(change)
            if isinstance(change, ast.expr):
                text = f"({text})"
            edit = described(node, change)
            one_line = node.lineno == node.end_lineno
            code = marked(
                lines[node.lineno - 1].rstrip(),
                node.col_offset,
                node.end_col_offset if one_line else None,
            )
            found[start, stop, text] = Mutant(file, start, stop, text, node.lineno, code, edit)
    return [found[place] for place in sorted(found)]


def described(old: ast.AST, new: ast.AST | str) -> str:
    """What became of a node, in a few words."""
    if isinstance(old, ast.Call) and isinstance(new, ast.Call):
        (gone,) = {k.arg for k in old.keywords} - {k.arg for k in new.keywords}
        return f"without {gone}"
    if new == "pass":
        return "left out"
    text = new if isinstance(new, str) else ast.unparse(new)
    return text if len(text) <= 80 else f"{text[:38]} … {text[-38:]}"


def marked(line: bytes, start: int, stop: int | None) -> str:
    """A line with «» around the bytes from ``start`` to ``stop``, or to lines that follow."""
    end = "…" if stop is None else "»" + line[stop:].decode()
    return f"{line[:start].decode()}«{line[start:stop].decode()}{end}".strip()


def compiles(mutant: Mutant) -> bool:
    try:
        compile(mutant.source(), mutant.file, "exec")
    except SyntaxError:
        return False
    return True


def population() -> dict[str, list[Mutant]]:
    """Every mutant, by file."""
    paths = [path for pattern in FILES for path in sorted(PACKAGE.glob(pattern))]
    paths += [PACKAGE / f"{module}.py" for module in MODULES]
    files = [path.relative_to(PACKAGE).as_posix() for path in paths]
    return {file: found for file in files if (found := mutants(file))}


def sample(everything: dict[str, list[Mutant]], seed: int, size: int) -> list[Mutant]:
    """``size`` mutants, of each file in proportion to those it has (largest remainders)."""
    total = sum(map(len, everything.values()))
    shares = {file: size * len(found) / total for file, found in everything.items()}
    counts = {file: int(share) for file, share in shares.items()}
    for file in sorted(shares, key=lambda file: counts[file] - shares[file])[
        : size - sum(counts.values())
    ]:
        counts[file] += 1
    rng = random.Random(seed)
    chosen = []
    for file, found in everything.items():
        drawn = (mutant for mutant in rng.sample(found, len(found)) if compiles(mutant))
        chosen += [mutant for mutant, _ in zip(drawn, range(counts[file]), strict=False)]
    rng.shuffle(chosen)  # so that a part of a run is a sample too
    return chosen
