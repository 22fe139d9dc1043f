"""The rules that a forward/backward pair must obey, each on one page: contract, finite differences,
rounding noise, exact digits. They work on a `Pair`, ours or a user's; `refimpl.check.check` runs
them all and reports by tensor.

Notation: w is a random cotangent of the outputs, v a random direction of one input, J the Jacobian,
g = Jᵀw what the backward returns. Every rule compares ⟨w, Jv⟩, computed without the backward, to
⟨g, v⟩.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np

from .dual import Dual, digits_context, dual_array, tangents, values

__all__ = [
    "Pair",
    "contract",
    "exact_digits",
    "finite_difference",
    "finite_difference_error",
    "full_jacobian",
    "Noise",
    "has_longdouble",
    "rounding_noise",
]

EPS64 = float(np.finfo(np.float64).eps)


def has_longdouble() -> bool:
    """Whether longdouble is wider than float64 here (not on Windows, nor on Arm Macs)."""
    return bool(np.finfo(np.longdouble).eps < EPS64)


@dataclass(frozen=True)
class Pair:
    """A forward and its backward, with the arguments that are not differentiable.

    ``forward(*inputs, **kwargs) -> (y, saved)`` and ``backward(dy, saved) -> gradients``: y is an
    array or a tuple, of which the floating-point members are differentiable (integer members,
    lists, dicts and None are not); dy has their gradients in the same order. One gradient an input;
    an input that is None has the gradient None.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def call(self, inputs: Sequence[Any]) -> tuple[Any, Any]:
        """(y, saved); TypeError if the forward returns anything else."""
        result = self.forward(*inputs, **self.kwargs)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(f"forward must return (y, saved), got {type(result).__name__}")
        y, saved = result
        if not any(map(_is_floating, y if isinstance(y, tuple) else (y,))):
            raise TypeError(
                "y must be a floating-point array, or a tuple with at least one, got "
                f"{type(y).__name__}"
            )
        return y, saved

    def outputs(self, inputs: Sequence[Any]) -> list[np.ndarray]:
        """The differentiable outputs as NumPy arrays."""
        y, _ = self.call(inputs)
        return [np.asarray(m) for m in (y if isinstance(y, tuple) else (y,)) if _is_floating(m)]

    def gradients(
        self, inputs: Sequence[Any], cotangents: Sequence[np.ndarray]
    ) -> list[np.ndarray | None]:
        """The gradients of all inputs as NumPy arrays."""
        return [
            None if g is None else np.asarray(g)
            for g in self.call_backward(*self.call(inputs), cotangents)
        ]

    def call_backward(
        self, y: Any, saved: Any, cotangents: Sequence[np.ndarray]
    ) -> tuple[Any, ...]:
        """The backward's result, always as a tuple."""
        dy = [
            c[()] if c.ndim == 0 and c.dtype == object else c for c in cotangents
        ]  # a single dual, not an array
        gradients = self.backward(tuple(dy) if isinstance(y, tuple) else dy[0], saved)
        return gradients if isinstance(gradients, (tuple, list)) else (gradients,)  # type: ignore[return-value]


def _is_floating(member: Any) -> bool:
    if isinstance(member, (float, complex, Dual)):
        return True
    dtype = getattr(member, "dtype", None)
    return (
        dtype is not None
        and getattr(dtype, "kind", "f") in "fcO"
        and not isinstance(member, (list, dict))
    )


def contract(
    pair: Pair,
    inputs: Sequence[np.ndarray | None],
    cotangents: Sequence[np.ndarray],
    dtypes: Sequence[Any] = (np.float64, np.float32),
) -> list[str]:
    """What the pair does wrong apart from its float64 numbers, in words; an empty list if nothing.

    Arity; shape and dtype of every output and gradient in each of ``dtypes``; nothing that goes in
    or is saved is changed; no output shares memory with an input, no gradient with an input, a
    cotangent, saved or another gradient; two calls give the same bits in new arrays; inputs may be
    read-only and strided; float32 agrees with float64.
    """
    faults: list[str] = []
    for dtype in dtypes:
        try:
            faults += _contract_in(dtype, pair, inputs, cotangents)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            faults.append(f"in {np.dtype(dtype)}, with read-only strided arrays, it raised {said}")
    if not faults and {np.dtype(d) for d in dtypes} >= {np.dtype(np.float64), np.dtype(np.float32)}:
        low = [None if x is None else x.astype(np.float32) for x in inputs]
        w = [c.astype(np.float32) for c in cotangents]
        high = pair.gradients(
            [None if x is None else x.astype(np.float64) for x in low],
            [c.astype(np.float64) for c in w],
        )
        for i, (g, wanted) in enumerate(zip(pair.gradients(low, w), high, strict=True)):
            if g is not None and wanted is not None:
                away = float(np.linalg.norm(g - wanted))
                if not away <= 1e-2 * float(np.linalg.norm(wanted)):
                    faults.append(
                        f"gradient {i} in float32 is {away:.1e} away from that in float64"
                    )
    return list(dict.fromkeys(faults))


