"""What a port's numbers say of its mistake without a catalogue: a constant factor and what it could
be in this run, a sign, a transpose, the other layout of rotated rows, halves that changed places,
blocks left at zero, and what is missing if the run is computed again without one of its parts.

A relation holds if the port's numbers fit it within `FACTOR` units of the truth's rounding, and the
plain truth does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from math import isfinite
from typing import Any

import numpy as np

from ..config import ModelConfig
from ..errors import CouldNotRun
from ..grads.units import roundoff
from ..model import mtp_scale
from ..ops import yarn_softmax_factor
from ..parameters import MTP, MTP_PROJECTION, attention_shapes, network_names
from .blocks import Cut, cuts_of, told
from .compare import FACTOR
from .parts import Part
from .recompute import recompute
from .truth import Truth

__all__ = ["factors_of", "hints_of"]

Arrays = Mapping[str, np.ndarray]
MOST_SMALL = 64  # an integer factor up to this may count micro-batches or ranks
MOST_NAMES = 4  # tensors that a hint names
PARTS = {  # what a run can be computed without, and what it is called
    "mtp": "the MTP part",
    "balance": "the balance loss's part",
    "shared": "the shared experts' part",
}


def hints_of(truth: Truth, part: Part, theirs: Arrays, dtype: str) -> list[str]:
    """Each relation in one line, with the tensors that it holds for; empty if none does."""
    wrong = {
        name: Pair(x.astype(np.float64), truth.array(name).astype(np.float64), truth, name, dtype)
        for name, x in theirs.items()
        if x.dtype.kind == "f" and x.shape == truth.entries[name].shape
    }
    wrong = {name: pair for name, pair in wrong.items() if not pair.fits(pair.truth)}
    if not wrong:
        return []
    found: dict[str, list[str]] = {}
    for name, pair in wrong.items():
        for hint in relations(truth, name, pair, theirs):
            found.setdefault(hint, []).append(name)
    lines = [f"{hint}: {listed(names, len(wrong))}" for hint, names in found.items()]
    return lines + left_out(truth, part, wrong)


class Pair:
    """A port's tensor and the truth's, in float64."""

    def __init__(
        self, theirs: np.ndarray, right: np.ndarray, truth: Truth, name: str, dtype: str
    ) -> None:
        self.theirs, self.truth = theirs, right
        entry = truth.entries[name]
        scale = float(np.max(np.abs(right), initial=0.0))
        self.unit = entry.units.get(dtype, roundoff(dtype) * scale)
        self.relative = self.unit / scale if scale else 0.0

    def fits(self, wanted: np.ndarray) -> bool:
        """Whether the port's numbers are these, within units that grow with them."""
        if wanted.shape != self.theirs.shape:
            return False
        unit = max(self.unit, self.relative * float(np.max(np.abs(wanted), initial=0.0)))
        return bool(np.max(np.abs(self.theirs - wanted), initial=0.0) <= FACTOR * unit)


def listed(names: list[str], of: int) -> str:
    """The first names, and how many more."""
    if len(names) == of and of > 1:
        return f"all {of} tensors of the part that are wrong"
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def relations(truth: Truth, name: str, pair: Pair, theirs: Arrays) -> Iterator[str]:
    """What the port's tensor is of the truth's."""
    right, other = pair.truth, pair.theirs
    if not np.isfinite(other).all():
        yield "not finite"
        return
    if pair.fits(np.zeros_like(right)):
        yield "0 throughout"
        return
    if pair.fits(-right):
        yield "the sign is wrong"
    elif hint := factor_hint(truth, pair):
        yield hint
    if right.ndim == 2 and right.shape[0] == right.shape[1] and pair.fits(right.T):
        yield "transposed"
    cuts = cuts_of(name, right.shape, truth.config)
    if zero := zero_blocks(pair, cuts):
        yield f"0 in some blocks and right in the others ({zero})"
    for what, move in moves(truth.config, name):
        if pair.fits(move(right)):
            yield what
    yield from exchanged(truth, name, pair)


# A factor


def factor_hint(truth: Truth, pair: Pair) -> str:
    """A constant factor and the numbers of the run that give it; empty without such a factor."""
    size = float(np.sum(pair.truth * pair.truth))
    factor = float(np.sum(pair.theirs * pair.truth)) / size if size > 0 else 0.0
    if not isfinite(factor) or not factor or not pair.fits(factor * pair.truth):
        return ""
    spread = FACTOR * pair.relative * max(1.0, abs(factor))
    if not abs(factor - 1) > spread:
        return ""
    could = [
        what for what, value in factors_of(truth).items() if abs(value - factor) <= spread
    ] or small_ratio(factor, spread)
    shown = f"a factor of {factor:.4g}"
    if not could:
        return f"{shown}, which no number of this run gives"
    tail = "" if len(could) == 1 else ": these agree here, but another run can tell them apart"
    return f"{shown}, as from {' or '.join(could)}{tail}"


