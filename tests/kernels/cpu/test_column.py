"""Every op of the column `numba_cpu`: contract, finite differences, the rule for errors, the same
bits with any number of threads, and mistakes that these see."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.check import check
from refimpl.check.cases import CASES, REGIMES, Draw, RandomDraw
from refimpl.config import preset
from refimpl.kernels.cpu import compile as compiling
from refimpl.kernels.cpu.adamw import FusedAdamW
from refimpl.kernels.cpu.pool import threads
from refimpl.model import backward, forward
from refimpl.ops import IMPLEMENTATIONS, REFERENCE, Op
from refimpl.optimizer import AdamW, Moments
from refimpl.parameters import init_parameters

from attention_contract import ERRORS, GOOD, check_more_queries_than_keys, check_range_of_validity
from kernel_support import compare, results, rounded
from kernel_support.on_cpu import (
    CPU,
    DRAWN,
    OPS,
    PLANTED,
    plant,
    plant_text,
    small_blocks,
    source_of,
    with_table,
)
from support import FULL, HypothesisDraw

CHECKED = 'CHECKED = os.environ.get("REFIMPL_BOUNDS_CHECKS") == "1"', "CHECKED = True"
DIFFERENCES = 40 if FULL else 4  # examples of each op, beside those of its regimes
EXAMPLES = 60 if FULL else 8  # likewise, in each type


@pytest.fixture(autouse=True, params=[1, 2] if FULL else [2], ids="{}_threads".format)
def in_small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    small_blocks(monkeypatch)
    with threads(request.param):
        yield


def assert_differences(op: str, seeds: range) -> None:
    """`refimpl.check` on cases that hit all regimes: contract and finite differences."""
    missed = set(REGIMES[op])
    for seed in range(1000):
        case = CASES[op](RandomDraw(seed))
        if seed not in seeds and not missed & case.regimes:
            if not missed:
                break
            continue
        missed -= case.regimes
        report = check(
            *CPU[op],
            case.inputs,
            case.kwargs | with_table(op),
            op=op,
            replay=case.replay,
            seed=seed,
            names=[str(i) for i in range(len(case.inputs))],
            rules=("contract", "differences"),
        )
        assert report.ok, f"{case.kwargs}\n{report}"
    assert not missed


FLASH = IMPLEMENTATIONS["flash"]
ALGORITHM = {  # as `algorithm_of` says of attention
    "mla": Op(partial(FLASH.mla.forward, ops=FLASH), FLASH.mla.backward)
}


def assert_error(op: str, storage: str, draw: Draw, seed: int) -> None:
    extra, algorithm = with_table(op), ALGORITHM.get(op)
    compare(op, CPU[op], DRAWN[op](draw), storage, seed, extra, algorithm=algorithm)


def assert_errors(op: str, storage: str, seeds: range) -> None:
    for seed in seeds:
        assert_error(op, storage, RandomDraw(seed), seed)


@pytest.mark.parametrize("op", OPS)
def test_finite_differences(op: str) -> None:
    assert_differences(op, range(DIFFERENCES))


@pytest.mark.parametrize("storage", ["float64", "float32"])
@pytest.mark.parametrize("op", OPS)
def test_error_is_that_of_the_reference(op: str, storage: str) -> None:
    @settings(max_examples=EXAMPLES)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        draw = HypothesisDraw(data)
        assert_error(op, storage, draw, draw.seed)

    run()


@pytest.mark.parametrize("op", OPS)
def test_same_bits_with_any_number_of_threads(op: str) -> None:
    """Twice with two threads, and with one, three and seven."""
    case = DRAWN[op](RandomDraw(3))
    inputs = [rounded(x, "float32") for x in case.inputs]
    kwargs = rounded(case.kwargs, "float32") | with_table(op)
    y, _ = CPU[op].forward(*inputs, **kwargs)
    members = [np.asarray(m) for m in (y if isinstance(y, tuple) else (y,))]
    shapes = [m.shape for m in members if m.dtype.kind == "f"]
    cotangents = [np.cos(np.arange(np.prod(s, dtype=int)) + 1).reshape(s) for s in shapes]
    found = []
    for count in (2, 2, 1, 3, 7):
        with threads(count):
            found.append(results(CPU[op], inputs, kwargs, cotangents))
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            assert a.tobytes() == b.tobytes()


def test_attention_promises_what_attention_does() -> None:
    check_range_of_validity(*CPU.attention)
    check_more_queries_than_keys(*CPU.attention)
    for change, error, message in ERRORS:
        if "float32" not in message:  # number types are the column's own
            with pytest.raises(error, match=message):
                CPU.attention.forward(**GOOD | change)


@pytest.mark.parametrize("op", [op for op in OPS if op != "embedding"])  # whose lookup takes any
def test_other_number_types_are_refused(op: str) -> None:
    case = DRAWN[op](RandomDraw(0))
    for dtype, message in ((np.complex128, "float32 or float64, got complex128"), (None, "NumPy")):
        first, *rest = case.inputs
        wrong = [[1.0]] if dtype is None else first.astype(dtype)
        with pytest.raises(TypeError, match=message):
            CPU[op].forward(wrong, *rest, **case.kwargs | with_table(op))


def test_signatures_are_the_ops() -> None:
    def parameters(function: Any) -> list[tuple[str, Any, Any]]:
        return [
            (p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()
        ]

    for op in OPS:
        assert parameters(CPU[op].forward) == parameters(REFERENCE[op].forward), op
        assert parameters(CPU[op].backward) == parameters(REFERENCE[op].backward), op


def test_whole_model() -> None:
    """Loss, loads and every gradient of the tiny model, with padding and MTP, as with the
    reference."""
    config = preset("tiny")
    params = {name: p.astype(np.float64) for name, p in init_parameters(config, std=0.15).items()}
    tokens = np.random.default_rng(0).integers(0, config.vocabulary, (2, 11))
    key_mask = np.arange(11) >= np.array([[0], [3]])
    wanted, wanted_saved = forward(params, tokens, config, key_mask=key_mask)
    found, saved = forward(params, tokens, config, key_mask=key_mask, ops=CPU)
    assert abs(float(found.loss) - float(wanted.loss)) <= 1e-13 * float(wanted.loss)
    grads = backward(saved)
    for name, g in backward(wanted_saved).items():
        assert np.max(np.abs(grads[name] - g)) <= 1e-12 * np.max(np.abs(g), initial=1e-3), name


def test_adamw() -> None:
    """Five steps on tensors of several blocks as the reference's, decay on some alone; an overflow
    of g² is NaN; a strided parameter is refused before anything changes."""
    rng = np.random.default_rng(0)
    for dtype, bound in ((np.float64, 1e-14), (np.float32, 2e-6)):
        start = {name: rng.normal(size=(5, 7)).astype(dtype) for name in ("a", "b.norm")}
        ours, theirs = ({n: p.copy() for n, p in start.items()} for _ in range(2))
        fused, plain = (kind(decays=lambda n: "norm" not in n) for kind in (FusedAdamW, AdamW))
        state = of_plain = Moments()
        for _ in range(5):
            grads = {name: rng.normal(size=p.shape).astype(dtype) for name, p in start.items()}
            state = fused.update(ours, grads, state, 0.01)
            of_plain = plain.update(theirs, grads, of_plain, 0.01)
        assert state.step == of_plain.step == 5
        for name in start:
            assert np.max(np.abs(ours[name] - theirs[name])) <= bound
            assert np.max(np.abs(theirs[name] - start[name])) > 0.01
    large = np.full((5, 7), 1e30, np.float32)
    fused.update(ours, {"a": large}, state, 0.01)
    assert np.isnan(ours["a"]).all()
    before = ours["b.norm"].copy()
    with pytest.raises(ValueError, match="must be contiguous"):
        fused.update({"b.norm": ours["b.norm"].T}, {"b.norm": large.T}, Moments(), 0.01)
    short = Moments(1, {"b.norm": large[:2]}, {"b.norm": large})
    with pytest.raises(ValueError, match=r"the moments of b.norm must be float32 \(5, 7\)"):
        fused.update(ours, {"b.norm": large}, short, 0.01)
    assert (ours["b.norm"] == before).all()


def assert_overflow_is_nan() -> None:
    """A row whose mean square overflows is NaN, and so are its gradients, as the reference's; a
    balance loss whose sum of scores does, too."""
    x = np.array([[1e20, 1e20], [1, 2]], np.float32)
    y, saved = CPU.rms_norm.forward(x, np.ones(2, np.float32), eps=1e-6)
    dx, _ = CPU.rms_norm.backward(np.ones_like(x), saved)
    for result in (y, dx):
        assert np.isnan(result[0]).all()
        assert np.isfinite(result[1]).all()
    scores, counted = np.full((1, 2, 3), 3e38, np.float32), np.zeros((1, 2, 1), np.int64)
    scores[..., 0] = 1  # the only one that f weights
    loss, kept = CPU.balance_loss.forward(scores, alpha=0.5, top_k=1, counted=counted)
    assert np.isnan(loss)
    assert np.isnan(CPU.balance_loss.backward(np.float32(1), kept)).all()


def assert_left_out_tokens_may_be_anything() -> None:
    """NaN in the logits or hidden states of a token that does not count changes nothing."""
    rng = np.random.default_rng(0)
    logits, w = rng.normal(size=(4, 6)), rng.normal(size=(6, 3))
    h = rng.normal(size=(4, 3))
    kwargs = {"targets": np.array([1, -100, 0, 5]), "mask": np.array([True, False, True, True])}
    for op, inputs in (
        ("cross_entropy", (logits,)),
        ("log_prob", (h, w)),
        ("head_cross_entropy", (h, w)),
    ):
        wrong = inputs[0].copy()
        wrong[1] = np.nan
        y, saved = CPU[op].forward(wrong, *inputs[1:], **kwargs)
        wanted, wanted_saved = REFERENCE[op].forward(*inputs, **kwargs)
        assert np.allclose(y, wanted, rtol=1e-13, atol=0), op
        dy = np.cos(np.asarray(wanted))
        found, right = CPU[op].backward(dy, saved), REFERENCE[op].backward(dy, wanted_saved)
        for g, g_wanted in zip(
            found if isinstance(found, tuple) else (found,),
            right if isinstance(right, tuple) else (right,),
            strict=True,
        ):
            assert np.allclose(g, g_wanted, rtol=1e-12, atol=1e-15), op


def test_sigmoid_far_out() -> None:
    """e^x where 1 + e^−x overflows: weights and gates as the reference's."""
    x, w = np.array([[-90.0]], np.float32), np.ones((2, 1), np.float32)
    for table in (REFERENCE, CPU):
        routed, _ = table.router.forward(x, w, top_k=1)
        assert routed.weights == 1
        y, saved = table.swiglu.forward(x, np.ones_like(x))
        assert np.allclose(y, -90 * np.exp(-90.0), rtol=1e-5)
        dgate, dup = table.swiglu.backward(np.ones_like(x), saved)
        assert np.allclose(dup, y, rtol=1e-5)
        assert np.allclose(dgate, -89 * np.exp(-90.0), rtol=1e-5)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_attention_with_any_scale(scale: float) -> None:
    """Hidden keys stay hidden."""
    rng = np.random.default_rng(0)
    q, k, v, do = rng.normal(size=(4, 2, 5, 2, 3))
    masks = {"key_mask": rng.random((2, 5)) < 0.7, "segments": np.array([[0, 0, 1, 1, 1]] * 2)}
    found, wanted = (
        results(table.attention, (q, k, v), masks | {"scale": scale}, [do])
        for table in (CPU, REFERENCE)
    )
    for x, y in zip(found, wanted, strict=True):
        assert np.allclose(x, y, rtol=1e-12, atol=1e-14)


