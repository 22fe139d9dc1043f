"""JAX as a fourth library of arrays: every op and the tiny model, called eagerly on its immutable
float64 arrays, against NumPy's. refimpl/ imports no JAX: its arrays bring their namespace. Needs
the extra `jax`.

A jitted function would need more than our ops have: no branch on a value (ids, targets, routes and
masks are checked, counts of tokens become Python numbers), and shapes that do not depend on values
(the experts' blocks of rows).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="the extra `jax` is not installed")
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_platforms", "cpu")

from refimpl.check.cases import CASES, Case, RandomDraw, model_case, pair_of
from refimpl.ops import AnyOp
from refimpl.verify import placed

DRAWS = 2  # of each op: JAX compiles anew for each shape
OPS_BOUND = 1e-14  # of the tensor's largest value: other sums, another exp
MODEL_BOUND = 1e-13


def arrays(x: Any, name: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """All arrays in nested tuples and dicts, each with where it stands."""
    if isinstance(x, dict):
        for key, value in x.items():
            yield from arrays(value, f"{name}.{key}")
    elif isinstance(x, tuple | list):
        for place, value in enumerate(x):
            yield from arrays(value, f"{name}.{place}")
    elif x is not None and hasattr(x, "dtype"):
        yield name, np.asarray(x)


def compare(case: Case, pair: AnyOp, seed: int, bound: float) -> float:
    """The largest error of outputs and gradients, relative to the tensor's largest value."""
    there = placed(pair, jax.numpy.asarray)
    y, saved = pair.forward(*case.inputs, **case.kwargs)
    if case.replay is not None:
        y, saved = pair.forward(*case.inputs, **case.kwargs | dict(case.replay(y)))
    y_jax, saved_jax = there.forward(*case.inputs, **case.kwargs)
    outputs = [x for _, x in arrays(y) if x.dtype.kind == "f"]
    rng = np.random.default_rng(seed)
    cotangents = tuple(np.asarray(rng.normal(size=x.shape)) for x in outputs)
    dy = cotangents if isinstance(y, tuple) else cotangents[0]
    ours = dict(arrays((y, pair.backward(dy, saved))))
    theirs = dict(arrays((y_jax, there.backward(dy, saved_jax))))
    assert ours.keys() == theirs.keys()
    worst = 0.0
    for name, x in ours.items():
        assert theirs[name].dtype == x.dtype, name
        assert theirs[name].shape == x.shape, name
        if x.dtype.kind != "f":
            np.testing.assert_array_equal(theirs[name], x, err_msg=name)
        elif x.size:
            error = float(np.max(np.abs(theirs[name] - x)) / (np.max(np.abs(x)) or 1))
            assert error <= bound, name
            worst = max(worst, error)
    return worst


@pytest.mark.parametrize("op", CASES)
def test_op(op: str) -> None:
    for seed in range(DRAWS):
        compare(CASES[op](RandomDraw(seed)), pair_of(op), seed, OPS_BOUND)


def test_model() -> None:
    """The preset tiny, its loss, hidden states, logits and the gradient of each parameter."""
    case, _, pair = model_case(RandomDraw(0), masked=True)
    assert compare(case, pair, 0, MODEL_BOUND) > 0  # other bits: JAX has computed them
