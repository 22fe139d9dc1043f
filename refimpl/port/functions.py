"""`check`: somebody's forward and backward of an op, of any array library, against ours.

On drawn cases that meet every regime of the op, in each type that their library takes:

* contract: a pair (y, saved), one gradient per input, shapes and types, nothing written to that
  they were given, the same gradients from a second call;
* outputs and gradients against the truth, our pair in longdouble, in units (`refimpl.port.cases`);
* finite differences of their forward against their backward, in float64.

A complex step, exact digits and longdouble, which `refimpl.check.check` runs on NumPy's functions,
are named as not run. If something is wrong, the planted bugs that give the same numbers are named.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

from ..check import FD_TOLERANCE
from ..check.cases import CASES, REGIMES, RandomDraw, pair_of
from ..check.planted import Planted
from ..check.rules import Pair, finite_difference_error, has_longdouble
from ..errors import CouldNotRun
from ..ops import IMPLEMENTATIONS
from .cases import (
    FACTOR,
    Arrays,
    OpCase,
    apart,
    difference,
    input_names,
    is_real,
    name_bugs,
    op_case,
    rounded_to,
    truth,
    units,
)
from .foreign import Called, Foreign, TheirError

__all__ = ["Example", "Result", "TensorRow", "check", "check_case", "examples_of", "schema"]

TYPES = ("float64", "float32")
MOST_EXAMPLES = 300  # drawn in search of a regime
FIRST, MORE = 2, 32  # reruns at first, and before a tensor is called wrong
OTHER_WAYS: dict[str, tuple[dict[str, Any], ...]] = {  # to compute the same, which are reruns, too
    "attention": ({"pair": pair_of("flash_attention")},),
    "mla": ({"pair": pair_of("mla_absorbed")}, {"table": IMPLEMENTATIONS["flash"]}),
    "mla_absorbed": ({"pair": pair_of("mla")}, {"table": IMPLEMENTATIONS["flash"]}),
}
REPLAYS = {"router": ("routes",), "grpo": ("unclipped", "kept")}  # arguments that freeze choices
DIAGNOSED = 3  # wrong cases that a planted bug must explain


@dataclass
class TensorRow:
    """The worst that was seen of one output or gradient."""

    op: str
    tensor: str  # out/NAME or grad/NAME
    shape: list[int]  # in the first case
    units: dict[str, float] = field(default_factory=dict)  # error by type
    difference: float | None = None  # of finite differences
    verdict: str = "INCONCLUSIVE"  # PASS, FAIL, or INCONCLUSIVE: never measured
    reasons: list[str] = field(default_factory=list)

    def fault(self, reason: str, kind: str) -> None:
        """FAIL; of each kind of reason the first is kept."""
        self.verdict = "FAIL"
        if not any(known.startswith(kind) for known in self.reasons):
            self.reasons.append(reason)

    def measured(self, dtype: str, found: float) -> None:
        self.units[dtype] = max(self.units.get(dtype, 0.0), found)
        if self.verdict == "INCONCLUSIVE":
            self.verdict = "PASS"


@dataclass
class Result:
    """What was found of one or more ops."""

    tensors: list[TensorRow] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # that belong to no tensor
    not_run: list[str] = field(default_factory=list)
    diagnosis: list[str] = field(default_factory=list)
    bugs: list[str] = field(default_factory=list)  # "op: name" of the planted bugs that fit
    cases: int = 0

    @property
    def ok(self) -> bool:
        return (
            bool(self.tensors)
            and not self.faults
            and all(t.verdict == "PASS" for t in self.tensors)
        )

    @property
    def first_wrong(self) -> str | None:
        """The first tensor that does not pass, outputs before gradients: op/out/NAME."""
        wrong = (t for t in self.tensors if t.verdict != "PASS")
        return next((f"{t.op}/{t.tensor}" for t in wrong), None)

    def merge(self, other: Result) -> None:
        """Add the result of another op."""
        self.tensors += other.tensors
        self.cases += other.cases
        for name in ("faults", "not_run", "diagnosis", "bugs"):
            mine = getattr(self, name)
            mine += [line for line in getattr(other, name) if line not in mine]

    def row(self, op: str, tensor: str, shape: Sequence[int]) -> TensorRow:
        """The tensor's row, made if it is new: outputs first, then gradients in the order of the
        forward's arguments."""
        for known in self.tensors:
            if (known.op, known.tensor) == (op, tensor):
                return known
        made = TensorRow(op, tensor, list(shape))
        names = [f"grad/{name}" for name in input_names(op)]
        self.tensors.append(made)
        self.tensors.sort(
            key=lambda t: names.index(t.tensor) if t.op == op and t.tensor in names else -1
        )
        return made

    def fault(self, line: str) -> None:
        if line not in self.faults:
            self.faults.append(line)

    def to_json(self) -> dict[str, Any]:
        """What `schema` describes."""
        found = asdict(self)
        for tensor in found["tensors"]:
            tensor["units"] = {t: _finite(x) for t, x in tensor["units"].items()}
            tensor["difference"] = _finite(tensor["difference"])
        return {"format": 1, "ok": self.ok, "first_wrong": self.first_wrong, **found}

    def __str__(self) -> str:
        types = [t for t in TYPES if any(t in row.units for row in self.tensors)]
        head = f"{'op':<20}{'tensor':<24}{'shape':<14}{'difference':>10}"
        lines = [head + "".join(f"{t:>10}" for t in types) + "  verdict"]
        for t in self.tensors:
            shape = "×".join(map(str, t.shape)) or "scalar"
            shown = "–" if t.difference is None else f"{t.difference:.1e}"
            cells = "".join(f"{_units(t.units.get(name)):>10}" for name in types)
            lines.append(f"{t.op:<20}{t.tensor:<24}{shape:<14}{shown:>10}{cells}  {t.verdict}")
            lines += [f"    {reason}" for reason in t.reasons]
        lines += [f"contract broken: {fault}" for fault in self.faults]
        lines += self.diagnosis
        lines += [f"not run: {line}" for line in self.not_run]
        if self.first_wrong is not None:
            lines.append(f"first wrong: {self.first_wrong}")
        wrong = sum(t.verdict != "PASS" for t in self.tensors)
        verdict = (
            "every tensor holds"
            if self.ok
            else f"tensors that do not hold: {wrong}, broken contracts: {len(self.faults)}"
        )
        lines.append(
            f"tensors: {len(self.tensors)}, cases: {self.cases}, errors in units ({FACTOR} "
            f"allowed): {verdict}"
        )
        return "\n".join(lines)


