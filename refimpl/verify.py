"""The main job: check every op and the whole tiny model on real text, tensor by tensor."""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from .check import MODEL_FD_TOLERANCE, MODEL_VALIDITY, Report, TensorResult, check
from .check.cases import (
    CASES,
    REGIMES,
    Case,
    RandomDraw,
    model_case,
    model_grpo_case,
    model_variant,
    pair_of,
)
from .config import CONVENTIONS, preset
from .errors import CouldNotRun
from .files import read_bytes
from .kernels.columns import (
    COLUMNS,
    COMPOSITES,
    CUDA,
    ON_CPU,
    expect_backend,
    expect_dtype,
    placement,
    table_of,
)
from .kernels.placed import placed
from .ops import IMPLEMENTATIONS, REFERENCE, AnyOp, Op, Ops
from .stored import algorithm_of, compare, stored_table
from .text import Text

__all__ = [
    "KERNELS",
    "MODELS",
    "MODEL_GRPO",
    "NAMES",
    "Settings",
    "Step",
    "backward_of",
    "module_from_file",
    "placed",
    "plan",
    "run",
    "select",
]

MODEL = "model"
VARIANT = "model_variant"
MODEL_GRPO = "model_grpo"  # the name of the model under GRPO's loss
MODELS = (MODEL, VARIANT, MODEL_GRPO)  # names of what is verified beside the ops
NAMES = (*CASES, *MODELS)  # in reading order
MOST_EXAMPLES = 300  # drawn in search of a regime
KERNELS = tuple(COLUMNS)  # the implementations that only a GPU runs


