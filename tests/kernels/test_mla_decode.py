"""Decoding's attention over the latent cache: the rule of errors for drawn shapes, what it reads,
the tiles and splits, mistakes, and generation through it."""

from __future__ import annotations

from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.check.cases import Case, Draw, RandomDraw
from refimpl.config import preset
from refimpl.generate import generate
from refimpl.kernels import columns
from refimpl.kernels.columns import for_generation
from refimpl.kernels.mla_decode import (
    COMPILED_AHEAD,
    MULTIPROCESSORS,
    SHARED,
    MLADecodeSaved,
    begins_with,
    mla_decode,
    splits,
    tiles,
)
from refimpl.kernels.placed import placed
from refimpl.ops import REFERENCE, AnyOp, Op
from refimpl.ops.attention import attention_forward
from refimpl.parameters import is_buffer
from refimpl.stored import algorithm_of, compare

from attention_contract import ERRORS, GOOD, check_range_of_validity
from kernel_support import (
    ALL,
    DTYPES,
    EXECUTED,
    ON_DEVICE,
    PRETENDED,
    InterpreterLaunch,
    make_launch,
    to_device,
    to_host,
    without_a_device,
)
from kernel_support.on_cupy import use_cuda
from kernel_support.planted import PLANTED, plant
from pretended_cupy import there
from ptx import PTXError
from random_parameters import random_parameters
from support import FULL, HypothesisDraw

SMALL = ((32, 16), (16, 16))  # tiles of which small examples have several
EXAMPLES = 1 if PRETENDED else 30 if FULL else 3  # of each type
SEEN_QUICKLY = (
    "wrong stage",
    "k-loop one short",
    "values' columns off",
    "mask of another row",
    "split combined twice",
    "combined without rescaling",
)


def over_cache(pair: AnyOp, width: int) -> Op[Any, Any]:
    """Attention to keys [B, S, 1, X] whose first columns are the values: its output alone."""

    def forward(q: Any, k: Any, **settings: Any) -> Any:
        return pair.forward(q, k, k[..., :width], **settings)

    return Op(forward, lambda do, saved: ())


def executed(pair: AnyOp, width: int) -> AnyOp:
    """The same where the kernels run, from and to NumPy's arrays."""
    found = over_cache(pair, width)
    return placed(found, to_device) if ON_DEVICE else found


def rule(pair: AnyOp, case: Case, width: int, storage: str, seed: int) -> None:
    """`refimpl.stored.compare` with the reference; its float32 runs round as tensor cores do, or
    have flash attention's formulas."""
    tested, reference = executed(pair, width), over_cache(REFERENCE.attention, width)
    algorithm = algorithm_of("attention", storage)
    assert algorithm is not None
    (told,) = compare(
        tested, reference, case, storage, seed, algorithm=over_cache(algorithm, width)
    )
    assert told.fault is None
    assert told.got.dtype == DTYPES[storage]
    assert told.ratio <= 1, str(told)


def drawn(draw: Draw) -> tuple[Case, int, dict[str, Any]]:
    """A case, the values' width, and how it is cut: several tiles and splits, ragged at the ends;
    rows of several blocks; sequences of their own length by padding."""
    b, t = draw.integer(1, 2), draw.choice([1, 1, 2, 3])
    h = draw.choice([1, 3, 16, 21, 40])
    s = t + draw.choice([0, 1, 15, 16, 37, 70])
    x, width = draw.choice([(9, 6), (40, 32)])
    masks: dict[str, Any] = {"causal": draw.choice([True, True, False])}
    hiding = draw.choice(["nothing", "padding", "some", "documents"])
    if hiding == "padding":  # in one row all
        masks["key_mask"] = np.arange(s) >= draw.rng.integers(0, s + 1, b)[:, None]
    if hiding == "some":
        masks["key_mask"] = draw.rng.random((b, s)) < draw.choice([0.05, 0.6])
    if hiding == "documents":
        masks["segments"] = np.sort(draw.rng.integers(-1, 3, (b, s)))
    inputs = [draw.rng.normal(size=shape) for shape in ((b, t, h, x), (b, s, 1, x))]
    how = {"sizes": draw.choice([SMALL, SMALL[1:]]), "multiprocessors": draw.choice([1, 8, 99])}
    return Case(inputs, {"scale": draw.choice([0.3, 1.0])} | masks), width, how