def test_segments_of_any_type() -> None:
    """Numbers between whole ones are as different as others."""
    rng = np.random.default_rng(0)
    q, k, v, do = rng.normal(size=(4, 1, 4, 2, 3))
    segments = {"segments": np.array([[0.1, 0.1, 0.7, 0.7]]), "scale": 0.5}
    found, wanted = (
        results(table.attention, (q, k, v), segments, [do]) for table in (CPU, REFERENCE)
    )
    for x, y in zip(found, wanted, strict=True):
        assert np.allclose(x, y, rtol=1e-12, atol=1e-14)


def test_cache_in_any_order() -> None:
    case = next(
        case
        for case in (CASES["mla"](RandomDraw(seed)) for seed in range(100))
        if case.inputs[1] is not None and case.inputs[1].shape[1] > 1
    )
    x, cache, *w = case.inputs
    turned = x, np.asfortranarray(cache), *w
    (y, _), (wanted, _) = (
        CPU.mla.forward(*inputs, **case.kwargs | {"ops": CPU}) for inputs in (turned, case.inputs)
    )
    assert (y.y == wanted.y).all()


def test_long_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a running sum in float32 would lose: a token 100,000 times, and 200,000 logits and keys
    nearly as large as the largest. Within 4 units in the last place, but for attention's values,
    which are summed in parts as in NumPy's product."""
    monkeypatch.undo()  # blocks of their own sizes
    unit = 2.0**-23
    ids, dy = np.zeros(100_000, np.int64), np.full((100_000, 1), 0.1, np.float32)
    _, saved = CPU.embedding.forward(np.zeros((1, 1), np.float32), ids=ids)
    assert abs(float(CPU.embedding.backward(dy, saved)[0, 0]) / (1e5 * float(dy[0, 0])) - 1) <= unit
    logits = np.full((1, 200_000), -0.1, np.float32)
    logits[0, 0] = 0
    loss, _ = CPU.cross_entropy.forward(logits, targets=np.zeros(1, np.int64))
    exact = np.log(1 + 199_999 * np.exp(float(logits[0, 1])))
    assert abs(float(loss) / exact - 1) <= 4 * unit
    k = np.zeros((1, 200_000, 1, 1), np.float32)
    k[0, 0], q = 0.1, np.ones((1, 1, 1, 1), np.float32)
    v = np.ones((1, 200_000, 1, 64), np.float32)
    o, _ = CPU.attention.forward(q, k, v, scale=1.0)
    p = np.exp(k[0, :, 0, 0] - k.max())
    of_numpy = np.max(np.abs((p @ v[0, :, 0]) / np.sum(p, dtype=np.float64) - 1))
    assert np.max(np.abs(o - 1)) <= 2 * of_numpy + 4 * unit


