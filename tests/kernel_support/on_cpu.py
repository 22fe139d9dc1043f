"""What the tests of the column `numba_cpu` share: blocks so small that small examples have several,
and mistakes planted in its kernels and host sides."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from refimpl.check.cases import CASES, Case, Draw
from refimpl.kernels import SOURCE
from refimpl.kernels.columns import on_cpu
from refimpl.kernels.cpu import compile as compiling
from refimpl.ops import REFERENCE, Op, Ops

from .shapes import SHAPES

CPU = on_cpu("numba_cpu")
OPS = [name for name in CPU if CPU[name] != REFERENCE[name]]
OTHERS = {"attention": CASES["attention"]}  # its blocks are smaller than the tiles of a GPU
DRAWN: dict[str, Callable[[Draw], Case]] = {op: (CASES | SHAPES | OTHERS)[op] for op in OPS}
BLOCKS = {  # by module, the sizes that decide how work is cut
    "attention": {"BLOCK": 6, "KEYS": 3},
    "ffn": {"ROWS": 2},
    "embedding": {"SOME": 2},
    "host": {"ONE_TASK": 8, "ONE_PRODUCT": 8, "MOST": 3, "LEAST": 2},
    "log_prob": {"AT_A_TIME": 0, "TOKENS": 2, "ENTRIES": 2},
    "mla": {"ROWS": 2},
    "moe": {"ROWS": 2},
}


def module_of(name: str) -> ModuleType:
    return importlib.import_module(f"refimpl.kernels.cpu.{name}")


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows, queries or tokens a task."""
    for name, sizes in BLOCKS.items():
        for constant, size in sizes.items():
            monkeypatch.setattr(module_of(name), constant, size)


def with_table(op: str, table: Ops = CPU) -> dict[str, Any]:
    """The argument ``ops`` of a composite."""
    return {"ops": table} if "ops" in (REFERENCE[op].forward.__kwdefaults__ or {}) else {}


def pair(op: str) -> Op[Any, Any]:
    return CPU[op]


# stem: {name: (what stands there, what a mistake would put)}
PLANTED: dict[str, dict[str, tuple[str, str]]] = {
    "rms_norm": {
        "eps left out": ("/ real(own.size) + eps", "/ real(own.size)"),
        "weight left out of dx": (
            "product(given[i], w[i])\n            out",
            "given[i]\n            out",
        ),
        "dw of the last row alone": ("dw[i] += given[i] * n", "dw[i] = given[i] * n"),
        "overflow gives 0": (
            "real(1) / math.sqrt(mean) if mean < np.inf else real(np.nan)",
            "real(1) / math.sqrt(mean)",
        ),
    },
    "rope": {
        "halves taken for pairs": ("2 * i if interleaved", "2 * i if not interleaved"),
        "block begins at the first angle": ("(first + row) %", "row %"),
        "turned the other way": ("a * c[i] - b * sine  # (rope.5)", "a * c[i] + b * sine"),
        "turned the same way back": ("-s[i] if backward", "s[i] if backward"),
        "turned from the first number on": ("head, start:]", "head, :]"),
    },
    "swiglu": {
        "silu without its second term": ("(s + g * s * (one - s))  # (swiglu.2)", "s"),
        "weight of an expert left out": ("dh *= weight", "dh *= one"),
        "weight applied twice": ("total += h * dh", "total += h * dh * weight"),
    },
    "attention": {
        "diagonal hidden": ("first + row // each + 1)", "first + row // each)"),
        "one key too many": ("first + row // each + 1)", "first + row // each + 2)"),
        "position of a folded row": ("first + row // each + 1)", "first + row + 1)"),
        "backward sees one query too few": ("(first + row) * each))", "(first + row) * each + 1))"),
        "probability left out of ds": ("ds[i] = p[i] * (ds", "ds[i] = (ds"),
        "row sum left out": ("(ds[i] - less[i])", "ds[i]"),
        "a query that sees nothing sees all": ("if not seen[row]:", "if False:"),
        "hidden keys seen": ("if not visible[row, i]:", "if False:"),
    },
    "cross_entropy": {
        "target off by one": ("hit = 0 <= target", "target += 1\n    hit = 0 <= target"),
        "left-out rows counted": ("if counted == 0:", "if False:"),
        "one-hot left out": ("(p - real(1))", "p"),
        "temperature left out": ("own[i] /= temperature", "own[i] /= 1"),
    },
    "mla": {
        "rotated key of the last head alone": ("shared[i] += turned[i]", "shared[i] = turned[i]"),
        "values in front of keys": ("kv[row, head, :nope]\n", "kv[row, head, 1 : nope + 1]\n"),
    },
    "embedding": {
        "last row of a token alone": ("part[i] += own[i]", "part[i] = own[i]"),
        "last rows of a token lost": ("min(first + some,", "min(first + some - 1,"),
    },
    "router": {
        "ties to the higher index": ("x > ranked[row, best]", "x >= ranked[row, best]"),
        "an expert chosen twice": ("taken[best] = True", "taken[best] = False"),
        "softmax's sum left out": ("(ds[i] - along)", "ds[i]"),
        "weights' gradient of the last choice alone": (
            "ds[indices[row, k]] += dchosen",
            "ds[indices[row, k]] = dchosen",
        ),
    },
    "moe": {
        "slots in reverse order": (
            "start[indices[slot]] = at + 1",
            "start[indices[slot]] = at + 1; order[at] = indices.size - 1 - slot",
        ),
        "weights left out": ("out[i] += weight * row[i]", "out[i] += row[i]"),
        "last choice dropped": ("range(place.shape[1])", "range(place.shape[1] - 1)"),
        "row of the next token": (
            "x[order[i] // top_k]",
            "x[(order[i] + 1) // top_k % x.shape[0]]",
        ),
    },
}


def plant(stem: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, the kernels of ``stem`` are compiled with the mistake, and not kept."""
    before, after = PLANTED[stem][name]
    plant_text(stem, before, after, monkeypatch)


def plant_text(stem: str, before: str, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = SOURCE / f"{stem}_numba_cpu.py"
    source = path.read_text()
    assert source.count(before) >= 1, f"{path.name} has no {before!r}"
    module = ModuleType(f"refimpl.kernels.{stem}_numba_cpu")
    module.__package__ = "refimpl.kernels"
    exec(compile(source.replace(before, after), str(path), "exec"), vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    recompiled(monkeypatch)


def recompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled anew, and nothing is kept, here or on disk."""
    fresh: dict[tuple[Any, ...], Any] = {}
    uncached = compiling.kernel.__wrapped__

    def kernel(*key: Any) -> Any:
        if key not in fresh:
            fresh[key] = uncached(*key)
        return fresh[key]

    monkeypatch.setattr(compiling, "_place", lambda real: None)
    monkeypatch.setattr(compiling, "_tell_once", lambda where: None)
    for path in (SOURCE.parent / "refimpl" / "kernels" / "cpu").glob("*.py"):
        module = module_of(path.stem)
        if hasattr(module, "kernel"):
            monkeypatch.setattr(module, "kernel", kernel)
