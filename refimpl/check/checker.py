"""`check`: all rules on one pair of functions, and the report of it, tensor by tensor."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from .rules import (
    Pair,
    contract,
    exact_digits,
    finite_difference_error,
    has_longdouble,
    rounding_noise,
)

__all__ = [
    "FD_TOLERANCE",
    "MODEL_FD_TOLERANCE",
    "MODEL_VALIDITY",
    "VALIDITY",
    "RULES",
    "Report",
    "TensorResult",
    "check",
]

FD_TOLERANCE = 1e-8  # ops; the whole model: MODEL_FD_TOLERANCE
MODEL_FD_TOLERANCE = 1e-7  # of the finite differences through the whole model
VALIDITY = 1e-12  # largest sharpness at which the rounding-noise rule counts, in float64
MODEL_VALIDITY = 1e-10  # VALIDITY for the whole model
RULES = ("contract", "differences", "noise")  # those that run unless others are named
DIGITS_MARGIN = 10  # of N digits, N − 10 must agree
# a gradient may cancel by chance under one cotangent, and then nothing sharp can be said: draw
# another
ATTEMPTS = 4
# keeps cotangents and directions apart from inputs that somebody drew from the same seed
STREAM = 0x5EED


@dataclass
class TensorResult:
    """The worst that was seen of one tensor's gradient."""

    op: str
    tensor: str
    shape: tuple[int, ...]
    difference: float | None = None  # finite-difference error
    noise: float | None = None  # mathematical error over rounding noise
    sharpness: float | None = None  # smallest relative error that the noise rule could see
    digits: float | None = None  # digits of exact agreement
    verdict: str = "PASS"  # PASS, FAIL, or INCONCLUSIVE (which fails too)
    reasons: list[str] = field(default_factory=list)

    def fault(self, verdict: str, reason: str) -> None:
        """Lower the verdict, and say why."""
        if self.verdict != "FAIL":
            self.verdict = verdict
        if reason not in self.reasons:
            self.reasons.append(reason)

    def merge(self, other: TensorResult) -> None:
        """Keep the worse of two results on the same tensor."""
        for name, worse in (
            ("difference", max),
            ("noise", max),
            ("sharpness", max),
            ("digits", min),
        ):
            a, b = getattr(self, name), getattr(other, name)
            both = [x for x in (a, b) if x is not None]
            setattr(
                self,
                name,
                math.nan if any(map(math.isnan, both)) else worse(both) if both else None,
            )
        for reason in other.reasons:
            self.fault(other.verdict, reason)


@dataclass
class Report:
    """All tensors of one or more checks; ``ok`` only if every verdict is PASS and no contract fault
    was found."""

    tensors: list[TensorResult]
    faults: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return (
            bool(self.tensors)
            and not self.faults
            and all(t.verdict == "PASS" for t in self.tensors)
        )

    def merge(self, other: Report) -> None:
        """Add another example: the worst of each tensor stays."""
        known = {(t.op, t.tensor): t for t in self.tensors}
        for tensor in other.tensors:
            if (tensor.op, tensor.tensor) in known:
                known[tensor.op, tensor.tensor].merge(tensor)
            else:
                self.tensors.append(tensor)
        self.faults += [f for f in other.faults if f not in self.faults]

    def __str__(self) -> str:
        def show(x: float | None, form: str = ".1e") -> str:
            return "–" if x is None else format(x, form)

        lines = [
            f"{'op':<20}{'tensor':<44}{'shape':<16}{'difference':>10}{'noise':>9}"
            f"{'sharpness':>11}{'digits':>8} verdict"
        ]
        for t in self.tensors:
            lines.append(
                f"{t.op:<20}{t.tensor:<44}{t.shape!s:<16}{show(t.difference):>10}{show(t.noise):>9}"
                f"{show(t.sharpness):>11}{show(t.digits, '.1f'):>8} {t.verdict}"
            )
            lines += [f"    {reason}" for reason in t.reasons]
        return "\n".join(lines + [f"contract: {fault}" for fault in self.faults])


