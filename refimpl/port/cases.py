"""One case of an op, run with any pair at any type; the unit of its rounding errors; and the
planted bugs whose numbers somebody has.

A type is float64, float32, bfloat16 or longdouble. bfloat16 is float32 whose values are bfloat16:
every op rounds what it returns, and works in float32 inside.

The unit of a tensor at a type: the largest error against the truth of `RERUNS` reruns of the
reference at that type, each with the summed axes in another order, and at least u · max|truth|,
where u is the type's unit roundoff. A port may have `FACTOR` of them. The tensors of an op case are
small, and small ones are exact by luck: without more, 6 of 24,000 right ones had over 4 units. So a
rerun in float64 or float32 also moves every input by a rounding of its type. Rotation frequencies
move in every type (in bfloat16 by a rounding of float32): many ports compute angles in the type.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ..check.cases import Case, pair_of
from ..check.planted import PLANTED, Planted, plant
from ..check.rules import Pair, has_longdouble
from ..grads.rounded import round_bfloat16, rounded
from ..grads.units import roundoff
from ..ops import REFERENCE, AnyOp, Op, Ops
from .compare import FACTOR

__all__ = [
    "FACTOR",
    "ROUNDOFF",
    "TYPES",
    "Arrays",
    "OpCase",
    "bugs_of",
    "difference",
    "name_bugs",
    "op_case",
    "rounded_table",
    "rounded_to",
    "run",
    "shows",
    "truth",
    "units",
]

Arrays = dict[str, np.ndarray]  # by name

TYPES = ("float64", "float32", "bfloat16")  # that a port may compute in
ROUNDOFF = {dtype: roundoff(dtype) for dtype in TYPES}  # half a unit in the last place of 1
RERUNS = 8
FAR = 64  # units of one rerun beyond which a bug's own need no more of them
SINGLE = {  # the output's name, where an op has one and it is not y
    "attention": "o",
    "flash_attention": "o",
    "balance_loss": "loss",
    "cross_entropy": "loss",
    "head_cross_entropy": "loss",
    "preference_loss": "loss",
    "mtp": "h",
}

_ATTENTION = {
    "q": "B T H X",
    "k": "B S . X",
    "v": "B S . V",
    "key_mask": "B S",
    "segments": "B S",
    "o": "B T H V",
}
_MLA = {
    "x": "B T D",
    "cache": "B S C+.",
    "w_q_a": "A D",
    "w_q_a_norm": "A",
    "w_q_b": ". A",
    "w_kv_a": "C+. D",
    "w_kv_a_norm": "C",
    "w_kv_b": ". C",
    "w_o": "D .",
    "positions": "B T",
    "key_mask": "B S",
    "segments": "B S",
    "y": "B T D",
}
_HEAD = {"h": "B T D", "w": "W D", "targets": "B T", "mask": "B T"}
AXES: dict[str, dict[str, str]] = {
    # the axes of each op's arrays. Letters in `FREE` may be permuted together in all of them, and
    # results come out permuted alike; `+` joins the parts of one axis, `.` is what stays in place
    "linear": {"x": "B T I", "w": "O I", "y": "B T O"},
    "embedding": {"w": ". D", "ids": "B T", "y": "B T D"},
    "rms_norm": {"x": "B T D", "w": "D", "y": "B T D"},
    "swiglu": {"gate": "B T F", "up": "B T F", "y": "B T F"},
    "ffn": {"x": "B T D", "w_gate": "F D", "w_up": "F D", "w_down": "D F", "y": "B T D"},
    "rope": {"x": "B T H .", "positions": "B T", "y": "B T H ."},
    "attention": _ATTENTION,
    "flash_attention": _ATTENTION,
    "mla": _MLA,
    "mla_absorbed": _MLA,
    "router": {
        "x": "B T D",
        "w": ". D",
        "routes": "B T .",
        "weights": "B T .",
        "scores": "B T .",
        "indices": "B T .",
    },
    "balance_loss": {
        "scores": "B T .",
        "counted": "B T .",
        "mask": "B T",
        "cut.0": "B .",  # of a tuple
        "cut.1": "B",
    },
    "moe": {
        "x": "B T D",
        "weights": "B T .",
        "indices": "B T .",
        "w_gate": ". F D",
        "w_up": ". F D",
        "w_down": ". D F",
        "w_shared_gate": "G D",
        "w_shared_up": "G D",
        "w_shared_down": "D G",
        "y": "B T D",
    },
    "cross_entropy": {"logits": "B T .", "targets": "B T", "mask": "B T"},
    "log_prob": {**_HEAD, "w": ". D", "y": "B T"},
    "head_cross_entropy": {**_HEAD, "w": ". D"},
    "mtp": {
        "hidden": "B T D",
        "embedding": "B T D",
        "w_hnorm": "D",
        "w_enorm": "D",
        "w_proj": "D D+D",
        "h": "B T D",
    },
    "grpo": {
        "log_prob": "N T",
        "advantages": "N",
        "mask": "N T",
        "old_log_prob": "N T",
        "reference_log_prob": "N T",
        "unclipped": "N T",
        "kept": "N",
    },
    "preference_loss": {"h_chosen": "N D", "h_rejected": "N D", "w": ". D"},
}
ROWS = "BN"  # a sum over these is a gradient's alone
TOKENS = "T"  # may be permuted unless order matters
WIDTHS = "ACDFGIOVX"
ORDERED = {"attention", "flash_attention", "mla", "mla_absorbed"}  # a token sees those before it


class OpCase(NamedTuple):
    """One case of an op: float64 inputs by name, in the forward's order, None for one that is
    absent; the other arguments; a cotangent per floating-point output."""

    op: str
    inputs: dict[str, np.ndarray | None]
    kwargs: dict[str, Any]
    cot: Arrays


def input_names(op: str) -> list[str]:
    """The differentiable arguments of the op's forward."""
    parameters = inspect.signature(pair_of(op).forward).parameters.values()
    return [p.name for p in parameters if p.kind != p.KEYWORD_ONLY]


