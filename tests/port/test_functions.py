"""Functions of other array libraries against ours: what is right passes, each mistake is one line,
and the others are graded all the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jsonschema
import numpy as np
import pytest

from refimpl.check.cases import CASES, REGIMES, pair_of
from refimpl.check.planted import PLANTED
from refimpl.errors import CouldNotRun
from refimpl.port import check
from refimpl.port.cases import planted
from refimpl.port.functions import examples_of, schema

from support import FULL


class Wrapped:
    """An array of a library that knows DLPack, and nothing else of NumPy."""

    def __init__(self, x: Any) -> None:
        self.x = np.from_dlpack(x)

    def __dlpack__(self, **given: Any) -> Any:
        return self.x.__dlpack__(**given)

    def __dlpack_device__(self) -> Any:
        return self.x.__dlpack_device__()

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("not by this way")


def unwrap(x: Any) -> Any:
    if isinstance(x, Wrapped):
        return x.x
    return tuple(map(unwrap, x)) if isinstance(x, tuple) else x


def wrap(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(map(wrap, x))
    return Wrapped(np.array(x)) if isinstance(x, np.ndarray | np.generic) else x


def foreign(op: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Our pair, dressed as one of another library."""
    ours = pair_of(op)

    def forward(*inputs: Any, **kwargs: Any) -> Any:
        given = {name: unwrap(x) for name, x in kwargs.items()}
        y, saved = ours.forward(*map(unwrap, inputs), **given)
        return wrap(y), saved

    return forward, lambda dy, saved: wrap(ours.backward(unwrap(dy), saved))


def forward(x: Any, w: Any, *, eps: float) -> Any:
    r = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.asarray(eps, x.dtype))
    return w * x * r, (x, w, r)


def backward(dy: Any, saved: Any) -> Any:
    x, w, r = saved
    n, dn = x * r, dy * w
    return r * (dn - n * np.mean(dn * n, axis=-1, keepdims=True)), np.sum(dy * n, axis=(0, 1))


@pytest.mark.parametrize("op", CASES)
def test_every_op_through_dlpack(op: str) -> None:
    result = check(op, *foreign(op), array=Wrapped, examples=1)
    assert result.ok, str(result)
    assert result.first_wrong is None
    assert {tuple(t.units) for t in result.tensors} <= {("float64", "float32")}
    assert any(t.difference is not None for t in result.tensors)
    assert result.cases == len(examples_of(op, 1))
    jsonschema.validate(result.to_json(), schema())


@pytest.mark.parametrize(
    ("op", "other", "seed"), [("attention", "flash_attention", 9000), ("mla", "mla_absorbed", 110)]
)
def test_another_way_to_compute_the_same(op: str, other: str, seed: int) -> None:
    """Flash attention in float32 has 4.4 units of plain attention's reruns at its worst of these
    cases: a flash port is right, so its reruns count."""
    result = check(op, *pair_of(other), examples=150 if FULL else 8, seed=seed)
    assert result.ok, str(result)


@pytest.mark.parametrize("op", CASES)
def test_examples_meet_every_regime(op: str) -> None:
    examples = examples_of(op)
    assert len(examples) >= 5
    assert set().union(*(x.regimes for x in examples)) >= REGIMES[op]
    assert sorted(name for x in examples for name in x.new) == sorted(REGIMES[op])


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("rms_norm", "no mean term"),
        ("mla", "gradient of k_pe from one head"),
        ("router", "normaliser taken as a constant"),
        ("grpo", "A < 0 clipped above too, both ways"),
    ],
)
def test_a_mistake_is_found_and_named(op: str, name: str) -> None:
    bug = next(bug for bug in PLANTED if (bug.op, bug.name) == (op, name))
    result = check(op, *planted(bug))
    assert not result.ok
    assert f"{op}: {name}" in result.bugs, str(result)
    assert result.first_wrong is not None
    assert result.first_wrong.startswith(f"{op}/{'out' if bug.shared else 'grad'}/")
    assert f"'{name}' of {op}" in str(result)
    found = result.to_json()
    assert json.loads(json.dumps(found)) == found  # no infinity
    jsonschema.validate(found, schema())