def small_ratio(factor: float, spread: float) -> list[str]:
    """A small integer, or one over it: of micro-batches or ranks."""
    near = Fraction(factor).limit_denominator(MOST_SMALL)
    if (
        near <= 0
        or abs(float(near) - factor) > spread
        or 1 not in (near.numerator, near.denominator)
    ):
        return []
    if max(near.numerator, near.denominator) > MOST_SMALL:
        return []
    return [f"{near} (micro-batches or ranks)"]


def factors_of(truth: Truth) -> dict[str, float]:
    """The numbers of a run by which a gradient may be off, by what they are; each with its
    inverse."""
    config, numbers = truth.config, dict[str, float]()
    if config is not None:
        numbers |= of_config(config) | of_batch(truth)
        settings = truth.metadata["request"].get("grpo") or {}
    else:
        settings = {}
    for name in ("temperature", "kl_weight", "length"):
        if isinstance(settings.get(name), int | float) and settings[name]:
            numbers[name] = float(settings[name])
    found: dict[str, float] = {}
    for what, value in numbers.items():
        if value not in (0.0, 1.0) and isfinite(value):
            found |= {
                what: value,
                f"1/({what})" if "/" in what or "·" in what else f"1/{what}": 1 / value,
            }
    return {f"{what} = {value:.5g}": value for what, value in found.items()}


def of_config(c: ModelConfig) -> dict[str, float]:
    scale = (c.nope + c.rope) ** -0.5
    mscale = yarn_softmax_factor(c.active_yarn)
    return {
        "the routed scale": c.routed_scale,
        "λ": c.mtp_weight,
        "λ/depth": mtp_scale(c),
        "depth": float(c.mtp_depth),
        "α": c.balance_weight,
        "heads H": float(c.heads),
        "top_k K": float(c.top_k),
        "experts E": float(c.experts),
        "E/K": c.experts / c.top_k,
        "shared experts": float(c.shared_experts),
        "the softmax scale": scale * mscale,
        "(N+R)^-1/2": scale,
        "(N/(N+R))^1/2": (c.nope / (c.nope + c.rope)) ** 0.5,
        "mscale²": mscale,
        "the rotation's factor": c.rope_factor,
        "width^1/2": c.width**0.5,
    }


def of_batch(truth: Truth) -> dict[str, float]:
    """Counts of tokens: N those whose target counts."""
    b, t = truth.entries["in/tokens"].shape
    masks = [truth.array(f"in/{x}") for x in ("mask", "grpo_mask") if f"in/{x}" in truth]
    n = float(masks[0].sum()) if masks else 0.0
    found = {
        "B": float(b),
        "T": float(t),
        "T − 1": float(t - 1),
        "B·T": float(b * t),
        "T/(T − 1)": t / (t - 1) if t > 1 else 1.0,
    }
    if n:
        found |= {"N counted": n, "B·T/N": b * t / n, "N/B": n / b}
        for depth in range(1, (truth.config.mtp_depth if truth.config else 0) + 1):
            later = float(masks[0][:, depth:].sum())
            found[f"N/N of MTP module {depth}"] = n / later if later else 1.0
            found[f"B·(T − {depth})/N of MTP module {depth}"] = b * (t - depth) / (later or 1.0)
    return found


# Blocks and places


def zero_blocks(pair: Pair, cuts: list[Cut]) -> str:
    """Which blocks are exactly 0 though the truth's are not, if all else is right."""
    for cut in cuts:
        axes = tuple(axis for axis in range(pair.truth.ndim) if axis != cut.axis)
        kept = np.zeros(cut.blocks, bool)  # blocks with a number that is not 0
        np.logical_or.at(kept, cut.block, np.any(pair.theirs, axis=axes))
        zero = ~kept[cut.block]
        shape = [1] * pair.truth.ndim
        shape[cut.axis] = -1
        if zero.any() and pair.fits(np.where(zero.reshape(shape), 0.0, pair.truth)):
            return told([cut], [zero]).replace("wrong", "0")
    return ""


Move = Callable[[np.ndarray], np.ndarray]


