"""What the checks can see: every planted bug against every rule, ours and other people's, and the
same rules on right code.

A bug shows in a draw if the exact numbers differ by more than a right port's rounding may. Nothing
can catch it in a draw in which it does not show, so that is the ceiling of every rule. Other
people's rules compare a port's tensors with the truth's, here on the very numbers of the draw.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..check import FD_TOLERANCE, MODEL_FD_TOLERANCE, MODEL_VALIDITY, RULES, VALIDITY, Report, check
from ..check.cases import CASES, Case, RandomDraw, model_case, pair_of
from ..check.planted import FUNCTIONS, PLANTED, Planted, plant
from ..config import ModelConfig, preset
from ..grads.rounded import round_bfloat16, rounded
from ..grads.units import roundoff
from ..ops import REFERENCE, AnyOp, Op
from ..text import load_text
from ..verify import Settings, plan, run
from .compare import FACTOR
from .diagnose import largest
from .orders import shuffled

__all__ = [
    "COLUMNS",
    "OURS",
    "PEERS",
    "SMALL",
    "TYPES",
    "Draws",
    "Row",
    "clean_runs",
    "draws_of",
    "false_alarms",
    "kill",
    "peers_table",
]

COLUMNS = ("contract", "differences", "noise", "sharpness")  # of the table: our rules
TYPES = ("float64", "float32", "bfloat16")  # in which false alarms are counted
EXAMPLES = 10  # of clean code, an op
SMALL = 1e-3  # what gradients are also multiplied with: an absolute tolerance then hides much
RERUNS = 4
Tensors = dict[str, np.ndarray]


class Row(NamedTuple):
    """What caught a bug, of `COLUMNS`; and the tensors whose gradients the checker calls wrong."""

    bug: Planted
    caught: frozenset[str]
    tensors: tuple[str, ...]


# Our checker on every bug


def small_model() -> ModelConfig:
    """The tiny model with one dense and one MoE layer less, for speed; two MTP modules, so that
    their chain counts."""
    return replace(
        preset("tiny"), layers=1, dense_layers=0, vocabulary=31, width=9, q_latent=5, heads=2
    )


def kill(bug: Planted, rules: Sequence[str] = RULES) -> Row:
    """Run the checker's rules on the bug; on a bug of the model, these alone. A function that is no
    pair is out of their reach."""
    planted = plant(bug)
    if bug.op in FUNCTIONS:
        return Row(bug, frozenset(), ())
    if isinstance(planted, Op):
        settings = Settings(load_text())
        reports = [run(step, settings, {bug.op: planted}) for step in plan([bug.op], settings)]
        caught = symptoms(reports, FD_TOLERANCE, VALIDITY)
    else:
        reports = [examine_model(planted, rules)]
        caught = symptoms(reports, MODEL_FD_TOLERANCE, MODEL_VALIDITY)
    wrong = {t.tensor: None for r in reports for t in r.tensors if t.verdict != "PASS"}
    return Row(bug, caught, tuple(wrong))


def examine_model(module: Any, rules: Sequence[str] = RULES) -> Report:
    """The checker's report on a small model whose forward and backward are those of ``module``."""
    case, names, pair = model_case(RandomDraw(0), config=small_model(), length=7, model=module)
    return check(
        *pair,
        case.inputs,
        replay=case.replay,
        op="model",
        names=names,
        difference_tolerance=MODEL_FD_TOLERANCE,
        validity=MODEL_VALIDITY,
        rules=rules,
    )


def symptoms(reports: list[Report], tolerance: float, validity: float) -> frozenset[str]:
    """The columns in which a report does not hold."""
    found = set()
    bounds = {"difference": tolerance, "noise": 1.0, "sharpness": validity}
    columns = dict(zip(bounds, COLUMNS[1:], strict=True))
    for report in reports:
        found |= {"contract"} if report.faults else set()
        for t in report.tensors:
            values = {name: getattr(t, name) for name in bounds}
            found |= {
                columns[name]
                for name, value in values.items()
                if value is not None and not value <= bounds[name]
            }
    return frozenset(found)