def test_choices_are_made_and_replayed() -> None:
    """A gate that takes the routes it is given, and chooses others when it is given none."""
    ours = pair_of("router")

    def forward(x: Any, w: Any, *, routes: Any = None, bias: Any = None, **kwargs: Any) -> Any:
        return ours.forward(x, w, routes=routes, bias=None, **kwargs)

    result = check("router", forward, ours.backward)
    assert not result.ok
    assert result.first_wrong == "router/out/weights"
    indices = next(t for t in result.tensors if t.tensor == "out/indices")
    assert indices.reasons[0].startswith("differs from ours at [")

    def biased(x: Any, w: Any, *, routes: Any = None, **kwargs: Any) -> Any:
        return ours.forward(x, w, **kwargs)  # no routes: its own choice, which is the same

    assert check("router", biased, ours.backward).ok


def one_line(result: Any, line: str) -> None:
    """The line stands once in what is said, and there is no traceback."""
    assert not result.ok
    assert str(result).count(line) == 1, str(result)
    assert "Traceback" not in str(result)


def rows(result: Any) -> dict[str, str]:
    return {t.tensor: t.verdict for t in result.tensors}


def test_what_raises_is_shown_by_its_own_line() -> None:
    def wrong(dy: Any, saved: Any) -> Any:
        return np.matmul(dy, np.ones((99, 1)))

    result = check("rms_norm", forward, wrong)
    line = wrong.__code__.co_firstlineno + 1
    one_line(result, f"backward raised at {__file__}:{line}: ValueError: matmul:")
    assert rows(result) == {"out/y": "PASS", "grad/x": "INCONCLUSIVE", "grad/w": "INCONCLUSIVE"}
    assert result.first_wrong == "rms_norm/grad/x"
    result = check("rms_norm", lambda x, w: x, backward)
    one_line(result, "unexpected keyword argument 'eps'")
    for left in (SystemExit(0), GeneratorExit(), RuntimeError("a\n\x1b[31mb")):

        def leave(dy: Any, saved: Any, left: BaseException = left) -> Any:
            raise left

        one_line(check("rms_norm", forward, leave, examples=1), type(left).__name__)


@pytest.mark.parametrize(
    ("change", "line", "passing"),
    [
        (lambda dx, dw: (dx, dw[None]), "must have shape (5,), got (1, 5)", "grad/x"),
        (lambda dx, dw: (dx, None), "must be an array, got NoneType", "grad/x"),
        (lambda dx, dw: (dx, "dw"), "must be an array, got str", "grad/x"),
        (lambda dx, dw: (dx.astype(np.float64), dw), "must be float32 for float32", "grad/w"),
        (lambda dx, dw: (dx, np.nan * dw), "error of inf units in float64", "grad/x"),
        (lambda dx, dw: (2 * dx, dw), "the gradient does not fit your own forward", "grad/w"),
        (lambda dx, dw: (dx, dw, dw), "backward must return 2 gradients (x, w)", "out/y"),
        (lambda dx, dw: (dx, object()), "can't take a result of type object", "out/y"),
    ],
)
def test_one_line_per_mistake(change: Callable[..., Any], line: str, passing: str) -> None:
    result = check("rms_norm", forward, lambda dy, saved: change(*backward(dy, saved)))
    one_line(result, line)
    assert rows(result)[passing] == "PASS"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda y, saved: y, "forward must return (y, saved), got ndarray"),
        (lambda y, saved: ((y, y), saved), "forward must return 1 outputs (y), got 2"),
        (lambda y, saved: (y[..., None], saved), "must have shape (3, 3, 5), got (3, 3, 5, 1)"),
    ],
)
def test_one_line_per_mistake_of_a_forward(change: Callable[..., Any], line: str) -> None:
    one_line(check("rms_norm", lambda *x, **k: change(*forward(*x, **k)), backward), line)


def test_a_consistent_pair_of_another_function() -> None:
    """Its gradients are right for its forward, which the differences say."""

    def other(x: Any, w: Any, *, eps: float) -> Any:
        return forward(x, w, eps=2 * eps)

    result = check("rms_norm", other, backward)
    assert rows(result)["out/y"] == "FAIL"
    one = next(t for t in result.tensors if t.tensor == "grad/x")
    assert one.verdict == "FAIL"
    assert one.reasons[-1].startswith("finite differences agree")
    assert result.first_wrong == "rms_norm/out/y"


