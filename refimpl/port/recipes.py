"""Which of FP8's mistakes a port has, or which other choice, if the truth is in FP8.

Through a model an FP8 gradient says little: where a number lies near a tie, another order of sums
rounds it the other way, and all behind it moves, by as much as a small mistake does. So every block
is computed again alone, from what the port itself gives as its input and as the gradient of its
output (act/ and cot/): right, with each mistake, and by each other choice.

Of each tensor let e be the port's difference from the right one, d the mistake's. Both without what
lies in the span of a few right runs whose float32 results are moved to their neighbours (`nudged`),
which is what a tie does. Then c = ⟨e, d⟩ / ⟨d, d⟩ is 1 for a port with the mistake, and 0 for a
right one, but for ties that no run met; these are near orthogonal to d. The mistake that leaves the
least of e is named if c lies in ½…3/2 for nearly all tensors that it changes; one is excluded if c
is less for nearly all. (On drawn models all tensors of ports with a mistake lie there, none of
right ones, and at most seven in ten of ports with a mistake of an op.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ..check.planted import PLANTED_IN_FP8, Planted, plant_module
from ..errors import CouldNotRun
from ..fp8 import DEFAULT, Recipe, fp8_table
from ..grads.request import EMBEDDINGS
from ..grads.rounded import nudged
from ..kernels.columns import IN_FP8
from ..ops import Ops
from .exclude import MOST_PARTS
from .parts import Part, parts_of
from .recompute import Setting, made_with, planted_code
from .truth import Truth

__all__ = ["Judged", "judge"]

INPUTS = ("act/", "cot/")
ROUNDED_DOWN = "UE8M0 rounded down"
Arrays = Mapping[str, np.ndarray]
NEARLY_ALL = 0.9
RERUNS = 3  # of the right code
LEAST = 2.0**-20  # of a tensor: less of d is float32's rounding
MOST_BYTES = 2**26  # of a block's weights in float64: with more, a dozen runs take minutes


class Judged(NamedTuple):
    """What a port's blocks are the numbers of."""

    named: list[Planted]  # the mistake, if it is one
    recipe: str  # or the other choice, as in weight_input=exact
    first: str  # the first tensor in reading order that shows it
    not_excluded: list[str]  # mistakes that would not have shown
    note: str  # what could not be done, and why


class Other(NamedTuple):
    """What a port may compute instead of the truth's recipe."""

    name: str
    bug: Planted | None  # None: another choice
    table: Ops


class Share(NamedTuple):
    """How much of a mistake a tensor has."""

    tensor: str
    c: float | None  # None where the mistake changes nothing but what ties do
    left: float  # |e − d|²


class Own(Truth):
    """A truth whose activations and cotangents are the port's. CouldNotRun for one that the port
    does not give, but for the embeddings, which no rounding to FP8 touches."""

    def __init__(self, truth: Truth, given: Arrays) -> None:
        super().__init__(truth.folder, truth.metadata, truth.entries)
        self.given = given

    def array(self, name: str) -> np.ndarray:
        if name in self.given:
            return self.given[name]
        if name.startswith(INPUTS) and name != f"act/{EMBEDDINGS}":
            raise CouldNotRun(f"the port does not give {name}")
        return super().array(name)


def recipe_of_truth(truth: Truth) -> Recipe | None:
    """The recipe of a truth in FP8, None for others; CouldNotRun if the index does not say it."""
    if truth.metadata.get("implementation") != IN_FP8:
        return None
    try:
        return Recipe(**truth.metadata["request"]["fp8"])
    except (KeyError, TypeError, ValueError) as error:
        raise CouldNotRun(f"{truth.folder} does not say its recipe of FP8: {error}") from error


@cache
def others(recipe: Recipe) -> list[Other]:
    """All mistakes and choices that are not the recipe's."""
    bugs = [x for x in PLANTED_IN_FP8 if recipe.scale == "ue8m0" or x.name != ROUNDED_DOWN]
    choices: tuple[dict[str, Any], ...] = (
        {"scale": "float32" if recipe.scale == "ue8m0" else "ue8m0"},
        {"weight_input": "exact" if recipe.weight_input == "kept" else "kept"},
        {"bits": 0 if recipe.bits else 14},
        {"floor": 1e-12 if recipe.floor > 1e-12 else DEFAULT.floor},
    )
    named = {f"{key}={value}": replace(recipe, **x) for x in choices for key, value in x.items()}
    return [Other(bug.name, bug, plant_module(bug).fp8_table(recipe)) for bug in bugs] + [
        Other(name, None, fp8_table(choice)) for name, choice in named.items()
    ]


