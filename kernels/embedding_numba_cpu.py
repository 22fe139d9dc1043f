"""The embedding's gradient for a CPU: a token's rows of dy are added up in float64, in order.

The reference must not depend on the order of a library's additions, so it sorts rows by token and
adds them in pairs of pairs. Here one thread goes through a token's rows, in an order of its own; a
token may have thousands, too many for a running sum in float32.
"""

from __future__ import annotations

import numpy as np

from .common_numba_cpu import Ids1, In2, Int, Out2


def embedding_backward(dw: Out2, dy: In2, order: Ids1, start: Ids1, some: Int) -> None:
    """``order``: the rows of ``dy`` by token; ``start`` [W + 1]: where those of each token begin.
    ``some`` rows have a sum of their own, and these are added."""
    total, part = np.empty(dy.shape[1], np.float64), np.empty(dy.shape[1], np.float64)
    for token in range(dw.shape[0]):
        out = dw[token]
        total[:] = 0
        for first in range(start[token], start[token + 1], some):
            part[:] = 0
            for at in range(first, min(first + some, start[token + 1])):
                own = dy[order[at]]
                for i in range(own.size):
                    part[i] += own[i]  # (embedding.2)
            for i in range(total.size):
                total[i] += part[i]
        for i in range(out.size):
            out[i] = total[i]