def test_saved_that_is_used_up_and_inputs_written_to() -> None:
    def spoil(dy: Any, saved: Any) -> Any:
        found = backward(dy, saved)
        saved[2][...] *= 2
        return found

    result = check("rms_norm", forward, spoil)
    one_line(result, "gradient 0 differs between two calls of backward with one saved")

    def scribble(dy: Any, saved: Any) -> Any:
        found = backward(dy, saved)
        dy *= 0
        return found

    one_line(check("rms_norm", forward, scribble), "dy was written to")


def test_a_library_with_float32_alone() -> None:
    """What can't be run is named; the rest counts."""
    pair = foreign("mla")

    def narrow(x: Any) -> Wrapped:
        return Wrapped(x.astype(np.float32) if x.dtype == np.float64 else x)

    result = check("mla", *pair, array=narrow, examples=2)
    assert result.ok, str(result)
    assert "float64: array() makes float32 of float64" in result.not_run
    assert all(t.difference is None and set(t.units) == {"float32"} for t in result.tensors)
    with pytest.raises(CouldNotRun, match="no type can be checked: float64"):
        check("mla", *pair, array=narrow, types=["float64"])


def test_what_is_nothing_but_rounding_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor whose bound is as large as itself in every case: not measured, which is no PASS."""
    monkeypatch.setattr("refimpl.port.functions.FACTOR", 1e300)
    result = check("linear", *pair_of("linear"), examples=1)
    assert not result.ok
    assert {t.verdict for t in result.tensors} == {"INCONCLUSIVE"}
    assert all("not measured" in t.reasons for t in result.tensors)


def test_without_longdouble(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: the truth is float64's, and that is said."""
    for module in ("cases", "functions"):
        monkeypatch.setattr(f"refimpl.port.{module}.has_longdouble", lambda: False)
    result = check("mla", *pair_of("mla"))
    assert result.ok, str(result)
    assert any("none is wider than float64 here" in line for line in result.not_run)


def test_what_cannot_be_asked_for() -> None:
    for given, said in (
        ({"op": "nothing"}, "unknown op nothing; there are linear"),
        ({"examples": 0}, "examples must be at least 1, got 0"),
        ({"types": ["float16"]}, "types must be among float64, float32, got"),
    ):
        with pytest.raises(CouldNotRun, match=said):
            check(**({"op": "rms_norm", "forward": forward, "backward": backward} | given))


class Evil:
    """An object, or an error, of which nothing can be asked."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def mute(dy: Any, saved: Any) -> Any:
    raise Mute


@pytest.mark.parametrize(
    ("backward", "line"),
    [
        (lambda dy, saved: [np.full(3, None)] * 2, "can't take a result of type ndarray (object)"),
        (lambda dy, saved: [np.full(3, "x")] * 2, "can't take a result of type ndarray (<U1)"),
        (lambda dy, saved: [Evil()] * 2, "RuntimeError: detach"),
        (mute, "Mute"),
    ],
)
def test_what_is_no_array_of_numbers(backward: Any, line: str) -> None:
    found = check("linear", pair_of("linear").forward, backward, examples=1)
    assert not found.ok
    assert line in found.faults[0]


def test_what_is_not_finite_agrees_with_no_difference() -> None:
    forward, backward = pair_of("linear")
    nan = check("linear", forward, lambda dy, s: [g * np.nan for g in backward(dy, s)], examples=1)
    assert not nan.ok
    assert "finite differences agree" not in str(nan)
    assert nan.tensors[1].difference == np.inf


def test_complex_gradients_are_not_compared() -> None:
    forward, backward = pair_of("linear")
    found = check("linear", forward, lambda dy, s: [g + 0j for g in backward(dy, s)], examples=1)
    assert not found.ok
    assert found.tensors[1].reasons == ["must be float64 for float64 inputs, got complex128"]


def test_a_second_call_with_fewer_gradients() -> None:
    forward, backward = pair_of("linear")
    calls: list[int] = []

    def shrinking(dy: Any, saved: Any) -> Any:
        calls.append(1)
        return backward(dy, saved)[: 1 + len(calls) % 2]

    found = check("linear", forward, shrinking, examples=1)
    assert "linear: backward gives 2 gradients, and 1 when called again" in found.faults


def test_a_seed_below_0() -> None:
    with pytest.raises(CouldNotRun, match="seed must be at least 0"):
        check("linear", *pair_of("linear"), seed=-1)