def judge(
    truth: Truth,
    theirs: Callable[[str], np.ndarray | None],
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Judged | None:
    """What a port's tensors are the numbers of, ``theirs`` by the truth's names; None if the truth
    is not in FP8."""
    try:
        recipe = recipe_of_truth(truth)
        if recipe is None:
            return None
        names = [n for n in truth.entries if n.startswith((*INPUTS, "grad/"))]
        given = {name: x for name in names if (x := theirs(name)) is not None}
        inputs = {name: x for name, x in given.items() if name.startswith(INPUTS)}
        every = others(recipe)
        shares = shares_of(Own(truth, inputs), given, recipe, every, progress)
    except CouldNotRun as error:
        why = f"which of FP8's mistakes a port has is told from act/ and cot/: {error}"
        return Judged([], "", "", [bug.name for bug in PLANTED_IN_FP8], why)
    return nearest(shares, every)


def shares_of(
    own: Own,
    given: Arrays,
    recipe: Recipe,
    every: Sequence[Other],
    progress: Callable[[str, int, int], None],
) -> dict[str, list[Share]]:
    """By mistake or choice, the share that the port's tensors have of it, in the blocks that can be
    computed again."""
    found: dict[str, list[Share]] = {other.name: [] for other in every}
    right, why = fp8_table(recipe), ""
    moved = [
        right | {name: nudged(op, seed) for name, op in right.items()}
        for seed in range(1, RERUNS + 1)
    ]
    for number, ways in enumerate(chosen := blocks_of(own)):
        progress(f"FP8 in layer {ways[0].layer}", number, len(chosen))
        for block in ways:
            try:
                exact = again(own, block, right)
            except CouldNotRun as error:
                why = why or str(error)
                continue
            names = [n for n, x in exact.items() if n in given and n in own and np.any(x)]
            errors = {n: relative(given[n], exact[n]) for n in names}
            noises = [again(own, block, table) for table in moved]
            spans = {n: span([relative(x[n], exact[n]) for x in noises]) for n in names}
            for other in every:
                made = again(own, block, other.table)
                for n in names:
                    mine = relative(made[n], exact[n])
                    left = float(np.sum((errors[n] - mine) ** 2))
                    found[other.name].append(Share(n, share(errors[n], mine, spans[n]), left))
            break
    if not any(found.values()):
        raise CouldNotRun(why or "no block can be computed again")
    return found


def blocks_of(truth: Truth) -> list[list[Part]]:
    """The blocks to compute, at most `MOST_PARTS`, and the ways: backward, or else forward."""
    layers: dict[int, list[Part]] = {}
    for part in sorted(parts_of(truth), key=lambda part: not part.backward):
        if part.kind == "attention" and part.layer is not None:
            layers.setdefault(part.layer, []).append(part)
    places = np.linspace(0, len(layers) - 1, min(len(layers), MOST_PARTS)).round()
    return [layers[sorted(layers)[int(place)]] for place in places]


def again(own: Own, block: Part, table: Ops) -> Arrays:
    """The tensors of a block by a table, from the port's own inputs."""
    setting = Setting(planted_code(None), "float32", ops=table, most_bytes=MOST_BYTES)
    try:
        with np.errstate(all="ignore"):
            found = made_with(setting, own, block)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CouldNotRun(f"{block.name} can't be computed again: {error}") from error
    return {name: np.asarray(x) for name, x in found.items()}


def relative(x: np.ndarray, right: np.ndarray) -> np.ndarray:
    """x − right, in units of |right|; 0 where it is not finite."""
    with np.errstate(all="ignore"):
        found = (x.astype(np.float64) - right) / np.linalg.norm(right.astype(np.float64))
    return np.where(np.isfinite(found), found, 0).ravel()


def span(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """An orthonormal basis [n, entries] of what the vectors span."""
    _, sizes, basis = np.linalg.svd(np.stack(vectors), full_matrices=False)
    return basis[sizes > LEAST]


def share(error: np.ndarray, mistake: np.ndarray, noise: np.ndarray) -> float | None:
    """c of `Share`."""
    left = mistake - noise.T @ (noise @ mistake)
    size = float(left @ left)
    return float(error @ left) / size if size > LEAST**2 else None


def nearest(shares: Mapping[str, Sequence[Share]], every: Sequence[Other]) -> Judged:
    """The mistake or choice that the port has, if it has one."""
    changed = {name: [x for x in each if x.c is not None] for name, each in shares.items()}
    best = min(every, key=lambda x: np.mean([each.left for each in shares[x.name]]))
    has = [x.tensor for x in changed[best.name] if x.c is not None and abs(x.c - 1) < 1 / 2]
    if has and len(has) >= NEARLY_ALL * len(changed[best.name]):
        return Judged([best.bug] if best.bug else [], "" if best.bug else best.name, has[0], [], "")
    hidden = []
    for bug in (x.bug for x in every if x.bug is not None):
        less = [x for x in changed[bug.name] if x.c is not None and x.c < 1 / 2]
        if not less or len(less) < NEARLY_ALL * len(changed[bug.name]):
            hidden.append(bug.name)
    return Judged([], "", "", hidden, "")