@pytest.mark.parametrize("storage", ["bfloat16", "float32", "float64"])
def test_error_is_that_of_the_reference(storage: str) -> None:
    @settings(max_examples=EXAMPLES)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        draw = HypothesisDraw(data)
        case, width, how = drawn(draw)
        rule(mla_decode(make_launch(), **how), case, width, storage, draw.seed)

    run()


@without_a_device
@pytest.mark.parametrize("storage", ["bfloat16", "float32", "float64"] if FULL else ["bfloat16"])
def test_other_targets(storage: str) -> None:
    """The same rule for the code of sm_100."""
    for target in EXECUTED[1:]:
        for seed in range(10 if FULL else 1):
            case, width, how = drawn(RandomDraw(seed))
            rule(mla_decode(make_launch(target=target), **how), case, width, storage, seed)


def test_shapes_meet_everything() -> None:
    """One split and several, one block of rows and several, rows that see nothing in a split or at
    all."""
    met = set()
    for seed in range(60):
        case, width, how = drawn(RandomDraw(seed))
        (q, k), settings = case.inputs, case.kwargs
        assert q is not None
        assert k is not None
        shape = tiles("float32", k.shape[3], width, sizes=how["sizes"])
        assert shape is not None
        (b, t, h, _), s = q.shape, k.shape[1]
        each, parts = splits(shape, b, t * h, s, how["multiprocessors"])
        met |= {f"{parts > 1} splits", f"{each > 1} tiles", f"{t * h > shape.rows} blocks"}
        _, saved = attention_forward(q, k, k[..., :width], **settings)
        seen = saved.p.sum(axis=1) > 0
        met |= {f"{not seen.any(axis=-1).all()} blind"}
        step = each * shape.keys
        of_splits = [seen[:, :, i : i + step].any(axis=-1) for i in range(0, s, step)]
        met |= {f"{not np.all(of_splits)} blind in a split"}
    wanted = ("splits", "tiles", "blocks", "blind", "blind in a split")
    assert met == {f"{flag} {name}" for flag in (True, False) for name in wanted}


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("storage", ["bfloat16", "float32", "float64"])
def test_widths_of_v3(storage: str, shared: int) -> None:
    """576 scores and 512 values in the tiles of both kinds of GPU, two splits of the keys; in
    test-full in bfloat16 more heads than a block has rows."""
    if not ALL and (storage, shared) != ("bfloat16", SHARED[0]):
        pytest.skip("in test-full: seconds under the interpreter")
    rng = np.random.default_rng(0)
    heads, length = (70, 80) if ALL and storage == "bfloat16" else (64, 40)
    inputs = [rng.normal(size=(1, 1, heads, 576)), rng.normal(size=(1, length, 1, 576))]
    kwargs = {"scale": 192**-0.5, "key_mask": np.arange(length)[None] >= 3}
    launch = make_launch()
    pair = mla_decode(launch, shared, multiprocessors=4)
    rule(pair, Case(inputs, kwargs), 512, storage, 0)
    if isinstance(launch, InterpreterLaunch):
        ran = {kernel for kernel, _ in launch.reports}
        decoded = storage != "float64" or shared == SHARED[0]
        assert ran == ({"mla_decode_split", "mla_decode_combine"} if decoded else set())


