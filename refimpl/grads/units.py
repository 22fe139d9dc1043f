"""The unit of error of every tensor of a result: how far reruns of the reference at a type come to
stand from it.

A rerun computes the same function with the model width D permuted, another permutation each time,
so that its sums run in another order; choices of experts, and GRPO's of tokens, are those of the
result. The unit is the largest error over all reruns, and, but in bfloat16, `SPREAD` times as much
as it is larger than the smallest; but at least u · max |x|, where u is the type's unit roundoff. A
right implementation stays within 4 units. In emulated FP8 a permutation would put other numbers
into a tile; there each op's float32 results are moved by chance instead (`nudged`), which turns
some roundings to FP8. In bfloat16 the ops round what they return, up or down by
chance (`rounded`), and weights and given gradients are rounded to the nearest.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ..array import blocks
from ..checkpoint.source import Source
from ..checkpoint.tensor_file import read_tensor_file
from ..config import ModelConfig
from ..errors import CouldNotRun
from ..kernels.columns import IN_FP8
from ..model import Route
from ..ops import AnyOp
from ..parameters import is_buffer, parameter_shapes
from .folder import PIECE, Folder, Step
from .request import UNITS, Request, gradient_shapes, has_width
from .result import routed_layers, write_result
from .rounded import nudged, round_bfloat16, rounded
from .steps import Arrays, Steps, steps_to

__all__ = ["PermutedSource", "measure_units", "reruns_of", "roundoff", "unit_of", "units_of"]

SPREAD = 3
"""So much of the spread of the reruns' errors is added to the largest. Few reruns say little where
one rounding decides: errors then scatter like one random number, and by chance all may be small.
On the trained test model in float32 the largest of 4 reruns alone put 1.2 % of right runs more than
4 units off somewhere, that of 8 still 0.15 %; that of 6 with 3 times the spread 2 in 100,000 (drawn
from 250 reruns; in float64 the same, on tiny fewer). Reruns in bfloat16 are independent draws of
many roundings: of 40 runs of transformers' own model on four checkpoints the furthest had 3.4 units
without the spread."""
STEPS_IN_FP8 = 16
"""By so many steps of float32 a rerun in FP8 moves results. By one step it may turn no rounding at
all on a small model, and a right port that turns one is then far off: 3 of 52 stood 24 units off or
more, on four drawn models of one layer; with 16 none stood 1."""
PREFIXES = ("act/", "cot/", "out/", "grad/", "aux/")  # of what a rerun makes anew
Progress = Callable[[str, int], None]
Axes = dict[int, int]  # by axis, how many times the width it is long


class Rerun(NamedTuple):
    type: str  # of `UNITS`
    number: int

    @property
    def name(self) -> str:
        return f"units-{self.type}"


def roundoff(name: str) -> float:
    """The unit roundoff u = eps/2 of a type of `UNITS`."""
    return float(ml_dtypes.finfo(name).eps) / 2  # type: ignore[no-untyped-call]


def width_axes(
    shapes: Callable[[ModelConfig], Mapping[str, tuple[int, ...]]], config: ModelConfig
) -> dict[str, Axes]:
    """Along which axes of each tensor the width runs: those that are longer in a wider model."""
    wider = shapes(replace(config, width=config.width + 1))
    return {
        name: {
            axis: more - size
            for axis, (size, more) in enumerate(zip(shape, wider[name], strict=True))
            if more != size
        }
        for name, shape in shapes(config).items()
    }


def along(order: np.ndarray, times: int) -> np.ndarray:
    """The permutation of an axis that is ``times`` widths long."""
    return np.concatenate([n * len(order) + order for n in range(times)])


def permute(x: np.ndarray, axes: Mapping[int, int], order: np.ndarray) -> np.ndarray:
    """``x`` with its ``axes`` in the order ``order``."""
    for axis, times in axes.items():
        x = x.take(along(order, times), axis=axis)
    return x


class PermutedSource:
    """A `Source` with the width in the order ``order`` [D], in the type ``type`` of `UNITS`."""

    def __init__(self, source: Source, order: np.ndarray, type: str) -> None:
        self.source, self.order = source, order
        self.type = type
        self.config: ModelConfig = source.config
        self.dtype = np.dtype("float64" if type == "float64" else "float32")
        self.shapes = parameter_shapes(source.config)
        self.axes = width_axes(parameter_shapes, source.config)

    def tensor(self, name: str) -> np.ndarray:
        shape = self.shapes[name]
        if is_buffer(name):
            return self.source.tensor(name)
        out = np.empty(shape, self.dtype)
        step = max(1, PIECE // max(1, prod(shape[1:])))
        for start, stop in blocks(shape[0], step):
            out[start:stop] = self.piece(name, slice(start, stop))
        return out

    def piece(self, name: str, index: Any) -> np.ndarray:
        axes, rank = self.axes[name], len(self.shapes[name])
        rows = np.arange(self.shapes[name][0])[index]
        if 0 in axes:
            rows = along(self.order, axes[0])[rows]
        x = self.source.piece(name, rows if np.ndim(rows) else int(rows))
        behind = {axis - rank: times for axis, times in axes.items() if axis}
        with np.errstate(over="ignore"):  # then nothing of it is finite, and has no unit
            x = permute(x, behind, self.order).astype(self.dtype, copy=False)
        return np.asarray(round_bfloat16(x) if self.type == "bfloat16" else x)

    def stored(self, name: str, expert: int | None) -> None:
        """None: the order is another."""


def reruns_of(request: Request) -> list[Rerun]:
    """Every rerun that a request's units need."""
    return [Rerun(name, number) for name in request.units for number in range(request.reruns)]