def op_case(op: str, case: Case, seed: int) -> OpCase:
    """A drawn case, with what replays its discrete choices and a random cotangent."""
    inputs = dict(zip(input_names(op), case.inputs, strict=True))
    pair = Pair(*pair_of(op), case.kwargs)
    y, _ = pair.call(case.inputs)
    kwargs = dict(case.kwargs) | dict(case.replay(y) if case.replay else {})
    rng = np.random.default_rng([seed, 0xC07])
    cot = {
        name: np.asarray(rng.normal(size=np.shape(member)))
        for name, member in members(op, y).items()
        if is_real(member)
    }
    return OpCase(op, inputs, kwargs, cot)


def members(op: str, y: Any) -> dict[str, Any]:
    """The outputs by name."""
    if isinstance(y, tuple):
        names = getattr(y, "_fields", None) or [str(i) for i in range(len(y))]
        return {name: m for name, m in zip(names, y, strict=True) if m is not None}
    return {SINGLE.get(op, "y"): y}


def is_real(x: Any) -> bool:
    return getattr(getattr(x, "dtype", None), "kind", "") == "f" or isinstance(x, float)


def rounded_table(table: Ops = REFERENCE) -> Ops:
    """The table with every op's results rounded to bfloat16."""
    return table | {name: rounded(op) for name, op in table.items()}


def rounded_to(case: OpCase, dtype: str) -> OpCase:
    """The case with its real arrays rounded to the type, held in float64; rotation frequencies
    stay."""
    if dtype in ("float64", "longdouble"):
        return case

    def fit(name: str, x: Any) -> Any:
        if name == "inv_freq" or not isinstance(x, np.ndarray) or not is_real(x):
            return x
        if dtype == "bfloat16":
            return round_bfloat16(x)
        return x.astype(dtype).astype(np.float64)

    groups = (case.inputs, case.kwargs, case.cot)
    return OpCase(case.op, *({name: fit(name, x) for name, x in g.items()} for g in groups))


def run(
    case: OpCase, dtype: str, pair: AnyOp | None = None, table: Ops | None = None
) -> dict[str, Any]:
    """Outputs and gradients of the case as out/NAME and grad/NAME, computed in the type.

    Args:
        pair: by default the op's own.
        table: of the ops that a composite op is made of; by default the reference.
    """
    pair = pair_of(case.op) if pair is None else pair
    kwargs = dict(case.kwargs)
    if dtype == "bfloat16":
        pair, table = rounded(pair), rounded_table(table or REFERENCE)
    if table is not None and "ops" in inspect.signature(pair_of(case.op).forward).parameters:
        kwargs["ops"] = table
    storage = np.dtype("float32" if dtype == "bfloat16" else dtype)
    inputs = [None if x is None else x.astype(storage) for x in case.inputs.values()]
    called = Pair(pair.forward, pair.backward, kwargs)
    y, saved = called.call(inputs)
    outputs = members(case.op, y)
    cotangents = [case.cot[name].astype(storage) for name, m in outputs.items() if is_real(m)]
    gradients = called.call_backward(y, saved, cotangents)
    results = {f"out/{name}": np.asarray(member) for name, member in outputs.items()}
    return results | {
        f"grad/{name}": np.asarray(g)
        for name, g in zip(case.inputs, gradients, strict=True)
        if g is not None
    }


