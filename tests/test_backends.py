"""The ops on other arrays: every number type of NumPy, and array-api-strict, which has nothing that
is not standard."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any

import array_api_strict as strict
import numpy as np
import pytest

from refimpl import ops, verify
from refimpl.check import rules
from refimpl.check.cases import CASES, Case, RandomDraw, model_case, pair_of
from refimpl.check.dual import dual_array, values
from refimpl.check.rules import Pair
from refimpl.config import CONVENTIONS, preset
from refimpl.generate import generate
from refimpl.generate.sampler import to_numpy
from refimpl.model import backward, forward
from refimpl.parameters import parameter_shapes
from refimpl.text import load_text
from refimpl.verify import placed

from pretended_cupy import Pretended
from pretended_cupy import there as pretended
from random_parameters import random_parameters

TYPES = [np.float32, np.float64, np.longdouble, np.complex64, np.complex128, np.clongdouble, object]
SEED = 5
DEVICE = strict.Device("device1")  # not where arrays are made if no device is named


def frozen(op: str) -> tuple[Case, dict[str, Any]]:
    """A case, and its arguments with the routes fixed."""
    case = CASES[op](RandomDraw(SEED))
    kwargs = case.kwargs
    if case.replay is not None:
        kwargs = kwargs | dict(case.replay(pair_of(op).forward(*case.inputs, **kwargs)[0]))
    return case, kwargs


def cotangents(op: str, case: Case, kwargs: dict[str, Any]) -> list[np.ndarray]:
    outputs = Pair(*pair_of(op), kwargs).outputs(case.inputs)
    return [np.asarray(np.random.default_rng(0).normal(size=y.shape)) for y in outputs]


@pytest.mark.parametrize("dtype", TYPES, ids=lambda t: t.__name__)
@pytest.mark.parametrize("op", CASES)
def test_number_types(op: str, dtype: Any) -> None:
    """Outputs and gradients keep the type, and agree with float64 to the type's precision (or
    float64's)."""
    case, kwargs = frozen(op)
    pair, w = Pair(*pair_of(op), kwargs), cotangents(op, case, kwargs)

    def to(x: np.ndarray) -> np.ndarray:
        return dual_array(x) if dtype is object else x.astype(dtype)

    def back(x: Any) -> np.ndarray:
        x = np.asarray(x)
        return (
            np.array([float(v) for v in values(x)]).reshape(x.shape)
            if dtype is object
            else np.real(x)
        )

    inputs = [None if x is None else to(x) for x in case.inputs]
    outputs = pair.outputs(inputs)
    gradients = pair.gradients(inputs, [to(c) for c in w])
    expected_outputs, expected_gradients = pair.outputs(case.inputs), pair.gradients(case.inputs, w)
    eps = np.finfo(np.float32 if dtype in (np.float32, np.complex64) else np.float64).eps
    for got, expected in zip(
        [*outputs, *gradients], [*expected_outputs, *expected_gradients], strict=True
    ):
        if expected is None:
            assert got is None
            continue
        assert got is not None
        assert got.dtype == dtype
        assert np.max(np.abs(back(got) - expected)) <= 200 * eps * np.max(np.abs(expected))


def there(x: Any) -> Any:
    """NumPy arrays as strict ones on `DEVICE`, within tuples and dicts too."""
    if isinstance(x, (np.ndarray, np.generic)):
        return strict.asarray(x, device=DEVICE)
    if isinstance(x, dict):
        return {key: there(value) for key, value in x.items()}
    return (
        tuple(map(there, x))
        if type(x) is tuple and any(isinstance(m, np.ndarray) for m in x)
        else x
    )


def back(x: Any) -> np.ndarray:
    assert x.device == DEVICE
    return np.asarray(x.to_device(strict.Device("CPU_DEVICE")))


@pytest.mark.parametrize("op", CASES)
def test_array_api_strict(op: str) -> None:
    """All ops, forward and backward, run on the bare standard, on the device of their inputs:
    nothing in them is NumPy's alone, and nothing is made elsewhere."""
    case, kwargs = frozen(op)
    pair, w = pair_of(op), cotangents(op, case, kwargs)
    y, saved = pair.forward(
        *(None if x is None else there(x) for x in case.inputs), **there(kwargs)
    )
    gradients = pair.backward(tuple(map(there, w)) if isinstance(y, tuple) else there(w[0]), saved)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    expected = Pair(*pair, kwargs).gradients(case.inputs, w)
    for got, wanted in zip(gradients, expected, strict=True):
        if wanted is None:
            assert got is None
        else:
            assert "array_api_strict" in type(got).__module__
            assert np.max(np.abs(back(got) - wanted)) <= 1e-14 * np.max(np.abs(wanted))