def measure_units(steps: Steps, progress: Progress) -> None:
    """Do all reruns of a result whose steps are done; ``progress``: called with a name and with how
    many steps of reruns are done."""
    for before, of in enumerate(reruns_of(steps.request)):
        work = partial(rerun, steps, of, before, progress)
        steps.folder.do((of.name, of.number), work)


def rerun(steps: Steps, of: Rerun, before: int, progress: Progress, _: Step) -> Arrays:
    """Do one rerun, with so many before it, in a folder beneath the result's, which is removed:
    {errors: max |rerun − result| of each `measured` tensor}."""
    request, truth = steps.request, steps.folder
    place = truth.unfinished / f"rerun-{of.type}-{of.number}"
    for left in truth.unfinished.glob("rerun-*"):
        if left != place:
            shutil.rmtree(left)
    place.mkdir(exist_ok=True)
    seed = [request.seed, UNITS.index(of.type), of.number]
    order, kind = np.random.default_rng(seed).permutation(steps.config.width), kind_of(request, of)
    if request.implementation == IN_FP8:
        order = np.sort(order)
    source = PermutedSource(steps.source, order, of.type)
    again = replayed(steps, source.dtype, of.type)
    folder = open_folder(place, again.fingerprint(source, str(seed)), truth, source.dtype)
    work = Steps(source, again, folder, kind)
    tasks = steps_to(work.config, folder.gradients, folder.activations)
    for number, step in enumerate(tasks):
        name = " ".join(map(str, (of.type, of.number + 1, *step)))
        progress(name, before * len(tasks) + number)
        folder.do(step, work.run)
    folder.do(("result",), lambda _: write_result(work))
    errors = np.array([error for _, error in differences(truth, folder, steps.config, order)])
    shutil.rmtree(place)
    return {"errors": errors}


def kind_of(request: Request, of: Rerun) -> Callable[[AnyOp], AnyOp]:
    """What a rerun makes of every op."""
    if request.implementation == IN_FP8:
        return partial(nudged, seed=seed_of(request, of), steps=STEPS_IN_FP8)
    if of.type == "bfloat16":
        return partial(rounded, seed=seed_of(request, of))
    return lambda op: op


def seed_of(request: Request, of: Rerun) -> int:
    """Of a rerun's roundings."""
    return 1000 * request.seed + of.number