@without_a_device
@pytest.mark.parametrize("heads", [16, 64, 128])
def test_the_cache_is_read_once_for_64_heads(heads: int) -> None:
    """Every byte that the first kernel reads: of each cached token its numbers, once for 64 heads,
    and the queries once for each split."""
    rng = np.random.default_rng(0)
    b, s = 2, 70
    x, width = 48, 32
    q, k = rng.normal(size=(b, 1, heads, x)), rng.normal(size=(b, s, 1, x))
    q, k = q.astype(ml_dtypes.bfloat16), k.astype(ml_dtypes.bfloat16)
    launch = InterpreterLaunch()
    mla_decode(launch).forward(q, k, k[..., :width], scale=0.2)
    ((kernel, report), (_, combined)) = launch.reports
    assert kernel == "mla_decode_split"
    shape = tiles("bfloat16", x, width)
    assert shape is not None
    assert shape.rows == 64
    _, parts = splits(shape, b, heads, s, MULTIPROCESSORS)
    assert parts == 3
    assert report.read["global"] == k.nbytes * -(-heads // 64) + q.nbytes * parts
    rows = b * heads
    assert report.written["global"] == 4 * rows * parts * (width + 2)
    assert combined.written["global"] == 2 * rows * width


def test_rows_that_see_nothing() -> None:
    """0, in a batch with rows that see all; one split, and several of which one is hidden."""
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 3, 9)), rng.normal(size=(2, 40, 1, 9))
    key_mask = np.array([[False] * 40, [False] * 20 + [True] * 20])
    for multiprocessors in (1, 99) if FULL else (99,):
        pair = mla_decode(make_launch(), sizes=SMALL, multiprocessors=multiprocessors)
        found, _ = executed(pair, 6).forward(q, k, scale=1.0, key_mask=key_mask)
        wanted, _ = attention_forward(q, k, k[..., :6], scale=1.0, key_mask=key_mask)
        assert not found[0].any()
        np.testing.assert_allclose(found, wanted, rtol=1e-13)


def beside_each_other(pair: AnyOp) -> Op[Any, Any]:
    """Attention with one head of keys and values of its own, as columns of one cache: [v | k]."""

    def forward(q: Any, k: Any, v: Any, **settings: Any) -> Any:
        cache = np.concatenate((v, k), axis=-1)
        queries = np.concatenate((np.zeros((*q.shape[:3], v.shape[3]), q.dtype), q), axis=-1)
        queries, cache = to_device(queries), to_device(cache)
        o, saved = pair.forward(queries, cache, cache[..., : v.shape[3]], **settings)
        assert isinstance(saved, MLADecodeSaved)
        return to_host(o), saved

    def backward(do: Any, saved: Any) -> Any:
        dq, dk, dv = map(to_host, pair.backward(to_device(do), saved))
        width = dv.shape[3]
        return dq[..., width:], dk[..., width:], dv + dk[..., :width]

    return Op(forward, backward)


def test_range_of_validity() -> None:
    """Overflow is NaN and no clean 0, in a split of all keys, and in one of three."""
    pair = mla_decode(make_launch())
    check_range_of_validity(*beside_each_other(pair))
    pair = mla_decode(make_launch(), sizes=SMALL)
    for place in (0, 30):
        scores = np.zeros((1, 40, 1, 1), np.float32)
        q, v = np.full((1, 1, 1, 1), 1e25, np.float32), np.ones_like(scores)
        scores[0, place] = 1e25
        with np.errstate(all="ignore"):
            assert np.isnan(beside_each_other(pair).forward(q, scores, v, scale=1.0)[0]).all()
            o, _ = beside_each_other(pair).forward(q, -scores, v, scale=1.0)
            assert o.tolist() == [[[[1]]]]  # a probability of 0
            scores[:] = -1e25
            assert np.isnan(beside_each_other(pair).forward(q, scores, v, scale=1.0)[0]).all()
            scores[0, :16] = 0  # of the others' splits, all are −∞
            o, _ = beside_each_other(pair).forward(q, scores, v, scale=1.0)
            assert o.tolist() == [[[[1]]]]
            v[0, place] = 3  # exp of this score is more than float32 holds
            scores[:] = np.where(v > 1, np.float32(1e-22), 0)
            o, _ = beside_each_other(pair).forward(q, scores, v, scale=1.0)
            assert o.tolist() == [[[[3]]]]


def test_backward_is_the_reference() -> None:
    rng = np.random.default_rng(0)
    q, k, do = (rng.normal(size=shape) for shape in ((2, 2, 3, 9), (2, 20, 1, 9), (2, 2, 3, 6)))
    given = {"scale": 0.5, "key_mask": rng.random((2, 20)) < 0.7}
    moved = {n: to_device(x) if n == "key_mask" else x for n, x in given.items()}
    queries, cache = to_device(q), to_device(k)
    pair = mla_decode(make_launch())
    _, saved = pair.forward(queries, cache, cache[..., :6], **moved)
    _, wanted = REFERENCE.attention.forward(q, k, k[..., :6], **given)
    found = pair.backward(to_device(do), saved)
    for x, y in zip(found, REFERENCE.attention.backward(do, wanted), strict=True):
        np.testing.assert_allclose(to_host(x), y, rtol=1e-12, atol=1e-14)


