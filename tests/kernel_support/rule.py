"""What the kernels' tests share: who executes them, inputs in all three types, and the rule for
their errors."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.array import library
from refimpl.check.cases import CASES, Case, Draw, pair_of
from refimpl.check.rules import Pair
from refimpl.kernels.compile import Module
from refimpl.kernels.launch import DeviceLaunch, Launch, NumbaLaunch
from refimpl.kernels.table import COLUMNS
from refimpl.ops import REFERENCE, Op, Yarn, rope_frequencies
from refimpl.verify import placed

import ptx

ON_DEVICE = os.environ.get("REFIMPL_GPU") == "1"  # tests/gpu.py: the same suite on the GPU
SANITIZED = os.environ.get("REFIMPL_SANITIZER") == "1"  # under compute-sanitizer
DTYPES = {"float64": np.float64, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
LUCK, HALF_UNIT = 8, 2.0**-24
WIDE = {"float64": np.float64, "float32": np.float32, "bfloat16": np.float32}


class InterpreterLaunch:
    """Executes kernels from their PTX, on NumPy arrays. What they shall write is NaN (or all ones)
    before, and reading it before that is an error."""

    def __init__(self, seed: int = 0, target: str = "sm_90") -> None:
        self.seed, self.target = seed, target
        self.reports: list[tuple[str, ptx.Report]] = []
        self.unwritten: list[np.ndarray] = []

    def __call__(
        self,
        module: Module,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Any],
        *,
        shared: int = 0,
    ) -> None:
        unwritten = [x for x in arguments if any(x is y for y in self.unwritten)]
        locked = {
            i: x
            for i, x in enumerate(arguments)
            if isinstance(x, np.ndarray) and not x.flags.writeable
        }
        given = [locked[i].copy() if i in locked else x for i, x in enumerate(arguments)]
        report = ptx.run(
            module.ptx,
            kernel,
            grid,
            block,
            given,
            shared=shared,
            seed=self.seed,
            uninitialised=unwritten,
        )
        self.reports.append((kernel, report))
        for i, x in locked.items():
            assert given[i].tobytes() == x.tobytes(), (
                f"{kernel} wrote to its argument {i}, which is read-only"
            )
        self.unwritten = [x for x in self.unwritten if not any(x is y for y in unwritten)]

    def empty(self, shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
        x = np.empty(shape, dtype)
        x.reshape(-1).view(np.uint8)[...] = 0xFF
        self.unwritten.append(x)
        return x


class PoisonedLaunch(DeviceLaunch):
    """On the GPU: what a kernel shall write is NaN (or all ones) before. Not under
    compute-sanitizer, whose initcheck sees reading before writing by itself."""

    def empty(self, shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
        x = super().empty(shape, dtype, like)
        if not SANITIZED:
            x.reshape(-1).view(np.uint8)[...] = 0xFF
        return x


def to_device(x: np.ndarray) -> Any:
    """Where kernels read it."""
    if not ON_DEVICE:
        return x
    import cupy

    return cupy.asarray(x)


def to_host(x: Any) -> np.ndarray:
    return x.get() if ON_DEVICE else x


def strided(x: Any) -> Any:
    """As `to_device`, but between any two elements lies another."""
    x = to_device(np.asarray(x))
    room = library(x).empty((*x.shape, 2), dtype=x.dtype)
    room[...] = x[..., None]
    return room[..., 0]


def make_table(launch: Launch, column: str = "cuda") -> dict[str, Op]:
    """A column, from and to NumPy arrays wherever it runs."""
    table = COLUMNS[column](launch)
    return {name: placed(pair, to_device) for name, pair in table.items()} if ON_DEVICE else table


def make_launch(seed: int = 0, column: str = "cuda", target: str = "sm_90") -> Launch:
    """What host functions outside a table are given. target: of what the interpreter executes."""
    launch: Launch = PoisonedLaunch() if ON_DEVICE else InterpreterLaunch(seed, target)
    return NumbaLaunch(launch) if column == "numba_cuda" else launch


if SANITIZED:  # each array an allocation of its own, so that its bounds are seen
    import cupy

    cupy.cuda.set_allocator(None)
TABLES = {column: make_table(make_launch(), column) for column in COLUMNS}
TABLE = TABLES["cuda"]


def ops_of(op: str, column: str = "cuda", target: str = "sm_90") -> dict[str, Any]:
    """The argument ``ops`` for an op made of others."""
    if "ops" not in inspect.signature(pair_of(op).forward).parameters:
        return {}
    return {"ops": COLUMNS[column](make_launch(target=target))}


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


def compare(
    op: str,
    pair: Op,
    case: Case,
    storage: str,
    seed: int,
    extra: Mapping[str, Any] | None = None,
    mean: float = 0,
) -> None:
    """The rule: a kernel's error is at most twice that of the float32 reference on the same inputs
    (rounded to the storage type), and one unit: of the element in the type that it is stored in,
    and of the largest in the type that arithmetic is done in. One small example may round luckily,
    so the reference's error is the largest of LUCK runs, in all but one of which float32 inputs and
    cotangents are moved by up to half a unit. For float64 kernels, whose reference is no better,
    its error is taken as 64 units. Cotangents are drawn around ``mean``."""
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
        moved = [
            x
            if x is None
            else widened(x, wide) * (1 + bool(run) * rng.uniform(-HALF_UNIT, HALF_UNIT, x.shape))
            for x in (*inputs, *cotangents)
        ]
        low = [x if x is None else np.asarray(x, wide) for x in moved]
        plain.append(
            results(reference, low[: len(inputs)], widened(constants, wide), low[len(inputs) :])
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


# Shapes for kernels: sizes around warps and chunks of 16 bytes, and 1.
WIDTHS = (1, 2, 7, 8, 31, 32, 33, 64, 100, 264)


def _rms_norm(draw: Draw) -> Case:
    d = draw.choice(WIDTHS)
    x = draw.rng.normal(size=(draw.integer(1, 3), draw.integer(1, 2), d))
    return Case((x, draw.rng.normal(size=d)), {"eps": draw.choice([1e-6, 0.2])})


def _swiglu(draw: Draw) -> Case:
    shape = (draw.integer(1, 3), draw.choice(WIDTHS))
    return Case((4 * draw.rng.normal(size=shape), draw.rng.normal(size=shape)))


def _rope(draw: Draw) -> Case:
    case = CASES["rope"](draw)
    r = 2 * draw.choice([1, 3, 4, 8, 32])
    (x,) = case.inputs
    assert x is not None
    inv_freq = np.logspace(0, -3, r // 2)
    return Case((draw.rng.normal(size=(*x.shape[:-1], r)),), case.kwargs | {"inv_freq": inv_freq})


def _cross_entropy(draw: Draw) -> Case:
    case, w = CASES["cross_entropy"](draw), draw.choice([*WIDTHS[1:], 1030, 4106])
    (x,) = case.inputs
    assert x is not None
    targets = np.where(case.kwargs["targets"] < 0, -100, draw.rng.integers(0, w, x.shape[:-1]))
    return Case((3 * draw.rng.normal(size=(*x.shape[:-1], w)),), case.kwargs | {"targets": targets})


def _log_prob(draw: Draw) -> Case:
    w, d, (b, t) = draw.choice([2, 33, 100]), draw.choice([1, 8, 33]), (2, draw.integer(4, 7))
    mask = draw.choice(
        [None, draw.rng.random((b, t)) < 0.7, draw.rng.choice([0.0, 0.5, 1.5], (b, t))]
    )
    targets = draw.rng.integers(0, w, (b, t))
    inputs = draw.rng.normal(size=(b, t, d)), draw.rng.normal(size=(w, d)) / np.sqrt(d)
    kwargs = {
        "targets": targets if mask is None else np.where(mask != 0, targets, -100),
        "mask": mask,
    }
    kwargs |= {"temperature": draw.choice([0.6, 1.7]), "block": draw.choice([(2, w), (256, 4096)])}
    return Case(inputs, kwargs)


def _embedding(draw: Draw) -> Case:
    w, d = draw.integer(1, 6), draw.choice(WIDTHS)
    return Case(
        (draw.rng.normal(size=(w, d)),), {"ids": draw.rng.integers(0, w, (draw.integer(1, 3), 7))}
    )


def _router(draw: Draw) -> Case:
    case = CASES["router"](draw)
    if draw.choice([True, False]):  # V3's proportions, and more experts than lanes
        groups, size, d = (*draw.choice([(4, 8), (8, 8), (2, 33)]), draw.choice([4, 33]))
        w, x = draw.rng.normal(size=(groups * size, d)), draw.rng.normal(size=(2, 2, d))
        more = {
            "groups": groups,
            "keep_groups": max(1, groups // 2),
            "top_k": draw.choice([1, 4, 8]),
        }
        bias = draw.choice([None, 0.1 * draw.rng.normal(size=groups * size)])
        case = Case((x, w / np.sqrt(d)), case.kwargs | more | {"bias": bias}, replay=case.replay)
    return case


def _moe(draw: Draw) -> Case:
    d, f, experts, tokens = (
        draw.choice([1, 8, 33, 100]),
        draw.integer(3, 6),
        draw.integer(4, 7),
        draw.integer(4, 7),
    )
    shared, k = (
        draw.choice([None, 5]),
        draw.choice([1, 2, experts - 1]),
    )  # up to 6: more than a thread loads ahead
    indices = (
        np.argsort(draw.rng.random((tokens, experts - 1)), axis=-1)[:, :k] + 1
    )  # expert 0 gets no token
    x, weights = draw.rng.normal(size=(tokens, d)), draw.rng.uniform(0.2, 1.5, (tokens, k))

    def weight(*shape: int) -> np.ndarray:
        return np.asarray(draw.rng.normal(size=shape) / np.sqrt(shape[-1]))

    routed = weight(experts, f, d), weight(experts, f, d), weight(experts, d, f)
    extra = (
        (None, None, None)
        if shared is None
        else (weight(shared, d), weight(shared, d), weight(d, shared))
    )
    return Case((x, weights, *routed, *extra), {"indices": indices})


SHAPES: dict[str, Callable[[Draw], Case]] = {
    "rms_norm": _rms_norm,
    "swiglu": _swiglu,
    "rope": _rope,
    "cross_entropy": _cross_entropy,
    "log_prob": _log_prob,
    "embedding": _embedding,
    "router": _router,
    "moe": _moe,
    "grpo": CASES["grpo"],
}


def _v3_router(draw: Draw) -> Case:
    x, w = draw.rng.normal(size=(ROWS, 128)), draw.rng.normal(size=(256, 128)) / np.sqrt(128)
    kwargs = {
        "top_k": 8,
        "groups": 8,
        "keep_groups": 4,
        "scale": 2.5,
        "bias": 0.01 * draw.rng.normal(size=256),
    }
    return Case((x, w), kwargs, replay=lambda y: {"routes": y.indices})


ROWS, FEW = (300, 50) if ON_DEVICE else (2, 2)
V3: dict[str, Callable[[Draw], Case]] = {  # V3's widths
    "rms_norm": lambda draw: Case(
        (draw.rng.normal(size=(ROWS, 7168)), draw.rng.uniform(0.5, 1.5, 7168)), {"eps": 1e-6}
    ),
    "swiglu": lambda draw: Case(
        (draw.rng.normal(size=(ROWS, 18432)), draw.rng.normal(size=(ROWS, 18432)))
    ),
    "rope": lambda draw: Case(
        (draw.rng.normal(size=(1, ROWS, 128, 64)),),
        {"positions": np.arange(ROWS) + 4000, "inv_freq": rope_frequencies(64, 1e4, Yarn())},
    ),
    "cross_entropy": lambda draw: Case(
        (2 * draw.rng.normal(size=(FEW, 129280)),), {"targets": draw.rng.integers(0, 129280, FEW)}
    ),
    "embedding": lambda draw: Case(
        (draw.rng.normal(size=(50, 7168)),), {"ids": draw.rng.integers(0, 40, FEW * 30)}
    ),
    "router": _v3_router,
}
