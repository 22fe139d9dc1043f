"""The rule for an implementation that stores float32 or bfloat16: how far it may err.

Truth is the float64 reference on the same inputs, which the type holds exactly, with the same
choices. A kernel's error is at most twice that of the float32 reference, and one unit: of the
element in the type that it is stored in, and of the largest in the type that arithmetic is done in.
One small example may be lucky, so the reference's error is the largest of 8 runs, in all but one of
which float32 inputs are moved within their rounding; and of 8 more with the kernel's formulas where
those are others, for where a sum vanishes each loses units of its terms, a whole number of them. In
float64 the reference, which is no better than the kernel, is taken to have the error of these runs
in units of float64, and 64 units of the largest element at least.

What is made of several ops, a model above all, stores its intermediate results, too. It is
compared with the reference that rounds at the same places (`stored_table`): to the nearest, two
such runs may be nearly the same or not, so in 16 runs each number is rounded up or down by chance,
and 4 times the largest of their errors is allowed, as `refimpl check` allows a port 4 units. The
first roundings of a model move all that follows, so errors scatter like few random numbers. Of
1,950 tensors of 30 examples (tiny, its variant and GRPO, all kernels under the interpreter) the
furthest had 2.36 times the largest of 16. Of 7,800 of 120, with the reference in the place of
attention's kernels, it was 2.14; 2.76 of 8 runs, 1.78 of 24. Half of the tensors are allowed less
than 13 % of their largest element, one in 100 more than 46 %. So this says that nothing is lost on
the way to the device; that a gradient is right, float32 says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from .check.cases import Case
from .check.rules import Pair
from .grads.rounded import round_bfloat16, rounded_by_chance
from .grads.units import roundoff
from .ops import IMPLEMENTATIONS, NETWORKS, REFERENCE, AnyOp, Op, Ops
from .ops.attention import sum_heads

__all__ = [
    "DTYPES",
    "FACTOR",
    "OtherChoice",
    "RUNS",
    "WIDE",
    "Result",
    "algorithm_of",
    "compare",
    "moved",
    "results",
    "rounded",
    "stored_table",
    "tensor_core_attention",
    "tensor_core_log_prob",
    "widened",
]

DTYPES: dict[str, Any] = {  # NumPy's type of a storage type
    "float64": np.float64,
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
}
# the type that its sums have at least
WIDE: dict[str, Any] = {"float64": np.float64, "float32": np.float32, "bfloat16": np.float32}
RUNS, FACTOR = 8, 2
RUNS_OF_SEVERAL, FACTOR_OF_SEVERAL = 16, 4
UNITS = 64  # of float64, of the largest element: what its reference is taken to err at least
# Arrays that are constants of the derivative and data all the same: what moves with the inputs
DATA = ("advantages", "old_log_prob", "reference_log_prob")
ACTIVATIONS = {
    "linear": (1, 1),
    "embedding": (1, 0),
    "rms_norm": (1, 1),
    "swiglu": (1, 2),
    "rope": (1, 1),
    "attention": (1, 3),
    "router": (0, 1),
    "moe": (1, 1),
    "log_prob": (0, 1),
}
"""By op, how many of its outputs and, from the first, of its gradients are stored in bfloat16. The
rest is float32: weights' gradients, what a gate gives, log-probabilities, losses."""


def tensor_core_attention(to_type: Callable[[Any], Any] = round_bfloat16) -> AnyOp:
    """Attention in float32 whose products take bfloat16 on both sides, as tensor cores do: the
    probabilities and the gradient of the scores are rounded before they are multiplied, and o
    before its row sums are taken (derivations/flash_attention.md)."""

    def forward(q: Any, k: Any, v: Any, **kwargs: Any) -> Any:
        _, saved = REFERENCE.attention.forward(q, k, v, **kwargs)
        p, values = to_type(saved.p), np.broadcast_to(v, (*v.shape[:2], q.shape[2], v.shape[3]))
        o = np.einsum("bhts,bshv->bthv", p, values)
        return o, (saved, p, to_type(o))

    def backward(do: Any, saved: Any) -> Any:
        exact, p, o = saved
        heads = exact.q.shape[2]
        keys, values = (
            np.broadcast_to(x, (*x.shape[:2], heads, x.shape[3])) for x in (exact.k, exact.v)
        )
        dp = np.einsum("bthv,bshv->bhts", do, values)
        row_sum = np.sum(do * o, axis=-1).swapaxes(1, 2)[..., None]
        ds = to_type(exact.scale * exact.p * (dp - row_sum))
        dq = np.einsum("bhts,bshx->bthx", ds, keys)
        dk = np.einsum("bhts,bthx->bshx", ds, exact.q)
        dv = np.einsum("bhts,bthv->bshv", p, do)
        return dq, sum_heads(dk, exact.k), sum_heads(dv, exact.v)

    return Op(forward, backward)


