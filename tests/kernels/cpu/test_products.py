"""The products inside kernels (kernels/products_numba_cpu.py) beside NumPy's: any strides, sizes
that fill no tile, panel or part, and the ops made of them at sizes that have several of each."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.kernels.cpu.compile import numba, panel_width, turned_shape
from refimpl.kernels.cpu.pool import threads
from refimpl.ops import REFERENCE

from kernel_support import results
from kernel_support.on_cpu import CPU, PLANTED, module_of, replace_text
from support import FULL

SIZES = st.integers(1, 40) | st.sampled_from([64, 255, 256, 257, 300, 520])
EXAMPLES = 200 if FULL else 25
REALS = (np.float32, np.float64) if FULL else (np.float32,)


# the arguments of the kernels' helpers: arrays of so many dimensions, numbers; of any strides where
# they may have any, so that one compilation serves all
ARGUMENTS = {
    "multiply": ("views3", "views3", "views3", "boolean"),
    "multiply_far": ("views3", "views3", "views3", "boolean"),
    "multiply_transposed": ("views3", "real2", "real4", "views3", "boolean", "real2"),
    "put_turned": ("real4", "real2", "int64", "int64"),
    "multiply_rows": ("views2", "views2", "views2", "boolean"),
    "pack_rows": ("real3", "real2", "ids", "int64"),
    "unpack_rows": ("real2", "real3"),
    "pack_columns": ("real3", "real2", "ids", "int64", "int64", "int64"),
    "outer_products": ("real2", "views3", "views3", "boolean"),
}


@cache
def compiled(name: str, real: Any) -> Callable[..., None]:
    """A helper of the kernels, to be called from Python."""
    types: Any = numba().types
    products: Any = importlib.import_module("refimpl.kernels.products_numba_cpu")
    scalar = getattr(types, np.dtype(real).name)
    of = {
        "views3": types.Array(scalar, 3, "A"),
        "views2": types.Array(scalar, 2, "A"),
        "real2": types.Array(scalar, 2, "C"),
        "real3": types.Array(scalar, 3, "C"),
        "real4": types.Array(scalar, 4, "C"),
        "ids": types.Array(types.int64, 1, "C"),
        "boolean": types.boolean,
        "int64": types.int64,
    }
    arguments = [of[kind] for kind in ARGUMENTS[name]]
    function = numba().njit(types.void(*arguments))(getattr(products, name).py_func)
    return function  # type: ignore[no-any-return]


def panels(x: np.ndarray) -> np.ndarray:
    """x [K, N] as [P, K, WIDTH]; NaN beyond."""
    width = panel_width(x.dtype)
    wide = np.full((x.shape[0], -(-x.shape[1] // width) * width), np.nan, x.dtype)
    wide[:, : x.shape[1]] = x
    return np.ascontiguousarray(wide.reshape(x.shape[0], -1, width).swapaxes(0, 1))


def matrix(of: np.ndarray, columns: int) -> np.ndarray:
    """What `panels` was made of."""
    return of.swapaxes(0, 1).reshape(of.shape[1], -1)[:, :columns]


def assert_close(found: np.ndarray, a: np.ndarray, b: np.ndarray, before: np.ndarray | int) -> None:
    """found = before + a b, to the error of a sum in its own type."""
    exact, bound = exactly(a, b, before)
    assert np.all(np.abs(found - exact) <= bound)


def exactly(a: np.ndarray, b: np.ndarray, before: np.ndarray | int) -> tuple[Any, Any]:
    """before + a b, and the error of such a sum in a's type: K + 2 roundings per term."""
    unit, tiny = np.finfo(a.dtype).eps / 2, np.finfo(a.dtype).tiny
    wide = np.float64 if a.dtype == np.float32 else np.longdouble
    a, b = a.astype(wide), b.astype(wide)
    bound = (a.shape[1] + 2) * unit * (np.abs(a) @ np.abs(b) + np.abs(before))
    return before + a @ b, bound + tiny


