"""Log-probabilities of chosen tokens on kernels/cross_entropy.cu; as `refimpl.ops.log_prob`, and for bfloat16.

Whole rows of logits are made at a time, as many as fit in ``block``'s number of entries (at least one): their product
is cuBLAS's, the log-sum-exp and the gradient, which is written over the logits, are the kernels'.
"""

from __future__ import annotations

from typing import NamedTuple

from ..array import Array, blocks, expect
from ..ops.cross_entropy import token_weights
from ..ops.table import Op
from .cross_entropy import softmax_gradient, softmax_statistics
from .host import numbers, product, ready
from .launch import Launch

__all__ = ["LogProbSaved", "log_prob"]


class LogProbSaved(NamedTuple):
    h: Array  # […, D]: logits are recomputed from it
    w: Array  # [W, D]
    largest: Array  # [M]: the largest logit of each token
    total: Array  # [M]: Σ e^(z − largest)
    targets: Array  # [M]
    mask: Array  # [M]
    temperature: float
    block: tuple[int, int]


def log_prob(launch: Launch) -> Op:
    """The op on ``launch``."""

    def logits(rows: Array, w: Array, saved: LogProbSaved) -> Array:
        z = product(rows, w.T, numbers(h=rows).real)
        z /= saved.temperature
        return z

    def log_prob_forward(
        h: Array, w: Array, *, targets: Array, mask: Array | None = None, temperature: float = 1.0,
        block: tuple[int, int] = (256, 4096),
    ) -> tuple[Array, LogProbSaved]:  # fmt: skip
        n = numbers(h=h, w=w)
        expect("w", w, "(W, D)", (None, h.shape[-1]))
        expect("targets", targets, "(…)", tuple(h.shape[:-1]))
        if not temperature > 0 or min(block) < 1:
            raise ValueError(f"temperature must be positive and block at least (1, 1), got {temperature}, {block}")
        like = n.xp.zeros((1,), dtype=n.real)
        targets, mask = token_weights(like, targets, mask, 1.0, w.shape[0])
        targets, mask = ready(targets.reshape(-1)), mask.reshape(-1)
        rows = h.reshape(-1, h.shape[-1])
        largest, total, chosen = (n.xp.zeros((targets.size,), dtype=n.real) for _ in range(3))
        saved = LogProbSaved(h, w, largest, total, targets, mask, float(temperature), block)
        for start, stop in blocks(targets.size, _rows(block, w)):
            z = logits(rows[start:stop], w, saved)
            part = slice(start, stop)
            largest[part], total[part], chosen[part] = softmax_statistics(launch, z, ready(targets[part]))
        return n.xp.where(mask != 0, mask * chosen, n.scalar(0)).reshape(h.shape[:-1]), saved

    def log_prob_backward(dy: Array, saved: LogProbSaved) -> tuple[Array, Array]:
        h, w, largest, total, targets, mask, temperature, block = saved
        n = numbers(h=h)
        expect("dy", dy, "(…)", tuple(h.shape[:-1]))
        rows = h.reshape(-1, h.shape[-1])
        weight = -dy.reshape(-1).astype(n.real, copy=False) * mask / n.scalar(temperature)
        dh, dw = n.xp.zeros(rows.shape, dtype=h.dtype), n.xp.zeros(w.shape, dtype=n.real)
        for start, stop in blocks(targets.size, _rows(block, w)):
            z, part = logits(rows[start:stop], w, saved), slice(start, stop)
            of_rows = [ready(x[part]) for x in (largest, total, targets, weight)]
            dz = softmax_gradient(launch, z, z, *of_rows, dloss=1.0)  # type: ignore[misc]
            dh[part] = product(dz, w.astype(n.real, copy=False), n.real)
            dw += product(dz.T, rows[part].astype(n.real, copy=False), n.real)
        return dh.reshape(h.shape), dw

    return Op(log_prob_forward, log_prob_backward)


def _rows(block: tuple[int, int], w: Array) -> int:
    return max(1, block[0] * block[1] // int(w.shape[0]))