def tensor_core_log_prob(to_type: Callable[[Any], Any] = round_bfloat16) -> AnyOp:
    """Log-probabilities in float32 whose logits' gradient is rounded before it is multiplied: dh
    errs by at most 2⁻⁸ Σ_w |dz_w| |w|, dw by 2⁻⁸ Σ_t |dz_t| |h_t|."""

    def backward(dy: Any, saved: Any) -> Any:
        h = saved.h.reshape(-1, saved.h.shape[-1])
        weight = (dy.reshape(-1) * saved.mask)[:, None] / saved.temperature
        p = np.exp(h @ saved.w.T / saved.temperature - saved.lse)
        chosen = np.arange(p.shape[1]) == saved.targets[:, None]
        dz = to_type(weight * (chosen - p))
        return (dz @ saved.w).reshape(saved.h.shape), dz.T @ h

    return Op(REFERENCE.log_prob.forward, backward)


def algorithm_of(op: str, storage: str) -> AnyOp | None:
    """What runs in float32 beside the reference of an op whose kernels have other formulas.
    Attention's are those of flash attention: Σ p dp by way of the output, so that
    dp − Σ p dp, and dq and dk with it, does not vanish where one key takes all. In bfloat16 both
    products' and the logits' gradients are rounded for tensor cores."""
    if op == "log_prob" and storage == "bfloat16":
        return tensor_core_log_prob()
    if op != "attention":
        return None
    return tensor_core_attention() if storage == "bfloat16" else IMPLEMENTATIONS["flash"].attention


class OtherChoice(ValueError):
    """Of what is tested, on inputs that both get: the numbers behind it mean nothing."""


class Result(NamedTuple):
    """One output or gradient of what is tested."""

    got: np.ndarray  # any shape, which the next two have, too
    wanted: np.ndarray  # [of got], float64
    reference: float  # its error
    allowed: np.ndarray  # [of got]: the error of each element that the rule allows

    @property
    def fault(self) -> str | None:
        """What is wrong apart from its numbers."""
        if self.got.shape != self.wanted.shape:
            return f"shape {self.got.shape}, wanted {self.wanted.shape}"
        if not np.array_equal(np.isnan(self.got.astype(np.float64)), np.isnan(self.wanted)):
            return "NaN at other places"
        return None

    @property
    def error(self) -> np.ndarray:
        return np.asarray(np.abs(self.got.astype(np.float64) - self.wanted))

    @property
    def ratio(self) -> float:
        """The largest error over what is allowed there; what is allowed nothing and errs: ∞."""
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.where(self.error > 0, self.error / self.allowed, 0.0)
        return float(np.max(found, initial=0))

    @property
    def largest(self) -> float:
        return float(np.max(np.abs(self.wanted), initial=0))

    def __str__(self) -> str:
        place = np.unravel_index(np.argmax(self.error - self.allowed), self.got.shape)
        return (
            f"error {np.max(self.error):.2e}, of the reference {self.reference:.2e}, largest "
            f"{self.largest:.2e}, at {tuple(map(int, place))}"
        )