def _units(x: float | None) -> str:
    if x is None:
        return "–"
    return f"{x:.1f}" if x < 1e4 else f"{x:.0e}"


def _finite(x: float | None) -> float | str | None:
    """JSON has no infinity."""
    return x if x is None or np.isfinite(x) else str(x)


def schema() -> dict[str, Any]:
    """The JSON Schema of `Result.to_json`."""
    text = (files(__package__) / "schemas" / "functions.schema.json").read_text("utf-8")
    return json.loads(text)  # type: ignore[no-any-return]


class Example(NamedTuple):
    """One drawn case."""

    op: str
    seed: int
    regimes: frozenset[str]
    new: tuple[str, ...]  # regimes that no example before it met

    @property
    def label(self) -> str:
        return "+".join(self.new) or f"seed{self.seed}"

    def case(self, text: bytes | None = None) -> OpCase:
        return op_case(self.op, CASES[self.op](RandomDraw(self.seed, text)), self.seed)


@cache
def examples_of(
    op: str, examples: int = 5, seed: int = 0, text: bytes | None = None
) -> tuple[Example, ...]:
    """So many ``examples`` of the op, drawn by ``seed``, ``seed + 1``, …, and those that meet the
    regimes still missing; tokens come from ``text``."""
    if op not in CASES:
        raise CouldNotRun(f"unknown op {op}; there are {', '.join(CASES)}")
    if seed < 0:
        raise CouldNotRun(f"must be at least 0, got {seed}", argument="seed")
    if examples < 1:
        raise CouldNotRun(f"must be at least 1, got {examples}", argument="examples")
    missing, found = set(REGIMES[op]), []
    for number in range(MOST_EXAMPLES):
        regimes = CASES[op](RandomDraw(seed + number, text)).regimes
        if number < examples or regimes & missing:
            new = tuple(sorted(regimes & missing))
            found.append(Example(op, seed + number, frozenset(regimes), new))
            missing -= regimes
        if number >= examples - 1 and not missing:
            break
    if missing:
        raise CouldNotRun(f"this text never gives {op} the case of {', '.join(sorted(missing))}")
    return tuple(found)


