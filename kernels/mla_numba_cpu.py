"""MLA without its attention, for a CPU: a block of tokens goes through products, norms and
rotations in one kernel, while it is in the cache.

In the reference a rotation makes five arrays, and each head's query, key and their gradients are
copied to put two parts beside each other. Here queries are turned where the product wrote them, and
keys and the gradient of [k | v] are written once. Letters as in `refimpl.ops.mla`, n the rows of a
block. Without query compression the arrays of A numbers are empty, and the last argument is 0.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .common_numba_cpu import SAME, In1, In2, In3, Int, Out1, Out2, Out3, Real
from .products_numba_cpu import EXACT, multiply_rows
from .rms_norm_numba_cpu import rms_norm_backward, rms_norm_forward
from .rope_numba_cpu import turn

norm_forward, norm_backward = njit(**SAME)(rms_norm_forward), njit(**SAME)(rms_norm_backward)
rotate = njit(**SAME)(turn)


@njit(**EXACT)
def flat(x):
    """x [n, H, m] as [n, H m]."""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2])


@njit(**SAME)
def rotate_shared(y, x, cos, sin, c, first, interleaved, backward):
    """The last R numbers of y [n, C + R]: those of x, rotated, as of one head."""
    for row in range(x.shape[0]):
        for i in range(c, x.shape[1]):
            y[row, i] = x[row, i]
    one_head = y.reshape(y.shape[0], 1, y.shape[1])
    rotate(one_head, cos, sin, c, first, interleaved, backward)


def project(
    q: Out3,
    latent: Out2,
    a: Out2,
    a_r: Out1,
    a_normed: Out2,
    kv: Out2,
    c_r: Out1,
    x: In2,
    w_q_a: In2,
    w_q_a_norm: In1,
    w_q_b: In2,
    w_kv_a: In2,
    w_kv_a_norm: In1,
    cos: In2,
    sin: In2,
    eps: Real,
    nope: Int,
    first: Int,
    interleaved: Int,
    compressed: Int,
) -> None:
    """Queries ``q`` [n, H, N + R] and ``latent`` [n, C + R], rotated, of the tokens ``x`` [n, D],
    the first of which turns by row ``first`` of the angles. ``a`` [n, A] and ``kv`` [n, C + R] are
    what goes into the norms, whose 1 / rms are ``a_r`` and ``c_r`` [n]."""
    if compressed:
        multiply_rows(a, x, w_q_a.T, False)  # (mla.1)
        norm_forward(a_normed, a_r, a, w_q_a_norm, eps)
        multiply_rows(flat(q), a_normed, w_q_b.T, False)  # (mla.2)
    else:
        multiply_rows(flat(q), x, w_q_b.T, False)
    rotate(q, cos, sin, nope, first, interleaved, 0)  # (mla.3)
    multiply_rows(kv, x, w_kv_a.T, False)  # (mla.4)
    c = w_kv_a_norm.size
    norm_forward(latent[:, :c], c_r, kv[:, :c], w_kv_a_norm, eps)  # (mla.5)
    rotate_shared(latent, kv, cos, sin, c, first, interleaved, 0)  # (mla.6)


def expand(k: Out3, kv: Out3, latent: In2, w_kv_b: In2, nope: Int) -> None:
    """``kv`` [n, H, N + V], each head's [k | v] of its ``latent``, and its keys ``k``
    [n, H, N + R]: the first N of ``kv``, and the last R of ``latent``."""
    c, rope = w_kv_b.shape[1], k.shape[2] - nope
    multiply_rows(flat(kv), latent[:, :c], w_kv_b.T, False)  # (mla.7)
    for row in range(k.shape[0]):
        shared = latent[row, latent.shape[1] - rope :]
        for head in range(k.shape[1]):
            own, other = k[row, head, :nope], kv[row, head, :nope]
            for i in range(own.size):
                own[i] = other[i]
            turned = k[row, head, nope:]
            for i in range(turned.size):
                turned[i] = shared[i]  # (mla.8)


def collapse(dkv: Out3, dlatent: Out2, dk: In3, dv: In3, w_kv_b: In2, nope: Int) -> None:
    """The adjoint: ``dkv`` [n, H, N + V] of ``dk`` and ``dv``, and ``dlatent`` [n, C + R]; the last
    R of that are a sum over heads."""
    c, rope = w_kv_b.shape[1], dk.shape[2] - nope
    for row in range(dk.shape[0]):
        shared = dlatent[row, dlatent.shape[1] - rope :]
        shared[:] = 0
        for head in range(dk.shape[1]):
            own, other = dkv[row, head, :nope], dk[row, head, :nope]
            for i in range(own.size):
                own[i] = other[i]
            values, others = dkv[row, head, nope:], dv[row, head]
            for i in range(values.size):
                values[i] = others[i]  # (mla.10)
            turned = dk[row, head, nope:]
            for i in range(turned.size):
                shared[i] += turned[i]  # (mla.11)
    multiply_rows(dlatent[:, :c], flat(dkv), w_kv_b, False)  # (mla.11)


def project_backward(
    dx: Out2,
    dq: Out3,
    da: Out2,
    dkv: Out2,
    dw_q_a_norm: Out1,
    dw_kv_a_norm: Out1,
    dq_turned: In3,
    dlatent: In2,
    a: In2,
    a_r: In1,
    kv: In2,
    c_r: In1,
    w_q_a: In2,
    w_q_a_norm: In1,
    w_q_b: In2,
    w_kv_a: In2,
    w_kv_a_norm: In1,
    cos: In2,
    sin: In2,
    nope: Int,
    first: Int,
    interleaved: Int,
    compressed: Int,
) -> None:
    """``dx`` of `project`'s tokens; ``dq``, ``da`` and ``dkv`` are the gradients of its products,
    those of the norms' weights are sums over this block."""
    c = w_kv_a_norm.size
    norm_backward(dkv[:, :c], dw_kv_a_norm, dlatent[:, :c], kv[:, :c], w_kv_a_norm, c_r)
    rotate_shared(dkv, dlatent, cos, sin, c, first, interleaved, 1)
    multiply_rows(dx, dkv, w_kv_a, False)  # (mla.16)
    numbers, given = dq.reshape(-1), dq_turned.reshape(-1)
    for i in range(numbers.size):
        numbers[i] = given[i]
    rotate(dq, cos, sin, nope, first, interleaved, 1)
    if compressed:
        da_normed = np.empty(da.shape, da.dtype)
        multiply_rows(da_normed, flat(dq), w_q_b, False)  # (mla.17)
        norm_backward(da, dw_q_a_norm, da_normed, a, w_q_a_norm, a_r)  # (mla.18)
        multiply_rows(dx, da, w_q_a, True)  # (mla.19), (mla.12)
    else:
        multiply_rows(dx, flat(dq), w_q_b, True)