def test_gradients_of_other_ops_are_not_written_to() -> None:
    """MLA turns a copy of what attention's backward returned."""
    kept = []

    def attention_backward(do: Any, saved: Any) -> Any:
        found = CPU.attention.backward(do, saved)
        kept.append([(x, x.copy()) for x in found])
        return found

    table = CPU | {"attention": Op(CPU.attention.forward, attention_backward)}
    case = CASES["mla"](RandomDraw(0))
    output, saved = CPU.mla.forward(*case.inputs, **case.kwargs | {"ops": table})
    CPU.mla.backward((np.ones_like(output.y), None), saved)
    assert all((x == copy).all() for x, copy in kept[0])


def test_overflow_is_nan() -> None:
    assert_overflow_is_nan()


def test_left_out_tokens_may_be_anything() -> None:
    assert_left_out_tokens_may_be_anything()


USES = {
    "rope": ("rope", "mla"),
    "ffn": ("ffn", "moe"),
    "log_prob": ("log_prob", "head_cross_entropy"),
}
MISTAKES = [(stem, name) for stem, planted in PLANTED.items() for name in planted]
HERE = [mistake for mistake in MISTAKES if mistake[0] != "products"]  # those by test_products.py
SLOW = ("attention", "ffn", "log_prob", "mla", "products", "rope")  # to compile, with their callers
QUICK = [mistake for mistake in HERE if mistake[0] not in SLOW][::5]
UNPLANTED = [stem for stem in PLANTED if stem not in SLOW or stem == "rope"]


