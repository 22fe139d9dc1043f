"""Rotary position embedding in Numba CUDA: what rope.cu does, on the same arguments, for reading.

A thread turns a pair, then one every gridsize-th. Angles are the host's. Derivation:
derivations/rope.md.
"""

from .common_numba_cuda import CPointer, cuda, int32, int64


def kernels(real):
    """For numbers of type ``real``; the annotations are the types of a kernel's arguments."""
    reals = CPointer(real)

    def rope_rotate(
        y: reals,
        x: reals,
        cos: reals,
        sin: reals,
        tokens: int64,
        angles: int64,
        heads: int32,
        half: int32,
        interleaved: int32,
        sign: int32,
    ):
        """y = the rotation of x [tokens, heads, 2 half] by ± its angles, whose cos and sin are
        [angles, half].

        Token t takes row t % angles: the rows of a batch share theirs, or each token has its own.
        sign: 1 forward, −1 backward, which is the turn back. interleaved: pair i lies at (2i, 2i +
        1), else at (i, i + half).
        """
        for pair in range(cuda.grid(1), tokens * heads * half, cuda.gridsize(1)):
            head, i = pair // half, pair % half  # head: of all tokens
            angle = head // heads % angles * half + i
            c, s = cos[angle], real(sign) * sin[angle]
            first = head * 2 * half + (2 * i if interleaved else i)
            second = first + (1 if interleaved else half)
            a, b = x[first], x[second]
            y[first] = a * c - b * s  # (rope.5) and, with the other sign, (rope.6)
            y[second] = a * s + b * c

    return (rope_rotate,)