def check(
    op: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    *,
    array: Callable[[Any], Any] | None = None,
    examples: int = 5,
    seed: int = 0,
    types: Sequence[str] = TYPES,
    text: bytes | None = None,
) -> Result:
    """Check somebody's pair of functions against ours.

    ``forward(*inputs, **kwargs) -> (y, saved)`` and ``backward(dy, saved) -> gradients`` take what
    our functions of that op take (help(refimpl.ops.mla_forward)): y is an array or a tuple like
    ours, dy the cotangents of its floating-point members.

    Args:
        op: the op's name.
        array: their array from a NumPy array (torch.from_dlpack, jax.dlpack.from_dlpack); None for
            NumPy.
        examples: drawn cases, more if these miss a regime. seed: of the first.
        types: of float64 and float32, those to check.
        text: where tokens come from; random ones by default.

    CouldNotRun for an op that does not exist, and if no type can be checked.
    """
    result = Result()
    pair = Foreign(forward, backward, array)
    can = _types(pair, types, result)
    drawn = examples_of(op, examples, seed, text)
    wrong: list[tuple[OpCase, Arrays, str]] = []
    for number, example in enumerate(drawn):
        wrong += _examine(pair, example.case(text), can, result, seed + number)
    result.cases = len(drawn)
    _finish(result, wrong)
    return result


def check_case(
    example: Example,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    *,
    array: Callable[[Any], Any] | None = None,
    types: Sequence[str] = TYPES,
) -> Result:
    """`check` on one example."""
    result = Result(cases=1)
    pair = Foreign(forward, backward, array)
    can = _types(pair, types, result)
    _finish(result, _examine(pair, example.case(), can, result, example.seed))
    return result


def _types(pair: Foreign, types: Sequence[str], result: Result) -> list[str]:
    """Those of the types that their library takes."""
    if not types or not set(types) <= set(TYPES):
        raise CouldNotRun(f"must be among {', '.join(TYPES)}, got {list(types)}", argument="types")
    can = []
    for dtype in types:
        why = pair.refuses(dtype)
        if why is None:
            can.append(dtype)
        else:
            result.not_run.append(f"{dtype}: {why}")
    if not can:
        raise CouldNotRun(f"no type can be checked: {'; '.join(result.not_run)}")
    if "float64" not in can:
        result.not_run.append("finite differences, which float32 is too coarse for")
    result.not_run += [
        "longdouble, complex step and exact digits: for NumPy refimpl.check.check runs them",
        "read-only, strided and shared memory: what crosses over is a copy",
    ]
    if not has_longdouble():
        result.not_run.append("a truth in longdouble: none is wider than float64 here")
    return can


def _finish(result: Result, wrong: list[tuple[OpCase, Arrays, str]]) -> None:
    """Say what could not be judged, and which planted bugs fit."""
    for t in result.tensors:
        if t.verdict == "INCONCLUSIVE":
            t.reasons.append("not measured")
        consistent = t.difference is not None and t.difference <= FD_TOLERANCE
        if t.verdict == "FAIL" and consistent:
            t.reasons.append(
                "finite differences agree: it is the gradient of your forward, which is another "
                "than ours"
            )
    named = _diagnose(wrong)
    result.bugs = [f"{bug.op}: {bug.name}" for bug in named]
    if named:
        shown = ", ".join(f"'{bug.name}' of {bug.op}" for bug in named)
        result.diagnosis.append(f"your numbers are those of the planted bug {shown}")
    elif wrong:
        result.diagnosis.append("which mistake it is: unknown, no planted bug gives your numbers")


def _diagnose(wrong: list[tuple[OpCase, Arrays, str]]) -> list[Planted]:
    """The planted bugs that explain the first wrong cases, all of them."""
    named: list[Planted] | None = None
    for case, theirs, dtype in wrong[:DIAGNOSED]:
        named = name_bugs(case, theirs, dtype, among=named)
        if not named:
            return []
    return named or []