def check(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    inputs: Sequence[np.ndarray | None],
    kwargs: Mapping[str, Any] | None = None,
    *,
    op: str = "",
    names: Sequence[str] | None = None,
    replay: Callable[[Any], Mapping[str, Any]] | None = None,
    reference: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    dtype: Any = np.float64,
    digits: int | None = None,
    seed: int = 0,
    difference_tolerance: float = FD_TOLERANCE,
    validity: float = VALIDITY,
    rules: Sequence[str] = RULES,
    contract_dtypes: Sequence[Any] = (np.float64, np.float32),
) -> Report:
    """Check a backward against its forward; returns a `Report` with one row per input.

    Give inputs of ordinary size (about 1), away from kinks and from where the gradient vanishes:
    there differences say nothing. ``replay`` freezes choices.

    Args:
        forward, backward: ``forward(*inputs, **kwargs) -> (y, saved)``, ``backward(dy, saved) ->
            gradients``. For the rule "noise" they must take longdouble and complex arrays, and be
            analytic: no abs, var, norm, conj or float() in the forward; for ``digits`` object
            arrays, with + − × ÷, exp, log, sqrt and integer powers.
        inputs: float64 arrays, the differentiable arguments; None for one that is absent.
        op, names: what the report calls the pair and its inputs (default: the forward's own names).
        replay: from the outputs y of a first float64 run, keyword arguments that freeze its
            discrete choices (routes, clip branches): no rule may straddle a jump.
        reference: another pair that computes the same, for the wide types, if this one cannot (a
            kernel, a GPU).
        dtype: the type under test, float64 or float32 (differences mean nothing in float32 and are
            left out).
        digits: also run exact dual numbers to so many digits.
        seed: of the cotangents and directions that are drawn.
        rules: of "contract", "differences" and "noise"; leave out what your functions can't do.
        contract_dtypes: types that gradients must keep, float64 and float32 by default.
        difference_tolerance, validity: bounds of the finite-difference error and of the sharpness
            (in float64).
    """
    dtype = np.dtype(dtype)
    _check_arguments(inputs, dtype, rules)
    inputs = _as(_as(inputs, dtype), np.float64)  # rounded to the type under test
    names = _names(forward, len(inputs)) if names is None else names
    chosen = tested = Pair(forward, backward, dict(kwargs or {}))
    if replay is not None:
        tested = Pair(forward, backward, {**chosen.kwargs, **replay(chosen.call(inputs)[0])})
    exact = tested if reference is None else Pair(*reference, tested.kwargs)
    rows = {i: TensorResult(op, names[i], x.shape) for i, x in enumerate(inputs) if x is not None}
    report = Report(list(rows.values()))

    trials = _trials(tested, exact, inputs, dtype, seed)
    trial = next(trials)
    if "contract" in rules:
        faults = contract(tested, inputs, trial.w, contract_dtypes)
        faults += _replay_faults(chosen, tested, inputs, trial.w)
        report.faults = [f"{op or 'pair'}: {_with_names(fault, names)}" for fault in faults]
    if not _shapes_fit(rows, trial.g, len(inputs)):
        return report
    if digits:
        _digits(rows, exact_digits(exact, inputs, trial.v, trial.w, digits), digits)

    bound = validity * float(np.finfo(dtype).eps / np.finfo(np.float64).eps)
    unclear = list(rows)
    for attempts_left in reversed(range(ATTEMPTS)):
        again = []
        for i in unclear:
            row = TensorResult(op, names[i], rows[i].shape)
            floor = trial.measure(i, row, rules)
            _judge(row, trial.g[i], difference_tolerance, bound)
            if "noise" in rules and row.noise is None and not digits:
                row.fault(
                    "INCONCLUSIVE", "longdouble is no wider than float64 here: ask for digits"
                )
            if row.verdict == "INCONCLUSIVE" and not floor <= bound and attempts_left:
                again.append(i)
            else:
                rows[i].merge(row)
        if not again:
            break
        unclear, trial = again, next(trials)
    return report


def _check_arguments(inputs: Any, dtype: np.dtype[Any], rules: Sequence[str]) -> None:
    """ValueError or TypeError unless `check` can work with them."""
    if dtype not in (np.float64, np.float32):
        raise ValueError(f"dtype must be float64 or float32, got {dtype}")
    if not set(rules) <= set(RULES):
        raise ValueError(
            f"rules must be among {', '.join(RULES)}, got {', '.join(map(str, rules))}"
        )
    if hasattr(inputs, "dtype"):
        raise TypeError("inputs must be a tuple of arrays, got an array: write (x,)")
    for i, x in enumerate(inputs):
        if x is not None and not (isinstance(x, np.ndarray) and x.dtype == np.float64):
            raise TypeError(
                f"inputs[{i}] must be a float64 NumPy array or None, got "
                f"{getattr(x, 'dtype', type(x))}"
            )


def _names(forward: Callable[..., Any], count: int) -> list[str]:
    """The forward's own names of its ``count`` differentiable arguments, or numbers if it has
    none."""
    signature = inspect.signature(forward).parameters.values()
    parameters = [p for p in signature if p.kind != p.KEYWORD_ONLY]
    if len(parameters) != count or any(p.kind == p.VAR_POSITIONAL for p in parameters):
        return [f"input {i}" for i in range(count)]
    return [p.name for p in parameters]