def replayed(steps: Steps, dtype: np.dtype[Any], type: str) -> Request:
    """The request of a rerun, which replays the choices of the result."""
    routes = {
        layer: Route(record.array("indices"), record.array("counted"))
        for layer, record in routed_layers(steps).items()
    }
    request, head = steps.request, steps.records["head",]
    grpo, dlogits = request.grpo, request.dlogits_as(dtype, steps.config)
    if grpo is not None:
        grpo = replace(grpo, unclipped=head.array("unclipped"), kept=head.array("kept"))
    if type == "bfloat16":
        dlogits = round_bfloat16(dlogits)
    return replace(request, routes=routes, grpo=grpo, dlogits=dlogits, units=())


def open_folder(
    place: Path, fingerprint: dict[str, str], truth: Folder, dtype: np.dtype[Any]
) -> Folder:
    """The folder of a rerun, resumed if that can be."""
    given: dict[str, Any] = {"gradients": truth.gradients, "activations": truth.activations}
    try:
        return Folder(place, fingerprint, False, **given, dtype=dtype)
    except CouldNotRun:
        return Folder(place, fingerprint, True, **given, dtype=dtype)


def measured(folder: Folder) -> list[str]:
    """The tensors that have a unit, in the order of the index."""
    return [
        name
        for name, entry in folder.tensors.items()
        if name.startswith(PREFIXES) and entry.get("dtype") in ("float32", "float64")
    ]


def differences(
    truth: Folder, again: Folder, config: ModelConfig, order: np.ndarray
) -> Iterator[tuple[str, float]]:
    """Each `measured` tensor, and its largest difference in ``again``."""
    axes = width_axes(gradient_shapes, config)
    tensors, file = truth.tensors, ""
    for name in measured(truth):
        if tensors[name]["file"] != file:
            file = tensors[name]["file"]
            ours, theirs = (read_tensor_file(folder.path / file)[0] for folder in (truth, again))
        kind, _, plain = name.partition("/")
        wide = axes[plain] if kind == "grad" else {}
        if kind in ("act", "cot") and has_width(plain):
            wide = {len(tensors[name]["shape"]) - 1: 1}
        yield name, difference(ours[name], theirs[name], wide, order)


def difference(
    truth: np.ndarray, again: np.ndarray, axes: Mapping[int, int], order: np.ndarray
) -> float:
    """max |again − truth|, where ``again`` has the ``axes`` in another order; a piece at a time."""
    if truth.ndim == 0:
        return abs(float(again) - float(truth))
    rows = along(order, axes[0]) if 0 in axes else np.arange(truth.shape[0])
    behind = {axis: times for axis, times in axes.items() if axis}
    largest = np.float64(0)
    for start, stop in blocks(len(rows), max(1, PIECE // max(1, prod(truth.shape[1:])))):
        chosen = rows[start:stop] if 0 in axes else slice(start, stop)
        x = permute(truth[chosen], behind, order).astype(np.float64)
        if x.size:
            largest = np.maximum(largest, np.max(np.abs(again[start:stop] - x)))
    return float(largest)


def units_of(steps: Steps) -> dict[str, dict[str, float | None]]:
    """The unit of each tensor by type, once all reruns are done; None where it is not finite."""
    request, folder = steps.request, steps.folder
    names, tensors = measured(folder) if request.units else [], folder.tensors
    found: dict[str, dict[str, float | None]] = {name: {} for name in names}
    for type in request.units:
        several = [steps.records[x.name, x.number] for x in reruns_of(request) if x.type == type]
        every = np.array([record.array("errors") for record in several])
        for name, errors in zip(names, every.T, strict=True):
            found[name][type] = unit_of(errors, tensors[name]["scale"], type)
    return found


def unit_of(errors: np.ndarray, scale: float | None, type: str) -> float | None:
    """The unit of a tensor whose largest number is ``scale``, from the ``errors`` [reruns] of its
    reruns; None where it is not finite."""
    most, least = float(np.max(errors)), float(np.min(errors))
    spread = 0 if type == "bfloat16" else SPREAD
    unit = math.inf if scale is None else most + spread * (most - least)
    return max(unit, roundoff(type) * (scale or 0.0)) if math.isfinite(unit) else None
