"""Which planted bug a part's numbers are those of.

Every bug that the part can show is computed on that part alone: in float64, and again at the port's
type with sums in other orders. How far these reruns come to stand from float64 is the bug's own
unit: a bug may amplify rounding as the right code does not. The port's numbers are the bug's if
all of them lie within `FACTOR` of these units, and if by the same measure they are not the right
code's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ..check.planted import PLANTED, Planted
from ..errors import CouldNotRun
from ..grads.units import roundoff
from .compare import FACTOR
from .hints import hints_of
from .parts import Part
from .recompute import planted_code, recompute
from .truth import Truth

__all__ = ["Diagnosis", "bugs_of", "diagnose"]

FACTOR_RMS = 3  # times a rerun's root mean square, which varies less: named ones have 2.5 at most
PEAK = 3  # of rounding noise, its largest error over its root mean square, about
RERUNS = 3  # of each bug that is not ruled out before
RULED_OUT = 64  # units of one rerun: further away, no more are made
COARSE = "in bfloat16 another mistake may give the same numbers: float32 can tell them apart"
Arrays = Mapping[str, np.ndarray]

MADE_OF = {  # of vectors' cases: the ops that an op calls
    "mla": ("attention", "flash_attention", "rope", "rms_norm", "linear"),
    "mla_absorbed": ("mla", "attention", "flash_attention", "rope", "rms_norm", "linear"),
    "moe": ("ffn", "swiglu", "linear"),
    "ffn": ("swiglu", "linear"),
    "head_cross_entropy": ("log_prob",),
    "mtp": ("rms_norm", "linear"),
    "bias_update": ("expert_load",),
}
OF_LOSS = {  # of models: with which losses an op is run
    "head_cross_entropy": ("cross_entropy",),
    "cross_entropy": ("cross_entropy",),
    "log_prob": ("cross_entropy", "grpo"),
    "grpo": ("grpo",),
}


class Diagnosis(NamedTuple):
    """The planted bugs whose numbers a wrong part has."""

    named: list[Planted]  # bugs that give these numbers
    hints: list[str]  # what needs no catalogue: a factor, a sign, a transpose
    note: str  # what could not be done, and why


def bugs_of(truth: Truth, part: Part) -> list[Planted]:
    """The planted bugs that the part can show, those left out of ops that its run does not have."""
    ops = {*part.ops, *(inner for op in part.ops for inner in MADE_OF.get(op, ()) if part.case)}
    if truth.kind == "model":
        loss = truth.metadata["request"]["loss"]
        ops -= {op for op, of in OF_LOSS.items() if loss not in of}
    return [bug for bug in PLANTED if bug.op in ops and not bug.of_checker]


def diagnose(truth: Truth, part: Part, theirs: Arrays, dtype: str) -> Diagnosis:
    """The bugs whose numbers ``theirs`` are, of the tensors of ``part`` by the truth's names, in
    ``dtype``; and what else can be said of them."""
    held = {name: np.asarray(theirs[name]) for name in part.tensors if name in theirs}
    hints = hints_of(truth, part, held, dtype)
    try:
        trial = Trial(truth, part, held, dtype)
    except CouldNotRun as error:
        return Diagnosis([], hints, f"no planted bug was tried: {error}")
    named = [bug for bug in bugs_of(truth, part) if trial.matches(bug)]
    coarse = bool(named) and dtype == "bfloat16"
    return Diagnosis(named, hints, COARSE if coarse else "")


class Trial:
    """A part's numbers of a port, held against those of planted bugs.

    CouldNotRun if the part can't be computed again, or if that does not give the truth.
    """

    def __init__(self, truth: Truth, part: Part, theirs: Arrays, dtype: str) -> None:
        self.truth, self.part = truth, part
        self.dtype = dtype
        right = recompute(truth, part, None)
        recompute(truth, part, None, dtype, 1)  # an error here is ours, and of no bug
        self.theirs = {n: x.astype(np.float64) for n, x in theirs.items() if is_judged(right, n, x)}
        self.right = {name: right[name].astype(np.float64) for name in self.theirs}
        self.units = {name: unit_of(truth, name, dtype) for name in self.theirs}
        for name, x in self.right.items():
            away = largest(x - truth.array(name))
            if not away <= FACTOR * max(self.units[name], unit_of(truth, name, "float64")):
                raise CouldNotRun(
                    f"{name}, computed again, differs from {truth.folder} by {away:.1e}: another "
                    "version wrote it, or another checkpoint"
                )

        self.away = {name: largest(x - self.right[name]) for name, x in self.theirs.items()}

    def matches(self, bug: Planted) -> bool:
        """Whether the port's numbers are the bug's."""
        exact = self.run(bug, "float64", 0)
        if exact is None:
            return False
        errors = {name: largest(self.theirs[name] - x) for name, x in exact.items()}
        if not any(error < self.away[name] for name, error in errors.items()):
            return False  # no tensor is nearer to the bug's than to the right one
        units = {name: self.least(name, x) for name, x in exact.items()}
        spread = dict.fromkeys(exact, 0.0)
        for seed in range(1, RERUNS + 1):
            again = self.run(bug, self.dtype, seed)
            if again is None:
                return False
            for name, x in again.items():
                units[name] = max(units[name], largest(x - exact[name]))
                spread[name] = max(spread[name], rms(x - exact[name]))
            if not all(error <= RULED_OUT * units[name] for name, error in errors.items()):
                return False
        if not all(error <= FACTOR * units[name] for name, error in errors.items()):
            return False
        spreads = {n: max(spread[n], self.least(n, x) / PEAK) for n, x in exact.items()}
        if not all(rms(self.theirs[n] - x) <= FACTOR_RMS * spreads[n] for n, x in exact.items()):
            return False
        return any(x > FACTOR * max(units[n], self.units[n]) for n, x in self.away.items())

    def run(self, bug: Planted, dtype: str, seed: int) -> dict[str, np.ndarray] | None:
        """The bug's numbers; None if it can't give these shapes, or gives none."""
        planted_code(bug)  # an error here is ours
        try:
            found = recompute(self.truth, self.part, bug, dtype, seed)
        except CouldNotRun:
            raise
        except Exception:  # of the bug's own: what it computes need not fit together
            return None
        if any(
            name not in found or found[name].shape != x.shape for name, x in self.theirs.items()
        ):
            return None
        return {name: found[name].astype(np.float64) for name in self.theirs}

    def least(self, name: str, exact: np.ndarray) -> float:
        """The least unit of a bug's tensor: a rounding of its largest number, and what the noise of
        all before it, which the port brings, makes of the clean one."""
        scale = largest(self.right[name])
        clean = self.units[name] / scale if scale > 0 else 0.0
        return max(roundoff(self.dtype), clean) * largest(exact)


def is_judged(right: Mapping[str, np.ndarray], name: str, theirs: np.ndarray) -> bool:
    """Whether a tensor can be told by its numbers: floating ones, made by the recomputation."""
    made = right.get(name)
    return made is not None and made.dtype.kind == "f" and made.shape == theirs.shape


def unit_of(truth: Truth, name: str, dtype: str) -> float:
    """The unit of a tensor of the truth; a rounding of its largest number if none was measured."""
    entry = truth.entries[name]
    if dtype in entry.units:
        return entry.units[dtype]
    return roundoff(dtype) * largest(truth.array(name))


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x * x))) if x.size else 0.0


def largest(x: np.ndarray) -> float:
    """max |x|; infinite if a number is not finite."""
    most = float(np.max(np.abs(x), initial=0.0))
    return most if np.isfinite(most) else np.inf
