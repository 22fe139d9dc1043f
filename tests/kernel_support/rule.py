"""The rule for a kernel's errors, and inputs in all three types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.check.cases import Case, pair_of
from refimpl.check.rules import Pair
from refimpl.ops import REFERENCE, Op

DTYPES = {"float64": np.float64, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
LUCK, HALF_UNIT = 8, 2.0**-24
# Arrays that are constants of the derivative and data all the same: what moves with the inputs
DATA = {"grpo": ("advantages", "old_log_prob", "reference_log_prob")}
WIDE = {"float64": np.float64, "float32": np.float32, "bfloat16": np.float32}


def rounded(x: Any, storage: str) -> Any:
    """Floating-point arrays, within dicts too, as the nearest of the type; the rest as it is."""
    if isinstance(x, dict):
        return {key: rounded(value, storage) for key, value in x.items()}
    if isinstance(x, np.ndarray) and x.dtype.kind == "f":
        return x.astype(DTYPES[storage])
    return x


def widened(x: Any, dtype: Any) -> Any:
    """Arrays of `rounded` in a type for computing."""
    if isinstance(x, dict):
        return {key: widened(value, dtype) for key, value in x.items()}
    if isinstance(x, np.ndarray) and (x.dtype.kind == "f" or x.dtype == DTYPES["bfloat16"]):
        return x.astype(dtype)
    return x


def results(
    pair: Op, inputs: Sequence[Any], kwargs: Mapping[str, Any], cotangents: Sequence[Any]
) -> list[np.ndarray]:
    """All differentiable outputs, then all gradients, as NumPy arrays; cotangents in the outputs'
    types."""
    y, saved = pair.forward(*inputs, **kwargs)
    members = [np.asarray(m) for m in (y if isinstance(y, tuple) else (y,))]
    floating = [m for m in members if m.dtype.kind not in "biu"]
    dy = [c.astype(m.dtype) for c, m in zip(cotangents, floating, strict=True)]
    gradients = pair.backward(tuple(dy) if isinstance(y, tuple) else dy[0], saved)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    return floating + [np.asarray(g) for g in gradients if g is not None]


def moved(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each element moved by up to half a unit in its last place and rounded up or down at random,
    more often to the nearer: to the nearest would undo every move."""
    by = rng.uniform(-0.5, 0.5, x.shape)
    goes = (rng.random(x.shape) < np.abs(by)) & (x != 0)
    return np.where(goes, np.nextafter(x, np.copysign(np.inf, by).astype(x.dtype)), x)


def compare(
    op: str,
    pair: Op,
    case: Case,
    storage: str,
    seed: int,
    extra: Mapping[str, Any] | None = None,
    mean: float = 0,
    algorithm: Op | None = None,
) -> None:
    """The rule: a kernel's error is at most twice that of the float32 reference on the same inputs
    (rounded to the storage type), and one unit: of the element in the type that it is stored in,
    and of the largest in the type that arithmetic is done in. One small example may round luckily,
    so the reference's error is the largest of LUCK runs, in all but one of which float32 inputs and
    cotangents (and `DATA`) are `moved`. For float64 kernels, whose reference is no better,
    its error is taken as 64 units. Cotangents are drawn around ``mean``. ``algorithm``: what runs
    in float32 in the reference's place, if the kernel's formulas are others, as flash attention's.
    """
    reference, wide = REFERENCE[op] if op in REFERENCE else pair_of(op), WIDE[storage]
    inputs, constants = (
        [rounded(x, storage) for x in case.inputs],
        rounded(case.kwargs, np.dtype(wide).name),
    )
    exact_inputs, exact_constants = (
        [widened(x, np.float64) for x in inputs],
        widened(constants, np.float64),
    )
    extra = dict(extra or {})
    if case.replay is not None:  # choices are the reference's; then all replay them
        chosen = dict(case.replay(reference.forward(*exact_inputs, **exact_constants)[0]))
        for name, choice in case.replay(pair.forward(*inputs, **constants, **extra)[0]).items():
            assert np.array_equal(choice, chosen[name]), f"{op} in {storage} chose other {name}"
        constants, exact_constants = constants | chosen, exact_constants | chosen
    shapes = [y.shape for y in Pair(*reference, exact_constants).outputs(exact_inputs)]
    rng = np.random.default_rng([seed, 7])
    cotangents = [
        np.asarray(rng.normal(mean, size=shape)).astype(DTYPES[storage]) for shape in shapes
    ]
    exact = results(
        reference, exact_inputs, exact_constants, [c.astype(np.float64) for c in cotangents]
    )
    plain = []
    for run in range(LUCK if storage != "float64" else 1):
        low = [x if x is None else widened(x, wide) for x in (*inputs, *cotangents)]
        low_constants = widened(constants, wide)
        if run:
            low = [x if x is None else moved(x, rng) for x in low]
            data = {name: low_constants[name] for name in DATA.get(op, ())}
            data = {name: moved(x, rng) for name, x in data.items() if x is not None}
            low_constants = low_constants | data
        plain.append(
            results(algorithm or reference, low[: len(inputs)], low_constants, low[len(inputs) :])
        )
    found = results(pair, inputs, constants | extra, cotangents)
    assert len(found) == len(exact)
    for i, (got, wanted) in enumerate(zip(found, exact, strict=True)):
        assert got.shape == wanted.shape, (
            f"{op} result {i}: shape {got.shape}, wanted {wanted.shape}"
        )
        assert got.dtype in (DTYPES[storage], wide), f"{op} result {i}: {got.dtype}"
        got_wide, largest = got.astype(np.float64), np.max(np.abs(wanted), initial=0)
        assert np.array_equal(np.isnan(got_wide), np.isnan(wanted)), (
            f"{op} result {i}: NaN at other places"
        )
        unit = (
            float(ml_dtypes.finfo(got.dtype).eps) * np.abs(wanted)
            + float(np.finfo(wide).eps) * largest
        )
        plain_error = max(np.max(np.abs(low[i] - wanted), initial=0) for low in plain)
        if storage == "float64":
            plain_error = 64 * np.finfo(np.float64).eps * largest
        excess = np.abs(got_wide - wanted) - 2 * plain_error - unit
        assert np.max(excess, initial=0) <= 0, (
            f"{op} result {i} of {storage}: error {np.max(np.abs(got_wide - wanted)):.2e}, of "
            f"the float32 reference {plain_error:.2e}, largest {largest:.2e}, at "
            f"{np.unravel_index(np.argmax(excess), got.shape)}"
        )