def moves(config: ModelConfig | None, name: str) -> Iterator[tuple[str, Move]]:
    """Other orders of a tensor's rows or last axis that ports know, by what they are."""
    if config is None:
        return
    c, part = config, name
    prefix, _, rest = name.partition("/")
    for axis, heads, begin, width in rotated(c, prefix, rest):
        evens_first = np.r_[0 : c.rope : 2, 1 : c.rope : 2]
        for told_as, order in (
            ("rotated rows as halves instead of interleaved", evens_first),
            ("rotated rows as interleaved instead of halves", np.argsort(evens_first)),
        ):
            if c.rope > 2:
                yield told_as, reordered(axis, heads, begin, width, order)
    shapes = list(attention_shapes(c))
    if prefix == "grad" and rest.endswith(shapes[-2]):
        both, n = c.nope + c.value, c.nope
        swap = np.r_[n:both, 0:n]
        yield "key and value rows changed places in each head", reordered(0, c.heads, 0, both, swap)
        parts = np.concatenate(
            [h * both + np.r_[0:n] for h in range(c.heads)]
            + [h * both + np.r_[n:both] for h in range(c.heads)]
        )
        yield "all heads' key rows before all value rows", lambda x: x[parts]
        yield "all heads' key rows taken for heads of both", lambda x: x[np.argsort(parts)]
    if prefix == "grad" and part.endswith(MTP_PROJECTION):
        d = c.width
        yield "embedding's and hidden state's columns changed places", lambda x: np.roll(x, d, 1)


def rotated(c: ModelConfig, prefix: str, rest: str) -> Iterator[tuple[int, int, int, int]]:
    """Where a tensor has rotated entries: axis, how many heads, where they begin in each, and the
    width of a head."""
    shapes = list(attention_shapes(c))
    query = shapes[2] if c.q_latent is not None else shapes[0]
    if prefix == "grad" and rest.endswith(query):
        yield 0, c.heads, c.nope, c.nope + c.rope
    if prefix == "grad" and rest.endswith(shapes[-4]):
        yield 0, 1, c.kv_latent, c.kv_latent + c.rope
    if prefix in ("act", "cot"):
        if rest.endswith((".q", ".k")):
            yield 3, 1, c.nope, c.nope + c.rope
        if rest.endswith(".latent"):
            yield 2, 1, c.kv_latent, c.kv_latent + c.rope


def reordered(axis: int, heads: int, begin: int, width: int, order: np.ndarray) -> Move:
    """Entries ``begin`` to ``begin + len(order)`` of each head along ``axis`` in another order."""
    one = np.arange(width)
    one[begin : begin + len(order)] = begin + order
    every = (np.arange(heads)[:, None] * width + one).reshape(-1)
    return lambda x: np.take(x, every, axis=axis)


def exchanged(truth: Truth, name: str, pair: Pair) -> Iterator[str]:
    """Whether the tensor is the truth's of its neighbour: gate and up, keys and values, hidden
    state and embedding."""
    for one, other in neighbours(truth.config):
        for mine, its in ((one, other), (other, one)):
            if name.endswith(mine):
                neighbour = f"{name.removesuffix(mine)}{its}"
                if neighbour in truth and pair.fits(truth.array(neighbour).astype(np.float64)):
                    yield f"the tensor is that of {its}"


def neighbours(config: ModelConfig | None) -> list[tuple[str, str]]:
    """Ends of names that stand side by side, and are alike."""
    gate, up, _ = network_names("")
    if config is not None:
        return [(gate, up), (MTP[0], MTP[1])]
    shared = ("w_shared_gate", "w_shared_up")
    return [("/gate", "/up"), ("w_gate", "w_up"), shared, ("w_hnorm", "w_enorm"), ("/k", "/v")]


# What is missing


def left_out(truth: Truth, part: Part, wrong: Mapping[str, Any]) -> list[str]:
    """Whether the port's numbers are those of the run without one of its parts."""
    if truth.config is None:
        return []
    c = truth.config
    present = {
        "mtp": bool(c.mtp_depth) and part.kind in ("head", "norm", "embedding", "loss"),
        "balance": bool(c.balance_weight) and part.kind in ("gate", "network"),
        "shared": bool(c.shared_experts) and part.kind == "network",
    }
    lines: list[str] = []
    for what, is_there in present.items():
        if not is_there:
            continue
        try:
            found = recompute(truth, part, None, without=what)
        except CouldNotRun:
            return lines
        these = [name for name, pair in wrong.items() if name in found and pair.fits(found[name])]
        if these:
            lines.append(f"differs by exactly {PARTS[what]}: {listed(these, len(wrong))}")
    return lines