@dataclass(frozen=True)
class Settings:
    """What one verification runs with; the defaults are those of ``refimpl verify``."""

    text: Text
    examples: int = 5
    model_examples: int = 1
    seed: int = 0
    implementation: str = "reference"
    backend: str = "numpy"
    dtype: str = "float64"
    convention: str = "official"
    digits: int | None = None

    def validate(self) -> None:
        """CouldNotRun unless every setting has a meaning here."""
        for name, least in (("examples", 1), ("model_examples", 1), ("seed", 0)):
            if (given := getattr(self, name)) < least:
                raise CouldNotRun(f"must be at least {least}, got {given}", argument=name)
        if self.digits is not None and not 20 <= self.digits <= 1000:
            raise CouldNotRun(f"must lie in 20…1000, got {self.digits}", argument="digits")
        choices = {
            "implementation": (*ON_CPU, *KERNELS),
            "backend": ("numpy", "cupy"),
            "convention": CONVENTIONS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise CouldNotRun(
                    f"must be one of {', '.join(allowed)}, got {getattr(self, name)}", argument=name
                )
        expect_backend(self.backend, self.implementation)
        expect_dtype(self.dtype, self.implementation)
        if self.dtype == "bfloat16" and CONVENTIONS[self.convention].blind_query == "mean":
            raise CouldNotRun(
                f"{self.convention} cannot be combined with bfloat16: no kernel gives a query that "
                "sees no key the mean of the values",
                argument="convention",
            )
        if self.dtype == "bfloat16" and self.digits is not None:
            raise CouldNotRun("cannot be combined with bfloat16", argument="digits")
        placement(self.backend)
        table_of(self.implementation)


class Step(NamedTuple):
    """One example to check."""

    op: str
    seed: int


def select(names: Sequence[str], dtype: str = "float64") -> list[str]:
    """The ops to verify, in reading order; all of them and the model if ``names`` is empty."""
    every = [x for x in NAMES if dtype != "bfloat16" or x in (*CUDA, *COMPOSITES, *MODELS)]
    unknown = [name for name in names if name not in every]
    if unknown:
        known = "" if dtype == "float64" else f" in {dtype}"
        raise CouldNotRun(f"unknown op {', '.join(unknown)}{known}; there are {', '.join(every)}")
    return [name for name in every if name in names or not names]


def plan(names: Sequence[str], settings: Settings) -> list[Step]:
    """The examples to check: for each op as many as asked for, and then those that hit the regimes
    still missing.

    CouldNotRun if the text does not give an op all its regimes (a file of one repeated byte, say).
    """
    steps = []
    for name in names:
        if name in MODELS:
            count = settings.model_examples * (
                2 if name == VARIANT else 1
            )  # the variant has two ways of its own
            steps += [Step(name, settings.seed + example) for example in range(count)]
            continue
        missing = set(REGIMES[name])
        for example in range(MOST_EXAMPLES):
            hit = regimes_of(Step(name, settings.seed + example), settings) & missing
            if example < settings.examples or hit:
                steps.append(Step(name, settings.seed + example))
                missing -= hit
            if example >= settings.examples and not missing:
                break
        if missing:
            raise CouldNotRun(
                f"{settings.text.name} never gives {name} the case of {', '.join(sorted(missing))}"
            )
    return steps


def regimes_of(step: Step, settings: Settings) -> set[str]:
    """The regimes that an op's example meets."""
    return CASES[step.op](RandomDraw(step.seed, settings.text.data)).regimes


def run(step: Step, settings: Settings, replaced: Mapping[str, AnyOp] | None = None) -> Report:
    """Check one example; ``replaced`` puts other pairs in the place of ops (to grade them)."""
    if settings.dtype == "bfloat16":
        return run_stored(step, settings)
    case, tested, common = _example(
        step, settings, table_of(settings.implementation), replaced or {}
    )
    place = placement(settings.backend)
    exact = IMPLEMENTATIONS.get(settings.implementation)
    if place is not None or exact is None:  # what has no wider types runs beside what has
        common["reference"] = _example(step, settings, exact or REFERENCE, replaced or {})[1]
    if place is not None:
        tested = placed(tested, place)
    return check(*tested, case.inputs, case.kwargs, replay=case.replay, seed=step.seed, **common)


def run_stored(step: Step, settings: Settings) -> Report:
    """Compare one example in bfloat16 with the float64 reference, by the rule of `stored`."""

    def pair_with(table: Ops) -> AnyOp:
        return _example(step, settings, table, {})[1]

    table, place = table_of(settings.implementation), placement(settings.backend)
    assert place is not None
    case, tested, common = _example(step, settings, table, {})
    several = step.op in (*COMPOSITES, *MODELS, "moe")
    told = compare(
        placed(tested, place),
        pair_with(REFERENCE),
        case,
        settings.dtype,
        step.seed,
        algorithm=algorithm_of(step.op, settings.dtype),
        runs=(lambda number: pair_with(stored_table(number))) if several else None,
    )
    given = [n for n, x in zip(common["names"], case.inputs, strict=True) if x is not None]
    outputs = [f"output {number}" for number in range(len(told) - len(given))]
    rows = []
    for name, x in zip([*outputs, *given], told, strict=True):
        row = TensorResult(step.op, name, x.wanted.shape, noise=x.ratio)
        if x.largest:
            row.sharpness = float(np.max(x.allowed)) / x.largest
        if x.fault is not None or not x.ratio <= 1:
            row.fault("FAIL", x.fault or str(x))
        rows.append(row)
    return Report(rows)


def _example(
    step: Step, settings: Settings, table: Ops, replaced: Mapping[str, AnyOp]
) -> tuple[Case, AnyOp, dict[str, Any]]:
    """One example's inputs, the pair under test, and what else `check` is told."""
    name, draw = step.op, RandomDraw(step.seed, settings.text.data)
    common: dict[str, Any] = {"op": name, "dtype": settings.dtype}
    if name in MODELS:
        conventions = CONVENTIONS[settings.convention]
        config = replace(preset("tiny"), conventions=conventions)
        if name == VARIANT:
            config = model_variant(config, conventions, ("raw", "raw_first")[step.seed % 2])
        if name == MODEL_GRPO:
            case, tensors, tested = model_grpo_case(draw, config=config, table=table)
        else:
            case, tensors, tested = model_case(
                draw, config=config, table=table, masked=name == VARIANT
            )
        common |= {
            "names": tensors,
            "difference_tolerance": MODEL_FD_TOLERANCE,
            "validity": MODEL_VALIDITY,
        }
        return case, tested, common
    case, tested = CASES[name](draw), replaced.get(name) or pair_of(name, table)
    parameters = inspect.signature(pair_of(name).forward).parameters
    common |= {
        "names": [p.name for p in parameters.values() if p.kind != p.KEYWORD_ONLY],
        "digits": settings.digits,
    }
    if "ops" in parameters:
        tested = Op(partial(tested.forward, ops=table), tested.backward)
    return case, tested, common


def module_from_file(path: Path) -> ModuleType:
    """The module that a Python file defines; CouldNotRun, in one line, if it can't be imported."""
    if not os.path.isfile(path):
        raise CouldNotRun(f"{path} is not a file")
    spec = importlib.util.spec_from_file_location("graded", path)
    if path.suffix != ".py" or spec is None or spec.loader is None:
        raise CouldNotRun(f"{path} must be a Python file (.py)")
    read_bytes(path, str(path))  # a pipe or a file that fills the memory ends here
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, too
        raise CouldNotRun(f"{path} can't be imported: {type(error).__name__}: {error}") from error
    return module


def backward_of(op: str, module: ModuleType, path: Path) -> AnyOp:
    """Our forward of the op with the ``<op>_backward`` of a file's module."""
    backward = getattr(module, f"{op}_backward", None)
    if not callable(backward):
        raise CouldNotRun(f"{path} must define {op}_backward(dy, saved)")
    return Op(pair_of(op).forward, backward)
