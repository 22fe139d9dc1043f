"""The embedding's gradient for a CPU: each row of dy is added where its token stands, in order.

The reference must not depend on the order of a library's additions, so it sorts rows by token and
adds them in pairs of pairs. One thread that goes through the rows has an order of its own.
"""

from __future__ import annotations

from .common_numba_cpu import Ids1, In2, Out2


def embedding_backward(dw: Out2, dy: In2, ids: Ids1) -> None:
    dw[:] = 0
    for row in range(ids.size):
        own, total = dy[row], dw[ids[row]]
        for i in range(own.size):
            total[i] += own[i]  # (embedding.2)
