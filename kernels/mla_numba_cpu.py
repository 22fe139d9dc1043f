"""What stands between MLA's products for a CPU: heads put together and taken apart.

In the reference a rotation makes five arrays, and each head's query, key and their gradients are
copied to put two parts beside each other. Here queries are turned where the product wrote them
(rope_numba_cpu.py), and keys and the gradient of [k | v] are written once.
"""

from __future__ import annotations

from .common_numba_cpu import In2, In3, Int, Out2, Out3


def put_keys(k: Out3, kv: In3, latent: In2, nope: Int) -> None:
    """k [rows, H, N + R]: the first N of each head of ``kv``, and the last R of ``latent``."""
    rope = k.shape[2] - nope
    for row in range(k.shape[0]):
        shared = latent[row, latent.shape[1] - rope :]
        for head in range(k.shape[1]):
            own, other = k[row, head, :nope], kv[row, head, :nope]
            for i in range(own.size):
                own[i] = other[i]
            turned = k[row, head, nope:]
            for i in range(turned.size):
                turned[i] = shared[i]  # (mla.8)


def take_keys(dkv: Out3, dlatent: Out2, dk: In3, dv: In3, nope: Int) -> None:
    """The adjoint: dkv [rows, H, N + V] of dk and dv; the last R of ``dlatent`` are a sum over
    heads."""
    rope = dk.shape[2] - nope
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