@without_a_device
def test_what_is_left_to_the_other_attention() -> None:
    """Values elsewhere, several heads of keys, the mean of all for a blind query; widths that no
    tiles hold. What flash_attention.cu computes then, or the reference, is that."""
    rng = np.random.default_rng(0)
    q, k, other = (rng.normal(size=shape) for shape in ((1, 1, 2, 9), (1, 5, 1, 9), (1, 5, 1, 6)))
    many, wide = rng.normal(size=(1, 5, 2, 9)), rng.normal(size=(1, 5, 1, 2000))
    calls = [
        ((q, k, other), {}, ["flash_attention_forward"]),
        ((q, k, k[..., :6]), {"blind": "mean"}, []),
        ((wide[:, :1], wide, wide), {}, []),
        ((q, k, k[..., :6]), {}, ["mla_decode_split", "mla_decode_combine"]),
    ]
    if FULL:
        calls.append(((q, many, many[..., :6]), {}, ["flash_attention_forward"]))
    for inputs, more, kernels in calls:
        launch = InterpreterLaunch()
        pair = mla_decode(launch)
        o, saved = pair.forward(*inputs, scale=0.3, **more)
        assert [kernel for kernel, _ in launch.reports] == kernels
        wanted, kept = REFERENCE.attention.forward(*inputs, scale=0.3, **more)
        np.testing.assert_allclose(o, wanted, rtol=1e-12)
        if FULL:
            found = pair.backward(o, saved), REFERENCE.attention.backward(o, kept)
            for x, y in zip(*found, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("wrong", "error", "message"), ERRORS)