def truth(case: OpCase, pair: AnyOp | None = None, table: Ops | None = None) -> Arrays:
    """The case in longdouble where that is wider than float64, else in float64."""
    return run(case, "longdouble" if has_longdouble() else "float64", pair, table)


def axes_of(case: OpCase) -> dict[str, list[str]]:
    """The axes of each array of the case, by its plain name."""
    axes = {name: text.split() for name, text in AXES[case.op].items()}
    if case.op in ("mla", "mla_absorbed") and case.inputs["w_q_a"] is None:
        axes["w_q_b"] = [".", "D"]
    return axes


def permutations(case: OpCase, rng: np.random.Generator, rows: bool) -> dict[str, np.ndarray]:
    """A random permutation per letter that may be permuted; of widths alone unless ``rows``."""
    free = set(WIDTHS)
    if rows:
        free |= set(ROWS)
        free |= set() if case.op in ORDERED else set(TOKENS)
    sizes: dict[str, int] = {}
    for name, axes in axes_of(case).items():
        x = case.inputs.get(name, case.kwargs.get(name, case.cot.get(name)))
        if isinstance(x, np.ndarray):
            sizes |= dict(zip(axes[-x.ndim :], x.shape, strict=True))
    return {a: rng.permutation(n) for a, n in sizes.items() if a in free}


def permuted(
    x: np.ndarray, axes: list[str], orders: Mapping[str, np.ndarray], back: bool = False
) -> np.ndarray:
    """``x`` with each axis in the order of its letter, or ``back`` from there."""
    tokens = ["."] * (x.ndim - len(axes)) + axes[len(axes) - min(x.ndim, len(axes)) :]
    for axis, token in enumerate(tokens):
        places: list[int] = []
        for letter in token.split("+"):
            order = orders.get(letter)
            start = len(places)
            if order is None or start + len(order) > x.shape[axis]:
                places += range(start, x.shape[axis])
            else:
                places += (start + order).tolist()
        index = np.argsort(places) if back else np.array(places, dtype=np.intp)
        x = np.take(x, index, axis=axis)
    return x