@pytest.mark.parametrize("op", CASES)
def test_every_input_is_looked_at(op: str) -> None:
    """Each differentiable input in turn as a list, in 16 bits, from another library than those
    before it: a TypeError that names it (or w, the name in the op that is given it)."""
    case, kwargs = frozen(op)
    forward = pair_of(op).forward
    names = [p.name for p in signature(forward).parameters.values() if p.kind != p.KEYWORD_ONLY]
    for i, x in enumerate(case.inputs):
        if x is None:
            continue
        wrong = {"must be an array": x.tolist(), "must be float32 or wider": x.astype(np.float16)}
        if i > 0:
            wrong["must come from numpy"] = strict.asarray(x)
        for message, given in wrong.items():
            inputs = [*case.inputs[:i], given, *case.inputs[i + 1 :]]
            name = names[min(i, len(names) - 1)]  # the last may stand for several
            with pytest.raises(TypeError, match=rf"^({name}|\w*w\w*) {message}"):
                forward(*inputs, **kwargs)


@pytest.mark.parametrize("op", CASES)
def test_a_cotangent_of_another_shape(op: str) -> None:
    """It would be broadcast, or summed along the wrong axis."""
    case, kwargs = frozen(op)
    pair, (dy, *others) = pair_of(op), cotangents(op, case, kwargs)
    _, saved = pair.forward(*case.inputs, **kwargs)
    for wrong in (np.stack((dy, dy)), dy[..., :-1], dy[:1], dy[0]) if dy.ndim else ():
        if wrong.shape == dy.shape:
            continue
        with pytest.raises(ValueError, match=r"^d\w+ must have shape"):
            pair.backward((wrong, *others) if others else wrong, saved)


@pytest.mark.parametrize(
    "dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64], ids=lambda t: t.__name__
)
def test_narrow_integers_do_not_wrap(dtype: Any) -> None:
    """Byte tokens in a vocabulary of 300: block offsets, row numbers and sentinels are computed in
    int64."""
    ids, rng = np.array([[1, 200, 255]], dtype=dtype), np.random.default_rng(0)
    h, w = rng.normal(size=(1, 3, 4)), rng.normal(size=(300, 4))
    y, saved = ops.embedding_forward(w, ids=ids)
    dw = ops.embedding_backward(np.ones_like(y), saved)
    assert np.array_equal(np.nonzero(dw[:, 0])[0], [1, 200, 255])
    wide, _ = ops.log_prob_forward(h, w, targets=ids.astype(np.int64))
    narrow, lp_saved = ops.log_prob_forward(h, w, targets=ids, block=(2, 100))
    np.testing.assert_allclose(narrow, wide, rtol=0, atol=1e-13)
    dh, _ = ops.log_prob_backward(np.ones_like(narrow), lp_saved)
    loss, ce_saved = ops.cross_entropy_forward(h @ w.T, targets=ids)
    assert abs(3 * loss + narrow.sum()) <= 1e-12
    np.testing.assert_allclose(
        dh, -3 * ops.cross_entropy_backward(1.0, ce_saved) @ w, rtol=0, atol=1e-12
    )
    assert ops.expert_load(ids, 300, np.array([True])).sum() == 3
    assert ops.expert_load(ids, 256, np.array([False])).sum() == 0


@pytest.mark.parametrize(
    "op",
    [
        "rms_norm",
        "attention",
        "flash_attention",
        "router",
        "log_prob",
        "balance_loss",
        "mtp",
        "grpo",
    ],
)
def test_numpy_scalars_do_not_widen(op: str) -> None:
    """np.float64 settings (1 / np.sqrt(d), say) leave float32 arrays in float32, forward and
    backward."""
    case, kwargs = frozen(op)
    kwargs = {
        key: np.float64(value) if isinstance(value, float) else value
        for key, value in kwargs.items()
    }
    inputs = [None if x is None else x.astype(np.float32) for x in case.inputs]
    pair = Pair(*pair_of(op), kwargs)
    w = [np.float64(1.0) if y.ndim == 0 else y for y in pair.outputs(inputs)]
    assert {y.dtype for y in pair.outputs(inputs)} == {np.dtype(np.float32)}
    y, saved = pair.call(inputs)
    gradients = pair.backward(tuple(w) if isinstance(y, tuple) else w[0], saved)
    for g in gradients if isinstance(gradients, tuple) else (gradients,):
        assert g.dtype == np.float32


