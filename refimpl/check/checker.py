"""`check`: all rules on one pair of functions, and the report of it, tensor by tensor."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
    "Report",
    "TensorResult",
    "check",
]

FD_TOLERANCE = 1e-8  # ops; the whole model: MODEL_FD_TOLERANCE
MODEL_FD_TOLERANCE = 1e-7
VALIDITY = 1e-12  # largest sharpness at which the rounding-noise rule counts, in float64
MODEL_VALIDITY = 1e-10
RULES = ("contract", "differences", "noise")
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
    """Check a backward against its forward; returns a `Report` with a row an input.

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
        rules: of "contract", "differences" and "noise"; leave out what your functions can't do.
        contract_dtypes: types that gradients must keep, float64 and float32 by default.
        difference_tolerance, validity: bounds of the finite-difference error and of the sharpness
            (in float64).
    """
    kwargs, dtype = dict(kwargs or {}), np.dtype(dtype)
    if dtype not in (np.float64, np.float32):
        raise ValueError(f"dtype must be float64 or float32, got {dtype}")
    if not set(rules) <= set(RULES):
        raise ValueError(f"rules must be of {', '.join(RULES)}, got {', '.join(map(str, rules))}")
    if hasattr(inputs, "dtype"):
        raise TypeError("inputs must be a tuple of arrays, got an array: write (x,)")
    for i, x in enumerate(inputs):
        if x is not None and not (isinstance(x, np.ndarray) and x.dtype == np.float64):
            raise TypeError(
                f"inputs[{i}] must be a float64 NumPy array or None, got "
                f"{getattr(x, 'dtype', type(x))}"
            )
    inputs = [None if x is None else x.astype(dtype).astype(np.float64) for x in inputs]
    if names is None:
        parameters = [
            p for p in inspect.signature(forward).parameters.values() if p.kind != p.KEYWORD_ONLY
        ]
        names = [p.name for p in parameters]
        if len(names) != len(inputs) or any(p.kind == p.VAR_POSITIONAL for p in parameters):
            names = [f"input {i}" for i in range(len(inputs))]
    chosen = tested = Pair(forward, backward, kwargs)
    if replay is not None:
        kwargs = kwargs | dict(replay(chosen.call(inputs)[0]))
        tested = Pair(forward, backward, kwargs)
    exact = tested if reference is None else Pair(*reference, kwargs)
    given = {i: x for i, x in enumerate(inputs) if x is not None}
    rows = {i: TensorResult(op, names[i], x.shape) for i, x in given.items()}
    report = Report(list(rows.values()))
    rng = np.random.default_rng([seed, STREAM])
    shapes = [y.shape for y in tested.outputs(inputs)]
    bound = validity * float(np.finfo(dtype).eps / np.finfo(np.float64).eps)
    unclear = list(given)
    for attempt in range(ATTEMPTS):
        w = [
            np.asarray(rng.normal(size=shape)).astype(dtype).astype(np.float64) for shape in shapes
        ]
        v = [None if x is None else np.asarray(rng.normal(size=x.shape)) for x in inputs]
        g = tested.gradients(_as(inputs, dtype), _as(w, dtype))
        if attempt == 0:
            if "contract" in rules:
                faults = contract(tested, inputs, w, contract_dtypes)
                if replay is not None and not _same(
                    chosen.gradients(inputs, w), tested.gradients(inputs, w)
                ):
                    faults.append(
                        "gradients differ between choices made and the same choices replayed"
                    )
                named = [
                    re.sub(r"gradient (\d+)", lambda m: f"gradient {names[int(m[1])]}", fault)
                    for fault in faults
                ]
                report.faults = [f"{op or 'pair'}: {fault}" for fault in named]
            if not _shapes_fit(rows, g, len(inputs)):
                return report
            if digits:
                _digits(rows, exact_digits(exact, inputs, v, w, digits), digits)
        g80: Sequence[Any] = [None] * len(inputs)
        if "noise" in rules and has_longdouble():
            g80 = exact.gradients(_as(inputs, np.longdouble), _as(w, np.longdouble))
        again = []
        for i in unclear:
            row = TensorResult(op, names[i], given[i].shape)
            if "differences" in rules and dtype == np.float64:
                row.difference = finite_difference_error(tested, inputs, i, v[i], w, g[i])  # type: ignore[arg-type]
            floor = 0.0
            if g80[i] is not None:
                noise = rounding_noise(exact, inputs, i, v[i], w, g[i], g80[i])  # type: ignore[arg-type]
                row.noise, row.sharpness, floor = noise
            _judge(row, g[i], difference_tolerance, bound)
            if "noise" in rules and g80[i] is None and not digits:
                row.fault(
                    "INCONCLUSIVE", "longdouble is no wider than float64 here: ask for digits"
                )
            if row.verdict == "INCONCLUSIVE" and not floor <= bound and attempt < ATTEMPTS - 1:
                again.append(i)
            else:
                rows[i].merge(row)
        unclear = again
    return report


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