@settings(max_examples=EXAMPLES)
@given(SIZES, SIZES, SIZES, st.booleans(), st.sampled_from(REALS), st.integers(0, 99))
def test_multiply(m: int, k: int, n: int, add: bool, real: Any, seed: int) -> None:
    """By a matrix as it lies, every other row and column of a larger one, and turned."""
    rng = np.random.default_rng(seed)
    numbers = rng.normal(size=(2 * m, 2 * k)).astype(real)
    b = rng.normal(size=(k, n)).astype(real)
    start = rng.normal(size=(m, n)).astype(real)
    before, packed = panels(start), panels(b)
    for a in (np.ascontiguousarray(numbers[:m, :k]), numbers[::2, ::2], numbers[:k, :m].T):
        if a.shape != (m, k):  # the third has it only at some sizes
            continue
        for name in ("multiply", "multiply_far"):
            c = before.copy()
            compiled(name, real)(c, a[:, None], packed, add)
            assert_close(matrix(c, n), a, b, start if add else 0)
    w = rng.normal(size=(k, m)).astype(real)
    blocks = np.full(turned_shape(k, m), np.nan, real)
    for part in range(3):
        compiled("put_turned", real)(blocks, w, part, 3)
    for turned in (blocks, blocks[:0]):
        c = before.copy()
        compiled("multiply_transposed", real)(c, w, turned, packed, add, w[:1])
        assert_close(matrix(c, n), w.T, b, start if add else 0)


