"""What the tests of the column `numba_cpu` share: blocks so small that small examples have several,
and mistakes planted in its kernels and host sides."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from graphlib import TopologicalSorter
from pathlib import Path
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
    "attention": {"BLOCK": 6},
    "ffn": {"MOST_ROWS": 2, "SHARED": 64},
    "embedding": {"SOME": 2, "ENTRIES": 8},
    "host": {"ONE_TASK": 8, "ONE_PRODUCT": 8, "MOST": 6, "SIDE": 2},
    "log_prob": {"AT_A_TIME": 0, "TOKENS": 2, "ENTRIES": 2, "MOST_TOKENS": 2, "NUMBERS": 2},
    "mla": {"ROWS": 2},
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
    "swiglu": {"silu without its second term": ("(s + g * s * (one - s))  # (swiglu.2)", "s")},
    "ffn": {
        "silu without its second term": ("(s + g[r] * s * (one - s))", "s"),
        "up left out of dx": ("dup, True, w_up", "dup, False, w_up"),
        "gradients of gate and up exchanged": (
            "outer_products(dw_up[e, some], dup[",
            "outer_products(dw_up[e, some], dgate[",
        ),
        "weight of an expert left out": ("d = dh[r] * weight[r]", "d = dh[r]"),
        "weight applied twice": ("total[r] += h * dh[r]", "total[r] += h * dh[r] * weight[r]"),
    },
    "products": {
        "row of the next token": (
            "x[order[first + i] // per_token], rows[i]",
            "x[(order[first + i] + 1) // per_token % x.shape[0]], rows[i]",
        ),
        "rows that fill no panel forgotten": ("if whole * width < steps:", "if False:"),
        "columns that fill no panel forgotten": (
            "x[i, first + lane] = panel[i, lane]",
            "x[i, first + lane] = 0",
        ),
        "rows that fill no tile forgotten": (
            "for first in range(tall, rows):",
            "for first in range(0):",
        ),
    },
    "attention": {
        "diagonal hidden": ("limit[lane] + 1 - first), keys", "limit[lane] - first), keys"),
        "one key too many": ("limit[lane] + 1 - first), keys", "limit[lane] + 2 - first), keys"),
        "position of a folded row": (
            "min(first + lane, rows - 1) // per_position",
            "min(first + lane, rows - 1)",
        ),
        "backward sees one key too few": ("limits[last] + 1 - begin", "limits[last] - begin"),
        "probability left out of ds": ("p * (drow", "(drow"),
        "row sum left out": ("(drow[lane] - row_sum[lane])", "drow[lane]"),
        "a query that sees nothing sees all": (
            "if blind(limit[place]",
            "if False and blind(limit[place]",
        ),
        "hidden keys seen": (
            "if not key_mask[key] or segments[key] != segment[lane]:",
            "if False:",
        ),
    },
    "cross_entropy": {
        "target off by one": ("if 0 <= target < own", "target += 1\n        if 0 <= target < own"),
        "left-out rows counted": ("if counted[row] == 0:", "if False:"),
        "one-hot left out": ("(p - one)", "p"),
    },
    "log_prob": {
        "the first target of a block lost": (
            "if first <= target < last",
            "if first < target < last",
        ),
        "one-hot left out": ("(of_target[lane] - 1)", "of_target[lane]"),
        "temperature left out": ("row[lane] /= temperature", "row[lane] /= 1"),
        "gradient of the last chunk alone": ("columns, add != 0)", "columns, False)"),
        "weights left out": ("by[lane] * exp", "exp"),
        "the first token of a panel for all": (
            "put_row(columns, row, h[row])",
            "put_row(columns, row, h[start])",
        ),
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
            "ds[chosen[k]] += dchosen",
            "ds[chosen[k]] = dchosen",
        ),
        "weights not divided": ("indices[row, k]] / total", "indices[row, k]]"),
        "mean left out of the weights' gradient": ("(dchosen[k] - mean)", "dchosen[k]"),
    },
    "balance_loss": {
        "padding counted": ("if valid[b, t]:", "if True:"),
        "tokens counted for sequences": ("(sequences * length)", "(sequences * tokens)"),
        "mean of f left out": ("(f[b, e] - mean_f)", "f[b, e]"),
        "overflow gives 0": ("total if math.isfinite(total) else real(np.nan)", "total"),
    },
    "moe": {
        "slots in reverse order": (
            "start[indices[slot]] = at + 1",
            "start[indices[slot]] = at + 1; order[at] = indices.size - 1 - slot",
        ),
        "weights left out": ("out[i] += weight * row[i]", "out[i] += row[i]"),
        "last choice dropped": ("range(place.shape[1])", "range(place.shape[1] - 1)"),
    },
}


def path_of(stem: str) -> Path:
    return SOURCE / f"{stem}_numba_cpu.py"


def source_of(stem: str) -> str:
    return path_of(stem).read_text()


def callers_of(stem: str) -> list[str]:
    """The files whose functions call those of ``stem``, each behind what it calls itself."""
    stems = *compiling.HELPERS, *compiling.STEMS
    imports = {s: set(re.findall(r"from \.(\w+)_numba_cpu import", source_of(s))) for s in stems}
    found: list[str] = []
    for other in TopologicalSorter(imports).static_order():
        if imports[other] & {stem, *found}:
            found.append(other)
    return found


def plant(stem: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, the kernels that the mistake reaches are compiled with it, and not
    kept."""
    before, after = PLANTED[stem][name]
    plant_text(stem, before, after, monkeypatch, reached=True)