def _contract_in(
    dtype: Any, pair: Pair, inputs: Sequence[Any], cotangents: Sequence[np.ndarray]
) -> list[str]:
    """The faults in one dtype."""
    faults: list[str] = []
    xs = [None if x is None else _awkward(x, dtype) for x in inputs]
    dys = [_awkward(c, dtype) for c in cotangents]
    given = _arrays(pair.kwargs)
    before = [a.copy() for a in given]
    y, saved = pair.call(xs)
    members = [np.asarray(m) for m in (y if isinstance(y, tuple) else (y,)) if _is_floating(m)]
    for i, (member, c) in enumerate(zip(members, cotangents, strict=True)):
        if member.dtype != dtype or member.shape != c.shape:
            faults.append(
                f"output {i} must be {np.dtype(dtype)} {c.shape}, got {member.dtype} {member.shape}"
            )
        if any(np.may_share_memory(member, x) for x in xs if x is not None):
            faults.append(f"output {i} shares memory with an input")
    kept = _arrays(saved)
    saved_before = [a.copy() for a in kept]
    first = pair.call_backward(y, saved, dys)
    if len(first) != len(inputs):
        return [
            *faults,
            f"backward must return {len(inputs)} gradients, one an input, got {len(first)}",
        ]
    grads = [None if g is None else np.array(g) for g in first]
    again = pair.call_backward(y, saved, dys)
    for i, (x, g, one, two) in enumerate(zip(xs, grads, first, again, strict=True)):
        if x is None or g is None or one is None or two is None:
            if (x is None) != (g is None):
                faults.append(
                    f"gradient {i} must be None exactly if the input is, got "
                    f"{'None' if g is None else 'an array'}"
                )
            continue
        if g.shape != x.shape or g.dtype != x.dtype:
            faults.append(f"gradient {i} must be {x.dtype} {x.shape}, got {g.dtype} {g.shape}")
        if not np.array_equal(g, np.asarray(two), equal_nan=True):
            faults.append(f"gradient {i} differs between two calls of backward with one saved")
        if np.may_share_memory(np.asarray(one), np.asarray(two)):
            faults.append(f"gradient {i} is the same memory in two calls of backward")
        others = [("an input", x) for x in xs if x is not None] + [("a cotangent", c) for c in dys]
        others += [
            ("another gradient", np.asarray(other)) for other in first[:i] if other is not None
        ]
        shared = [
            what
            for what, a in others + [("saved", a) for a in kept]
            if np.may_share_memory(np.asarray(one), a)
        ]
        faults += [f"gradient {i} shares memory with {what}" for what in dict.fromkeys(shared)]
    for what, arrays, copies in (
        ("saved", kept, saved_before),
        ("an argument that is not differentiable", given, before),
    ):
        if not all(
            np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
            for a, b in zip(arrays, copies, strict=True)
        ):
            faults.append(f"{what} was changed")
    plain = pair.gradients(
        [None if x is None else np.array(x) for x in xs], [np.array(c) for c in dys]
    )
    for i, (g, p) in enumerate(zip(grads, plain, strict=True)):
        if g is not None and p is not None and g.shape == p.shape:
            close = np.max(np.abs(g - p), initial=0) <= np.sqrt(np.finfo(dtype).eps) * np.max(
                np.abs(p), initial=0
            )
            if not (close or np.array_equal(g, p, equal_nan=True)):
                faults.append(
                    f"gradient {i} is another for strided inputs than for contiguous ones"
                )
    return faults


def _awkward(x: np.ndarray, dtype: Any) -> np.ndarray:
    """A read-only, non-contiguous copy."""
    wide = np.zeros((*x.shape, 2), dtype=dtype)
    wide[..., 0] = x
    view = wide[..., 0]
    view.flags.writeable = False
    return view