def false_alarms() -> tuple[int, int]:
    """(clean examples that some rule calls wrong, clean examples)."""
    settings = Settings(load_text(), examples=EXAMPLES)
    reports = [run(step, settings) for step in plan(list(CASES), settings)]
    return sum(not report.ok for report in reports), len(reports)


# Draws, and rules that compare a port with the truth


class Draw(NamedTuple):
    """One case of an op: what goes in, and the exact results of right code."""

    case: Case
    kwargs: dict[str, Any]
    cotangents: list[np.ndarray]
    right: Tensors


def drawn(op: str, seed: int) -> Draw:
    case = CASES[op](RandomDraw(seed))
    pair, kwargs = pair_of(op), dict(case.kwargs)
    y, _ = pair.forward(*case.inputs, **kwargs)
    if case.replay is not None:
        kwargs |= case.replay(y)
    rng = np.random.default_rng([seed, 0x5EED])
    members = [np.asarray(x) for x in (y if isinstance(y, tuple) else (y,))]
    cotangents = [np.asarray(rng.normal(size=x.shape)) for x in members if x.dtype.kind == "f"]
    return Draw(case, kwargs, cotangents, results(pair, case, kwargs, cotangents))


def results(
    pair: AnyOp,
    case: Case,
    kwargs: Mapping[str, Any],
    cotangents: Sequence[np.ndarray],
    place: Callable[[Any], Any] = np.asarray,
) -> Tensors:
    """Outputs and gradients, by place."""
    inputs = [None if x is None else place(x) for x in case.inputs]
    given = {name: placed(x, place) for name, x in kwargs.items()}
    y, saved = pair.forward(*inputs, **given)
    dy: Any = tuple(map(place, cotangents))
    gradients = pair.backward(dy if isinstance(y, tuple) else dy[0], saved)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    members = y if isinstance(y, tuple) else (y,)
    found = {f"out {n}": np.asarray(x) for n, x in enumerate(members)}
    found = {name: x for name, x in found.items() if x.dtype.kind == "f"}
    return found | {f"grad {n}": np.asarray(g) for n, g in enumerate(gradients) if g is not None}


def placed(x: Any, place: Callable[[Any], Any]) -> Any:
    """An argument that is not differentiable, placed if it is a floating array."""
    return place(x) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x


def again(op: str, draw: Draw, dtype: str, seed: int) -> Tensors:
    """Right code at a type, with sums in an order of the seed's."""
    own, pair = shuffled(seed), pair_of(op)

    def place(x: Any) -> Any:
        low = np.asarray(x, "float64" if dtype == "float64" else "float32")
        return own(round_bfloat16(low) if dtype == "bfloat16" else low)

    kwargs = dict(draw.kwargs)
    if dtype == "bfloat16":
        pair = rounded(pair)
        if "ops" in inspect.signature(pair_of(op).forward).parameters:
            kwargs["ops"] = REFERENCE | {name: rounded(x) for name, x in REFERENCE.items()}
    return results(pair, draw.case, kwargs, draw.cotangents, place)


def rounded_draw(draw: Draw, op: str) -> Draw:
    """The draw with inputs that every type holds, and right code's results of these."""
    inputs = tuple(None if x is None else round_bfloat16(x) for x in draw.case.inputs)
    kwargs = {name: placed(x, round_bfloat16) for name, x in draw.kwargs.items()}
    cotangents = [round_bfloat16(x) for x in draw.cotangents]
    case = Case(inputs, kwargs)
    return Draw(case, kwargs, cotangents, results(pair_of(op), case, kwargs, cotangents))


def units(op: str, draw: Draw, dtype: str) -> dict[str, float]:
    """The unit of each tensor, by reruns."""
    found = {name: roundoff(dtype) * largest(x) for name, x in draw.right.items()}
    for seed in range(1, RERUNS + 1):
        for name, x in again(op, draw, dtype, seed).items():
            found[name] = max(found[name], largest(x - draw.right[name]))
    return found