class _Examination:
    """One case in one type: their numbers, beside ours."""

    def __init__(self, pair: Foreign, case: OpCase, dtype: str, result: Result) -> None:
        self.pair = pair
        self.case = rounded_to(case, dtype)
        self.dtype = dtype
        self.result = result
        self.exact = truth(self.case)
        self.real = [
            name for name, x in self.exact.items() if x.dtype.kind == "f" and "out/" in name
        ]

    def row(self, name: str) -> TensorRow:
        return self.result.row(self.case.op, name, self.exact[name].shape)

    def fault(self, line: str, kind: str = "") -> None:
        """A fault that belongs to no tensor; of each kind the first is kept."""
        if not (kind and any(kind in known for known in self.result.faults)):
            self.result.fault(f"{self.case.op}: {line}")

    def typed(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Real arrays in the type; rotation frequencies stay in float64."""
        return {
            name: x.astype(self.dtype)
            if isinstance(x, np.ndarray) and is_real(x) and name != "inv_freq"
            else x
            for name, x in group.items()
        }

    def theirs(self) -> Arrays:
        """Their outputs and gradients by our names, those that could be had."""
        for name in self.exact:
            self.row(name)
        found: Arrays = {}
        cotangents = self.typed(self.case.cot)
        try:
            called = self.pair.call(self.typed(self.case.inputs), self.typed(self.case.kwargs))
            outputs = self.outputs(called)
            if isinstance(outputs, str):
                self.fault(outputs)
                return found
            found |= outputs
            gradients = self.pair.gradients(called, cotangents)
            found |= self.gradients(gradients)
            self.again(gradients, self.pair.gradients(called, cotangents))
            for name in called.changed():
                self.fault(f"{name} was written to")
        except TheirError as error:
            self.fault(str(error), error.kind)
        return found

    def outputs(self, called: Called) -> Arrays | str:
        """Their outputs by our names, in our order; members that are not differentiable may be
        left out. What is wrong if they don't line up."""
        ours = [name for name in self.exact if name.startswith("out/")]
        got = [m for m in called.y if isinstance(m, np.ndarray)]
        for names in (ours, self.real):
            if len(got) == len(names):
                return dict(zip(names, got, strict=True))
        listed = ", ".join(name.removeprefix("out/") for name in ours)
        return f"forward must return {len(ours)} outputs ({listed}), got {len(got)}"

    def gradients(self, gradients: list[Any]) -> Arrays:
        """Their gradients by our names."""
        names = list(self.case.inputs)
        present = [name for name, x in self.case.inputs.items() if x is not None]
        if len(gradients) != len(names):
            self.fault(
                f"backward must return {len(names)} gradients ({', '.join(names)}), None for an "
                f"input that is None, got {len(gradients)}"
            )
            if len(gradients) != len(present):
                return {}
            names = present
        found = {}
        for name, g in zip(names, gradients, strict=True):
            if isinstance(g, np.ndarray) and name in present:
                found[f"grad/{name}"] = g
            elif name in present:
                said = f"must be an array, got {type(g).__name__}"
                self.row(f"grad/{name}").fault(said, "must be an array")
            elif g is not None:
                self.fault(f"gradient {name} must be None, since the input is")
        return found

    def again(self, first: list[Any], second: list[Any]) -> None:
        """A fault unless a second call of backward gives the same, but for rounding."""
        if len(first) != len(second):
            self.fault(
                f"backward gives {len(first)} gradients, and {len(second)} when called again"
            )
        for i, (one, two) in enumerate(zip(first, second, strict=False)):
            if isinstance(one, np.ndarray) and is_real(one) and one.size:
                close = 64 * float(np.finfo(one.dtype).eps) * float(np.max(np.abs(one)))
                if not difference(two, one) <= close:
                    self.fault(f"gradient {i} differs between two calls of backward with one saved")

    def compare(self, theirs: Arrays, seed: int) -> bool:
        """Note every tensor's error; False if one is too large."""
        given = (self.case, self.dtype, self.exact)
        unit = units(*given, seed=seed, reruns=FIRST)
        if apart(theirs, self.exact, unit):
            for way in ({}, *OTHER_WAYS.get(self.case.op, ())):
                more = units(*given, seed=seed, reruns=MORE, **way)
                unit = {name: max(x, more[name]) for name, x in unit.items()}
        found = [self.holds(name, x, unit.get(name, 0.0)) for name, x in theirs.items()]
        return all(found)

    def holds(self, name: str, x: np.ndarray, unit: float) -> bool:
        """Note the error of one tensor; False if it is too large."""
        row, like = self.row(name), self.exact[name]
        if x.shape != like.shape:
            row.fault(f"must have shape {like.shape}, got {x.shape}", "must have shape")
            return False
        if like.dtype.kind != "f":
            wrong = np.argwhere(x != like)
            if len(wrong):
                row.fault(f"differs from ours at {wrong[0].tolist()}", "differs from ours")
            row.measured(self.dtype, np.inf if len(wrong) else 0.0)
            return not len(wrong)
        if x.dtype != np.dtype(self.dtype):
            row.fault(f"must be {self.dtype} for {self.dtype} inputs, got {x.dtype}", "must be")
        if x.dtype.kind != "f":
            row.measured(self.dtype, np.inf)
            return False
        size = float(np.max(np.abs(like), initial=0))
        if size and FACTOR * unit >= size:
            return True  # nothing but rounding: this case can't judge it
        away = difference(x, like)
        found = away / unit if unit else (np.inf if away else 0.0)
        row.measured(self.dtype, found)
        if not found <= FACTOR:
            row.fault(_said(self.dtype, found, x, like), "error of")
        return found <= FACTOR

    def differences(self, theirs: Arrays, seed: int) -> None:
        """Finite differences of their forward against their own gradients."""
        names = list(self.case.inputs)

        def forward(*inputs: Any, **kwargs: Any) -> tuple[Any, None]:
            called = self.pair.call(dict(zip(names, inputs, strict=True)), kwargs)
            outputs = self.outputs(called)
            if isinstance(outputs, str):
                raise TheirError(outputs)
            return tuple(outputs[name] for name in self.real), None

        rng = np.random.default_rng([seed, 0xD1F])
        alone = Pair(forward, lambda dy, saved: None, self.case.kwargs)
        inputs, cot = list(self.case.inputs.values()), list(self.case.cot.values())
        for i, (name, x) in enumerate(self.case.inputs.items()):
            g = theirs.get(f"grad/{name}")
            if x is None or g is None or g.shape != x.shape or g.dtype.kind != "f":
                continue
            v = np.asarray(rng.normal(size=x.shape))
            try:
                found = finite_difference_error(alone, inputs, i, v, cot, g.astype(np.float64))
            except (TheirError, ArithmeticError, TypeError, ValueError) as error:
                self.fault(f"finite differences: {error}", getattr(error, "kind", ""))
                return
            row = self.row(f"grad/{name}")
            found = np.inf if np.isnan(found) else found
            row.difference = max(row.difference or 0.0, found)
            if not found <= FD_TOLERANCE:
                row.fault(
                    f"finite-difference error {found:.1e} exceeds {FD_TOLERANCE:.0e}: the gradient "
                    "does not fit your own forward",
                    "finite-difference error",
                )


def _examine(
    pair: Foreign, case: OpCase, types: Sequence[str], result: Result, seed: int
) -> list[tuple[OpCase, Arrays, str]]:
    """One case in each type, and in float64 once more without what replays its choices; returns
    those in which a tensor was wrong, with their numbers."""
    wrong: list[tuple[OpCase, Arrays, str]] = []
    replays = REPLAYS.get(case.op, ())
    free = case._replace(kwargs={k: x for k, x in case.kwargs.items() if k not in replays})
    runs = [(case, dtype) for dtype in types]
    runs += [(free, "float64")] if replays and "float64" in types else []
    for given, dtype in runs:
        at = _Examination(pair, given, dtype, result)
        theirs = at.theirs()
        if not at.compare(theirs, seed):
            wrong.append((given, theirs, dtype))
        lined_up = all(
            name in theirs
            and theirs[name].shape == at.exact[name].shape
            and theirs[name].dtype.kind == "f"
            for name in at.real
        )
        if dtype == "float64" and given is case and lined_up:
            at.differences(theirs, seed)
    return wrong


def _said(dtype: str, found: float, x: np.ndarray, like: np.ndarray) -> str:
    """The error of a tensor and its worst place."""
    with np.errstate(all="ignore"):
        away = np.abs(np.asarray(x, dtype=like.dtype) - like)
        away = np.where(np.isnan(away), np.inf, away)
        worst = np.unravel_index(int(np.argmax(away)), x.shape)
        size = float(np.max(np.abs(like), initial=0))
        relative = float(np.max(away)) / size if size else np.inf
    place = f"[{', '.join(map(str, worst))}]" if worst else "it"
    return (
        f"error of {_units(found)} units in {dtype}, {relative:.1e} of the largest value: {place} "
        f"must be {float(like[worst]):.6g}, got {float(x[worst]):.6g}"
    )
