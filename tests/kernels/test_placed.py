"""Ops on a device for NumPy's arrays: what crosses, what stays there, and gradients so computed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refimpl.check.cases import CASES, RandomDraw
from refimpl.config import preset
from refimpl.errors import CouldNotRun
from refimpl.grads import Request
from refimpl.kernels.placed import OnDevice, on_host, placed
from refimpl.ops import LEAVES, REFERENCE

from grads.examples import TOKENS, read, stream
from kernel_support import without_a_device
from kernel_support.on_cupy import use_cuda
from pretended_cupy import Pretended, ndarray, there
from random_parameters import random_parameters
from support import FULL

pytestmark = without_a_device


def test_what_crosses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays within tuples and dicts; what is saved stays on the device, and its fields come as
    NumPy's; a saved record that somebody else made goes there."""
    monkeypatch.setitem(sys.modules, "cupy", Pretended("cupy"))
    case = CASES["router"](RandomDraw(0))
    op = placed(REFERENCE.router, there)
    y, saved = op.forward(*case.inputs, **case.kwargs)
    assert {type(x) for x in y} == {np.ndarray}
    assert type(saved.x) is ndarray
    host = on_host(REFERENCE, there).router
    y, kept = host.forward(*case.inputs, **case.kwargs)
    assert isinstance(kept, OnDevice)
    assert type(kept.x) is np.ndarray
    assert [type(x) for x in kept][:3] == [np.ndarray] * 3
    dy = np.ones(y.weights.shape), None
    plain = REFERENCE.router.forward(*case.inputs, **case.kwargs)[1]
    for given in (kept, plain):
        for found, wanted in zip(
            host.backward(dy, given), REFERENCE.router.backward(dy, plain), strict=True
        ):
            assert type(found) is np.ndarray
            np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-14)
    table = on_host(REFERENCE, there)
    assert {name for name in table if table[name] != REFERENCE[name]} == {*LEAVES}


@pytest.mark.parametrize("implementation", ["cuda", "reference"] if FULL else ["cuda"])
def test_gradients(implementation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result of `refimpl grads` with every tensor that a block saves, units and a split, is
    NumPy's but for rounding."""
    use_cuda(monkeypatch)
    config, params = preset("tiny"), random_parameters(preset("tiny"))
    given: dict[str, Any] = {"balance_alpha": 0.02, "activations": "*"}
    given |= {"mtp": True} if FULL else {"layers": 2}
    if implementation == "reference":
        inner = "*.layers.[01]*.self_attn.*"
        given |= {"activations": inner, "units": ("bfloat16",), "reruns": 1, "split": "rows=1+1"}
    results = {}
    for backend, name in (("numpy", "reference"), ("cupy", implementation)):
        out = tmp_path / backend
        stream(params, config, out, backend=backend, implementation=name, **given)
        results[backend] = read(out)
    assert results["cupy"].keys() == results["numpy"].keys()
    for name, x in results["cupy"].items():
        wanted = results["numpy"][name]
        atol = 1e-12 * np.max(np.abs(wanted), initial=0)
        np.testing.assert_allclose(x, wanted, rtol=0, atol=atol, err_msg=name)


def test_refused() -> None:
    """A backend without its implementation, or without CuPy."""
    with pytest.raises(CouldNotRun, match=r"^backend must be cupy for the implementation cuda"):
        Request(TOKENS, implementation="cuda").table()
    with pytest.raises(CouldNotRun, match=r"^backend cupy needs"):
        Request(TOKENS, backend="cupy").table()