@dataclass(frozen=True)
class _Trial:
    """A random cotangent of the outputs, a random direction of each input, and the gradients that
    the pair under test returns."""

    tested: Pair
    exact: Pair  # computes the same in wide types
    inputs: Sequence[Any]
    dtype: np.dtype[Any]  # under test
    w: Sequence[Any]
    v: Sequence[Any]
    g: Sequence[Any]

    @cached_property
    def wide_g(self) -> Sequence[Any]:
        """The gradients in longdouble."""
        return self.exact.gradients(_as(self.inputs, np.longdouble), _as(self.w, np.longdouble))

    def measure(self, i: int, row: TensorResult, rules: Sequence[str]) -> float:
        """Note in the row what the rules find about input ``i``; returns the floor of its
        sharpness, 0 if that was not measured."""
        v, g = self.v[i], self.g[i]
        if "differences" in rules and self.dtype == np.float64:
            row.difference = finite_difference_error(self.tested, self.inputs, i, v, self.w, g)
        if "noise" not in rules or not has_longdouble() or self.wide_g[i] is None:
            return 0.0
        noise = rounding_noise(self.exact, self.inputs, i, v, self.w, g, self.wide_g[i])
        row.noise, row.sharpness, floor = noise
        return floor


def _trials(
    tested: Pair, exact: Pair, inputs: Sequence[Any], dtype: np.dtype[Any], seed: int
) -> Iterator[_Trial]:
    """One trial after the other, drawn from the seed."""
    rng = np.random.default_rng([seed, STREAM])
    shapes = [y.shape for y in tested.outputs(inputs)]
    while True:
        normal = [np.asarray(rng.normal(size=shape)) for shape in shapes]
        w = _as(_as(normal, dtype), np.float64)
        v = [None if x is None else np.asarray(rng.normal(size=x.shape)) for x in inputs]
        g = tested.gradients(_as(inputs, dtype), _as(w, dtype))
        yield _Trial(tested, exact, inputs, dtype, w, v, g)


def _replay_faults(
    chosen: Pair, replayed: Pair, inputs: Sequence[Any], w: Sequence[Any]
) -> list[str]:
    """A fault unless choices that are replayed give the gradients of choices that are made."""
    if replayed is chosen or _same(chosen.gradients(inputs, w), replayed.gradients(inputs, w)):
        return []
    return ["gradients differ between choices made and the same choices replayed"]


def _with_names(fault: str, names: Sequence[str]) -> str:
    """The fault with the input's name where it has its number."""
    return re.sub(r"gradient (\d+)", lambda match: f"gradient {names[int(match[1])]}", fault)


def _judge(row: TensorResult, g: Any, difference_tolerance: float, validity: float) -> None:
    """The verdict on what was measured; NaN fails."""
    if not np.all(np.isfinite(g)):
        row.fault("FAIL", "the gradient is not finite")
    if row.difference is not None and not row.difference <= difference_tolerance:
        row.fault(
            "FAIL",
            f"finite-difference error {row.difference:.1e} exceeds {difference_tolerance:.0e}",
        )
    if row.noise is not None and not row.noise <= 1:
        hint = ""
        if row.verdict == "PASS" and row.difference is not None:
            hint = (
                "; differences agree: is the forward analytic (no abs, var, norm, float())? "
                "Else leave out 'noise'"
            )
        row.fault("FAIL", f"the error is {row.noise:.1e} times the rounding noise{hint}")
    if row.sharpness is not None and not row.sharpness <= validity:
        row.fault("INCONCLUSIVE", f"sharpness {row.sharpness:.1e} exceeds {validity:.0e}")


def _shapes_fit(rows: Mapping[int, TensorResult], gradients: Sequence[Any], count: int) -> bool:
    """Whether there is a gradient of the right shape for every row; says so in the rows if not."""
    for i, row in rows.items():
        got = gradients[i].shape if i < len(gradients) and gradients[i] is not None else None
        if got != row.shape:
            row.fault("FAIL", f"the gradient must have shape {row.shape}, got {got}")
    fit = len(gradients) == count and all(row.verdict == "PASS" for row in rows.values())
    for row in rows.values():
        if not fit:
            row.fault("INCONCLUSIVE", "not measured: the gradients do not line up with the inputs")
    return fit


def _digits(rows: Mapping[int, TensorResult], found: Sequence[float | None], digits: int) -> None:
    """Note to how many digits each tensor agrees."""
    for i, row in rows.items():
        row.digits = found[i]
        if not (row.digits is not None and row.digits >= digits - DIGITS_MARGIN):
            row.fault("FAIL", f"only {row.digits or 0:.1f} of {digits} digits agree")


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two lists of gradients are bitwise equal."""
    return len(a) == len(b) and all(
        (x is None) == (y is None) and (x is None or np.array_equal(x, y, equal_nan=True))
        for x, y in zip(a, b, strict=True)
    )


def _as(arrays: Sequence[Any], dtype: Any) -> list[Any]:
    return [None if x is None else x.astype(dtype) for x in arrays]