def rerun(
    case: OpCase,
    dtype: str,
    rng: np.random.Generator,
    pair: AnyOp | None = None,
    table: Ops | None = None,
    *,
    rows: bool = True,
) -> Arrays:
    """The case run with its sums in another order, and its results put back in place."""
    axes, orders = axes_of(case), permutations(case, rng, rows)

    def moved_one(name: str, x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(moved_one(f"{name}.{i}", part) for i, part in enumerate(x))
        return permuted(x, axes[name], orders) if isinstance(x, np.ndarray) and name in axes else x

    def move(group: Mapping[str, Any]) -> dict[str, Any]:
        return {name: moved_one(name, x) for name, x in group.items()}

    moved = OpCase(case.op, move(case.inputs), move(case.kwargs), move(case.cot))
    u = ROUNDOFF["float64" if dtype == "float64" else "float32"]
    if "inv_freq" in moved.kwargs:
        moved.kwargs["inv_freq"] = nudged(moved.kwargs["inv_freq"], u, rng)
    if dtype != "bfloat16":
        for group in (moved.inputs, moved.cot):
            group |= {n: nudged(x, u, rng) for n, x in group.items() if x is not None}
    results = run(moved, dtype, pair, table)
    return {
        name: permuted(x, axes.get(name.partition("/")[2], []), orders, back=True)
        for name, x in results.items()
    }


def nudged(x: np.ndarray, u: float, rng: np.random.Generator) -> np.ndarray:
    """``x`` with every number moved by a rounding."""
    return x * (1 + u * rng.uniform(-1, 1, x.shape))


def difference(x: Any, exact: Any) -> float:
    """The largest difference of two arrays of one shape; infinite if one alone is not finite, or
    if integers differ."""
    x, exact = np.asarray(x), np.asarray(exact)
    if x.shape != exact.shape:
        return np.inf
    if exact.dtype.kind != "f":
        return 0.0 if np.array_equal(x, exact) else np.inf
    if x.dtype.kind != "f" or not x.size:
        return 0.0 if x.dtype.kind == "f" else np.inf
    with np.errstate(all="ignore"):
        away = np.where((x == exact) | (np.isnan(x) & np.isnan(exact)), 0.0, np.abs(x - exact))
    worst = float(np.max(away))
    return worst if np.isfinite(worst) else np.inf


def units(
    case: OpCase,
    dtype: str,
    exact: Arrays,
    pair: AnyOp | None = None,
    table: Ops | None = None,
    *,
    seed: int = 0,
    rows: bool = True,
    reruns: int = RERUNS,
) -> dict[str, float]:
    """The unit of every real tensor at the type; ``rows`` also permutes batch and tokens."""
    u = ROUNDOFF[dtype]
    real = {name: x for name, x in exact.items() if x.dtype.kind == "f"}
    sizes = {name: float(np.max(np.abs(x), initial=0)) for name, x in real.items()}
    found = {name: u * size for name, size in sizes.items()}
    for number in range(reruns):
        rng = np.random.default_rng([seed, number])
        again = rerun(case, dtype, rng, pair, table, rows=rows)
        for name, x in real.items():
            found[name] = max(found[name], difference(again[name], x))
    largest = max(sizes.values(), default=0.0)
    # of a tensor that is exactly 0, the noise of terms that cancel: that of the largest tensor
    return {name: unit or u * largest for name, unit in found.items()}


def apart(
    x: Mapping[str, Any], exact: Arrays, unit: Mapping[str, float], more: Mapping[str, float] = {}
) -> list[str]:
    """The tensors of ``x`` that are further than `FACTOR` units from the truth."""
    return [
        name
        for name in x
        if name in exact
        and not difference(x[name], exact[name])
        <= FACTOR * (unit.get(name, 0.0) + more.get(name, 0.0))
    ]


def parts_of(case: OpCase) -> set[str]:
    """The ops of the table that the op is made of."""
    used: set[str] = set()

    def watched(name: str, op: AnyOp) -> AnyOp:
        def forward(*args: Any, **kwargs: Any) -> Any:
            used.add(name)
            return op.forward(*args, **kwargs)

        return Op(forward, op.backward)

    run(case, "float64", table=REFERENCE | {n: watched(n, op) for n, op in REFERENCE.items()})
    return used


@cache
def planted(bug: Planted) -> AnyOp:
    pair = plant(bug)
    assert isinstance(pair, Op)
    return pair


def bugs_of(case: OpCase, *, inside: bool = True) -> Iterator[tuple[Planted, dict[str, Any]]]:
    """The planted bugs of the op and, with ``inside``, of the ops that it is made of; each with a
    pair and a table as keyword arguments for `run`."""
    parts = parts_of(case) if inside else set()
    for bug in PLANTED:
        if bug.of_checker:
            continue
        if bug.op == case.op:
            yield bug, {"pair": planted(bug)}
        elif bug.op in parts:
            yield bug, {"table": REFERENCE | {bug.op: planted(bug)}}


def shows(
    case: OpCase, dtype: str, exact: Arrays, unit: Mapping[str, float], *, inside: bool = False
) -> list[Planted]:
    """The planted bugs whose numbers at the type are further than twice `FACTOR` units from the
    truth: whoever has the bug, and as much rounding as a right port, is still seen."""
    found = []
    for bug, how in bugs_of(case, inside=inside):
        try:
            with np.errstate(all="ignore"):
                wrong = run(case, dtype, **how)
        except Exception:  # of its own making: a port with that bug would have met it
            continue
        if apart(wrong, exact, unit, more=unit):
            found.append(bug)
    return found


def name_bugs(
    case: OpCase, theirs: Mapping[str, Any], dtype: str, among: Collection[Planted] | None = None
) -> list[Planted]:
    """The planted bugs that give these numbers: every tensor of ``theirs`` (out/NAME, grad/NAME)
    within `FACTOR` of the bug's own units, and at least one that a right port can't have.

    Several that agree are all named; none means unknown.
    """
    case = rounded_to(case, dtype)
    exact = truth(case)
    unit = units(case, dtype, exact)
    found = []
    for bug, how in bugs_of(case):
        if among is not None and bug not in among:
            continue
        try:
            with np.errstate(all="ignore"):
                wrong = truth(case, **how)
                near = units(case, dtype, wrong, **how, rows=False, reruns=1)
                most = max((float(np.max(np.abs(x), initial=0)) for x in wrong.values()), default=0)
                least = ROUNDOFF[dtype] * most  # one rerun may be exact by luck
                if apart(theirs, wrong, {name: FAR * max(x, least) for name, x in near.items()}):
                    continue
                own = units(case, dtype, wrong, **how, rows=False)
        except Exception:  # on these inputs it raises, and so gives no numbers
            continue
        if not all(map(np.isfinite, own.values())) or apart(theirs, wrong, own):
            continue
        if set(apart(wrong, exact, unit, own)) & set(theirs):
            found.append(bug)
    return found