def _arrays(x: Any) -> list[np.ndarray]:
    """All NumPy arrays within tuples, lists, mappings and plain objects."""
    if isinstance(x, np.ndarray):
        return [x]
    if isinstance(x, Mapping):
        return [a for member in x.values() for a in _arrays(member)]
    if isinstance(x, (tuple, list)):
        return [a for member in x for a in _arrays(member)]
    inside = getattr(x, "__dict__", None)
    return (
        _arrays(inside)
        if isinstance(inside, dict) and not callable(x) and not inspect.ismodule(x)
        else []
    )


def finite_difference(
    function: Callable[[float], Sequence[np.ndarray]], *, step: float = 2e-2, points: int = 6
) -> list[np.ndarray]:
    """The derivative of ``function`` at 0: central differences at step, step/2, …, extrapolated to
    step 0.

    Richardson's extrapolation removes the error terms in h², h⁴, … one after the other; of all
    estimates, each entry takes the one that agrees best with its predecessors (Ridders 1982), so
    that neither truncation nor rounding wins.
    """
    previous: list[np.ndarray] = []
    best = error = None
    for level in range(points):
        h = step / 2**level
        plus, minus = function(h), function(-h)
        row = [_flat([(a - b) / (2 * h) for a, b in zip(plus, minus, strict=True)])]
        for order in range(1, level + 1):
            row.append(row[-1] + (row[-1] - previous[order - 1]) / (4.0**order - 1))
            spread = np.maximum(np.abs(row[-1] - row[-2]), np.abs(row[-1] - previous[order - 1]))
            if best is None or error is None:
                best, error = row[-1].copy(), spread
            better = ~(spread >= error)
            best[better], error[better] = row[-1][better], spread[better]
        previous = row
    assert best is not None
    sizes = np.cumsum([p.size for p in plus])[:-1]
    return [part.reshape(p.shape) for part, p in zip(np.split(best, sizes), plus, strict=True)]


def _flat(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(p, dtype=np.float64).reshape(-1) for p in parts])


def _moved(inputs: Sequence[Any], index: int, change: Any) -> list[Any]:
    return [x + change if i == index else x for i, x in enumerate(inputs)]


def finite_difference_error(
    pair: Pair,
    inputs: Sequence[Any],
    index: int,
    v: np.ndarray,
    cotangents: Sequence[np.ndarray],
    g: np.ndarray,
) -> float:
    """|FD − ⟨g,v⟩| / max(|⟨g,v⟩|, ‖g‖‖v‖/√n), in float64, with steps relative to the RMS of the
    tensor. The direction ``v`` and the gradient ``g``, of any shape, have that of the input.

    A gradient that is exactly zero must have exactly zero differences (else the error is infinite).
    """
    x = inputs[index]
    size = float(np.sqrt(np.mean(x * x))) or 1.0 if x.size else 1.0

    def weighted(h: float) -> list[np.ndarray]:
        outputs = pair.outputs(_moved(inputs, index, h * size * v))
        return [
            np.array([math.fsum((w * y).flat) for w, y in zip(cotangents, outputs, strict=True)])
        ]

    difference = float(finite_difference(weighted)[0].sum()) / size
    expected = float(np.sum(g * v))
    scale = max(
        abs(expected), float(np.linalg.norm(g) * np.linalg.norm(v)) / math.sqrt(max(g.size, 1))
    )
    if scale == 0:
        return 0.0 if difference == 0 else math.inf
    return abs(difference - expected) / scale


def full_jacobian(pair: Pair, inputs: Sequence[Any], index: int) -> tuple[np.ndarray, np.ndarray]:
    """The whole Jacobian of one input, [outputs, entries], by differences and by the backward: for
    tiny shapes.

    Where the two disagree, the row names the output and the column the entry of the input.
    """
    x, outputs = inputs[index], pair.outputs(inputs)
    size = float(np.sqrt(np.mean(x * x))) or 1.0
    columns = []
    for entry in range(x.size):
        e = np.zeros(x.size)
        e[entry] = size
        unit = e.reshape(x.shape)
        part = finite_difference(lambda h, unit=unit: pair.outputs(_moved(inputs, index, h * unit)))  # type: ignore[misc]
        columns.append(_flat(part) / size)
    rows = []
    for output in range(sum(y.size for y in outputs)):
        seed = np.zeros(sum(y.size for y in outputs))
        seed[output] = 1.0
        parts = np.split(seed, np.cumsum([y.size for y in outputs])[:-1])
        g = pair.gradients(
            inputs, [p.reshape(y.shape) for p, y in zip(parts, outputs, strict=True)]
        )[index]
        assert g is not None
        rows.append(g.reshape(-1))
    return np.stack(columns, axis=1), np.stack(rows)


