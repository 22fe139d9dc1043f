"""MLA's absorbed form for decoding: products of each head as they lie in memory, the op against the
reference in every type, and a cuBLAS that is asked once for all heads."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from refimpl.check.cases import CASES, Case, RandomDraw
from refimpl.kernels.columns import cuda_table, decoding
from refimpl.kernels.mla_absorbed import MLA_ABSORBED, matmul_heads
from refimpl.kernels.placed import placed
from refimpl.ops import IMPLEMENTATIONS, REFERENCE, AnyOp, Op, Ops
from refimpl.stored import compare, stored_table

from kernel_support import ON_DEVICE, PretendedLaunch, to_device, without_a_device
from kernel_support.on_cupy import use_cuda
from pretended_cupy import there
from support import FULL

ABSORBED = IMPLEMENTATIONS["absorbed"].mla


def given(move: Any, dtype: Any, m: int = 3) -> tuple[Any, Any, Any, Any]:
    """(a, wₖ, wᵥ, out), as MLA has them: slices of queries, of a weight, of absorbed queries."""
    rng = np.random.default_rng(0)
    q, w = rng.normal(size=(m, 2, 7)), rng.normal(size=(2, 5 + 6, 4))
    q, w, out = (move(x.astype(dtype)) for x in (q, w, np.full((m, 2, 9), 8.0)))
    return q[..., :5], w[:, :5], w[:, 5:], out


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("move", [to_device] if ON_DEVICE else [np.asarray, there])
def test_products_of_heads(
    move: Any, dtype: Any, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slices are neither copied nor written beside; bfloat16 is rounded once."""
    if not ON_DEVICE:
        use_cuda(monkeypatch)
    a, w_k, w_v, out = given(move, dtype, rows)
    matmul_heads(a, w_k, out[..., :4])
    o = move(np.zeros((rows, 2, 6), dtype))
    matmul_heads(out[..., :4], w_v.swapaxes(1, 2), o)
    a, w_k, w_v, out, o = (
        np.asarray(x.get() if hasattr(x, "get") else x) for x in (a, w_k, w_v, out, o)
    )
    real = np.float64 if dtype == np.float64 else np.float32
    wide = [x.astype(real) for x in (a, w_k, w_v, out)]
    u = np.einsum("bhn,hnc->bhc", wide[0], wide[1])
    wanted = np.einsum("bhc,hvc->bhv", wide[3][..., :4], wide[2])
    eps = float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(wide[3][..., :4], u, rtol=eps, atol=20 * np.finfo(real).eps)
    np.testing.assert_allclose(o.astype(real), wanted, rtol=eps, atol=20 * np.finfo(real).eps)
    assert (out[..., 4:] == 8).all()


@without_a_device
def test_one_call_for_all_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    use_cuda(monkeypatch)
    a, w_k, w_v, out = given(there, np.float32)
    matmul_heads(a, w_k, out[..., :4])
    matmul_heads(out[..., :4], w_v.swapaxes(1, 2), there(np.zeros((3, 2, 6), np.float32)))
    blas = sys.modules["cupy"].cuda.cublas
    assert blas.calls == [(0, 0, 4, 3, 5, 2), (1, 0, 6, 3, 4, 2)]
    assert blas.mode == 0  # as it was before
    empty = there(np.full((3, 2, 4), 8, np.float32))
    matmul_heads(a[..., :0], w_k[:, :0], empty)
    assert not empty.get().any()


@without_a_device
def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    use_cuda(monkeypatch)
    a, w_k, w_v, out = given(there, np.float32)
    with pytest.raises(
        ValueError, match=r"out must be of the type and product of a float32 \(3, 2"
    ):
        matmul_heads(a, w_v, out[..., :4])
    with pytest.raises(ValueError, match=r"out must be of the type .*, got float64 \(3, 2, 4\)"):
        matmul_heads(a, w_k, there(np.zeros((3, 2, 4))))
    with pytest.raises(ValueError, match=r"rows or columns must be contiguous, got strides"):
        matmul_heads(a[..., ::2], w_k[:, ::2], out[..., :4])
    with pytest.raises(ValueError, match="a and out must have contiguous rows"):
        matmul_heads(there(np.zeros((2, 5, 3), np.float32).transpose(2, 0, 1)), w_k, out[..., :4])


def test_signature_is_that_of_the_op() -> None:
    """It is put in its place by name."""
    mine, other = (
        [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
        for f in (MLA_ABSORBED.forward, ABSORBED.forward)
    )
    assert mine == other
    assert MLA_ABSORBED.backward is ABSORBED.backward


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_same_numbers(dtype: Any) -> None:
    """Outputs, cache and gradients of the reference's, on NumPy."""
    for seed in range(20 if FULL else 5):
        case = CASES["mla_absorbed"](RandomDraw(seed))
        inputs = [None if x is None else x.astype(dtype) for x in case.inputs]
        (found, saved), (wanted, kept) = (
            pair.forward(*inputs, **case.kwargs) for pair in (MLA_ABSORBED, ABSORBED)
        )
        close = {"rtol": 1e3 * np.finfo(dtype).eps, "atol": 100 * np.finfo(dtype).eps}
        np.testing.assert_allclose(found.y, wanted.y, **close)
        np.testing.assert_array_equal(found.cache, wanted.cache)
        if dtype == np.float64:
            dy = np.ones_like(found.y), np.ones_like(found.cache)
            for x, y in zip(
                MLA_ABSORBED.backward(dy, saved), ABSORBED.backward(dy, kept), strict=True
            ):
                assert (x is None) == (y is None)
                if x is not None:
                    np.testing.assert_allclose(x, y, **close)


@without_a_device
@pytest.mark.parametrize("seed", range(12 if FULL else 3))
def test_bfloat16(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a pretended device with decoding's kernels, by the rule of what is made of several ops: as
    near to float64 as the naive form that rounds what it stores."""
    use_cuda(monkeypatch)
    case = CASES["mla"](RandomDraw(seed))
    launch = PretendedLaunch()
    table = cuda_table(launch) | decoding(launch)

    def output(pair: AnyOp, ops: Ops) -> Op[Any, Any]:
        """y alone: what decodes has no gradients in bfloat16."""

        def forward(*inputs: Any, **kwargs: Any) -> Any:
            y, saved = pair.forward(*inputs, **kwargs, ops=ops)
            return y.y, saved

        return Op(forward, lambda dy, saved: ())

    (told,) = compare(
        placed(output(table.mla, table), there),
        output(REFERENCE.mla, REFERENCE),
        Case(case.inputs, case.kwargs),
        "bfloat16",
        seed,
        runs=lambda number: output(REFERENCE.mla, stored_table(number)),
    )
    assert told.got.dtype == ml_dtypes.bfloat16
    assert told.fault is None
    assert told.ratio <= 1, str(told)
    kernels = {kernel for kernel, _ in launch.reports}
    assert {"mla_decode_split", "mla_decode_combine"} <= kernels