@settings(max_examples=EXAMPLES)
@given(SIZES, SIZES, SIZES, st.integers(1, 3), st.sampled_from(REALS), st.integers(0, 99))
def test_rows_and_outer_products(n: int, d: int, f: int, each: int, real: Any, seed: int) -> None:
    """Rows become columns, zeros beyond, and come back; some stay rows; a part of the rows of
    Σ a bᵀ."""
    rng = np.random.default_rng(seed)
    width = panel_width(real)
    x = rng.normal(size=(2 * n, d)).astype(real)
    order = rng.integers(0, x.shape[0] * each, n)
    rows = x[order // each]
    packed = np.full((-(-n // width), d, width), np.nan, real)
    compiled("pack_rows", real)(packed, x, order, each)
    assert (matrix(packed, n) == rows.T).all()
    assert (matrix(packed, packed.shape[0] * width)[:, n:] == 0).all()
    back = np.full((n, d), np.nan, real)
    compiled("unpack_rows", real)(back, packed)
    assert (back == rows).all()
    a = rng.normal(size=(n, f)).astype(real)
    by_column = np.full((packed.shape[0], f, width), np.nan, real)
    compiled("pack_rows", real)(by_column, a, np.arange(n), 1)
    start, stop = sorted(rng.integers(0, n + 1, 2).tolist())
    some = np.full((-(-d // width), n, width), np.nan, real)
    compiled("pack_columns", real)(some, x, order, each, start, stop)
    assert (matrix(some, d)[start:stop] == rows[start:stop]).all()
    assert (matrix(some, some.shape[0] * width)[start:stop, d:] == 0).all()
    assert np.isnan(some[:, :start]).all()
    assert np.isnan(some[:, stop:]).all()
    dw, (first, last) = np.full((f, d), np.nan, real), sorted(rng.integers(0, f + 1, 2).tolist())
    own = np.ascontiguousarray(by_column[:, first:last])
    compiled("outer_products", real)(dw[first:last], own, panels(rows), False)
    assert_close(dw[first:last], a.T[first:last], rows, 0)
    before = dw[first:last].copy()
    compiled("outer_products", real)(dw[first:last], own, panels(rows), True)
    assert_close(dw[first:last], a.T[first:last], rows, before)
    assert np.isnan(dw[:first]).all()
    assert np.isnan(dw[last:]).all()


@settings(max_examples=EXAMPLES)
@given(SIZES, SIZES, SIZES, st.booleans(), st.sampled_from(REALS), st.integers(0, 99))
def test_multiply_rows(m: int, k: int, n: int, add: bool, real: Any, seed: int) -> None:
    """Each factor as it lies, in a larger one (a with gaps in its rows too), and turned; what
    stands beside the result stays."""
    rng = np.random.default_rng(seed)

    def laid_out(x: np.ndarray, gap: int) -> list[np.ndarray]:
        apart = np.full((2 * x.shape[0], 2 * x.shape[1]), np.nan, real)
        inside = apart[::2, : gap * x.shape[1] : gap]
        inside[:] = x
        return [x, inside, np.ascontiguousarray(x.T).T]

    a, b = (rng.normal(size=shape).astype(real) for shape in ((m, k), (k, n)))
    start = rng.normal(size=(m, n + 3)).astype(real)
    exact, bound = exactly(a, b, start[:, 1 : n + 1] if add else 0)
    for one in laid_out(a, 2):
        for other in laid_out(b, 1):
            c = start.copy()
            compiled("multiply_rows", real)(c[:, 1 : n + 1], one, other, add)
            assert np.all(np.abs(c[:, 1 : n + 1] - exact) <= bound)
            assert (c[:, 0] == start[:, 0]).all()
            assert (c[:, n + 1 :] == start[:, n + 1 :]).all()


@pytest.mark.parametrize("name", PLANTED["products"] if FULL else [])
def test_planted_mistakes_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the tests above, their helpers compiled with the mistake."""
    replace_text("products", *PLANTED["products"][name], monkeypatch)
    monkeypatch.setitem(globals(), "compiled", cache(compiled.__wrapped__))
    for look in (test_rows_and_outer_products, test_multiply_rows, test_multiply):
        try:
            look()
        except AssertionError:
            return
    raise AssertionError("nothing sees it")


def test_nothing_to_sum() -> None:
    """Zeros, or what was there."""
    for add in (False, True):
        c = np.ones((1, 3, panel_width(np.float32)), np.float32)
        compiled("multiply", np.float32)(c, np.ones((3, 1, 0), np.float32), c[:, :0], add)
        assert (c == add).all()
        w = np.ones((0, 3), np.float32)
        compiled("multiply_transposed", np.float32)(c, w, c[None, :0], c[:, :0], add, w)
        assert (c == add).all()
        for y in (np.ones((3, 5), np.float32), np.ones((20, 5), np.float32)):
            compiled("multiply_rows", np.float32)(y, y[:, :0], y[:0], add)
            assert (y == add).all()
    for add in (True, False):
        dw = np.ones((2, 3), np.float32)
        compiled("outer_products", np.float32)(dw, c[:0], c[:, :0], add)
        assert (dw == add).all()


def test_shapes_that_do_not_agree() -> None:
    c = np.ones((1, 3, panel_width(np.float32)), np.float32)
    a, w = np.ones((3, 1, 2), np.float32), c[0, :2]
    turned = w, c[None, :0], c, False, w
    for name, more in (("multiply", (a, c, False)), ("multiply_transposed", turned)):
        with pytest.raises(ValueError, match="shapes do not agree"):
            compiled(name, np.float32)(c, *more)
    c = np.ones((5, 3), np.float32)
    for a, b in (((4, 2), (2, 3)), ((5, 3), (2, 3)), ((5, 2), (2, 4))):
        factors = np.ones(a, np.float32), np.ones(b, np.float32)
        with pytest.raises(ValueError, match="shapes do not agree"):
            compiled("multiply_rows", np.float32)(c, *factors, False)


LARGE = {  # op: shapes of its arrays, keyword arguments
    "ffn": ([(300, 70), (600, 70), (600, 70), (70, 600)], {}),
    "ffn, weights turned once": ([(1060, 130), (300, 130), (300, 130), (130, 300)], {}),
    "moe": (
        [(200, 70), (200, 2), *[(3, 90, 70)] * 2, (3, 70, 90), *[(280, 70)] * 2, (70, 280)],
        {"indices": np.where(np.arange(400) < 330, np.arange(400) % 2, 2 - np.arange(400) % 2)},
    ),
    "head_cross_entropy": ([(700, 70), (2100, 70)], {"targets": np.arange(700) * 3 % 2100}),
    "attention": ([(1, 600, 2, 40), (1, 1100, 2, 40), (1, 1100, 2, 50)], {"scale": 0.2}),
    "attention, the first blocks of keys hidden": (
        [(1, 1300, 1, 8), (1, 1300, 1, 8), (1, 1300, 1, 8)],
        {"scale": 0.2, "segments": np.array([[0] * 520 + [1] * 780])},
    ),
    "attention, one head of keys, masked": (
        [(2, 90, 3, 40), (2, 130, 1, 40), (2, 130, 1, 50)],
        {
            "scale": 0.2,
            "key_mask": np.arange(260).reshape(2, 130) % 7 > 1,
            "segments": np.repeat([[0] * 40 + [1] * 90], 2, axis=0),
        },
    ),
}


@pytest.mark.parametrize("case", LARGE)
def test_several_of_everything(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks, panels, tiles and parts: as the reference in float64."""
    shapes, kwargs = LARGE[case]
    if "turned once" in case:
        monkeypatch.setattr(module_of("ffn"), "SHARED", 2**17)
        monkeypatch.setattr(module_of("ffn"), "ONE_TASK", 2**15)
    op, rng = case.split(",")[0], np.random.default_rng(0)
    if op == "moe":
        kwargs = kwargs | {"indices": kwargs["indices"].reshape(200, 2)}
    arrays = [rng.normal(size=shape) * shape[-1] ** -0.25 for shape in shapes]
    y, _ = REFERENCE[op].forward(*arrays, **kwargs)
    dy = [rng.normal(size=y.shape)]
    found, wanted = (results(table[op], arrays, kwargs, dy) for table in (CPU, REFERENCE))
    for x, right in zip(found, wanted, strict=True):
        assert np.max(np.abs(x - right)) <= 1e-12 * np.max(np.abs(right))


@pytest.mark.parametrize("compressed", [True, False])
def test_mla_of_many_tokens(compressed: bool) -> None:
    """More than those whose products are made one by one."""
    rng, (d, a, c, h, n, r, v) = np.random.default_rng(0), (40, 24, 12, 3, 10, 4, 8)
    shapes = [(h * (n + r), a if compressed else d), (c + r, d), (c,), (h * (n + v), c), (d, h * v)]
    shapes = [(a, d), (a,), *shapes] if compressed else shapes
    weights = [rng.normal(size=shape) * shape[-1] ** -0.5 for shape in shapes]
    arrays = [rng.normal(size=(2, 150, d)), None, *([] if compressed else [None] * 2), *weights]
    settings = {"heads": h, "scale": 0.3, "eps": 1e-6, "positions": np.arange(150)}
    settings["inv_freq"] = np.array([1.0, 0.1])
    (right, saved), (found, kept) = (x.mla.forward(*arrays, **settings) for x in (REFERENCE, CPU))
    dy = rng.normal(size=right.y.shape), rng.normal(size=right.cache.shape)
    wanted = *right, *REFERENCE.mla.backward(dy, saved)
    for x, one in zip((*found, *CPU.mla.backward(dy, kept)), wanted, strict=True):
        assert (x is None) == (one is None)
        if one is not None:
            assert np.max(np.abs(x - one)) <= 1e-13 * np.max(np.abs(one))


def test_the_number_of_threads_changes_no_bit() -> None:
    """Though it decides how many rows a task has."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape) for shape in ((2100, 70), (300, 70), (300, 70), (70, 300))]
    dy = rng.normal(size=(2100, 70))
    found = []
    for count in (1, 2, 3, 20):
        with threads(count):
            y, saved = CPU.ffn.forward(*arrays)
            found.append((y, *CPU.ffn.backward(dy, saved)))
    for other in found[1:]:
        assert all((x == y).all() for x, y in zip(found[0], other, strict=True))


CODE = """
import numpy as np
from refimpl.kernels.columns import on_cpu
from refimpl.ops import REFERENCE
rng = np.random.default_rng(0)
arrays = [rng.normal(size=shape) for shape in ((9, 5), (3, 5), (3, 5), (5, 3))]
found, right = (table["ffn"].forward(*arrays)[0] for table in (on_cpu("numba_cpu"), REFERENCE))
assert np.allclose(found, right, rtol=1e-13, atol=0)
"""


def run_with(**environment: str) -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True, env=os.environ | environment)


def test_without_compiler() -> None:
    run_with(NUMBA_DISABLE_JIT="1")


@pytest.mark.skipif(not FULL, reason="compiles twice: make test-full")
def test_the_name_of_this_processor_changes_nothing(tmp_path: Path) -> None:
    """Numba takes its own features then, and finds what was compiled without the name."""
    llvm: Any = importlib.import_module("llvmlite.binding")
    folder = {"REFIMPL_KERNELS": str(tmp_path)}
    run_with(**folder)
    run_with(**folder, NUMBA_CPU_NAME=llvm.get_host_cpu_name())
    run_with(**folder)


PROCESSORS = {  # as Numba is told: vectors of 32 bytes, and of 16 without fused multiply-adds
    "haswell": "+64bit,+avx,+avx2,+fma,+sse,+sse2,+sse3,+sse4.1,+sse4.2,+ssse3,+popcnt,+bmi,+bmi2",
    "x86-64": "+64bit,+sse,+sse2",
}


@pytest.mark.parametrize("name", PROCESSORS if FULL else [])
def test_other_processors(name: str) -> None:
    """The same tests, compiled for an older one."""
    if os.uname().machine != "x86_64":
        pytest.skip("needs a processor of x86-64")
    told = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": PROCESSORS[name]}
    test = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | told | {"REFIMPL_TEST_FULL": ""}
    done = subprocess.run(test, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:]