# seconds each, so with one number of threads
RECOMPILED = pytest.mark.parametrize("in_small_blocks", [2], indirect=True, ids=["2_threads"])


@RECOMPILED
@pytest.mark.parametrize(("stem", "name"), HERE if FULL else QUICK)
def test_planted_mistakes_are_caught(stem: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By differences, the rule for errors, or the two tests above, of an op that the kernel is part
    of."""
    plant(stem, name, monkeypatch)
    for look in looks_of(stem):
        try:
            look()
        except (AssertionError, RuntimeWarning):  # of 0 / 0
            return
    raise AssertionError("nothing sees it")


@pytest.mark.parametrize(("stem", "name"), MISTAKES)
def test_planted_mistakes_can_be_planted(stem: str, name: str) -> None:
    """What they replace stands there; test-full compiles them all."""
    assert PLANTED[stem][name][0] in source_of(stem)


@RECOMPILED
@pytest.mark.parametrize("stem", UNPLANTED if FULL else ["embedding"])
def test_nothing_is_caught_where_nothing_is_planted(
    stem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_text(stem, "from __future__", "from __future__", monkeypatch)
    for look in looks_of(stem):
        look()


def looks_of(stem: str) -> list[Callable[[], None]]:
    """What looks for a mistake in the kernels of ``stem``."""
    looks: list[Callable[[], None]] = []
    for op in USES.get(stem, (stem,)):
        looks.append(partial(assert_errors, op, "float64", range(20)))
        looks.append(partial(assert_differences, op, range(2)))
    return [
        *looks,
        assert_overflow_is_nan,
        assert_left_out_tokens_may_be_anything,
        assert_ties_to_the_lower_index,
    ]


def assert_ties_to_the_lower_index() -> None:
    """Of equal scores the first, NaN last, as in the reference's sort."""
    x = np.array([[1, 1, 0, 2, 1, np.nan], [np.nan, 0, -np.inf, 0, np.nan, -np.inf]])
    chosen = np.empty((2, 6), np.int64)
    compiling.kernel("router", "select", np.dtype(np.float64))(chosen, x)
    assert chosen.tolist() == [[3, 0, 1, 4, 2, 5], [1, 3, 2, 5, 0, 4]]
    assert chosen.tolist() == np.argsort(-x, axis=-1, kind="stable").tolist()


def test_ties_to_the_lower_index() -> None:
    assert_ties_to_the_lower_index()


@RECOMPILED
@pytest.mark.parametrize("storage", ["float32", "float64"] if FULL else [])
def test_within_bounds(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases of every op with kernels that check every index, each compiled once."""
    monkeypatch.setitem(compiling.OPTIONS, "boundscheck", True)
    plant_text("common", *CHECKED, monkeypatch)
    for op in OPS:
        assert_errors(op, storage, range(10))


WRITES = {  # of a file's kernels, out of bounds
    "swiglu": ("        y[i] = g", "        y[i + 1] = g"),
    "attention": ("lse[first + lane] = shift", "lse[first + lane + 1] = shift"),
    "products": ("c[own, i, lane] = c[", "c[own, i + 1, lane] = c["),
}


@pytest.mark.parametrize("stem", WRITES)
def test_writes_out_of_bounds_can_be_planted(stem: str) -> None:
    assert WRITES[stem][0] in source_of(stem)


@RECOMPILED
@pytest.mark.parametrize("stem", WRITES if FULL else ["swiglu"])
def test_a_write_out_of_bounds_is_seen(stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compiling.OPTIONS, "boundscheck", True)
    plant_text("common", *CHECKED, monkeypatch)
    plant_text(stem, *WRITES[stem], monkeypatch)
    with pytest.raises(IndexError):
        assert_errors("attention" if stem == "products" else stem, "float32", range(3))