def plant_text(
    stem: str, before: str, after: str, monkeypatch: pytest.MonkeyPatch, *, reached: bool = False
) -> None:
    """Until the test ends, the kernels of a changed file and of its callers are compiled anew; with
    ``reached`` those alone that the change reaches."""
    stems = stem, *callers_of(stem)
    right = {name: kernels_of(name) for name in stems}
    replace_text(stem, before, after, monkeypatch)
    for other in stems[1:]:
        replace_text(other, "from __future__", "from __future__", monkeypatch)

    def anew(name: str, function: str) -> bool:
        if name not in stems:
            return False
        return not (reached and alike(right[name][function], kernels_of(name)[function]))

    recompiled(monkeypatch, anew)


def kernels_of(stem: str) -> dict[str, Any]:
    return vars(importlib.import_module(f"refimpl.kernels.{stem}_numba_cpu"))


def alike(a: Any, b: Any) -> bool:
    """Whether two functions have the same code, and all that they call; of others, are equal."""
    a, b = (getattr(x, "py_func", x) for x in (a, b))
    if a is b or not inspect.isfunction(a):
        return bool(a is b or a == b)
    same = code_of(a) == code_of(b)
    return same and all(alike(a.__globals__.get(x), b.__globals__.get(x)) for x in code_of(a)[2])


def code_of(function: Any) -> tuple[Any, Any, tuple[str, ...]]:
    code = function.__code__
    return code.co_code, code.co_consts, code.co_names


def replace_text(stem: str, before: str, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, source = path_of(stem), source_of(stem)
    assert before in source, f"{path.name} has no {before!r}"
    module = ModuleType(f"refimpl.kernels.{stem}_numba_cpu")
    module.__package__ = "refimpl.kernels"
    exec(compile(source.replace(before, after), str(path), "exec"), vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)


UNCACHED = compiling.kernel.__wrapped__


def recompiled(monkeypatch: pytest.MonkeyPatch, anew: Callable[[str, str], bool]) -> None:
    """Kernels are compiled where ``anew`` (file, name) says so; nothing of that is kept, here or on
    disk."""
    config: Any = importlib.import_module("numba.core.config")
    fresh: dict[tuple[Any, ...], Any] = {}
    kept = compiling.kernel

    def kernel(stem: str, name: str, real: Any) -> Any:
        if not anew(stem, name):
            return kept(stem, name, real)
        key = stem, name, real
        with compiling.LOCK:  # several threads may want it
            if key not in fresh:
                with pytest.MonkeyPatch.context() as nowhere:
                    nowhere.setattr(compiling, "_place", lambda real: None)
                    nowhere.setattr(compiling, "_tell_once", lambda where: None)
                    nowhere.setattr(config, "OPT", type(config.OPT)(0))  # half the time
                    fresh[key] = UNCACHED(*key)
        return fresh[key]

    for path in (SOURCE.parent / "refimpl" / "kernels" / "cpu").glob("*.py"):
        module = module_of(path.stem)
        if hasattr(module, "kernel"):
            monkeypatch.setattr(module, "kernel", kernel)