def clean_runs(draws: int) -> Iterator[tuple[str, str, float]]:
    """Right code in another order of sums, ``draws`` cases of every op at every type: the op, the
    type, and the largest error in units."""
    for op in CASES:
        for seed in range(draws):
            draw = rounded_draw(drawn(op, 500 + seed), op)
            for dtype in TYPES:
                unit = units(op, draw, dtype)
                found = again(op, draw, dtype, RERUNS + 1)
                errors = [
                    largest(found[name] - x) / unit[name] if unit[name] else 0.0
                    for name, x in draw.right.items()
                ]
                yield op, dtype, max(errors)


Compare = Callable[[np.ndarray, np.ndarray], bool]


def allclose(tolerance: float) -> Compare:
    return lambda x, y: bool(np.allclose(x, y, rtol=tolerance, atol=tolerance))


def cosine(x: np.ndarray, y: np.ndarray) -> bool:
    """Of two zeros it is 1."""
    size = float(np.linalg.norm(x) * np.linalg.norm(y))
    return bool(float(np.sum(x * y)) / size >= 0.999) if size else not (x.any() or y.any())


def calc_diff(x: np.ndarray, y: np.ndarray) -> bool:
    size = float(np.sum(x * x + y * y))
    return bool(1 - 2 * float(np.sum(x * y)) / size <= 1e-3) if size else True


PEERS: dict[str, Compare] = {  # other people's rules, by name
    "calc_diff ≤ 1e-3": calc_diff,
    "cosine ≥ 0.999": cosine,
    "allclose 1e-2": allclose(1e-2),
    "allclose 1e-4": allclose(1e-4),
    "allclose 1e-5": allclose(1e-5),
}
OURS = "4 units of float32"  # the name of our own rule beside them


class Draws(NamedTuple):
    """In how many draws of a bug each rule sees it: on the numbers as they are, and with gradients
    times `SMALL`."""

    bug: Planted
    draws: int
    seen: dict[str, int]
    seen_small: dict[str, int]

    @property
    def shown(self) -> int:
        """In how many draws it shows at all."""
        return self.seen[OURS]


def draws_of(op: str, bugs: Sequence[Planted], draws: int) -> list[Draws]:
    """Every rule on all ``bugs`` of one op, over the same draws."""
    rules = [OURS, *PEERS]
    found = [Draws(bug, draws, dict.fromkeys(rules, 0), dict.fromkeys(rules, 0)) for bug in bugs]
    planted = [plant(bug) for bug in bugs]
    for seed in range(draws):
        draw = drawn(op, seed)
        unit = units(op, draw, "float32")
        for row, pair in zip(found, planted, strict=True):
            try:
                theirs = results(pair, draw.case, draw.kwargs, draw.cotangents)  # type: ignore[arg-type]
            except Exception:  # of the bug's own: everybody sees it
                theirs = {}
            for rule, seen, scale in (
                *((rule, row.seen, 1.0) for rule in rules),
                *((rule, row.seen_small, SMALL) for rule in rules),
            ):
                seen[rule] += not agrees(rule, theirs, draw.right, unit, scale)
    return found


def agrees(
    rule: str, theirs: Tensors, right: Tensors, unit: Mapping[str, float], scale: float
) -> bool:
    """Whether a rule calls all tensors right; gradients are multiplied with ``scale`` before."""
    for name, y in right.items():
        x = theirs.get(name)
        if x is None or x.shape != y.shape:
            return False
        if rule == OURS:
            if not largest(x - y) <= FACTOR * unit[name]:
                return False
            continue
        factor = scale if name.startswith("grad") else 1.0
        if not PEERS[rule](factor * x, factor * y):
            return False
    return True


def peers_table(
    draws: int, progress: Callable[[str, int, int], None] = lambda step, done, total: None
) -> list[Draws]:
    """Every bug of an op that forward and backward do not share, over so many draws."""
    by_op: dict[str, list[Planted]] = {}
    for bug in PLANTED:
        if not (bug.shared or bug.of_checker or bug.op == "model" or bug.op in FUNCTIONS):
            by_op.setdefault(bug.op, []).append(bug)
    found: list[Draws] = []
    for number, (op, bugs) in enumerate(by_op.items()):
        progress(op, number, len(by_op))
        found += draws_of(op, bugs, draws)
    return found