def compare(
    pair: AnyOp,
    reference: AnyOp,
    case: Case,
    storage: str,
    seed: int,
    *,
    extra: Mapping[str, Any] | None = None,
    mean: float = 0,
    algorithm: AnyOp | None = None,
    runs: Callable[[int], AnyOp] | None = None,
) -> list[Result]:
    """All differentiable outputs of ``pair``, then all gradients, beside those of ``reference``,
    for ``case`` with inputs and cotangents (drawn around ``mean``) of the type ``storage``.

    Args:
        extra: keyword arguments of ``pair`` alone.
        algorithm: what runs in float32 beside the reference, if the formulas tested are others.
        runs: by the number of a run, the reference that rounds at the same places, for what is made
            of several ops; it may choose other routes than float64 does.

    `OtherChoice` if an op chooses another way than the reference on the same inputs.
    """
    wide = WIDE[storage]
    inputs = [rounded(x, storage) for x in case.inputs]
    constants = rounded(case.kwargs, np.dtype(wide).name)
    exact_inputs, exact_constants = (widened(x, np.float64) for x in (inputs, constants))
    extra = dict(extra or {})
    if case.replay is not None:  # choices are the reference's; then all replay them
        chosen = dict(case.replay(reference.forward(*exact_inputs, **exact_constants)[0]))
        if runs is None:
            own = dict(case.replay(pair.forward(*inputs, **constants, **extra)[0]))
            for name, choice in own.items():
                if not np.array_equal(choice, chosen[name]):
                    raise OtherChoice(f"chose other {name} in {storage} than the reference")
        constants, exact_constants = constants | chosen, exact_constants | chosen
    rng = np.random.default_rng([seed, 7])
    shapes = [y.shape for y in Pair(*reference, exact_constants).outputs(exact_inputs)]
    cotangents = [
        np.asarray(rng.normal(mean, size=shape)).astype(DTYPES[storage]) for shape in shapes
    ]
    exact = results(reference, exact_inputs, exact_constants, widened(cotangents, np.float64))
    if runs is None:
        below = [
            partial(lower, op, inputs, constants, cotangents, rng)
            for op in (reference, algorithm)
            if op
        ]
        count, factor = RUNS, FACTOR
    else:
        below = [partial(narrow, runs, inputs, constants, cotangents)]
        count, factor = RUNS_OF_SEVERAL, FACTOR_OF_SEVERAL
    plain = [results_of(run) for results_of in below for run in range(count)]
    found = results(pair, inputs, constants | extra, cotangents)
    told = []
    for i, (got, wanted) in enumerate(zip(found, exact, strict=True)):
        largest = np.max(np.abs(wanted), initial=0)
        unit = 2 * roundoff(str(got.dtype)) * np.abs(wanted)
        unit = unit + float(np.finfo(wide).eps) * largest
        error = max(np.max(np.abs(low[i] - wanted), initial=0) for low in plain)
        if storage == "float64":
            eps = np.finfo(np.float64).eps
            error = eps * max(error / np.finfo(np.float32).eps, UNITS * largest)
        told.append(Result(got, wanted, float(error), factor * error + unit))
    return told


def lower(
    op: AnyOp,
    inputs: Sequence[Any],
    constants: Mapping[str, Any],
    cotangents: Sequence[np.ndarray],
    rng: np.random.Generator,
    run: int,
) -> list[np.ndarray]:
    """The results of ``op`` in float32; in all runs but the first, inputs, cotangents and `DATA`
    are `moved`."""
    low, given = (widened(x, np.float32) for x in ([*inputs, *cotangents], dict(constants)))
    if run:
        low = [x if x is None else moved(x, rng) for x in low]
        given |= {name: moved(given[name], rng) for name in DATA if given.get(name) is not None}
    return results(op, low[: len(inputs)], given, low[len(inputs) :])


def narrow(
    runs: Callable[[int], AnyOp],
    inputs: Sequence[Any],
    constants: Mapping[str, Any],
    cotangents: Sequence[np.ndarray],
    run: int,
) -> list[np.ndarray]:
    """The results of the run's own pair on the very inputs."""
    return results(runs(run), inputs, constants, cotangents)