class Noise(NamedTuple):
    """The verdict of `rounding_noise` on one input."""

    error: float  # mathematical error over rounding noise: at most 1
    sharpness: (
        float  # rounding noise over Σ|g||v|: the smallest relative error that the rule could see
    )
    # the part of the sharpness that even exact code has, large if Σ|w||Jv| nearly cancels in g
    floor: float


def rounding_noise(
    pair: Pair,
    inputs: Sequence[Any],
    index: int,
    v: np.ndarray,
    cotangents: Sequence[np.ndarray],
    g_tested: np.ndarray,
    g80: np.ndarray,
) -> Noise:
    """The primary rule, with no constant to tune. The direction ``v`` and the gradients
    ``g_tested`` and ``g80``, of any shape, have that of the input.

    A complex step in clongdouble gives Jv to 80-bit precision, ``g80`` is the backward run in
    longdouble, ``g_tested`` the one under test (float64, or float32). The mathematical error
    |⟨w,Jv⟩ − ⟨g80,v⟩| must lie below the rounding noise of that same code, Σ|g − g80||v| + eps
    (Σ|w||Jv| + Σ|g||v|), eps that of the tested type. Sharpness is this noise over Σ|g80||v|. If it
    is large, the rule proves nothing.
    """
    h = np.longdouble("1e-200")
    wide = [None if x is None else x.astype(np.clongdouble) for x in inputs]
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", np.exceptions.ComplexWarning
        )  # a cast that drops the tangent
        outputs = pair.outputs(_moved(wide, index, 1j * h * v))
    jv = [np.imag(y) / h for y in outputs]
    math_error = abs(
        sum(np.sum(w * y) for w, y in zip(cotangents, jv, strict=True)) - np.sum(g80 * v)
    )
    size = np.sum(np.abs(g80) * np.abs(v))
    reach = sum(np.sum(np.abs(w) * np.abs(y)) for w, y in zip(cotangents, jv, strict=True))
    floor = float(np.finfo(g_tested.dtype).eps) * (reach + size)
    noise = np.sum(np.abs(g_tested - g80) * np.abs(v)) + floor
    if noise == 0:
        return Noise(0.0, 0.0, 0.0) if math_error == 0 else Noise(math.inf, 0.0, 0.0)
    if size == 0:
        return Noise(float(math_error / noise), math.inf, math.inf)
    return Noise(float(math_error / noise), float(noise / size), float(floor / size))


def exact_digits(
    pair: Pair,
    inputs: Sequence[Any],
    vs: Sequence[np.ndarray | None],
    cotangents: Sequence[np.ndarray],
    digits: int,
) -> list[float | None]:
    """To how many digits ⟨w, Jv⟩ and ⟨g, v⟩ agree, input by input, in dual numbers of ``digits``
    digits (the most)."""
    with digits_context(digits):
        still = [None if x is None else dual_array(x) for x in inputs]
        w = [dual_array(c) for c in cotangents]
        y, saved = pair.forward(*still, **pair.kwargs)
        gradients = pair.call_backward(y, saved, w)
        result: list[float | None] = []
        for i, (x, v, g) in enumerate(zip(inputs, vs, gradients, strict=True)):
            if x is None or v is None:
                result.append(None)
                continue
            moving = [dual_array(x, v) if j == i else s for j, s in enumerate(still)]
            outputs = pair.outputs(moving)
            forward_terms = [
                a * b
                for c, out in zip(w, outputs, strict=True)
                for a, b in zip(values(c), tangents(out), strict=True)
            ]
            backward_terms = [a * b for a, b in zip(values(g), values(dual_array(v)), strict=True)]
            size: Decimal = sum((abs(term) for term in backward_terms), start=Decimal(0))
            error: Decimal = abs(
                sum(forward_terms, start=Decimal(0)) - sum(backward_terms, start=Decimal(0))
            )
            if error == 0:
                result.append(float(digits))
            else:
                result.append(min(float(digits), -float((error / size).log10())) if size else 0.0)
        return result