@pytest.mark.parametrize("op", CASES)
def test_nothing_that_cupy_refuses(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ops on NumPy dressed as CuPy, whose functions take fewer arguments than the
    standard's."""
    monkeypatch.setitem(sys.modules, "cupy", Pretended("cupy"))
    case, kwargs = frozen(op)
    pair, w = placed(pair_of(op), pretended), cotangents(op, case, kwargs)
    for got, wanted in zip(
        Pair(*pair, kwargs).gradients(case.inputs, w),
        Pair(*pair_of(op), kwargs).gradients(case.inputs, w),
        strict=True,
    ):
        if wanted is not None:
            assert np.max(np.abs(got - wanted)) <= 1e-14 * np.max(np.abs(wanted))


def test_model_needs_nothing_that_cupy_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", Pretended("cupy"))
    case, _, pair = model_case(RandomDraw(0), length=5)
    y, saved = pair.forward(*case.inputs)
    dy = tuple(np.ones_like(m) for m in y[:3])
    pretended_y, pretended_saved = (on_cupy := placed(pair, pretended)).forward(*case.inputs)
    assert abs(float(pretended_y[0]) - float(y[0])) <= 1e-13
    for got, wanted in zip(
        on_cupy.backward(dy, pretended_saved), pair.backward(dy, saved), strict=True
    ):
        assert np.max(np.abs(got - wanted)) <= 1e-12 * np.max(np.abs(wanted), initial=1e-3)


@pytest.mark.parametrize("op", verify.NAMES)
def test_verify_needs_nothing_that_cupy_refuses(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``refimpl verify --backend cupy`` as it runs, models and their replayed routes too (without
    differences)."""
    monkeypatch.setitem(sys.modules, "cupy", Pretended("cupy"))
    monkeypatch.setattr(verify, "placement", lambda backend: lambda x: pretended(np.array(x)))
    on_the_host = rules._arrays
    monkeypatch.setattr(
        rules, "_arrays", lambda x: [a for a in on_the_host(x) if type(a) is np.ndarray]
    )
    if op in verify.MODELS:
        monkeypatch.setattr(verify, "check", partial(verify.check, rules=("contract", "noise")))
    settings = verify.Settings(load_text(None), backend="cupy")
    report = verify.run(verify.Step(op, 0), settings)
    assert report.ok, str(report)


@pytest.mark.parametrize("convention", ["official", "hf"])
def test_model_on_array_api_strict(convention: str) -> None:
    """The whole model too, padded and packed, on one device: loss and every gradient as on
    NumPy."""
    config = replace(preset("tiny"), conventions=CONVENTIONS[convention])
    rng = np.random.default_rng(0)
    params = {
        n: 0.15 * rng.normal(size=s) + n.endswith("norm.weight")
        for n, s in parameter_shapes(config).items()
    }
    tokens, key_mask = rng.integers(0, 256, (2, 9)), np.ones((2, 9), dtype=bool)
    key_mask[0, :2] = False
    options = {"key_mask": key_mask, "segments": np.array([[0] * 9, [0] * 4 + [1] * 5])}
    output, saved = forward(params, tokens, config, **options)
    grads = backward(saved, dhidden=np.ones_like(output.hidden))
    strict_output, strict_saved = forward(there(params), there(tokens), config, **there(options))
    strict_grads = backward(strict_saved, dhidden=there(np.ones_like(output.hidden)))
    assert abs(float(strict_output.loss) - output.loss) <= 1e-14 * output.loss
    for name, g in grads.items():
        assert np.max(np.abs(back(strict_grads[name]) - g)) <= 1e-13 * np.max(np.abs(g))


@pytest.mark.parametrize(("prompts", "speculate"), [([[1, 2, 3], [4, 5]], 0), ([[1, 2, 3]], 4)])
def test_generation_on_one_device(
    prompts: list[list[int]], speculate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only logits leave the device of the parameters; padded prompts, drafts behind the last
    module."""
    config = preset("tiny")
    params = random_parameters(config)
    options: Any = {"max_tokens": 8, "speculate": speculate}
    wanted = generate(params, config, prompts, **options)
    monkeypatch.setattr(
        "refimpl.generate.sampler.to_numpy",
        lambda x: to_numpy(x) if isinstance(x, np.ndarray) else back(x),
    )
    assert generate(there(params), config, prompts, **options) == wanted