def results(
    pair: AnyOp, inputs: Sequence[Any], kwargs: Mapping[str, Any], cotangents: Sequence[Any]
) -> list[np.ndarray]:
    """All differentiable outputs, then all gradients, as NumPy arrays; cotangents in the outputs'
    types."""
    y, saved = pair.forward(*inputs, **kwargs)
    members = [np.asarray(m) for m in (y if isinstance(y, tuple) else (y,))]
    floating = [m for m in members if str(m.dtype) in DTYPES]
    dy = [c.astype(m.dtype) for c, m in zip(cotangents, floating, strict=True)]
    gradients = pair.backward(tuple(dy) if isinstance(y, tuple) else dy[0], saved)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    return floating + [np.asarray(g) for g in gradients if g is not None]


def rounded(x: Any, storage: str) -> Any:
    """Floating-point arrays, within dicts too, as the nearest of the type; the rest as it is."""
    if isinstance(x, dict):
        return {key: rounded(value, storage) for key, value in x.items()}
    if isinstance(x, np.ndarray) and x.dtype.kind == "f":
        return x.astype(DTYPES[storage])
    return x


def widened(x: Any, dtype: Any) -> Any:
    """Arrays of `rounded`, within lists and dicts too, in a type for computing."""
    if isinstance(x, dict):
        return {key: widened(value, dtype) for key, value in x.items()}
    if isinstance(x, list):
        return [widened(value, dtype) for value in x]
    if isinstance(x, np.ndarray) and str(x.dtype) in DTYPES:
        return x.astype(dtype)
    return x


def moved(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each element of ``x`` (any shape) moved by up to half a unit in its last place and rounded up
    or down at random, more often to the nearer: to the nearest would undo every move."""
    by = rng.uniform(-0.5, 0.5, x.shape)
    goes = (rng.random(x.shape) < np.abs(by)) & (x != 0)
    return np.where(goes, np.nextafter(x, np.copysign(np.inf, by).astype(x.dtype)), x)


# The reference with bfloat16 in memory


def stored_table(seed: int | None = None) -> Ops:
    """The reference's table on NumPy's bfloat16 arrays: each op computes in float32 and rounds once
    what it gives, with a ``seed`` up or down by chance. Composites and the model run on these
    arrays as they do on a device.

    Inside the mixture of experts rounded numbers are kept in float32: the reference adds them up.
    """
    to_type = round_bfloat16 if seed is None else partial(rounded_by_chance, seed=seed)
    inner = NETWORKS | {
        name: stored(NETWORKS[name], name, to_type, np.float32) for name in ("linear", "swiglu")
    }

    def moe_forward(*args: Any, ops: Any = None, **kwargs: Any) -> Any:
        return REFERENCE.moe.forward(*args, ops=inner, **kwargs)

    pairs = {name: REFERENCE[name] for name in ACTIVATIONS}
    pairs["moe"] = Op(moe_forward, REFERENCE.moe.backward)
    pairs["attention"] = tensor_core_attention(to_type)
    pairs["log_prob"] = tensor_core_log_prob(to_type)
    return REFERENCE | {
        name: stored(op, name, to_type, DTYPES["bfloat16"]) for name, op in pairs.items()
    }


def stored(op: AnyOp, name: str, to_type: Callable[[Any], Any], dtype: Any) -> AnyOp:
    """``op`` in float32, whose activations and their gradients are rounded and returned in
    ``dtype``."""
    outputs, gradients = ACTIVATIONS[name]

    def kept(x: np.ndarray) -> np.ndarray:
        return np.asarray(to_type(x)).astype(dtype, copy=False)

    def forward(*args: Any, **kwargs: Any) -> Any:
        y, saved = op.forward(*(in_float32(x) for x in args), **kwargs)
        return kept(y) if outputs else y, saved

    def backward(dy: Any, saved: Any) -> Any:
        found = op.backward(in_float32(dy), saved)
        if not isinstance(found, tuple):
            return kept(found) if gradients else found
        return *map(kept, found[:gradients]), *found[gradients:]

    return Op(forward, backward)


def in_float32(x: Any) -> Any:
    """bfloat16 arrays, in a tuple too, in float32."""
    if isinstance(x, tuple):
        return tuple(map(in_float32, x))
    return x.astype(np.float32) if str(getattr(x, "dtype", "")) == "bfloat16" else x