def test_errors(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    """Those of the op; of types, the kernels' own."""
    if error is TypeError and "must be float32 or wider" in message:
        message = message.split(" must")[0] + " must be"
    with pytest.raises(error, match=message):
        mla_decode(InterpreterLaunch()).forward(**GOOD | wrong)


def test_values_in_the_cache() -> None:
    """By address, shape and steps; of one token's axis, which has no step, any."""
    k = np.zeros((2, 6, 1, 9))
    assert begins_with(k, k)
    assert begins_with(k, k[..., :4])
    assert begins_with(k[:, 1:], k[:, 1:, :, :4])
    assert begins_with(there(k), there(k)[..., :4])
    latent = np.zeros((1, 1, 9))
    assert begins_with(latent[:, :, None, :], latent[..., :4][:, :, None, :])
    for v in (k[..., 1:5], k.copy()[..., :4], k[:, ::2], k[..., ::2], k[:, :, [0, 0]]):
        assert not begins_with(k[:, : v.shape[1]], v), v.shape
    assert not begins_with(k[..., :4], k)


def test_tiles() -> None:
    """V3's as in kernels/README.md; others fit, and are what the kernel asks for."""
    found = [tiles("bfloat16", 576, 512, shared) for shared in SHARED]
    assert [x and (x.rows, x.keys, x.shared) for x in found] == [(64, 32, 158976), (32, 16, 77440)]
    assert tiles("float64", 576, 512, SHARED[1]) is None
    for storage in ("bfloat16", "float32", "float64"):
        for shared in SHARED:
            for x, v in ((1, 1), (7, 7), (192, 128), (130, 40), (300, 250), *COMPILED_AHEAD):
                shape = tiles(storage, x, v, shared)
                if shape is None:
                    assert storage == "float64"
                    continue
                assert shape.shared <= shared
                assert shape.key_width >= max(shape.value_width, x)
                assert shape.value_width >= v
                assert shape.key_width % 32 == shape.value_width % (16 * shape.warps) == 0
                assert shape.rows <= 32 * shape.warps
                assert storage != "bfloat16" or shape.keys >= 16


def test_tiles_are_those_of_the_device() -> None:
    """163 KB where a block may have as much, as on sm_80; else 99 KB, as on sm_86."""
    asked: list[int] = []

    class Asked(InterpreterLaunch):
        def __call__(self, *work: Any, shared: int = 0) -> None:
            asked.append(shared)

    x = np.ones((1, 1, 1, 576), ml_dtypes.bfloat16)
    for most in (227 << 10, 163 << 10, 162 << 10, 99 << 10):
        launch = Asked()
        launch.most_shared = most
        mla_decode(launch).forward(x, x, x[..., :512], scale=1.0)
    assert asked[::2] == [158976, 158976, 77440, 77440]


def test_splits() -> None:
    """All keys, by no more blocks than there are multiprocessors, unless there are more rows."""
    shape = tiles("bfloat16", 576, 512)
    assert shape is not None
    assert splits(shape, 1, 128, 4096, MULTIPROCESSORS) == (2, 64)
    for b in (1, 3, 70, 200):
        for rows in (1, 16, 128):
            for keys in (1, 32, 33, 1000, 65536):
                each, parts = splits(shape, b, rows, keys, MULTIPROCESSORS)
                blocks = b * -(-rows // 64)
                assert (parts - 1) * each * 32 < keys <= parts * each * 32
                assert parts * blocks <= max(MULTIPROCESSORS, blocks)


def test_same_bits() -> None:
    """Twice the same call, and in float64 warps in other orders."""
    case, width, _ = drawn(RandomDraw(3))
    for storage, seeds in (("bfloat16", (0, 0)), ("float64", (0, 1, 2))):
        given = [x.astype(DTYPES[storage]) for x in case.inputs if x is not None]
        found = set()
        for seed in seeds:
            pair = mla_decode(make_launch(seed), sizes=SMALL)
            o, _ = executed(pair, width).forward(*given, **case.kwargs)
            found.add(o.tobytes())
        assert len(found) == 1


@without_a_device
@pytest.mark.parametrize("name", PLANTED["mla_decode"] if FULL else SEEN_QUICKLY)
def test_planted_mistakes_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one of 40 draws, or by the range of validity."""
    plant("mla_decode", name, monkeypatch)
    for seed in range(40):
        case, width, how = drawn(RandomDraw(seed))
        try:
            with np.errstate(all="ignore"):
                rule(mla_decode(InterpreterLaunch(), **how), case, width, "bfloat16", seed)
        except (AssertionError, PTXError):
            return
    with pytest.raises(AssertionError):
        test_range_of_validity()


@without_a_device
@pytest.mark.skipif(not FULL, reason="in test-full; one prompt, in tests/cli/test_generate.py")
def test_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of a random model that the kernels decode, of a padded batch and with a draft: the
    reference's in float64, and in bfloat16 those of the same table without absorbing."""
    table, launches = use_cuda(monkeypatch), list[InterpreterLaunch]()

    def launch() -> Any:
        launches.append(columns_launch())
        return launches[-1]

    columns_launch = columns.device_launch
    monkeypatch.setattr(columns, "device_launch", launch)
    config = preset("tiny")
    params = random_parameters(config, std=0.3)
    prompts = [[65, 66, 67, 68, 69], [70, 71]]
    wanted = generate(params, config, prompts, max_tokens=3)
    moved = {name: there(x) for name, x in params.items()}
    prefill, decode = for_generation("cuda", "float64")
    found = generate(moved, config, prompts, max_tokens=3, prefill=prefill, decode=decode)
    assert [x.tokens for x in found] == [x.tokens for x in wanted]
    ran = [kernel for kernel, _ in launches[0].reports]
    assert ran == ["mla_decode_split", "mla_decode_combine"] * 2 * config.layers
    drafted = partial(generate, prompts=prompts[:1], max_tokens=4, speculate=1)
    wanted = drafted(params, config)
    found = drafted(moved, config, prefill=prefill, decode=decode)
    assert found == wanted

    narrow = {
        name: there(x.astype(np.float32 if is_buffer(name) else ml_dtypes.bfloat16))
        for name, x in params.items()
    }
    both = []
    for decode in (for_generation("cuda", "bfloat16")[1], table):
        done = generate(narrow, config, prompts, max_tokens=3, prefill=table, decode=decode)
        both.append([x.tokens for x in done])
    assert both[0] == both[1]
